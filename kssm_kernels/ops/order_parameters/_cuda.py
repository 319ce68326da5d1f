"""Order parameters and their adjoint by the CUDA kernels: tensors to the fields of csrc/cuda/order_parameters.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends.calls import address, packer
from kssm_kernels.backends.cuda import call
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import rows_of
from kssm_kernels.ops.order_parameters._calls import OrderParametersBackward, OrderParametersForward
from kssm_kernels.ops.order_parameters._row_blocks import row_block_length

_pack_forward, _pack_backward = packer(OrderParametersForward), packer(OrderParametersBackward)

SUMMED_AT_ONCE = 256  # kRowBlocksAtOnce of csrc/cuda/row_blocks.h


def partial_sums(rows: int, row_blocks: int, width: int) -> int:
    """Elements of the workspace for sums of row blocks, and for the sums of those, until one is left."""
    total = 0
    while row_blocks > 1:
        total += rows * row_blocks * width
        row_blocks = -(-row_blocks // SUMMED_AT_ONCE)
    return total


def forward(theta: Tensor, harmonics: int) -> Tensor:
    """[..., N], any strides, to [..., 3H] in theta's dtype."""
    out = theta.new_empty(*theta.shape[:-1], 3 * harmonics)
    data, rows, row_stride, column_stride = rows_of(theta)
    if rows == 0:
        return out
    n = theta.shape[-1]
    code, compute = DTYPES[theta.dtype]
    row_block = row_block_length(n, harmonics, theta.dtype)
    size = partial_sums(rows, -(-n // row_block), 2 * harmonics)
    work = torch.empty(size, dtype=compute, device=theta.device) if size else None
    where = data.data_ptr(), rows, n, row_stride, column_stride, code
    fields = _pack_forward(*where, harmonics, out.data_ptr(), row_block, address(work))
    call("order_parameters_forward", fields, theta)
    return out


def backward(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """dL/dtheta [..., N], contiguous, in theta's dtype; features and their gradient contiguous in it."""
    out = theta.new_empty(*theta.shape)
    data, rows, row_stride, column_stride = rows_of(theta)
    if rows == 0:
        return out
    harmonics = features.shape[-1] // 3
    where = data.data_ptr(), rows, theta.shape[-1], row_stride, column_stride, DTYPES[theta.dtype][0]
    fields = _pack_backward(*where, harmonics, features.data_ptr(), grad.data_ptr(), out.data_ptr())
    call("order_parameters_backward", fields, theta)
    return out

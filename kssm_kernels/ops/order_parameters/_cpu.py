"""Order parameters and their adjoint by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import packer
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import rows_of
from kssm_kernels.ops.order_parameters._calls import OrderParametersBackward, OrderParametersForward

_pack_forward, _pack_backward = packer(OrderParametersForward), packer(OrderParametersBackward)


def forward(theta: Tensor, harmonics: int) -> Tensor:
    out = theta.new_empty(*theta.shape[:-1], 3 * harmonics)
    data, rows, row_stride, column_stride = rows_of(theta)
    code, n = DTYPES[theta.dtype][0], theta.shape[-1]
    call = _pack_forward(data.data_ptr(), rows, n, row_stride, column_stride, code, harmonics, out.data_ptr(), 0, 0)
    cpu.extension.order_parameters_forward(call, torch.get_num_threads())
    return out


def backward(theta: Tensor, features: Tensor, g_features: Tensor) -> Tensor:
    out = theta.new_empty(*theta.shape)
    data, rows, row_stride, column_stride = rows_of(theta)
    code, n, harmonics = DTYPES[theta.dtype][0], theta.shape[-1], features.shape[-1] // 3
    saved = features.data_ptr(), g_features.data_ptr(), out.data_ptr()
    call = _pack_backward(data.data_ptr(), rows, n, row_stride, column_stride, code, harmonics, *saved)
    cpu.extension.order_parameters_backward(call, torch.get_num_threads())
    return out

"""Order parameters and their adjoint by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import rows_of


def forward(theta: Tensor, harmonics: int) -> Tensor:
    out = theta.new_empty(*theta.shape[:-1], 3 * harmonics)
    data, rows, row_stride, column_stride = rows_of(theta)
    cpu.extension.order_parameters_forward(
        data.data_ptr(),
        rows,
        theta.shape[-1],
        row_stride,
        column_stride,
        DTYPES[theta.dtype][0],
        harmonics,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def backward(theta: Tensor, features: Tensor, g_features: Tensor) -> Tensor:
    out = theta.new_empty(*theta.shape)
    data, rows, row_stride, column_stride = rows_of(theta)
    cpu.extension.order_parameters_backward(
        data.data_ptr(),
        rows,
        theta.shape[-1],
        row_stride,
        column_stride,
        DTYPES[theta.dtype][0],
        features.shape[-1] // 3,
        features.data_ptr(),
        g_features.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out

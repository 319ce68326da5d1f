"""The bistable bank's coupling strength and its adjoint by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.ops._dtypes import DTYPES


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    code, compute = DTYPES[params.dtype]
    if not params.is_contiguous():
        params = params.contiguous()
    shape = params.shape[:-1]
    # twice as fast as torch.empty with a shape, a dtype and a device
    k = params.new_empty(*shape) if shape and params.dtype == compute else params.new_empty(shape, dtype=compute)
    u, delta = torch.empty_like(k), torch.empty_like(k)
    cpu.extension.bistable_coupling_forward(
        params.data_ptr(), k.numel(), code, low, high, k.data_ptr(), u.data_ptr(), delta.data_ptr()
    )
    return k, u, delta


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    out = torch.empty_like(params)
    code = DTYPES[params.dtype][0]
    grads = g_k.data_ptr(), g_u.data_ptr(), g_delta.data_ptr()
    cpu.extension.bistable_coupling_backward(params.data_ptr(), g_k.numel(), code, low, high, *grads, out.data_ptr())
    return out

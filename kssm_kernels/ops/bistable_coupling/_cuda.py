"""The bistable bank's coupling strength and its adjoint by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends.cuda import call
from kssm_kernels.ops._dtypes import DTYPES


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """[..., 10] to (K, u, Delta), each [...], in the arithmetic dtype."""
    params = params.contiguous()
    code, compute = DTYPES[params.dtype]
    k = params.new_empty(params.shape[:-1], dtype=compute)
    u, delta = torch.empty_like(k), torch.empty_like(k)
    fields = (params.data_ptr(), k.numel(), code, low, high, k.data_ptr(), u.data_ptr(), delta.data_ptr())
    call("bistable_coupling_forward", "3q2d3q", fields, params)
    return k, u, delta


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    out = torch.empty_like(params)
    fields = (params.data_ptr(), g_k.numel(), DTYPES[params.dtype][0], low, high)
    addresses = (g_k.data_ptr(), g_u.data_ptr(), g_delta.data_ptr(), out.data_ptr())
    call("bistable_coupling_backward", "3q2d4q", (*fields, *addresses), params)
    return out

"""The bistable bank's coupling strength and its adjoint by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends.calls import packer
from kssm_kernels.backends.cuda import call
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.bistable_coupling._calls import BistableCouplingBackward, BistableCouplingForward

_pack_forward, _pack_backward = packer(BistableCouplingForward), packer(BistableCouplingBackward)


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """[..., 10] to (K, u, Delta), each [...], in the compute dtype."""
    params = params.contiguous()
    code, compute = DTYPES[params.dtype]
    k = params.new_empty(params.shape[:-1], dtype=compute)
    u, delta = torch.empty_like(k), torch.empty_like(k)
    outputs = k.data_ptr(), u.data_ptr(), delta.data_ptr()
    call("bistable_coupling_forward", _pack_forward(params.data_ptr(), k.numel(), code, low, high, *outputs), params)
    return k, u, delta


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    out = torch.empty_like(params)
    grads = g_k.data_ptr(), g_u.data_ptr(), g_delta.data_ptr()
    fields = _pack_backward(params.data_ptr(), g_k.numel(), DTYPES[params.dtype][0], low, high, *grads, out.data_ptr())
    call("bistable_coupling_backward", fields, params)
    return out

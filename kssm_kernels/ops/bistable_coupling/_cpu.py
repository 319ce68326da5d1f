"""The bistable bank's coupling strength and its adjoint by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import packer
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.bistable_coupling._calls import BistableCouplingBackward, BistableCouplingForward

_pack_forward, _pack_backward = packer(BistableCouplingForward), packer(BistableCouplingBackward)


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    code, compute = DTYPES[params.dtype]
    if not params.is_contiguous():
        params = params.contiguous()
    shape = params.shape[:-1]
    # twice as fast as torch.empty with a shape, a dtype and a device
    k = params.new_empty(*shape) if shape and params.dtype == compute else params.new_empty(shape, dtype=compute)
    u, delta = torch.empty_like(k), torch.empty_like(k)
    rows = k.numel()
    call = _pack_forward(params.data_ptr(), rows, code, low, high, k.data_ptr(), u.data_ptr(), delta.data_ptr())
    cpu.extension.bistable_coupling_forward(call, 1)
    return k, u, delta


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    out = torch.empty_like(params)
    code = DTYPES[params.dtype][0]
    grads = g_k.data_ptr(), g_u.data_ptr(), g_delta.data_ptr()
    call = _pack_backward(params.data_ptr(), g_k.numel(), code, low, high, *grads, out.data_ptr())
    cpu.extension.bistable_coupling_backward(call, 1)
    return out

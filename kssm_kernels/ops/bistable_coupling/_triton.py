"""The bistable bank's coupling strength in Triton. Equations: __init__.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.triton_math.launch import launch

ROWS = 128  # of ten parameters each, one per thread of a program
EPSILON = tl.constexpr(1e-6)  # in the denominator of u_raw


@triton.jit
def _load(parameters, at, mask):
    return tl.load(parameters + at, mask=mask, other=1.0).to(tl.float32)


@triton.jit
def _parameters(parameters, at, mask):
    a, b = _load(parameters, at, mask), _load(parameters, at + 1, mask)
    c, d = _load(parameters, at + 2, mask), _load(parameters, at + 3, mask)
    e, f = _load(parameters, at + 4, mask), _load(parameters, at + 5, mask)
    return a, b, c, d, e, f, _load(parameters, at + 6, mask), _load(parameters, at + 7, mask)


@triton.jit
def _latent(a, c, d, e, g, h, low, high):
    den = a * g - c * e + EPSILON
    raw = tl.div_rn(d * g - c * h, den)
    u = tl.where(raw < low, low, tl.where(raw > high, high, raw))  # NaN passes, as through torch.clamp
    return den, raw, u, tl.div_rn(1.0, 1.0 + tl.exp(-u))


@triton.jit
def _forward_kernel(parameters, strength, latent, determinant, rows, low, high, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    at = row * 10
    a, b, c, d, e, f, g, h = _parameters(parameters, at, live)
    den, raw, u, sigmoid = _latent(a, c, d, e, g, h, low, high)
    tl.store(strength + row, 2.0 * sigmoid, mask=live)
    tl.store(latent + row, u, mask=live)
    tl.store(determinant + row, b * g - c * f, mask=live)


@triton.jit
def _backward_kernel(parameters, g_strength, g_latent, g_determinant, out, rows, low, high, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    at = row * 10
    a, b, c, d, e, f, g, h = _parameters(parameters, at, live)
    den, raw, u, sigmoid = _latent(a, c, d, e, g, h, low, high)
    g_k = _load(g_strength, row, live)
    g_u = _load(g_latent, row, live)
    g_d = _load(g_determinant, row, live)
    inside = (raw >= low) & (raw <= high)
    r = tl.where(inside, g_u + 2.0 * g_k * sigmoid * (1.0 - sigmoid), 0.0)
    g_num = tl.div_rn(r, den)
    g_den = tl.div_rn(-r * raw, den)
    to = out.dtype.element_ty
    at = out + at
    tl.store(at, (g_den * g).to(to), mask=live)
    tl.store(at + 1, (g_d * g).to(to), mask=live)
    tl.store(at + 2, (-g_d * f - g_num * h - g_den * e).to(to), mask=live)
    tl.store(at + 3, (g_num * g).to(to), mask=live)
    tl.store(at + 4, (-g_den * c).to(to), mask=live)
    tl.store(at + 5, (-g_d * c).to(to), mask=live)
    tl.store(at + 6, (g_d * b + g_num * d + g_den * a).to(to), mask=live)
    tl.store(at + 7, (-g_num * c).to(to), mask=live)
    zero = (r * 0.0).to(to)
    tl.store(at + 8, tl.zeros_like(zero), mask=live)
    tl.store(at + 9, tl.zeros_like(zero), mask=live)


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    params = params.contiguous()
    strength = torch.empty(params.shape[:-1], dtype=DTYPES[params.dtype][1], device=params.device)
    latent, determinant = torch.empty_like(strength), torch.empty_like(strength)
    rows = strength.numel()
    if rows:
        grid = triton.cdiv(rows, ROWS)
        launch(_forward_kernel, grid, params, params, strength, latent, determinant, rows, low, high, ROWS=ROWS)
    return strength, latent, determinant


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    out = torch.empty_like(params)
    rows = g_k.numel()
    if rows:
        grid = triton.cdiv(rows, ROWS)
        launch(_backward_kernel, grid, params, params, g_k, g_u, g_delta, out, rows, low, high, ROWS=ROWS)
    return out

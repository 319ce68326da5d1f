"""The bistable bank's coupling strength, its adjoint and its tangents in pure torch. Equations: __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops._dtypes import DTYPES

EPSILON = 1e-6  # in the denominator of u_raw


def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c, d, e, f, g, h, _, _ = params.to(DTYPES[params.dtype][1]).unbind(-1)
    u = ((d * g - c * h) / (a * g - c * e + EPSILON)).clamp(low, high)
    return 2 * torch.sigmoid(u), u, b * g - c * f


def backward(params: Tensor, low: float, high: float, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h, _, _ = params.to(DTYPES[params.dtype][1]).unbind(-1)
    den = a * g - c * e + EPSILON
    raw = (d * g - c * h) / den
    s = torch.sigmoid(raw.clamp(low, high))
    r = torch.where((raw >= low) & (raw <= high), g_u + 2 * g_k * s * (1 - s), 0.0)
    num, den = r / den, -r * raw / den
    zero = torch.zeros_like(r)
    columns = (
        *(den * g, g_delta * g, -g_delta * f - num * h - den * e, num * g, -den * c),
        *(-g_delta * c, g_delta * b + num * d + den * a, -num * c, zero, zero),
    )
    return torch.stack(columns, dim=-1).to(params.dtype)


def tangents_of(
    arguments: tuple[Any, ...], tangents: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    params, low, high = arguments
    compute = DTYPES[params.dtype][1]
    a, b, c, d, e, f, g, h, _, _ = params.to(compute).unbind(-1)
    da, db, dc, dd, de, df, dg, dh, _, _ = tangents[0].to(compute).unbind(-1)
    den = a * g - c * e + EPSILON
    raw = (d * g - c * h) / den
    d_raw = (dd * g + d * dg - dc * h - c * dh - raw * (da * g + a * dg - dc * e - c * de)) / den
    du = torch.where((raw >= low) & (raw <= high), d_raw, 0.0)
    s = torch.sigmoid(outputs[1])
    return 2 * s * (1 - s) * du, du, db * g + b * dg - dc * f - c * df

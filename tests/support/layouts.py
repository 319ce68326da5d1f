"""Tensors whose memory is not what their shape suggests: views of something larger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def laid_out(values: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], layout: str) -> Tensor:
    """A tensor of ``shape`` whose memory is laid out as named; every layout but the first is a view of a larger one."""
    if layout == "contiguous":
        return values(shape)
    if layout == "transposed":
        return values((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "every-second":
        return values((*shape[:-1], 2 * shape[-1] + 1))[..., 1::2]
    if layout == "columns":
        return values((*shape[:-1], shape[-1] + 5))[..., 2:-3]
    if layout == "rows":
        return values((shape[0] + 2, *shape[1:]))[1:-1]
    if layout == "expanded":
        return values((1, *shape[1:])).expand(shape)
    if layout == "one-phase":  # stride 0 along the oscillators
        return values((*shape[:-1], 1)).expand(shape)
    raise ValueError(layout)


def wide(t: Tensor) -> Tensor:
    """Every second element of something larger."""
    if not t.dim():
        return t.clone()
    memory = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 0.5).to(t.dtype)
    memory[..., ::2] = t
    return memory[..., ::2]

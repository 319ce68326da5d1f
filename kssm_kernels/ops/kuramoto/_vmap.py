"""vmap rules of the Kuramoto ops: one call with one more leading axis; with noise sometimes one call per member.

Noise depends on a seed and on an element's row (noise.py). In one call for all members their rows differ, and so does
their noise. That is right for ``randomness="different"``, and for a seed that was passed. Members are called one by one
where each has a seed of its own, where ``randomness="same"`` wants the same noise for all, and in the adjoint of a
forward pass that was not batched itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops._registered import aligned, is_absent, move_batch

SOURCES, SEED = 5, 5  # theta and the operands come first in a call's arguments, the seed after them
NOISE_SCALE = 4


def _logical_rank(tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]) -> int:
    return max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None)


def _one_by_one(info: Any, dims: tuple[Any, ...], args: tuple[Any, ...], batched: bool) -> bool:
    if args[NOISE_SCALE] is None or not info.batch_size:
        return False
    return dims[SEED] is not None or info.randomness == "same" or not batched


def _members(
    function: Callable[..., tuple[Tensor, ...]], size: int, dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    def member(i: int) -> tuple[Tensor, ...]:
        pairs = zip(args, dims, strict=True)
        return function(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in pairs))

    rows = [member(i) for i in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def forward_rule(
    function: Callable[..., tuple[Tensor, ...]], info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Any:
    """``function`` takes the arguments of the registered op."""
    wanted = bool(args[8]), bool(args[9])  # harmonics, return_phases
    out_dims = tuple(0 if w else None for w in wanted)
    if _one_by_one(info, dims, args, True):
        results = _members(function, info.batch_size, dims, args)
        return tuple(r if w else r[0] for r, w in zip(results, wanted, strict=True)), out_dims
    rank = _logical_rank(args[:SOURCES], dims[:SOURCES])
    operands = [aligned(t, d, rank, None) for t, d in zip(args[:SOURCES], dims[:SOURCES], strict=True)]
    return function(*operands, *args[SOURCES:]), out_dims


def backward_rule(
    function: Callable[..., tuple[Tensor, ...]], info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Any:
    """``function`` takes the arguments of the registered backward op."""
    size, sources, needed = info.batch_size, args[:SOURCES], args[-1]
    batched = any(d is not None for d in dims[:SOURCES])
    out_dims = tuple(0 if n else None for n in needed)
    if _one_by_one(info, dims, args, batched):
        results = _members(function, size, dims, args)
        return tuple(r if n else r[0] for r, n in zip(results, needed, strict=True)), out_dims
    rank = _logical_rank(sources, dims[:SOURCES])
    operands = [aligned(t, d, rank, size) for t, d in zip(sources, dims[:SOURCES], strict=True)]
    pairs = zip(args[9:13], dims[9:13], strict=True)
    saved = [None if is_absent(t, d is not None) else move_batch(t, d, size) for t, d in pairs]
    results = function(*operands, *args[SOURCES:9], *saved, needed)
    shaped = [
        r.reshape(size, *(s.shape if d is None else s.shape[:d] + s.shape[d + 1 :])) if n else r
        for r, s, d, n in zip(results, sources, dims[:SOURCES], needed, strict=True)
    ]
    return tuple(shaped), out_dims

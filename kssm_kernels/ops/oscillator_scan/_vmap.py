"""vmap rules of the scan: one call with the batch as one more leading axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops._registered import aligned, is_absent, move_batch
from kssm_kernels.ops.oscillator_scan._scan import OPERANDS, SEQUENCES, Scan

FIELDS = len(Scan._fields)
WEIGHTS = 9, 10  # C and U, which have no leading axes
LISTEN, RESET = 11, OPERANDS


def _moved(dims: tuple[Any, ...], arguments: tuple[Any, ...], size: int, every: bool) -> list[Any]:
    """A scan's arguments with the batch first; what may broadcast is repeated only if ``every`` one is."""
    rank = arguments[0].dim() - (dims[0] is not None) - 1  # of [..., D]
    moved: list[Any] = []
    for i, (value, dim) in enumerate(zip(arguments, dims, strict=True)):
        if not isinstance(value, Tensor):
            moved.append(value)
        elif i < SEQUENCES or i in (LISTEN, RESET):  # whose leading axes are all of the call's
            moved.append(move_batch(value, dim, size))
        elif i in WEIGHTS:
            moved.append(value)
        else:
            moved.append(aligned(value, dim, rank, size if every else None))
    return moved


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]], size: int, dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """A call for each, with weights of its own; results have the batch first."""
    pairs = list(zip(arguments, dims, strict=True))
    each = [
        function(*(v.select(d, i) if isinstance(v, Tensor) and d is not None else v for v, d in pairs))
        for i in range(size)
    ]
    return tuple(r[0] if is_absent(r[0]) else torch.stack(r) for r in zip(*each, strict=True))


def forward_rule(
    function: Callable[..., tuple[Tensor, ...]], info: Any, dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Any:
    if any(dims[i] is not None for i in WEIGHTS):
        results = _one_by_one(function, info.batch_size, dims, arguments)
    else:
        results = function(*_moved(dims, arguments, info.batch_size, False))
    return results, tuple(None if is_absent(r) else 0 for r in results)


def backward_rule(
    function: Callable[..., tuple[Tensor, ...]], info: Any, dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Any:
    size, needed = info.batch_size, arguments[-1]
    if arguments[WEIGHTS[0]] is not None and any(dims[i] is not None or needed[i] for i in WEIGHTS):
        results = _one_by_one(function, size, dims, arguments)
        return results, tuple(0 if need else None for need in needed)
    operands = _moved(dims[:FIELDS], arguments[:FIELDS], size, True)
    pairs = zip(arguments[FIELDS:-1], dims[FIELDS:-1], strict=True)
    saved = [t if is_absent(t, d is not None) else move_batch(t, d, size) for t, d in pairs]
    results = function(*operands, *saved, needed)
    shaped = []
    for r, source, dim, need in zip(results, arguments, dims, needed, strict=False):
        own = () if source is None else source.shape if dim is None else source.shape[:dim] + source.shape[dim + 1 :]
        shaped.append(r.reshape(size, *own) if need else r)
    return tuple(shaped), tuple(0 if need else None for need in needed)

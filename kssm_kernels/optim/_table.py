"""What a kernel takes: one row of addresses per tensor, kept from step to step while no address changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kssm_kernels.optim._tensors import Tensors

# 8 bytes each: SignSplitTensor in csrc/cpu/kernels.h. Addresses are 0 where a step has no such tensor.
FIELDS = (
    "p", "g", "positive", "negative", "temperature", "compensation", "positive_scale", "negative_scale",
    "cryo", "rms", "step", "n", "row", "stream",
)  # fmt: skip
GRADIENT = FIELDS.index("g")


@dataclass
class Table:
    """Tensors of one device, one dtype of parameters, of gradients and of means, with the same optional tensors."""

    tensors: list[Tensors]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    device_rows: Tensor | None = field(default=None, repr=False)  # the copy a device kernel reads
    device_chunks: Tensor | None = field(default=None, repr=False)  # and its launcher's own cut of the work

    @staticmethod
    def of(tensors: Sequence[Tensors]) -> Table:
        rows = [
            [0 if x is None else x if isinstance(x, int) else x.data_ptr() for x in t[:11]] + [t.p.numel(), *t[11:]]
            for t in tensors
        ]
        return Table(list(tensors), np.array(rows, dtype=np.int64).reshape(-1, len(FIELDS)))

    def point_at(self, gradients: Sequence[int]) -> None:
        """The gradients of this step, which lie elsewhere after zero_grad(set_to_none=True)."""
        column = np.array(gradients, dtype=np.int64)
        if not np.array_equal(column, self.rows[:, GRADIENT]):
            self.rows[:, GRADIENT] = column
            self.device_rows = None


def key_of(t: Tensors) -> tuple[Any, ...]:
    """Tensors with one key go to a kernel together."""
    absent = tuple(x is None for x in t[4:11] if x is not t.cryo)
    return (t.p.device, t.p.dtype, t.g.dtype, t.positive.dtype, absent)


def bucketed(tensors: Sequence[Tensors]) -> list[list[int]]:
    """Positions of the tensors that share a key, in order."""
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for i, t in enumerate(tensors):
        if t.p.numel():
            buckets.setdefault(key_of(t), []).append(i)
    return list(buckets.values())


# ---- the rows of a group, for as long as they hold ----


@dataclass
class Plan:
    """The tables of a group whose parameters are plain, dense tensors, and what must hold for them to be used again."""

    options: tuple[Any, ...]
    params: list[Tensor]
    states: list[dict[str, Any]]
    layouts: list[tuple[Any, ...]]  # of g: dtype, stride; addresses of p, P, N; number of tensors of state
    others: list[tuple[dict[str, Any], str, Tensor]]  # state that few parameters have
    runs: list[tuple[list[int], Table, Callable[..., None]]]

    def renewed(self, options: tuple[Any, ...], params: Sequence[Tensor]) -> bool:
        """Points the tables at this step's gradients; False if anything else has changed."""
        if options != self.options or len(params) != len(self.params):
            return False
        gradients = []
        for p, known, state, layout in zip(params, self.params, self.states, self.layouts, strict=True):
            g = p.grad
            if (
                p is not known
                or g is None
                or g.layout is not torch.strided
                or (
                    g.dtype,
                    g.stride(),
                    p.data_ptr(),
                    state["positive"].data_ptr(),
                    state["negative"].data_ptr(),
                    len(state),
                )
                != layout
            ):
                return False
            gradients.append(g.data_ptr())
        if any(state.get(name) is not tensor for state, name, tensor in self.others):
            return False
        for positions, table, _ in self.runs:
            table.point_at([gradients[i] for i in positions])
        return True

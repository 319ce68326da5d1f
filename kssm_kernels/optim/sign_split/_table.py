"""What a kernel takes: one row of addresses per tensor, kept from step to step while no address changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kssm_kernels.optim.sign_split import _tensors
from kssm_kernels.optim.sign_split._calls import SignSplitTensor
from kssm_kernels.optim.sign_split._hyper import NAME
from kssm_kernels.optim.sign_split._rounding import scale_count
from kssm_kernels.optim.sign_split._tensors import Tensors

# 8 bytes each. Addresses are 0 where a step has no such tensor.
FIELDS = SignSplitTensor._fields
GRADIENT = FIELDS.index("g")


def _address(name: str, t: Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> int:
    """Where native code reads and writes ``count`` numbers of a dtype, end to end; 0 for a tensor that is not there.

    The one way from tensors to a table: what a kernel takes for granted is asked here, and nowhere later.
    """
    if t is None:
        return 0
    if t.numel() != count or t.dtype != dtype or t.device != device or not t.is_contiguous() or t.is_neg():
        raise RuntimeError(
            f"{NAME}: a kernel wants {count} numbers of {dtype} on {device}, end to end, as {name}; got {t.dtype} "
            f"{tuple(t.shape)} with stride {t.stride()} on {t.device}{', to be negated' if t.is_neg() else ''}"
        )
    if not _tensors.has_memory(t):
        raise RuntimeError(
            f"{NAME}: {name} of shape {tuple(t.shape)} on {t.device} has no memory that a kernel could read (a "
            "wrapper, fake, or its storage is smaller than its shape); want a plain tensor, or fused=False"
        )
    return t.data_ptr()


def _row(t: Tensors) -> list[int]:
    n, device, single = t.p.numel(), t.p.device, torch.float32
    compute = torch.float64 if t.p.dtype == torch.float64 else single
    blocks = scale_count(n)
    scaled = t.positive.dtype == torch.uint8
    if any((scale is not None) != scaled for scale in (t.positive_scale, t.negative_scale)) or n % t.row:
        raise RuntimeError(f"{NAME}: a kernel wants scales beside 8-bit means alone, and rows of one size")
    wanted = (
        (t.p, n, t.p.dtype), (t.g, n, t.g.dtype), (t.positive, n, t.positive.dtype),
        (t.negative, n, t.positive.dtype), (t.temperature, n, compute), (t.compensation, n, torch.bfloat16),
        (t.positive_scale, blocks, single), (t.negative_scale, blocks, single), (t.cryo, n // t.row, single),
        (t.rms, 1, single), (t.step, 1, torch.int64),
    )  # fmt: skip
    return [*(_address(name, *w, device) for name, w in zip(FIELDS, wanted, strict=False)), n, t.row, t.stream]


@dataclass
class Table:
    """Tensors of one device, one dtype of parameters, of gradients and of means, with the same optional tensors."""

    tensors: list[Tensors]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    device_rows: Tensor | None = field(default=None, repr=False)  # the copy a device kernel reads
    device_chunks: Tensor | None = field(default=None, repr=False)  # and its launcher's own cut of the work

    @staticmethod
    def of(tensors: Sequence[Tensors]) -> Table:
        if len({key_of(t) for t in tensors}) > 1:
            raise RuntimeError(f"{NAME}: a kernel wants tensors of one key in a table, got {set(map(key_of, tensors))}")
        rows = np.array([_row(t) for t in tensors], dtype=np.int64)
        return Table(list(tensors), rows.reshape(-1, len(FIELDS)))

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


_dtype, _size = attrgetter("dtype"), torch.UntypedStorage.nbytes


@dataclass
class Plan:
    """The tables of a group whose parameters are plain, dense tensors, and what must hold for them to be used again.

    It keeps alive all memory that its tables point at, but for the gradients: those of a step live as long as it.
    """

    options: tuple[Any, ...]
    params: list[Tensor]
    states: list[dict[str, Any]]
    runs: list[tuple[list[int], Table, Callable[..., None]]]
    layouts: list[tuple[Any, ...]] = field(init=False)  # of the gradients; the bytes that their storages need
    counts: list[int] = field(init=False)  # of tensors of state
    others: list[tuple[dict[str, Any], str, Tensor]] = field(init=False)  # where each state is
    tensors: list[Tensor] = field(init=False)  # parameters and states
    views: list[Tensor] = field(init=False)  # and how they lay: memory, shape and stride
    dtypes: list[torch.dtype] = field(init=False)
    storages: list[torch.UntypedStorage] = field(init=False)
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        gradients = [p.grad for p in self.params if p.grad is not None]
        self.layouts = [
            (g.dtype, g.shape, g.stride(), g.storage_offset(), g.element_size() * (g.storage_offset() + g.numel()))
            for g in gradients
        ]
        self.counts = list(map(len, self.states))
        self.others = [(state, name, t) for state in self.states for name, t in state.items()]
        self.tensors = [*self.params, *(t for _, _, t in self.others if isinstance(t, Tensor))]
        self.views = [t.detach() for t in self.tensors]
        self.dtypes = list(map(_dtype, self.params))
        self.storages = [t.untyped_storage() for t in self.tensors]
        self.sizes = list(map(_size, self.storages))

    def renewed(self, options: tuple[Any, ...], params: Sequence[Tensor]) -> bool:
        """Points the tables at this step's gradients; False if anything else has changed.

        1.5 us for each parameter. Devices are left out, which no tensor changes in place, and so is the dtype of a
        state that is still the same tensor; is_set_to is false also for a view that reading negates.
        """
        if options != self.options or len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        try:
            gradients = self._gradients()
        except (RuntimeError, NotImplementedError):  # sparse, or without memory: the next plan's checks say which
            return False
        if gradients is None:
            return False
        if (
            any(state.get(name) is not tensor for state, name, tensor in self.others)
            or list(map(len, self.states)) != self.counts
            or list(map(_size, self.storages)) != self.sizes
            or list(map(_dtype, params)) != self.dtypes
            or not all(map(Tensor.is_set_to, self.tensors, self.views))
        ):
            return False
        for positions, table, _ in self.runs:
            table.point_at([gradients[i] for i in positions])
        return True

    def _gradients(self) -> list[int] | None:
        """Addresses of this step's gradients; None where one is not as the plan knows it."""
        found = []
        for p, (dtype, shape, stride, offset, needed) in zip(self.params, self.layouts, strict=True):
            g = p.grad
            if (
                type(g) is not Tensor
                or g.dtype is not dtype
                or g.is_neg()
                or g.shape != shape
                or g.stride() != stride
                or g.storage_offset() != offset
                or g.untyped_storage().nbytes() < needed
            ):
                return None
            found.append(g.data_ptr())
        return found

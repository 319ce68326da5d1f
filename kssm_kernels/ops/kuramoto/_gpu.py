"""The Kuramoto update and its adjoint on a GPU: what the Triton and the CUDA backend have in common.

A row (ensemble) of up to FUSED_LIMIT oscillators stays in the registers of one team of threads through all steps; the
backward pass replays up to CHECKPOINT_STEPS steps and walks back in one launch. The mean field of a longer row needs
the whole device: one launch per step.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.kuramoto._torch import reduced
from kssm_kernels.ops.kuramoto._update import (
    OPERANDS,
    PLAIN,
    Operand,
    Update,
    is_shared,
    operand_rows,
    seed_value,
    steps_together,
    theta_rows,
    wraps,
)

# Sums over rows are taken over runs of rows that one team works off in order, and the runs' sums added afterwards.
# So many runs that 2^19 oscillators are at work at a time: 65536 threads with eight each, a large device's fill.
AT_WORK = 1 << 19

# How a call keeps its phases between its steps: as they are; as x + moved; and with whole turns taken off x. The number
# of steps of the whole call decides (_update.py says why), whatever a launch's share of them.
WHOLE, IN_TWO, WRAPPING = 0, 1, 2


class Rows(NamedTuple):
    """An operand as a kernel reads it: element (row, j) lies row * row_stride + j * column_stride behind the tensor's
    start; without a tensor all are ``value``."""

    tensor: Tensor | None
    row_stride: int
    column_stride: int
    value: float


class Call(NamedTuple):
    """What every launch of one call shares; operands in the compute dtype, None where absent."""

    rows: int
    n: int
    dt: float
    seed: int
    keeping: int
    coupling: Rows
    omega: Rows | None
    phase_lag: Rows | None
    noise_scale: Rows | None


class End(NamedTuple):
    """The features of the last phases and their gradient, contiguous, in theta's dtype."""

    harmonics: int
    features: Tensor
    g_features: Tensor


class Target(NamedTuple):
    """Where an operand's gradient goes.

    per_row and per_column: [rows, n]. per_row only: [rows], each the sum over its row. per_column only: [parts, n].
    Neither: [parts].
    """

    tensor: Tensor
    per_row: bool
    per_column: bool


Targets = tuple[Target | None, ...]


class Kernels(Protocol):
    """The launches of a GPU backend; ``state`` is [rows, n] in the compute dtype."""

    FUSED_LIMIT: int

    def fused_forward(
        self,
        call: Call,
        start: Rows,
        first: int,
        steps: int,
        harmonics: int,
        features: Tensor | None,
        phases: Tensor | None,
    ) -> None:
        """All steps from number ``first`` on, of rows up to FUSED_LIMIT; features and phases where wanted."""

    def fused_backward(
        self,
        call: Call,
        start: Rows,
        first: int,
        steps: int,
        states: Tensor | None,
        end: End | None,
        g: Tensor | None,
        targets: Targets,
        parts: int,
        accumulate: bool,
    ) -> None:
        """The adjoint of the same; ``states`` [steps - 1, rows, n] is scratch, ``g`` the gradient at the last phases.

        The first target is the start's, written in the start's dtype if per_row; the others gain if ``accumulate``.
        """

    def step(self, call: Call, state: Tensor, moved: Tensor | None, z: Tensor, index: int, out: Tensor) -> None:
        """One step of rows of any length; ``out`` may be ``state``. z [rows, 3]: C, S and M of the state.

        ``moved``, unless the call keeps its phases whole: what rounding cut off the state, in place.
        """

    def adjoint_sums(self, call: Call, state: Tensor, z: Tensor, g: Tensor) -> Tensor:
        """[rows, 2]: gC / N and gS / N."""

    def adjoint_step(
        self, call: Call, state: Tensor, z: Tensor, gz: Tensor, index: int, g: Tensor, targets: Targets
    ) -> None:
        """``g`` from after the step to before it, in place; the operands' targets gain: [rows, n] per column, else
        [rows, row_blocks_of(n)]."""

    def row_blocks_of(self, n: int) -> int:
        """Row blocks of a row whose sums adjoint_step leaves."""


def _rows(operand: Operand, batch_shape: torch.Size, n: int, dtype: torch.dtype) -> Rows | None:
    return None if operand is None else Rows(*operand_rows(operand, batch_shape, n, dtype))


def _call(theta: Tensor, u: Update, batch_shape: torch.Size) -> Call:
    n, compute = theta.shape[-1], DTYPES[theta.dtype][1]
    coupling, omega, phase_lag, noise_scale = (_rows(operand, batch_shape, n, compute) for operand in u[:OPERANDS])
    assert coupling is not None
    seed = 0 if noise_scale is None else seed_value(u)
    keeping = WHOLE if u.steps <= PLAIN else WRAPPING if wraps(u.steps, compute) else IN_TWO
    return Call(math.prod(batch_shape), n, float(u.dt), seed, keeping, coupling, omega, phase_lag, noise_scale)


def _start(theta: Tensor, call: Call) -> Tensor:
    """theta; before a call that takes turns off, one that turns can be counted in, in the compute dtype."""
    return reduced(theta.to(DTYPES[theta.dtype][1])) if call.keeping == WRAPPING else theta


def _whole(state: Tensor) -> Rows:
    return Rows(state, state.shape[-1], 1, 0.0)


def _states(start: Tensor, batch_shape: torch.Size) -> Tensor:
    """A fresh [rows, n] in the compute dtype."""
    n = start.shape[-1]
    full = start.to(DTYPES[start.dtype][1]).expand(*batch_shape, n)
    return full.clone(memory_format=torch.contiguous_format).reshape(-1, n)


def forward(
    kernels: Any, order_parameters: ModuleType, theta: Tensor, u: Update, batch_shape: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    k: Kernels = kernels
    call = _call(theta, u, batch_shape)
    phases: Tensor | None
    start = _start(theta, call)  # its dtype is that of the launch's results
    if call.n <= k.FUSED_LIMIT or call.rows == 0:
        features = start.new_empty(*batch_shape, 3 * u.harmonics) if u.harmonics else None
        phases = start.new_empty(*batch_shape, call.n) if u.return_phases else None
        if call.rows:
            k.fused_forward(
                call, Rows(*theta_rows(start, batch_shape, call.rows)), 0, u.steps, u.harmonics, features, phases
            )
    else:
        phases = _states(start, batch_shape)
        _advance(k, order_parameters, call, phases, 0, u.steps)
        features = order_parameters.forward(phases, u.harmonics) if u.harmonics else None
    return (
        None if features is None else features.to(theta.dtype).reshape(*batch_shape, 3 * u.harmonics),
        phases.to(theta.dtype).reshape(*batch_shape, call.n) if phases is not None and u.return_phases else None,
    )


def _nothing_moved(state: Tensor, call: Call) -> Tensor | None:
    return None if call.keeping == WHOLE else torch.zeros_like(state)


def _advance(k: Kernels, order_parameters: ModuleType, call: Call, state: Tensor, first: int, steps: int) -> None:
    moved = _nothing_moved(state, call)
    for index in range(first, first + steps):
        k.step(call, state, moved, order_parameters.forward(state, 1), index, state)


def backward(
    kernels: Any,
    order_parameters: ModuleType,
    theta: Tensor,
    u: Update,
    batch_shape: torch.Size,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of theta and the operands; what the kernels sum over rows or columns is already summed."""
    k: Kernels = kernels
    call = _call(theta, u, batch_shape)
    operands = (theta, *u[:OPERANDS])
    sources = [s if need and isinstance(s, Tensor) else None for s, need in zip(operands, needed, strict=True)]
    if call.rows == 0:
        return [None if s is None else torch.zeros_like(s) for s in sources]
    end = None
    if features is not None and g_features is not None:
        end = End(u.harmonics, features, g_features)
    if call.n <= k.FUSED_LIMIT:
        return _backward_fused(k, call, theta, u, batch_shape, end, g_phases, sources)
    return _backward_long(k, order_parameters, call, theta, u, batch_shape, end, g_phases, sources)


def _per_row_and_column(i: int, source: Tensor, rows: int) -> tuple[bool, bool]:
    columns = source.shape[-1] if source.dim() else 1
    per_row = not is_shared(source, rows) if i == 0 else source.numel() != columns
    return per_row, i == 0 or columns > 1


def _backward_fused(
    k: Kernels,
    call: Call,
    theta: Tensor,
    u: Update,
    batch_shape: torch.Size,
    end: End | None,
    g: Tensor | None,
    sources: list[Tensor | None],
) -> list[Tensor | None]:
    rows, n, compute = call.rows, call.n, DTYPES[theta.dtype][1]
    start = _start(theta, call)
    kinds = [None if s is None else _per_row_and_column(i, s, rows) for i, s in enumerate(sources)]
    if all(kind is None or kind[0] for kind in kinds):
        parts = rows
    else:
        run = -(-rows // min(rows, max(1, AT_WORK // n)))
        parts = -(-rows // run)
    targets: list[Target | None] = []
    for i, kind in enumerate(kinds):
        if kind is None:
            targets.append(None)
            continue
        shape = (rows if kind[0] else parts, n if kind[1] else 1)
        dtype = start.dtype if i == 0 and kind[0] else compute
        targets.append(Target(torch.empty(shape, dtype=dtype, device=theta.device), *kind))
    length = steps_together(u.steps)
    starts = [Rows(*theta_rows(start, batch_shape, rows))]
    for first in range(0, u.steps - length, length):
        mark = torch.empty(rows, n, dtype=compute, device=theta.device)
        k.fused_forward(call, starts[-1], first, length, 0, None, mark)
        starts.append(_whole(mark))
    scratch = min(length, u.steps) - 1
    states = torch.empty(scratch, rows, n, dtype=compute, device=theta.device) if scratch > 0 else None
    for index in range(len(starts) - 1, -1, -1):
        first, at_end = index * length, index == len(starts) - 1
        own = targets[0]
        if index:
            own = Target(torch.empty(rows, n, dtype=compute, device=theta.device), True, True)
        k.fused_backward(
            call,
            starts[index],
            first,
            min(length, u.steps - first),
            states,
            end if at_end else None,
            g,
            (own, *targets[1:]),
            parts,
            not at_end,
        )
        g = None if own is None else own.tensor
    return [None if t is None else _summed(t, batch_shape) for t in targets]


def _summed(target: Target, batch_shape: torch.Size) -> Tensor:
    """[*batch_shape, columns], or [columns] of what is shared by all rows."""
    if target.per_row:
        return target.tensor.reshape(*batch_shape, target.tensor.shape[-1])
    return target.tensor.sum(0)


def _backward_long(
    k: Kernels,
    order_parameters: ModuleType,
    call: Call,
    theta: Tensor,
    u: Update,
    batch_shape: torch.Size,
    end: End | None,
    g_phases: Tensor | None,
    sources: list[Tensor | None],
) -> list[Tensor | None]:
    rows, n, compute = call.rows, call.n, DTYPES[theta.dtype][1]
    kinds = [None if s is None else _per_row_and_column(i, s, rows) for i, s in enumerate(sources)]
    targets: list[Target | None] = []
    for kind in kinds[1:]:
        if kind is None:
            targets.append(None)
            continue
        shape = (rows, n if kind[1] else k.row_blocks_of(n))
        targets.append(Target(torch.zeros(shape, dtype=compute, device=theta.device), True, kind[1]))
    length = steps_together(u.steps)
    marks = [_states(_start(theta, call), batch_shape)]
    for first in range(0, u.steps - length, length):
        mark = marks[-1].clone()
        _advance(k, order_parameters, call, mark, first, length)
        marks.append(mark)
    g = torch.zeros_like(marks[0]) if g_phases is None else g_phases.to(compute, copy=True).reshape(rows, n)
    for part in range(len(marks) - 1, -1, -1):
        first, last = part * length, min((part + 1) * length, u.steps)
        states, means, moved = [marks[part]], [], _nothing_moved(marks[part], call)
        for index in range(first, last):
            means.append(order_parameters.forward(states[-1], 1))
            if index + 1 < last or (last == u.steps and end is not None):
                states.append(torch.empty_like(states[-1]))
                k.step(call, states[-2], moved, means[-1], index, states[-1])
        if last == u.steps and end is not None:
            wide = (t.to(compute).reshape(rows, -1) for t in (end.features, end.g_features))
            g += order_parameters.backward(states[-1], *wide)
        for index in range(last - 1, first - 1, -1):
            state, z = states[index - first], means[index - first]
            k.adjoint_step(call, state, z, k.adjoint_sums(call, state, z, g), index, g, tuple(targets))
    found: list[Tensor | None] = []
    for kind, tensor in zip(kinds, (g, *(t and t.tensor for t in targets)), strict=True):
        if kind is None or tensor is None:
            found.append(None)
            continue
        columns = tensor if kind[1] else tensor.sum(-1, keepdim=True)
        found.append(columns.reshape(*batch_shape, -1) if kind[0] else columns.sum(0))
    return found

"""The Kuramoto update and its adjoint in pure torch: the reference, and what runs on every device without a kernel.

Equations: __init__.py, whose names these are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.noise import philox_normal
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.kuramoto._update import (
    COUNTABLE,
    FOLD,
    OPERANDS,
    PLAIN,
    REST,
    TURN,
    Operand,
    Update,
    seed_value,
    steps_together,
    wraps,
)
from kssm_kernels.ops.order_parameters._torch import features_backward_torch, features_torch


def _in_compute(operand: Operand, dtype: torch.dtype) -> Any:
    return operand.to(dtype) if isinstance(operand, Tensor) else operand


class State(NamedTuple):
    """Phases as base + moved, each [..., N]; None stands for zero. _update.py says why."""

    base: Tensor
    moved: Tensor | None = None

    @property
    def phases(self) -> Tensor:
        return self.base if self.moved is None else self.base + self.moved


def folded(state: State, wrap: bool) -> State:
    """The same phases with next to nothing moved; modulo 2 pi if ``wrap``. fold in csrc/math/phase_step.h."""
    x, y = state
    if y is None:
        return state
    if wrap:
        turns = (x * (1 / math.tau)).round()
        x = x - TURN * turns
        y = y - REST * turns
    total = x + y
    part = total - x
    return State(total, (x - (total - part)) + (y - part))


def reduced(theta: Tensor) -> Tensor:
    """Phases too large to count turns in, modulo 2 pi: sine and cosine take an exact reduction."""
    return torch.where(theta.abs() <= COUNTABLE, theta, torch.atan2(torch.sin(theta), torch.cos(theta)))


class _Torch:
    """One call's operands in the compute dtype, its steps and their adjoints, on whole tensors."""

    def __init__(self, theta: Tensor, u: Update, batch_shape: torch.Size):
        self.u, self.n = u, theta.shape[-1]
        self.dtype = DTYPES[theta.dtype][1]
        self.batch_shape = batch_shape
        self.device = theta.device
        self.coupling, self.omega, self.phase_lag, self.noise_scale = (_in_compute(v, self.dtype) for v in u[:OPERANDS])
        start = theta.to(self.dtype).expand(*self.batch_shape, self.n).clone(memory_format=torch.contiguous_format)
        self.wrap = wraps(u.steps, self.dtype)
        self.start = State(reduced(start) if self.wrap else start)

    def xi(self, step: int) -> Tensor:
        rows = math.prod(self.batch_shape)
        xi = philox_normal(rows, self.n, seed=seed_value(self.u), step=step, device=self.device)
        return xi.to(self.dtype).reshape(*self.batch_shape, self.n)

    def _mean_field(self, theta: Tensor) -> tuple[Tensor, ...]:
        cos, sin = torch.cos(theta), torch.sin(theta)
        mean_cos, mean_sin = cos.mean(-1, keepdim=True), sin.mean(-1, keepdim=True)
        if self.phase_lag is None:
            return cos, sin, cos, sin, mean_cos, mean_sin
        shifted = theta + self.phase_lag
        return cos, sin, torch.cos(shifted), torch.sin(shifted), mean_cos, mean_sin

    def step(self, state: State, index: int) -> State:
        _, _, cos, sin, mean_cos, mean_sin = self._mean_field(state.phases)
        velocity = (mean_sin * cos).addcmul_(mean_cos, sin, value=-1).mul_(self.coupling)
        if self.omega is not None:
            velocity += self.omega
        if self.u.steps <= PLAIN:
            out = state.base + self.u.dt * velocity
            if self.noise_scale is not None:
                out -= self.noise_scale * self.xi(index)
            return State(out)
        moved = self.u.dt * velocity
        if self.noise_scale is not None:
            moved -= self.noise_scale * self.xi(index)
        if state.moved is not None:
            moved += state.moved
        after = State(state.base, moved)
        return folded(after, self.wrap) if (index + 1) % FOLD == 0 or index + 1 == self.u.steps else after

    def adjoint(self, theta: Tensor, index: int, g: Tensor, totals: list[Any]) -> Tensor:
        dt = self.u.dt
        cos, sin, lag_cos, lag_sin, mean_cos, mean_sin = self._mean_field(theta)
        p = (mean_sin * lag_cos).addcmul_(mean_cos, lag_sin, value=-1)
        q = (mean_sin * lag_sin).addcmul_(mean_cos, lag_cos)
        pull = dt * g * self.coupling
        contributions = (dt * g * p, dt * g, -(pull * q), None)
        for k, contribution in enumerate(contributions):
            if totals[k] is not None and contribution is not None:
                totals[k] += contribution
        if totals[3] is not None:
            totals[3] -= g * self.xi(index)
        g_cos = -(pull * lag_sin).sum(-1, keepdim=True) / self.n
        g_sin = (pull * lag_cos).sum(-1, keepdim=True) / self.n
        before: Tensor = g - pull * q + g_sin * cos - g_cos * sin
        return before

    def trajectory(self, state: State, first: int, last: int) -> list[State]:
        states = [state]
        for index in range(first, last):
            states.append(self.step(states[-1], index))
        return states


def forward(theta: Tensor, u: Update, batch_shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    call = _Torch(theta, u, batch_shape)
    state = call.start
    for index in range(u.steps):
        state = call.step(state, index)
    features = features_torch(state.phases, u.harmonics).to(theta.dtype) if u.harmonics else None
    return features, state.phases.to(theta.dtype) if u.return_phases else None


def backward(
    theta: Tensor,
    u: Update,
    batch_shape: torch.Size,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    call = _Torch(theta, u, batch_shape)
    length = steps_together(u.steps)
    marks = [call.start]  # the state at steps 0, length, 2 length, ...
    for first in range(0, u.steps - length, length):
        marks.append(call.trajectory(marks[-1], first, first + length)[-1])
    totals: list[Any] = [
        torch.zeros(*call.batch_shape, call.n, dtype=call.dtype, device=call.device) if need else None
        for need in needed[1:]
    ]
    g = torch.zeros(*call.batch_shape, call.n, dtype=call.dtype, device=call.device)
    if g_phases is not None:
        g = g + g_phases.to(call.dtype)
    for k in range(len(marks) - 1, -1, -1):
        first, last = k * length, min((k + 1) * length, u.steps)
        states = [state.phases for state in call.trajectory(marks[k], first, last)]
        if last == u.steps and g_features is not None:
            g = g + features_backward_torch(states[-1], features_torch(states[-1], u.harmonics), g_features)
        for index in range(last - 1, first - 1, -1):
            g = call.adjoint(states[index - first], index, g, totals)
    return [g if needed[0] else None, *totals]

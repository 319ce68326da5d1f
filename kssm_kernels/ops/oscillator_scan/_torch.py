"""The scan and its adjoint in pure torch: the reference, and what runs on every device without a kernel.

A loop over time, or a scan in parallel where ``_parallel.wins`` says so. What needs no state is computed for a segment
of steps at once. The adjoint keeps the states that the scan was told to keep, and no more; it computes a segment's
others anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _parallel, _step
from kssm_kernels.ops.oscillator_scan._scan import LEAK, Scan, result_shapes
from kssm_kernels.ops.oscillator_scan._step import Gates, Heads, Pair

SEGMENT = 64  # steps whose gates are held at once, where no interval of kept states says how many

Results = tuple[Tensor, ...]  # Z, last state, kept states, (re, im) of each


class Segment(NamedTuple):
    """Inputs of some steps: the time is the third axis from the end."""

    gates: Gates
    heads: Heads
    reset: Tensor | None  # [..., L, 1, 1]

    def at(self, t: int) -> tuple[Gates, Tensor | None, Tensor | None]:
        """Gates, K and reset of one step."""
        g, k, reset = self.gates, self.heads.strength, self.reset

        def both(z: Pair) -> Pair:
            return z[0].select(-3, t), z[1].select(-3, t)

        wide = g.open.select(-3, t), g.shut.select(-3, t)
        one = Gates(*wide, both(g.d), both(g.lam), g.decay.select(-3, t))
        return one, None if k is None else k.select(-3, t), None if reset is None else reset.select(-3, t)


class Call:
    """A scan's arguments in the compute dtype, as oscillators [..., T, G, N] and heads [..., T, G, 1]."""

    def __init__(self, s: Scan) -> None:
        self.s, self.dtype = s, s.compute
        self.grid = s.heads, s.oscillators
        self.parallel = _parallel.wins(s)
        self.lag: Pair | None = None
        if s.phase_lag is not None:
            alpha = s.phase_lag.to(self.dtype).expand(*s.batch_shape, s.heads).unsqueeze(-1)
            self.lag = torch.cos(alpha), torch.sin(alpha)
        self.given = self._initial()
        self.start = _step.start(s, self.given)

    def by_heads(self, x: Tensor) -> Tensor:
        """[..., D] as [..., G, N]"""
        return x.reshape(*x.shape[:-1], *self.grid)

    def compute_pair(self, parts: tuple[Tensor | None, Tensor | None], by_heads: bool = True) -> Pair | None:
        """Two gradients in the compute dtype, one that is missing as zero; None if both are."""
        some = parts[0] if parts[0] is not None else parts[1]
        if some is None:
            return None
        re, im = (torch.zeros_like(some) if g is None else g for g in parts)
        re, im = re.to(self.dtype), im.to(self.dtype)
        return (self.by_heads(re), self.by_heads(im)) if by_heads else (re, im)

    def _initial(self) -> Pair:
        s, shape = self.s, (*self.s.batch_shape, self.s.p.shape[-1])
        if s.initial_re is None or s.initial_im is None:
            zero = self.by_heads(torch.zeros(shape, dtype=self.dtype, device=s.p.device))
            return zero, zero
        re, im = (self.by_heads(v.to(self.dtype).expand(shape)) for v in (s.initial_re, s.initial_im))
        return re, im

    def segments(self) -> list[tuple[int, int]]:
        steps, length = self.s.steps, self.s.every if self.s.every > 1 else SEGMENT
        if self.parallel:
            length = _parallel.span(self.s)
        return [(first, min(first + length, steps)) for first in range(0, steps, length)]

    def segment(self, first: int, last: int) -> Segment:
        s = self.s

        def wide(x: Tensor) -> Tensor:
            return self.by_heads(x.narrow(-2, first, last - first).to(self.dtype))

        def per_head(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.narrow(-2, first, last - first).to(self.dtype).unsqueeze(-1)

        heads = _step.heads(s, per_head(s.coupling), per_head(s.forget))
        gates = _step.gates(s.kind, wide(s.p), wide(s.q), wide(s.gate), wide(s.phase), heads.keep)
        reset = None if s.reset is None else s.reset.narrow(-1, first, last - first)[..., None, None]
        return Segment(gates, heads, reset)

    def before(self, reset: Tensor | None, z: Pair) -> Pair:
        """The state that a step takes: the last one's, or the initial one."""
        if reset is None:
            return z
        return torch.where(reset, self.start[0], z[0]), torch.where(reset, self.start[1], z[1])

    def forces(self, gates: Gates, strength: Tensor | None, before: Pair) -> Pair:
        if strength is None:
            return gates.d
        return _step.plus(gates.d, _step.field(strength, self.lag, _step.seen(self.s, before))[1])

    def states(self, segment: Segment, z: Pair) -> Pair:
        """The states after each step of a segment, [..., L, G, N], from the one before it."""
        if self.parallel:
            return _parallel.states(self.s, segment, self.start, z)
        states = []
        for t in range(segment.gates.open.shape[-3]):
            gates, strength, reset = segment.at(t)
            before = self.before(reset, z)
            z = _step.step(self.s, gates, self.forces(gates, strength, before), before)
            states.append(z)
        return _stacked(states)


def _stacked(states: list[Pair]) -> Pair:
    return torch.stack([z[0] for z in states], -3), torch.stack([z[1] for z in states], -3)


def forward(s: Scan) -> Results:
    call = Call(s)
    z, orders, kept = call.start, [], []
    for first, last in call.segments():
        states = call.states(call.segment(first, last), z)
        z = states[0].select(-3, -1), states[1].select(-3, -1)
        if s.every and last - first >= s.every:
            to_keep = slice(s.every - 1, None, s.every)
            kept.append((states[0][..., to_keep, :, :], states[1][..., to_keep, :, :]))
        if s.harmonics:
            orders.append(_step.order_parameters(_step.seen(s, states), s.harmonics))
    return finished(s, orders, z if s.steps else call.given, kept)


def finished(s: Scan, orders: list[Pair], last: Pair, kept: list[Pair]) -> Results:
    """Segments' results put together, in the shapes and dtypes of ``result_shapes``."""

    def joined(parts: list[Pair], shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
        if not parts:
            return last[0].new_empty(shape, dtype=dtype), last[0].new_empty(shape, dtype=dtype)
        re, im = torch.cat([z[0] for z in parts], -3), torch.cat([z[1] for z in parts], -3)
        return re.reshape(shape).to(dtype), im.reshape(shape).to(dtype)

    order, final, states = result_shapes(s)
    end = tuple(z.reshape(final[0]).clone(memory_format=torch.contiguous_format) for z in last)
    return *joined(orders, *order), *end, *joined(kept, *states)


def backward(
    s: Scan,
    states_re: Tensor,
    states_im: Tensor,
    g_order_re: Tensor | None,
    g_order_im: Tensor | None,
    g_last_re: Tensor | None,
    g_last_im: Tensor | None,
    g_states_re: Tensor | None,
    g_states_im: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of the operands, phase_lag's of shape [..., G] and the initial state's of [..., D]."""
    return _Adjoint(s, (states_re, states_im)).run(
        (g_order_re, g_order_im), (g_last_re, g_last_im), (g_states_re, g_states_im), needed
    )


def _some(
    parts: tuple[Tensor | None, Tensor | None], axis: int, first: int, last: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of some steps."""
    re, im = (None if g is None else g.narrow(axis, first, last - first) for g in parts)
    return re, im


class _Adjoint:
    def __init__(self, s: Scan, kept: Pair) -> None:
        self.s, self.call = s, Call(s)
        self.kept = self.call.by_heads(kept[0]), self.call.by_heads(kept[1])
        like = self.call.start[0]
        self.carry: Pair = (torch.zeros_like(like), torch.zeros_like(like))
        self.initial: Pair = (torch.zeros_like(like), torch.zeros_like(like))
        self.lag = torch.zeros_like(like[..., :1])

    def _states(self, segment: Segment, first: int, last: int) -> tuple[Pair, Pair]:
        """The state before a segment, and those after each of its steps."""
        every, (re, im) = self.s.every, self.kept
        start = (re.select(-3, first // every - 1), im.select(-3, first // every - 1)) if first else self.call.start
        if every == 1:
            return start, (re.narrow(-3, first, last - first), im.narrow(-3, first, last - first))
        return start, self.call.states(segment, start)

    def run(self, g_order: Any, g_last: Any, g_states: Any, needed: tuple[bool, ...]) -> list[Tensor | None]:
        s, call = self.s, self.call
        end = call.compute_pair(g_last)
        if end is not None and s.steps:
            self.carry = end
        elif end is not None:
            self.initial = _step.plus(self.initial, end)  # not the gradient that was handed in itself
        parts: list[list[Tensor | None]] = []
        for first, last in reversed(self.call.segments()):
            order = call.compute_pair(_some(g_order, -3, first, last), by_heads=False) if s.harmonics else None
            states = call.compute_pair(_some(g_states, -2, first, last)) if s.every == 1 else None
            parts.append(self._segment(first, last, order, states))
        whole: list[Tensor | None] = []
        for i, source in enumerate(s[:6]):
            if not needed[i] or not isinstance(source, Tensor):
                whole.append(None)
                continue
            found = [p for p in (part[i] for part in reversed(parts)) if p is not None]
            whole.append(torch.cat(found, -2).to(source.dtype) if found else torch.zeros_like(source))
        width = (*s.batch_shape, s.p.shape[-1])
        rest = self.lag.reshape(*s.batch_shape, s.heads), *(g.reshape(width) for g in self.initial)
        return [*whole, *(g if need else None for g, need in zip(rest, needed[6:], strict=True))]

    def _segment(self, first: int, last: int, g_order: Pair | None, g_states: Pair | None) -> list[Tensor | None]:
        s = self.s
        segment = self.call.segment(first, last)
        start, states = self._states(segment, first, last)
        outside = g_states
        if g_order is not None:
            v = _step.squash(states) if s.kind == "stuart_landau" else None
            g_seen = _step.order_parameters_adjoint(states if v is None else v.u, g_order)
            read = g_seen if v is None else v.adjoint(g_seen)
            outside = read if outside is None else _step.plus(outside, read)
        through = self._parallel if self.call.parallel else self._loop
        return inputs_adjoint(s, segment, *through(segment, start, states, outside, first == 0))

    def _parallel(
        self, segment: Segment, start: Pair, states: Pair, outside: Pair | None, is_first: bool
    ) -> tuple[Pair, Pair, Pair, None]:
        call, reset = self.call, segment.reset
        earlier = (torch.cat((a.unsqueeze(-3), b[..., :-1, :, :]), -3) for a, b in zip(start, states, strict=True))
        before: Any = tuple(earlier)
        if reset is not None:
            before = tuple(torch.where(reset, a.unsqueeze(-3), b) for a, b in zip(call.start, before, strict=True))
        made = _parallel.adjoint(self.s, segment, before, states, outside, self.carry)
        if reset is not None:  # the first step's goes by way of the carry
            later = reset[..., 1:, :, :]
            found: Any = (torch.where(later, g[..., 1:, :, :], 0.0).sum(-3) for g in made.g_before)
            self.initial = _step.plus(self.initial, tuple(found))
        g = made.g_before[0].select(-3, 0), made.g_before[1].select(-3, 0)
        self._carry(g, None if reset is None else reset.select(-3, 0), is_first)
        return made.turned, made.g_turned, made.g_forces, None

    def _loop(
        self, segment: Segment, start: Pair, states: Pair, outside: Pair | None, is_first: bool
    ) -> tuple[Pair, Pair, Pair, Tensor | None]:
        s, call = self.s, self.call
        turned: list[Pair] = []  # lam z(t-1), and its gradient
        g_turned: list[Pair] = []
        g_forces: list[Pair] = []
        g_strength: list[Tensor] = []

        def after(t: int) -> Pair:
            return (states[0].select(-3, t), states[1].select(-3, t)) if t >= 0 else start

        for t in range(states[0].shape[-3] - 1, -1, -1):
            gates, strength, reset = segment.at(t)
            before = call.before(reset, after(t - 1))
            g = self.carry
            if outside is not None:
                g = _step.plus(g, (outside[0].select(-3, t), outside[1].select(-3, t)))
            gs, gf = _step.step_adjoint(s, gates, call.forces(gates, strength, before), before, after(t), g)
            g = _step.times_conjugate(gs, gates.lam)
            if strength is not None:
                of_strength, through_field = self._field_adjoint(strength, before, gf)
                g_strength.append(of_strength)
                g = _step.plus(g, through_field)
            turned.append(_step.times(gates.lam, before))
            g_turned.append(gs)
            g_forces.append(gf)
            self._carry(g, reset, is_first and t == 0)
        for found in (turned, g_turned, g_forces, g_strength):
            found.reverse()
        strengths = torch.stack(g_strength, -3) if g_strength else None
        return _stacked(turned), _stacked(g_turned), _stacked(g_forces), strengths

    def _field_adjoint(self, strength: Tensor, before: Pair, gf: Pair) -> tuple[Tensor, Pair]:
        """Gradients of K and of the state that the field was made of; adds to that of the lag."""
        s, call = self.s, self.call
        v = _step.squash(before) if s.kind == "stuart_landau" else None
        turned, force = _step.field(strength, call.lag, before if v is None else v.u)
        g = _step.summed_pair(gf)
        self.lag = self.lag - (force[0] * g[1] - force[1] * g[0])
        back = _step.scaled(g if call.lag is None else _step.times(g, call.lag), strength / s.oscillators)
        wide = back[0].expand_as(before[0]), back[1].expand_as(before[0])
        return _step.real_of(turned, g), wide if v is None else v.adjoint(wide)

    def _carry(self, g: Pair, reset: Tensor | None, is_first: bool) -> None:
        """Hands the gradient of the state before a step to the step that made it, or to the initial state."""
        if is_first:
            self.initial = _step.plus(self.initial, g)
        elif reset is None:
            self.carry = g
        else:
            self.initial = tuple(torch.where(reset, a + b, a) for a, b in zip(self.initial, g, strict=True))  # type: ignore[assignment]  # two
            self.carry = tuple(torch.where(reset, 0.0, b) for b in g)  # type: ignore[assignment]  # two


def inputs_adjoint(
    s: Scan, segment: Segment, turned: Pair, g_turned: Pair, g_forces: Pair, g_strength: Tensor | None
) -> list[Tensor | None]:
    """Gradients of a segment's p, q, gate, phase [..., L, D], coupling and forget [..., L, G]."""
    gates, heads = segment.gates, segment.heads
    rho = _step.real_of(turned, g_turned)
    g_phase = turned[0] * g_turned[1] - turned[1] * g_turned[0]
    g_gate = gates.shut * _step.real_of(gates.d, g_forces)
    if s.kind == "moebius":
        g_gate = g_gate - gates.open * rho
    else:
        g_gate = g_gate - LEAK * gates.open * gates.open * gates.shut * rho / gates.decay
    wide = *_step.scaled(g_forces, gates.open), g_gate, g_phase
    g_coupling = g_forget = None
    if heads.strength is not None and heads.slope is not None and g_strength is not None:
        g_coupling = heads.slope * g_strength
        if s.tied_leak:
            g_coupling = g_coupling - heads.strength * _step.summed(rho)
        g_coupling = g_coupling.squeeze(-1)
    if heads.forget is not None:
        g_forget = -(heads.forget * _step.summed(rho)).squeeze(-1)
    return [*(g.flatten(-2) for g in wide), g_coupling, g_forget]

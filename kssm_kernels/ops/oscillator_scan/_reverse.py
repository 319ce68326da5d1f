"""The adjoint of the scan in pure torch, in reverse time. Equations: __init__.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _parallel, _step
from kssm_kernels.ops.oscillator_scan._call import Call, Segment, stacked
from kssm_kernels.ops.oscillator_scan._loop import Gathered
from kssm_kernels.ops.oscillator_scan._scan import LEAK, SEQUENCES, Grads, Scan, operands_of
from kssm_kernels.ops.oscillator_scan._step import Gates, Pair


def _some(
    parts: tuple[Tensor | None, Tensor | None], axis: int, first: int, last: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of some steps."""
    re, im = (None if g is None else g.narrow(axis, first, last - first) for g in parts)
    return re, im


class Adjoint:
    def __init__(self, s: Scan, kept: Pair) -> None:
        self.s, self.call = s, Call(s)
        self.kept = self.call.by_heads(kept[0]), self.call.by_heads(kept[1])
        like = self.call.start[0]
        self.carry: Pair = (torch.zeros_like(like), torch.zeros_like(like))
        self.initial: Pair = (torch.zeros_like(like), torch.zeros_like(like))
        self.lag = torch.zeros_like(like[..., :1])
        self.gathered = None if self.call.loop is None else Gathered(self.call.loop)

    def _states(self, first: int, last: int) -> tuple[Pair, Pair]:
        """The state before a segment, and those after each of its steps."""
        every, (re, im) = self.s.every, self.kept
        start = (re.select(-3, first // every - 1), im.select(-3, first // every - 1)) if first else self.call.start
        if every == 1:
            return start, (re.narrow(-3, first, last - first), im.narrow(-3, first, last - first))
        return start, self.call.states(first, last, start)

    def run(self, given: Grads, needed: tuple[bool, ...]) -> list[Tensor | None]:
        s, call = self.s, self.call
        g_order, g_states = (given.order_re, given.order_im), (given.states_re, given.states_im)
        end = call.compute_pair((given.last_re, given.last_im))
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
        for i, source in enumerate(operands_of(s)[:SEQUENCES]):
            if not needed[i] or not isinstance(source, Tensor):
                whole.append(None)
                continue
            found = [p for p in (part[i] for part in reversed(parts)) if p is not None]
            whole.append(torch.cat(found, -2).to(source.dtype) if found else torch.zeros_like(source))
        width = (*s.batch_shape, s.p.shape[-1])
        start = self.lag.reshape(*s.batch_shape, s.heads), *(g.reshape(width) for g in self.initial)
        rest = *start, *(self.gathered.gradients() if self.gathered else (None, None, None))
        return [*whole, *(g if need else None for g, need in zip(rest, needed[SEQUENCES:], strict=True))]

    def _segment(self, first: int, last: int, g_order: Pair | None, g_states: Pair | None) -> list[Tensor | None]:
        s = self.s
        start, states = self._states(first, last)
        outside = g_states
        if g_order is not None:
            v = _step.squash(states) if s.kind == "stuart_landau" else None
            g_seen = _step.order_parameters_adjoint(states if v is None else v.u, g_order)
            read = g_seen if v is None else v.adjoint(g_seen)
            outside = read if outside is None else _step.plus(outside, read)
        if self.call.loop is not None:
            return self._closed(first, start, states, outside)
        segment = self.call.segment(first, last)
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
        call = self.call
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
            gs, gf, g, of_strength = self._one(gates, strength, before, after(t), g)
            if of_strength is not None:
                g_strength.append(of_strength)
            turned.append(_step.times(gates.lam, before))
            g_turned.append(gs)
            g_forces.append(gf)
            self._carry(g, reset, is_first and t == 0)
        for found in (turned, g_turned, g_forces, g_strength):
            found.reverse()
        strengths = torch.stack(g_strength, -3) if g_strength else None
        return stacked(turned), stacked(g_turned), stacked(g_forces), strengths

    def _one(
        self, gates: Gates, strength: Tensor | None, before: Pair, after: Pair, g: Pair
    ) -> tuple[Pair, Pair, Pair, Tensor | None]:
        """From the gradient of the state after a step: those of lam z(t-1), the forces, z(t-1) and K."""
        gs, gf = _step.step_adjoint(self.s, gates, self.call.forces(gates, strength, before), before, after, g)
        g_before = _step.times_conjugate(gs, gates.lam)
        if strength is None:
            return gs, gf, g_before, None
        of_strength, through_field = self._field_adjoint(strength, before, gf)
        return gs, gf, _step.plus(g_before, through_field), of_strength

    def _closed(self, first: int, start: Pair, states: Pair, outside: Pair | None) -> list[Tensor | None]:
        s, call = self.s, self.call
        assert self.gathered is not None
        found: list[list[Tensor | None]] = []
        for t in range(states[0].shape[-3] - 1, -1, -1):
            z = (states[0].select(-3, t - 1), states[1].select(-3, t - 1)) if t else start
            segment, before, seen = call.closed_step(first + t, z)
            gates, strength, reset = segment.at(0)
            g = self.carry
            if outside is not None:
                g = _step.plus(g, (outside[0].select(-3, t), outside[1].select(-3, t)))
            after = states[0].select(-3, t), states[1].select(-3, t)
            gs, gf, g, of_strength = self._one(gates, strength, before, after, g)

            def timed(z: Pair) -> Pair:
                return z[0].unsqueeze(-3), z[1].unsqueeze(-3)

            k = None if of_strength is None else of_strength.unsqueeze(-3)
            inputs = inputs_adjoint(s, segment, timed(_step.times(gates.lam, before)), timed(gs), timed(gf), k)
            found.append(inputs)
            by_loop = self.gathered.step(seen, inputs)
            gv = call.by_heads(by_loop[0]), call.by_heads(by_loop[1])
            g = _step.plus(g, gv if s.kind == "moebius" else _step.squash(before).adjoint(gv))
            self._carry(g, reset, first == 0 and t == 0)
        together = zip(*reversed(found), strict=True)
        return [None if parts[0] is None else torch.cat(parts, -2) for parts in together]

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

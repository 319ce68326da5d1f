"""A scan's arguments as pure torch runs over them, and the states that come of them.

What needs no state is computed for a segment of steps at once; in a closed loop that is one step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _parallel, _step
from kssm_kernels.ops.oscillator_scan._loop import Communities, Loop, Moved
from kssm_kernels.ops.oscillator_scan._scan import Scan
from kssm_kernels.ops.oscillator_scan._step import Gates, Heads, Pair

SEGMENT = 64  # steps whose gates are held at once, where no interval of kept states says how many


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
        self.loop = None if s.communities is None or s.feedback is None else Loop(s)

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

    def segment(self, first: int, last: int, moved: Moved | None = None) -> Segment:
        """Steps first .. last - 1; ``moved``: what the loop adds to the inputs of a single one."""
        s = self.s

        def some(x: Tensor, i: int) -> Tensor:
            x = x.narrow(-2, first, last - first).to(self.dtype)
            return x if moved is None else x + moved[i].unsqueeze(-2)

        def per_head(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.narrow(-2, first, last - first).to(self.dtype).unsqueeze(-1)

        forget = None if s.forget is None else some(s.forget, 4).unsqueeze(-1)
        heads = _step.heads(s, per_head(s.coupling), forget)
        p, q, gate, phase = (self.by_heads(some(x, i)) for i, x in enumerate((s.p, s.q, s.gate, s.phase)))
        gates = _step.gates(s.kind, p, q, gate, phase, heads.keep)
        reset = None if s.reset is None else s.reset.narrow(-1, first, last - first)[..., None, None]
        return Segment(gates, heads, reset)

    def closed_step(self, t: int, z: Pair) -> tuple[Segment, Pair, Communities]:
        """Step t after the state z as a segment of its own, the state that it takes, and what the loop sees of that."""
        assert self.loop is not None
        reset = None if self.s.reset is None else self.s.reset.select(-1, t)[..., None, None]
        before = self.before(reset, z)
        found = self.loop.communities(t, _step.seen(self.s, before))
        return self.segment(t, t + 1, self.loop.moved(found.f)), before, found

    def before(self, reset: Tensor | None, z: Pair) -> Pair:
        """The state that a step takes: the last one's, or the initial one."""
        if reset is None:
            return z
        return torch.where(reset, self.start[0], z[0]), torch.where(reset, self.start[1], z[1])

    def forces(self, gates: Gates, strength: Tensor | None, before: Pair) -> Pair:
        if strength is None:
            return gates.d
        return _step.plus(gates.d, _step.field(strength, self.lag, _step.seen(self.s, before))[1])

    def states(self, first: int, last: int, z: Pair) -> Pair:
        """The states after each of steps first .. last - 1, [..., L, G, N], from the one before them."""
        if self.loop is None:
            return self.open_states(self.segment(first, last), z)
        states = []
        for t in range(first, last):
            segment, before, _ = self.closed_step(t, z)
            gates, strength, _ = segment.at(0)
            z = _step.step(self.s, gates, self.forces(gates, strength, before), before)
            states.append(z)
        return stacked(states)

    def open_states(self, segment: Segment, z: Pair) -> Pair:
        if self.parallel:
            return _parallel.states(self.s, segment, self.start, z)
        states = []
        for t in range(segment.gates.open.shape[-3]):
            gates, strength, reset = segment.at(t)
            before = self.before(reset, z)
            z = _step.step(self.s, gates, self.forces(gates, strength, before), before)
            states.append(z)
        return stacked(states)


def stacked(states: list[Pair]) -> Pair:
    return torch.stack([z[0] for z in states], -3), torch.stack([z[1] for z in states], -3)

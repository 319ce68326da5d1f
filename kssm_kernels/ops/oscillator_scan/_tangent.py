"""Forward mode of the scan, in torch operators that autograd and vmap know, none of them in place.

The tangent of a step, with d for a tangent and the names of __init__.py:

    dlam = lam (dlog|lam| + i dphi),   ds = dlam z + lam dz,   dF = K exp(-i alpha) (dZ + Z (dk K'/K - i dalpha))
    stuart_landau   dz <- ds + dd + dF,   du = r (dz - u Re(conj(u) dz))
    moebius         dw = r (dG - w Re(conj(w) dG)),   dz <- (ds + dw - z (conj(dw) s + conj(w) ds)) / c
    closed loop     d(p, q, gate, phi, l) += dU F + U dF,   dF = K' (dY + (1 - K') dk Y) in parts,   dY = dC v + C dv
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _step
from kssm_kernels.ops.oscillator_scan._call import Call, Segment
from kssm_kernels.ops.oscillator_scan._loop import Communities, Loop, product
from kssm_kernels.ops.oscillator_scan._scan import LEAK, OPERANDS, Scan
from kssm_kernels.ops.oscillator_scan._step import Heads, Pair


def tangents(arguments: tuple[Any, ...], given: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tangents of (Z, last state, kept states), (re, im) each, for the registered op's arguments and theirs."""
    s = Scan(*arguments)
    call = Call(s)
    moving = _Moving(s, call, given[:OPERANDS])
    z, dz = call.start, moving.initial()
    orders: list[Pair] = []
    kept: list[Pair] = []
    for t in range(s.steps):
        reset = None if s.reset is None else s.reset.select(-1, t)[..., None, None]
        if reset is not None:
            fresh = moving.initial()
            dz = torch.where(reset, fresh[0], dz[0]), torch.where(reset, fresh[1], dz[1])
        moved: Any = (0.0,) * 5
        if call.loop is None:
            segment, before = call.segment(t, t + 1), call.before(reset, z)
        else:
            segment, before, seen = call.closed_step(t, z)
            moved = moving.by_loop(call.loop, t, seen, _seen_tangent(s, before, dz)[1])
        z, dz = moving.step(t, segment, before, dz, moved)
        if s.every and (t + 1) % s.every == 0:
            kept.append(dz)
        orders.append(_order_tangent(s, z, dz))

    def joined(parts: list[Pair], like: tuple[Tensor, ...]) -> list[Tensor]:
        if not parts:
            return [torch.zeros_like(x) for x in like]
        return [torch.stack([x[i] for x in parts], -3).reshape(like[i].shape) for i in range(2)]

    order = joined(orders if s.harmonics else [], outputs[:2])
    last = [x.reshape(outputs[2].shape) for x in dz]
    return *order, *last, *joined(kept, outputs[4:])


class _Moving:
    """The operands' tangents in the compute dtype; one that there is none of is zero."""

    def __init__(self, s: Scan, call: Call, given: tuple[Any, ...]) -> None:
        self.s, self.call, self.given = s, call, given
        self.zero = torch.zeros((), dtype=call.dtype, device=s.p.device)

    def initial(self) -> Pair:
        shape = (*self.s.batch_shape, self.s.p.shape[-1])

        def part(g: Tensor | None) -> Tensor:
            g = self.zero if g is None else g.to(self.call.dtype)
            return self.call.by_heads(g.expand(shape))

        return part(self.given[7]), part(self.given[8])

    def _at(self, i: int, t: int) -> Tensor:
        """Of a sequence's step: oscillators [..., G, N] or heads [..., G, 1]."""
        g = self.given[i]
        if g is None:
            return self.zero
        g = g.select(-2, t).to(self.call.dtype)
        return g.unsqueeze(-1) if i > 3 else self.call.by_heads(g)

    def by_loop(self, loop: Loop, t: int, seen: Communities, dv: Pair) -> list[Tensor]:
        """Of what the loop adds to p, q, gate, phase [..., G, N] and forget [..., G, 1]."""
        dc, du, dk = (None if g is None else g.to(self.call.dtype) for g in self.given[9:12])
        flat = dv[0].reshape(seen.v[0].shape), dv[1].reshape(seen.v[1].shape)
        dy = product(flat[0], loop.c.t()), product(flat[1], loop.c.t())
        if dc is not None:
            dy = _step.plus(dy, (product(seen.v[0], dc.t()), product(seen.v[1], dc.t())))
        if seen.strength is not None:
            if dk is not None:
                dy = _step.plus(dy, _step.scaled(seen.y, (1 - seen.strength) * dk.select(-2, t)))
            dy = _step.scaled(dy, seen.strength)
        moved = product(torch.cat(dy, -1), loop.u.t())
        if du is not None:
            moved = moved + product(seen.f, du.t())
        parts = torch.split(moved, loop.sizes, -1)
        return [*(self.call.by_heads(part) for part in parts[:4]), *(part.unsqueeze(-1) for part in parts[4:])]

    def step(self, t: int, segment: Segment, before: Pair, dz: Pair, moved: Any) -> tuple[Pair, Pair]:
        """State and tangent after step t; ``moved``: the tangents of what the loop adds to its inputs."""
        s, call = self.s, self.call
        gates, strength, _ = segment.at(0)
        dp, dq, d_gate, d_phase = (self._at(i, t) + moved[i] for i in range(4))
        dk = self._at(4, t)
        dd = gates.shut * d_gate  # of log g
        d_force = gates.open * dp + gates.d[0] * dd, gates.open * dq + gates.d[1] * dd
        if s.kind == "moebius":
            d_size = -gates.open * d_gate
        else:
            d_size = -LEAK * gates.open * gates.open * gates.shut / gates.decay * d_gate
        heads = segment.heads
        if heads.forget is not None:
            d_size = d_size - heads.forget.select(-3, 0) * (self._at(5, t) + moved[4])
        if s.tied_leak and strength is not None:
            d_size = d_size - strength * dk
        turned = _step.times(gates.lam, before)
        ds = _step.times(gates.lam, dz)
        ds = ds[0] + turned[0] * d_size - turned[1] * d_phase, ds[1] + turned[1] * d_size + turned[0] * d_phase
        if strength is not None:
            d_force = _step.plus(d_force, self._field(strength, heads, dk, before, dz))
        forces = call.forces(gates, strength, before)
        after = _step.step(s, gates, forces, before)
        if s.kind == "stuart_landau":
            return after, _step.plus(ds, d_force)
        m = _step.moebius_parts(turned, forces)
        dw = m.w.adjoint(d_force)  # the map is symmetric
        dc = _step.plus(_step.times_conjugate(turned, dw), _step.times_conjugate(ds, m.w.u))
        dn = _step.plus(_step.plus(ds, dw), _step.scaled(_step.times(after, dc), -torch.ones_like(m.size)))
        x = _step.times_conjugate(dn, m.c)
        return after, (x[0] / m.size, x[1] / m.size)

    def _field(self, strength: Tensor, heads: Heads, dk: Tensor, before: Pair, dz: Pair) -> Pair:
        assert heads.slope is not None
        slope = heads.slope.select(-3, 0)
        s, lag = self.s, self.call.lag
        v, dv = _seen_tangent(s, before, dz)
        turned, force = _step.field(strength, lag, v)
        moved = _step.field(strength, lag, dv)[1]
        moved = _step.plus(moved, _step.scaled(turned, slope * dk))
        if self.given[6] is None:
            return moved
        d_lag = self.given[6].to(self.call.dtype).expand(*s.batch_shape, s.heads).unsqueeze(-1)
        return moved[0] + force[1] * d_lag, moved[1] - force[0] * d_lag


def _seen_tangent(s: Scan, z: Pair, dz: Pair) -> tuple[Pair, Pair]:
    if s.kind == "moebius":
        return z, dz
    squashed = _step.squash(z)
    return squashed.u, squashed.adjoint(dz)  # the map is symmetric


def _order_tangent(s: Scan, z: Pair, dz: Pair) -> Pair:
    """dZ_n = (1/N) sum_j n v^(n-1) dv, [..., G, H]."""
    v, dv = _seen_tangent(s, z, dz)
    power, found = dv, []
    for n in range(1, s.harmonics + 1):
        total = _step.mean(power)
        found.append((n * total[0], n * total[1]))
        power = _step.times(power, v)
    if not found:
        return z
    return torch.cat([x[0] for x in found], -1), torch.cat([x[1] for x in found], -1)

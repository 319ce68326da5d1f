"""One step of the scan, its gates and its adjoint, on whole tensors. Equations: __init__.py.

Oscillators have shape [..., G, N], what belongs to a head [..., G, 1]. Complex numbers are pairs of real tensors:
Metal has few operators on complex ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan._scan import LEAK, Scan

Pair = tuple[Tensor, Tensor]  # (re, im)

LARGEST = 2.0**126  # of a force's parts: sums of two finite ones may be infinite


def by_heads(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., D] as [..., G, N]"""
    return x.reshape(*x.shape[:-1], *grid)


def times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def times_conjugate(a: Pair, b: Pair) -> Pair:
    """a conj(b)"""
    return a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]


def real_of(a: Pair, b: Pair) -> Tensor:
    """Re(conj(a) b)"""
    return a[0] * b[0] + a[1] * b[1]


def scaled(a: Pair, factor: Tensor) -> Pair:
    return a[0] * factor, a[1] * factor


def plus(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def summed(x: Tensor) -> Tensor:
    """The sum over the last axis, kept as one of length 1, in pairs.

    torch's own adds up in another order where other axes are longer, and a sequence in parts would get other bits.
    """
    while (n := x.shape[-1]) > 1:
        half = n // 2
        pairs = x.narrow(-1, 0, half) + x.narrow(-1, half, half)
        x = torch.cat((pairs, x.narrow(-1, n - 1, 1)), -1) if n % 2 else pairs
    return x


def summed_pair(z: Pair) -> Pair:
    both = summed(torch.stack(z))
    return both[0], both[1]


def mean(z: Pair) -> Pair:
    """Over the last axis, kept."""
    total = summed_pair(z)
    return total[0] / z[0].shape[-1], total[1] / z[0].shape[-1]


def sigmoid(x: Tensor) -> Tensor:
    """torch's own computes the last elements of a row in another way than the others (2.13, CPU)."""
    return 1 / (1 + torch.exp(-x))


class Squashed(NamedTuple):
    """u = z / sqrt(1 + |z|^2), and the factor that made it of z."""

    u: Pair
    factor: Tensor

    def adjoint(self, g: Pair) -> Pair:
        inward = real_of(self.u, g)
        return scaled((g[0] - self.u[0] * inward, g[1] - self.u[1] * inward), self.factor)


def squash(z: Pair) -> Squashed:
    """By the larger part, whose square may overflow."""
    size = torch.maximum(z[0].abs(), z[1].abs()).clamp(min=1)
    a, b, one = z[0] / size, z[1] / size, 1 / size
    r = 1 / torch.sqrt(one * one + (a * a + b * b))
    return Squashed((a * r, b * r), one * r)


class Gates(NamedTuple):
    """What a step takes from its inputs alone."""

    open: Tensor  # g
    shut: Tensor  # 1 - g
    d: Pair  # g (p + i q)
    lam: Pair
    decay: Tensor  # 1 - (1 - 1e-6) g^2, whose root a Stuart-Landau state keeps


def gates(kind: str, p: Tensor, q: Tensor, gate: Tensor, phase: Tensor, keep: Tensor | None) -> Gates:
    """``keep``: 1 - f, or 1 - K with a tied leak; None: 1."""
    g, shut = sigmoid(gate), sigmoid(-gate)
    decay = shut * (1 + g) + (1 - LEAK) * (g * g)
    size = shut if kind == "moebius" else torch.sqrt(decay)
    if keep is not None:
        size = size * keep
    return Gates(g, shut, (g * p, g * q), (size * torch.cos(phase), size * torch.sin(phase)), decay)


class Heads(NamedTuple):
    """What a step takes from the logits of its heads."""

    strength: Tensor | None  # K
    slope: Tensor | None  # dK/dk
    forget: Tensor | None  # f
    keep: Tensor | None  # 1 - f, or 1 - K


def heads(s: Scan, coupling: Tensor | None, forget: Tensor | None) -> Heads:
    strength = slope = keep = f = None
    if coupling is not None:
        share, rest = sigmoid(coupling), sigmoid(-coupling)
        if s.kind == "moebius":
            strength, slope = coupling.clamp(min=0) + torch.log1p(torch.exp(-coupling.abs())), share
        else:
            strength, slope = share, share * rest
        if s.tied_leak:
            keep = rest
    if forget is not None:
        f, keep = sigmoid(forget), sigmoid(-forget)
    return Heads(strength, slope, f, keep)


# ---- the step ----


def field(strength: Tensor, lag: Pair | None, v: Pair) -> tuple[Pair, Pair]:
    """(exp(-i alpha) Z, K exp(-i alpha) Z) of a head; ``lag``: cos and sin of alpha."""
    z = mean(v)
    turned = z if lag is None else times_conjugate(z, lag)
    return turned, scaled(turned, strength)


class Moebius(NamedTuple):
    """The parts of x = (s + w) / (1 + conj(w) s)."""

    w: Squashed
    c: Pair
    size: Tensor  # |c|^2, not below its own rounding error
    n: Pair


def write(force: Pair) -> Squashed:
    """w of a force."""
    return squash((force[0].clamp(-LARGEST, LARGEST), force[1].clamp(-LARGEST, LARGEST)))


def moebius_parts(s: Pair, force: Pair) -> Moebius:
    w = write(force)
    turned = times_conjugate(s, w.u)
    c = 1 + turned[0], turned[1]
    floor = torch.finfo(s[0].dtype).eps ** 2
    return Moebius(w, c, (c[0] * c[0] + c[1] * c[1]).clamp(min=floor), plus(s, w.u))


def inside_disc(z: Pair, limit: float = 1.0) -> Pair:
    """Scaled back to radius 1 where |z|^2 is above ``limit``."""
    square = z[0] * z[0] + z[1] * z[1]
    back = torch.where(square > limit, 1 / torch.sqrt(square), 1.0)
    return scaled(z, back)


def step(s: Scan, gates: Gates, forces: Pair, before: Pair) -> Pair:
    """The state after a step from ``before``; ``forces``: d and the field of the head."""
    turned = times(gates.lam, before)
    if s.kind == "stuart_landau":
        return plus(turned, forces)
    m = moebius_parts(turned, forces)
    x = times_conjugate(m.n, m.c)
    return inside_disc((x[0] / m.size, x[1] / m.size))


def seen(s: Scan, z: Pair) -> Pair:
    """v, what the field and the readout see of a state."""
    return squash(z).u if s.kind == "stuart_landau" else z


def start(s: Scan, z: Pair) -> Pair:
    """The initial state as the first step takes it. States of an earlier call pass as they are."""
    if s.kind == "stuart_landau":
        return z
    eps = torch.finfo(z[0].dtype).eps
    outside = torch.maximum(z[0].abs(), z[1].abs()).clamp(min=1)  # whose square may overflow
    near = (
        torch.where(outside > 1 + 8 * eps, z[0] / outside, z[0]),
        torch.where(outside > 1 + 8 * eps, z[1] / outside, z[1]),
    )
    return inside_disc(near, 1 + 16 * eps)


# ---- its adjoint ----


def step_adjoint(s: Scan, gates: Gates, forces: Pair, before: Pair, after: Pair, g: Pair) -> tuple[Pair, Pair]:
    """Gradients of lam z(t-1) and of the forces, from that of the state after."""
    if s.kind == "stuart_landau":
        return g, g
    turned = times(gates.lam, before)
    m = moebius_parts(turned, forces)
    gn = times(g, m.c)
    gn = gn[0] / m.size, gn[1] / m.size
    gc = times_conjugate(gn, after)
    gc = -gc[0], -gc[1]
    gw = times((gc[0], -gc[1]), turned)
    return plus(gn, times(gc, m.w.u)), m.w.adjoint(plus(gn, gw))


def moebius_slope(turned: Pair, forces: Pair, after: Pair) -> Pair:
    """gs / g of ``step_adjoint``, one number for every gradient: (1 - conj(x) w) / conj(c)."""
    m = moebius_parts(turned, forces)
    back = times_conjugate(m.w.u, after)
    x = times((1 - back[0], -back[1]), m.c)
    return x[0] / m.size, x[1] / m.size


# ---- readout ----


def order_parameters(v: Pair, harmonics: int) -> Pair:
    """Z_n, n = 1..H: [..., G, N] -> [..., G, H]."""
    power, found = v, []
    for n in range(harmonics):
        power = times(power, v) if n else v
        found.append(mean(power))
    if not found:
        empty = v[0].new_empty((*v[0].shape[:-1], 0))
        return empty, empty.clone()
    return torch.cat([z[0] for z in found], -1), torch.cat([z[1] for z in found], -1)


def order_parameters_adjoint(v: Pair, g: Pair) -> Pair:
    """The gradient of v: (1/N) sum_n n conj(v)^(n-1) gZ_n."""
    size, harmonics = v[0].shape[-1], g[0].shape[-1]
    total: Pair = (torch.zeros_like(v[0]), torch.zeros_like(v[1]))
    for n in range(harmonics, 0, -1):
        total = plus(times_conjugate(total, v), (g[0][..., n - 1 : n] * (n / size), g[1][..., n - 1 : n] * (n / size)))
    return total

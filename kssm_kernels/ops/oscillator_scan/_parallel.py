"""The scan over time in parallel, in pure torch: what maps of one step compose to, by a tree of log2 T levels.

Without coupling a step is a map of each oscillator's state alone, and maps of its kind compose to one of that kind:

    stuart_landau   z -> lam z + d                                affine
    moebius         z -> (lam z + w) / (conj(w) lam z + 1)        the 2 x 2 matrix [[lam, w], [conj(w) lam, 1]]

A level joins each two neighbours, has the half as many scanned, and fills in the steps between: 2 T joins in all, where
doubling (Hillis-Steele) needs T log2 T. Of affine maps doubling is faster for small ones alone: 0.30 ms to 0.45 for
64 steps of 64 states, but 5.2 ms to 1.6 for 128 steps of 1024.

A matrix stands for a map up to a factor, so every join divides it by its largest entry; without that float32 overflows
near T = 128.

A step that takes a given state, the first one or one with ``reset``, is a constant map. Joins select it with
``torch.where`` and never multiply by zero: what stands before it may be NaN.

The adjoint is gz(t-1) = a_t gz(t) + outside(t-1), with a_t = conj(lam_t), for moebius times (1 - conj(x_t) w_t) /
conj(c_t): affine for both kinds, scanned from the last step to the first.

The rule: T >= 16 and B D <= 4096, for both kinds. A loop pays for torch calls, some dozens a step; the tree pays for
memory traffic, and loses where a step has states enough to pay for its calls. Time of the loop over that of the tree,
forward and backward, medians of bench/ops/test_scan_parallel.py (AMD EPYC, family 25 model 17, 2 cores, one thread,
torch 2.13.0, AVX-512, float32, 8 heads, 4 harmonics):

    [B, T, D]       stuart_landau  moebius        [B, T, D]       stuart_landau  moebius
    [1, 16, 64]          1.1         1.8          [12, 16, 256]        1.0         1.1
    [1, 64, 64]          2.3         4.5          [12, 64, 256]        1.1         1.3
    [1, 512, 64]         6.8        17.2          [12, 512, 256]       1.1         1.3
    [1, 4096, 64]       10.4        25.0          [8, 512, 512]        1.1         1.1
    [4, 16, 256]         1.2         1.5          [12, 64, 512]        1.0         0.9    by the loop
    [4, 512, 256]        1.8         2.7          [12, 512, 512]       1.1         0.9    by the loop

At T = 8 stuart_landau had 0.86, moebius 1.1 to 1.2. Longer spans than AT_ONCE allows leave the cache: at 1024 steps of
6144 states at once the tree was three times slower than the loop for moebius. All of this was measured on a CPU. A
device on which a torch call costs more, as Metal, should gain more and at larger shapes; there the rule is a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _step
from kssm_kernels.ops.oscillator_scan._scan import Scan
from kssm_kernels.ops.oscillator_scan._step import Pair

if TYPE_CHECKING:
    from kssm_kernels.ops.oscillator_scan._call import Segment

LEAST_STEPS = 16
MOST_STATES = 4096  # of a step
AT_ONCE = 2**17  # states that are scanned at once, in spans of 16 to 1024 steps


def runs_parallel(rows: int, steps: int, width: int, every: int = 1) -> bool:
    """Whether ``rows`` sequences [T, D] = [steps, width], uncoupled and not ``exact``, go over time in parallel.

    ``every``: the interval of kept states, ``save`` of the op. The pure-torch path alone asks this.

    >>> from kssm_kernels.ops.oscillator_scan import runs_parallel
    >>> runs_parallel(12, 512, 256), runs_parallel(12, 8, 256), runs_parallel(64, 512, 256)
    (True, False, False)
    """
    states = rows * width
    return steps >= LEAST_STEPS and states <= MOST_STATES and _span(states, every) * states <= 2 * AT_ONCE


def wins(s: Scan) -> bool:
    """Forward and backward ask, and get the same answer."""
    if s.exact or s.coupling is not None or s.communities is not None:
        return False
    return runs_parallel(s.batch_shape.numel(), s.steps, s.p.shape[-1], s.every)


def span(s: Scan) -> int:
    """Steps that are scanned at once; a span ends with a kept state."""
    return _span(s.batch_shape.numel() * s.p.shape[-1], s.every)


def _span(states: int, every: int) -> int:
    room = min(max(AT_ONCE // max(states, 1), 16), 1024)
    return every * max(1, room // every) if every else room


# ---- complex numbers as pairs, with fewer passes over memory than _step's ----


def _times(a: Pair, b: Pair) -> Pair:
    return torch.addcmul(a[0] * b[0], a[1], b[1], value=-1), torch.addcmul(a[0] * b[1], a[1], b[0])


def _add_times(c: Pair, a: Pair, b: Pair) -> Pair:
    """c + a b"""
    re = torch.addcmul(torch.addcmul(c[0], a[0], b[0]), a[1], b[1], value=-1)
    return re, torch.addcmul(torch.addcmul(c[1], a[0], b[1]), a[1], b[0])


def _select(mask: Tensor | None, a: Pair, b: Pair) -> Pair:
    return b if mask is None else (torch.where(mask, a[0], b[0]), torch.where(mask, a[1], b[1]))


def _quotient(n: Pair, c: Pair) -> Pair:
    """n / c inside the unit disc."""
    size = torch.addcmul(c[0] * c[0], c[1], c[1]).clamp(min=torch.finfo(c[0].dtype).eps ** 2)
    x = _step.times_conjugate(n, c)
    return _step.inside_disc((x[0] / size, x[1] / size))


# ---- a level of the tree ----


class _Level:
    """Which steps of a level are joined; time is the third axis from the end."""

    def __init__(self, length: int, reverse: bool) -> None:
        half, filled, odd = length // 2, (length - 1) // 2, length % 2
        if reverse:
            self.first, self.second = slice(odd + 1, length, 2), slice(odd, length - 1, 2)
            self.begin, self.rest = slice(length - 1, length), slice((length - 1) % 2, length - 1, 2)
            self.previous = slice(half - filled, half)
        else:
            self.first, self.second = slice(0, 2 * half, 2), slice(1, length, 2)
            self.begin, self.rest, self.previous = slice(0, 1), slice(2, length, 2), slice(0, filled)


def _at(x: Pair, steps: slice) -> Pair:
    return x[0][..., steps, :, :], x[1][..., steps, :, :]


def _flags(fresh: Tensor | None, steps: slice) -> Tensor | None:
    return None if fresh is None else fresh[..., steps, :, :]


def _filled(level: _Level, like: Pair, begin: Pair, rest: Pair, second: Pair) -> Pair:
    made = torch.empty_like(like[0]), torch.empty_like(like[1])
    for x, *parts in zip(made, begin, rest, second, strict=True):
        for steps, part in zip((level.begin, level.rest, level.second), parts, strict=True):
            x[..., steps, :, :] = part
    return made


def _joined_flags(fresh: Tensor | None, level: _Level) -> Tensor | None:
    return None if fresh is None else fresh[..., level.first, :, :] | fresh[..., level.second, :, :]


# ---- affine maps ----


def affine(a: Pair, b: Pair, fresh: Tensor | None, reverse: bool = False, limit: float | None = None) -> Pair:
    """x(t) = a(t) x(t-1) + b(t); where ``fresh`` [..., T, 1, 1], and at the first step, x(t) = b(t).

    ``reverse``: x(t+1) for x(t-1). ``limit``: of the parts of products of a, whose own products must be finite.
    """
    length = b[0].shape[-3]
    if length <= 1:
        return b
    level = _Level(length, reverse)
    a_second, b_second = _at(a, level.second), _at(b, level.second)
    b_pairs = _add_times(b_second, a_second, _at(b, level.first))
    b_pairs = _select(_flags(fresh, level.second), b_second, b_pairs)
    a_pairs = _times(a_second, _at(a, level.first))
    if limit is not None:
        a_pairs = a_pairs[0].clamp(-limit, limit), a_pairs[1].clamp(-limit, limit)
    second = affine(a_pairs, b_pairs, _joined_flags(fresh, level), reverse, limit)
    b_rest = _at(b, level.rest)
    rest = _add_times(b_rest, _at(a, level.rest), _at(second, level.previous))
    rest = _select(_flags(fresh, level.rest), b_rest, rest)
    return _filled(level, b, _at(b, level.begin), rest, second)


# ---- Moebius maps ----


def moebius(a: Pair, b: Pair, c: Pair, d: Pair, fresh: Tensor | None) -> Pair:
    """The states z(t) = (a z(t-1) + b) / (c z(t-1) + d); where ``fresh``, and at the first step, b / d."""
    length = b[0].shape[-3]
    if length <= 1:
        return _quotient(b, d)
    level = _Level(length, False)
    first, second = ([_at(x, steps) for x in (a, b, c, d)] for steps in (level.first, level.second))
    a1, b1, c1, d1 = second
    a0, b0, c0, d0 = first
    again, constant = _flags(fresh, level.second), _joined_flags(fresh, level)
    joined = (
        _zero_where(constant, _add_times(_times(a1, a0), b1, c0)),
        _select(again, b1, _add_times(_times(a1, b0), b1, d0)),
        _zero_where(constant, _add_times(_times(c1, a0), d1, c0)),
        _select(again, d1, _add_times(_times(c1, b0), d1, d0)),
    )
    a3, b3, c3, d3 = _of_one_size(joined)
    found = moebius(a3, b3, c3, d3, constant)
    before, (a2, b2, c2, d2) = _at(found, level.previous), [_at(x, level.rest) for x in (a, b, c, d)]
    again = _flags(fresh, level.rest)
    n, m = _select(again, b2, _add_times(b2, a2, before)), _select(again, d2, _add_times(d2, c2, before))
    begin = _quotient(_at(b, level.begin), _at(d, level.begin))
    return _filled(level, b, begin, _quotient(n, m), found)


def _zero_where(mask: Tensor | None, x: Pair) -> Pair:
    """A constant map's first column is not read, but its size is: a NaN there must not reach the second."""
    return x if mask is None else (torch.where(mask, 0.0, x[0]), torch.where(mask, 0.0, x[1]))


def _of_one_size(entries: tuple[Pair, ...]) -> tuple[Pair, Pair, Pair, Pair]:
    """The matrix divided by the largest magnitude of its parts."""
    parts = [x.abs() for pair in entries for x in pair]
    largest = parts[0]
    for x in parts[1:]:
        largest = torch.maximum(largest, x)
    inverse = 1 / largest.clamp(min=torch.finfo(largest.dtype).tiny * 4)
    a, b, c, d = (_step.scaled(pair, inverse) for pair in entries)
    return a, b, c, d


# ---- the steps of a segment ----


def states(s: Scan, segment: Segment, start: Pair, z: Pair) -> Pair:
    """The states after each step, [..., L, G, N]; ``start``: the initial state, ``z``: the one before the segment."""
    fresh, gates = segment.reset, segment.gates
    enters: Pair = z[0].unsqueeze(-3), z[1].unsqueeze(-3)
    initial = start[0].unsqueeze(-3), start[1].unsqueeze(-3)
    begin = slice(0, 1)
    enters = _select(_flags(fresh, begin), initial, enters)

    def entered(x: Pair, slope: Pair) -> Pair:
        """x + slope z(t-1) at the steps that take a known state."""
        head = _add_times(_at(x, begin), _at(slope, begin), enters)
        rest = _at(x, slice(1, None))
        if fresh is not None:
            given = _add_times(rest, _at(slope, slice(1, None)), initial)
            rest = _select(_flags(fresh, slice(1, None)), given, rest)
        return torch.cat((head[0], rest[0]), -3), torch.cat((head[1], rest[1]), -3)

    if s.kind == "stuart_landau":
        return affine(gates.lam, entered(gates.d, gates.lam), fresh)
    w = _step.write(gates.d).u
    c = _step.times_conjugate(gates.lam, w)
    one = torch.ones_like(w[0]), torch.zeros_like(w[0])
    return moebius(gates.lam, entered(w, gates.lam), c, entered(one, c), fresh)


class Adjoint(NamedTuple):
    turned: Pair  # lam z(t-1)
    g_turned: Pair
    g_forces: Pair
    g_before: Pair  # of the state that each step took


def adjoint(s: Scan, segment: Segment, before: Pair, after: Pair, outside: Pair | None, carry: Pair) -> Adjoint:
    """``outside``: the gradient that each state has from its readout; ``carry``: what the last one has beyond that."""
    gates = segment.gates
    turned = _step.times(gates.lam, before)
    slope: Pair | None = None
    back, limit = (gates.lam[0], -gates.lam[1]), None
    if s.kind == "moebius":
        slope = _step.moebius_slope(turned, gates.d, after)
        # near a pole a slope is as large as 1 / eps: products of a few would overflow, and 0 times them be NaN
        limit = torch.finfo(slope[0].dtype).max ** 0.5 / 2
        back = _times(slope, back)
        back = back[0].clamp(-limit, limit), back[1].clamp(-limit, limit)
    if outside is None:
        outside = torch.zeros_like(turned[0]), torch.zeros_like(turned[1])
    body, end = slice(0, -1), slice(-1, None)
    last = _at(outside, end)
    total = tuple(
        torch.cat((x[..., body, :, :], y + z.unsqueeze(-3)), -3) for x, y, z in zip(outside, last, carry, strict=True)
    )

    def from_next(x: Tensor) -> Tensor:
        return torch.cat((x[..., 1:, :, :], x[..., :1, :, :]), -3)

    fresh = None if segment.reset is None else from_next(segment.reset)
    g = affine((from_next(back[0]), from_next(back[1])), (total[0], total[1]), fresh, True, limit)
    gs, gf = _step.step_adjoint(s, gates, gates.d, before, after, g)
    return Adjoint(turned, gs, gf, _step.times_conjugate(gs, gates.lam))

"""Sums over harmonics by products to sums, five harmonics at a time, and their adjoint.

Around b = 3, 8, 13, .. the harmonics b - 2 .. b + 2 come from products of (c_b, s_b) with the first two powers:

    cos(b +- a) = c_b c_a -+ s_b s_a,   sin(b +- a) = s_b c_a +- c_b s_a,   a = 1, 2     (c_a = cos a theta, ..)

(c_b, s_b) walks by rotations through 5 theta, whose (c_5, s_5) are put back on the unit circle: the error grows as n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kssm_kernels.triton_math.phase import as_float, sincos


def groups_of(harmonics: int) -> int:
    """A number that kernels take at run time: for a constant LLVM unrolls the walk, and on AMD spills 119 registers."""
    return -(-harmonics // 5)


@triton.jit
def _powers(theta, live):
    """(c, s) of 1, 2, 5 and 3 times theta; those of 3 are zero where not ``live``."""
    s1, c1 = sincos(theta)
    c2 = tl.fma(c1, c1, -(s1 * s1))
    s2 = (c1 + c1) * s1
    c3 = tl.fma(c2, c1, -(s2 * s1))
    s3 = tl.fma(s2, c1, c2 * s1)
    c5 = tl.fma(c3, c2, -(s3 * s2))
    s5 = tl.fma(s3, c2, c3 * s2)
    half_excess = 0.5 * tl.fma(s5, s5, tl.fma(c5, c5, -1.0))
    c5 = tl.fma(-c5, half_excess, c5)
    s5 = tl.fma(-s5, half_excess, s5)
    return c1, s1, c2, s2, c5, s5, tl.where(live, c3, 0.0), tl.where(live, s3, 0.0)


@triton.jit
def _put(sums, at, h, value):
    return tl.where(h == at, sums + value[:, None], sums)


@triton.jit
def add_harmonics(theta, live, sums_c, sums_s, groups, HP: tl.constexpr):
    """``sums_c, sums_s [ROWS, HP]`` gain what ``theta [ROWS, BLOCK]`` sums up to; column n - 1 is harmonic n."""
    h = tl.arange(0, HP)[None, :]
    c1, s1, c2, s2, c5, s5, cb, sb = _powers(theta, live)
    for k in range(groups):
        cc1, ss1 = tl.sum(cb * c1, axis=1), tl.sum(sb * s1, axis=1)
        cs1, sc1 = tl.sum(cb * s1, axis=1), tl.sum(sb * c1, axis=1)
        cc2, ss2 = tl.sum(cb * c2, axis=1), tl.sum(sb * s2, axis=1)
        cs2, sc2 = tl.sum(cb * s2, axis=1), tl.sum(sb * c2, axis=1)
        at = 5 * k  # column of b - 2
        sums_c = _put(sums_c, at, h, cc2 + ss2)
        sums_c = _put(sums_c, at + 1, h, cc1 + ss1)
        sums_c = _put(sums_c, at + 2, h, tl.sum(cb, axis=1))
        sums_c = _put(sums_c, at + 3, h, cc1 - ss1)
        sums_c = _put(sums_c, at + 4, h, cc2 - ss2)
        sums_s = _put(sums_s, at, h, sc2 - cs2)
        sums_s = _put(sums_s, at + 1, h, sc1 - cs1)
        sums_s = _put(sums_s, at + 2, h, tl.sum(sb, axis=1))
        sums_s = _put(sums_s, at + 3, h, sc1 + cs1)
        sums_s = _put(sums_s, at + 4, h, sc2 + cs2)
        cb, sb = tl.fma(cb, c5, -(sb * s5)), tl.fma(sb, c5, cb * s5)
    return sums_c, sums_s


@triton.jit
def put_features(features, row, live_row, sums_c, sums_s, n, HARMONICS: tl.constexpr, HP: tl.constexpr):
    """C, S and M of rows ``row [ROWS]`` from their sums."""
    h = tl.arange(0, HP)[None, :]
    size = as_float(n)
    c = tl.div_rn(sums_c, size)
    s = tl.div_rn(sums_s, size)
    square = tl.fma(c, c, s * s)  # back on the unit disk: into_unit_disk in csrc/math/harmonics.h
    scale = tl.where(square > 1.0, tl.div_rn(tl.full([1, 1], 1.0, tl.float32), tl.sqrt_rn(square)), 1.0)
    c, s = c * scale, s * scale
    m = tl.sqrt_rn(tl.fma(c, c, tl.fma(s, s, 1e-8)))
    at = features + row[:, None] * (3 * HARMONICS) + h
    mask = live_row[:, None] & (h < HARMONICS)
    to = features.dtype.element_ty
    tl.store(at, c.to(to), mask=mask)
    tl.store(at + HARMONICS, s.to(to), mask=mask)
    tl.store(at + 2 * HARMONICS, m.to(to), mask=mask)


@triton.jit
def _weights(features, g_features, at, live, n, scale, HARMONICS: tl.constexpr):
    """What harmonic n's cosine and sine get in the adjoint: (n/N) gS, -(n/N) gC, with the gradient of M in both."""
    mask = live & (n >= 1) & (n <= HARMONICS)
    at = at + n - 1
    c = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(features + at + HARMONICS, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(features + at + 2 * HARMONICS, mask=mask, other=1.0).to(tl.float32)
    g_c = tl.load(g_features + at, mask=mask, other=0.0).to(tl.float32)
    g_s = tl.load(g_features + at + HARMONICS, mask=mask, other=0.0).to(tl.float32)
    g_m = tl.load(g_features + at + 2 * HARMONICS, mask=mask, other=0.0).to(tl.float32)
    share = tl.div_rn(g_m, m)
    weight = n.to(tl.float32) * scale
    return weight * tl.fma(share, s, g_s), -weight * tl.fma(share, c, g_c)


@triton.jit
def harmonics_adjoint(theta, features, g_features, row, live_row, size, groups, HARMONICS: tl.constexpr):
    """dL/d theta [ROWS, BLOCK] through the features of rows ``row [ROWS]`` of ``size`` oscillators."""
    at = row[:, None] * (3 * HARMONICS)
    live = live_row[:, None]
    scale = tl.div_rn(1.0, as_float(size))
    c1, s1, c2, s2, c5, s5, cb, sb = _powers(theta, live)
    g = theta * 0.0
    for k in range(groups):
        b = tl.full([1, 1], 3, tl.int32) + 5 * k
        p0, q0 = _weights(features, g_features, at, live, b, scale, HARMONICS)
        pd1, qd1 = _weights(features, g_features, at, live, b - 1, scale, HARMONICS)
        pu1, qu1 = _weights(features, g_features, at, live, b + 1, scale, HARMONICS)
        pd2, qd2 = _weights(features, g_features, at, live, b - 2, scale, HARMONICS)
        pu2, qu2 = _weights(features, g_features, at, live, b + 2, scale, HARMONICS)
        x = tl.fma(pu1 + pd1, c1, tl.fma(qu1 - qd1, s1, tl.fma(pu2 + pd2, c2, tl.fma(qu2 - qd2, s2, p0))))
        y = tl.fma(qu1 + qd1, c1, tl.fma(pd1 - pu1, s1, tl.fma(qu2 + qd2, c2, tl.fma(pd2 - pu2, s2, q0))))
        g = tl.fma(cb, x, tl.fma(sb, y, g))
        cb, sb = tl.fma(cb, c5, -(sb * s5)), tl.fma(sb, c5, cb * s5)
    return g

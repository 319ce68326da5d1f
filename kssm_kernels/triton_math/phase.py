"""Sine and cosine of a phase, and its noise: the mathematics of csrc/math/{sincos,range_reduction,philox}.h in Triton.

Triton's own sine is CUDA's library function on NVIDIA devices, whose slow path keeps an array in memory, and another
one elsewhere; these are one polynomial everywhere, the interpreter included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kssm_kernels.noise import COS_POLYNOMIAL, LOG_POLYNOMIAL, SIN_POLYNOMIAL

TWO_OVER_PI = tl.constexpr(0.63661977)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
# Four parts of pi/2, of 11 bits each but the last: exact products with a quotient below 2^13, with a fused multiply-add
# or without (the interpreter has none).
REACH = tl.constexpr(12000.0)
HALF_PI_0 = tl.constexpr(float.fromhex("0x1.92p+0"))
HALF_PI_1 = tl.constexpr(float.fromhex("0x1.fb4p-12"))
HALF_PI_2 = tl.constexpr(float.fromhex("0x1.444p-24"))
HALF_PI_3 = tl.constexpr(float.fromhex("0x1.68c234p-39"))
S0, S1, S2 = (tl.constexpr(c) for c in SIN_POLYNOMIAL)
C0, C1, C2 = (tl.constexpr(c) for c in COS_POLYNOMIAL)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(c) for c in LOG_POLYNOMIAL)
HALF_PI_FIXED = tl.constexpr(float.fromhex("0x1.921fb6p-64"))  # pi/2 / 2^64
# 2/pi in words of 32 bits, the most significant first, behind one word of zeros
W0, W1, W2, W3, W4, W5, W6, W7 = (
    tl.constexpr(w)
    for w in (0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB)
)  # fmt: skip
LN_2 = tl.constexpr(0.69314718055994530942)
ANGLE_UNIT = tl.constexpr(float.fromhex("0x1.921fb6p-24"))  # pi/2 / 2^24


@triton.jit
def as_float(n):
    """A scalar argument as [1] float32: Triton makes a constant of an argument that is 1, which has no ``.to``."""
    return tl.zeros([1], tl.float32) + n


@triton.jit
def _pick(word, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr, e: tl.constexpr):
    """The word-th of five words."""
    low = tl.where(word == 0, a, tl.where(word == 1, b, c))
    return tl.where(word < 3, low, tl.where(word == 3, d, e)).to(tl.uint64)


@triton.jit
def _reduce_exact(x):
    """x = q pi/2 + r for |x| >= 2^-7, by the bits of 2/pi that matter (Payne and Hanek, SIGNUM 18 (1983))."""
    bits = x.to(tl.int32, bitcast=True)
    biased = (bits >> 23) & 0xFF
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    start = biased - 120  # first bit of the window of 96, counted from W0: what lies before gives whole turns
    word = start >> 5
    shift = (start & 31).to(tl.uint64)
    a = _pick(word, W0, W1, W2, W3, W4)
    b = _pick(word, W1, W2, W3, W4, W5)
    c = _pick(word, W2, W3, W4, W5, W6)
    d = _pick(word, W3, W4, W5, W6, W7)
    first = (((a << 32) | b) << shift) >> 32
    second = (((b << 32) | c) << shift) >> 32
    third = (((c << 32) | d) << shift) >> 32
    low = mantissa * third
    middle = mantissa * second + (low >> 32)
    high = (mantissa * first + (middle >> 32)) & 0xFFFFFFFF
    # two bits of quadrant, then the fraction; one of a half or more reads as negative: the next quadrant's
    fraction = ((high << 34) | ((middle & 0xFFFFFFFF) << 2) | ((low & 0xFFFFFFFF) >> 30)).to(tl.int64, bitcast=True)
    q = (high >> 30).to(tl.int32) + (fraction < 0).to(tl.int32)
    r = fraction.to(tl.float32) * HALF_PI_FIXED
    negative = bits < 0
    r = tl.where(biased == 255, float("nan"), tl.where(negative, -r, r))
    return r, tl.where(negative, -q, q)


@triton.jit
def sincos(x):
    """Sine and cosine of float32 phases; any finite phase gives a right answer."""
    shifted = tl.fma(x, TWO_OVER_PI, MAGIC)
    k = shifted - MAGIC
    q = shifted.to(tl.int32, bitcast=True)
    r = tl.fma(k, -HALF_PI_0, x)
    r = tl.fma(k, -HALF_PI_1, r)
    r = tl.fma(k, -HALF_PI_2, r)
    r = tl.fma(k, -HALF_PI_3, r)
    far = tl.abs(x) > REACH
    if tl.max(tl.ravel(far.to(tl.int32)), axis=0) > 0:
        far_r, far_q = _reduce_exact(x)
        r = tl.where(far, far_r, r)
        q = tl.where(far, far_q, q)
    z = r * r
    s = tl.fma(r * z, tl.fma(tl.fma(z, S2, S1), z, S0), r)
    c = tl.fma(z * z, tl.fma(tl.fma(z, C2, C1), z, C0), tl.fma(z, -0.5, 1.0))
    odd = (q & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((q & 2) != 0, -sine, sine), tl.where(((q + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def _box_muller(word0, word1):
    """Two normals from two words; every operation rounds once, so the kernel must be compiled without fusion."""
    v = ((word0 >> 8).to(tl.int32) + 1).to(tl.float32)
    shifted = v.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of 1/sqrt 2, the lower end of the mantissa
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = ((((((f * L7 + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    log_mantissa = (f - 0.5 * z) + (z * f) * p
    minus_log = (24 - (shifted >> 23)).to(tl.float32) * LN_2 - log_mantissa
    radius = tl.sqrt_rn(2.0 * tl.maximum(minus_log, 0.0))
    x = (((word1 >> 6) & 0xFFFFFF).to(tl.int32) - 0x800000).to(tl.float32) * ANGLE_UNIT
    z = x * x
    s = x + (x * z) * ((z * S2 + S1) * z + S0)
    c = (1.0 - 0.5 * z) + (z * z) * ((z * C2 + C1) * z + C0)
    quadrant = (word1 >> 30).to(tl.int32)
    odd = (quadrant & 1) != 0
    a = tl.where(odd, s, c)
    b = tl.where(odd, c, s)
    a = tl.where(((quadrant + 1) & 2) != 0, -a, a)
    b = tl.where((quadrant & 2) != 0, -b, b)
    return radius * a, radius * b


@triton.jit
def normals(row, j, step, seed_low, seed_high):
    """The noise of oscillators ``j`` in rows ``row`` (int64): that of kssm_kernels/noise.py, bit for bit.

    Every element computes its whole block of four and keeps one: 40 integer operations, against 26 for sharing a block
    among eight threads, of which 16 would be issue slots of shuffles.
    """
    low = (tl.zeros([1, 1], tl.int32) + seed_low).to(tl.uint32).to(tl.uint64)
    seed = ((tl.zeros([1, 1], tl.int32) + seed_high).to(tl.uint32).to(tl.uint64) << 32) | low
    zero = (row * 0 + j * 0).to(tl.uint32)
    block = (8 * (j // 32) + j % 8).to(tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(
        seed, block, step.to(tl.uint32) + zero, row.to(tl.uint32) + zero, (row >> 32).to(tl.uint32) + zero
    )
    word = (j % 32) // 8
    late = word >= 2
    first, second = _box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1))
    return tl.where(word % 2 == 0, first, second)

"""One element of the sign-split EMA step, and how its numbers are stored: csrc/math/{sign_split,state_rounding}.h in
Triton, operation by operation. Definitions: kssm_kernels/optim/sign_split/_rounding.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kssm_kernels.optim.sign_split import _rounding as rounding

BLOCK = tl.constexpr(rounding.BLOCK)  # elements that share a scale


@triton.jit
def advance(
    g, p, positive, negative, temperature, scale, steps, resistance, beta, fresh, eps, decay, cool, heat, floor, span,
    MODE: tl.constexpr, LAZY: tl.constexpr, SCALED: tl.constexpr, MAXIMIZE: tl.constexpr, PADDED: tl.constexpr,
    DECAYS: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """New p, P, N and T."""
    if SCALED:
        g = tl.div_rn(g, tl.zeros_like(g) + scale)
    if MAXIMIZE:
        g = -g
    part = fresh * g
    new_positive = beta * positive + tl.where(part > 0, part, 0.0)
    new_negative = beta * negative - tl.where(part < 0, part, 0.0)
    opposite = tl.where(g < 0, new_positive, new_negative)
    if not LAZY:
        opposite = tl.where(g != 0, opposite, 0.0)
    difference = new_positive - new_negative
    weight = new_positive + new_negative
    if PADDED:
        weight = weight + eps
    else:
        weight = tl.where(weight > 0, weight, 1.0)  # both means 0: r is 0, not 0/0
    if MODE == 1:
        u = tl.div_rn(difference, weight + resistance * opposite)  # r / (1 + kappa D / weight) in one division
    else:
        u = tl.div_rn(g, 1.0 + resistance * opposite)
    live = tl.abs(g) < float("inf")
    if LAZY:
        live = live & (g != 0)
    if TEMPERED:
        t = cool * temperature + heat * tl.abs(tl.div_rn(difference, weight)) * (1.0 - temperature)
        t = tl.where(t < 1, t, 1.0)
        temperature = tl.where(live, t, temperature)
        u = u * (floor + span * t)
    if DECAYS:
        u = u + decay * p
    p = tl.where(live, p - steps * u, p)
    return p, tl.where(live, new_positive, positive), tl.where(live, new_negative, negative), temperature


@triton.jit
def random_words(begin, step, stream, seed_low, seed_high, COUNT: tl.constexpr):
    """uint32 [COUNT, BLOCK]: the words of the elements from ``begin``, which 32 divides.

    A block of Philox serves four elements, eight apart: it is computed once and its words change threads by way of
    shared memory, a quarter of the arithmetic of computing it for each.
    """
    low = (tl.zeros([1], tl.int32) + seed_low).to(tl.uint32).to(tl.uint64)
    seed = ((tl.zeros([1], tl.int32) + seed_high).to(tl.uint32).to(tl.uint64) << 32) | low
    block = (begin // 4 + tl.arange(0, COUNT * BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(
        seed, block, step.to(tl.uint32) + zero, stream.to(tl.uint32) + zero, (stream >> 32).to(tl.uint32) + zero
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [block, a, b]: word 2 a + b
    words = tl.reshape(words, (COUNT * BLOCK // 32, 8, 2, 2))
    return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (COUNT, BLOCK))


@triton.jit
def stochastic_bfloat16(x, random):
    """Up with the probability of what is cut off. random: 16 bits. Infinity and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    special = tl.where(size > 0x7F800000, bits | 0x400000, bits)
    return (tl.where(size < 0x7F800000, bits + random, special) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _from_decade(y, up, levels, top, scale, count):
    below = y <= top
    return tl.where(below, scale, up), tl.where(below, count, levels)


@triton.jit
def encoded(x, random, STOCHASTIC: tl.constexpr):
    """Codes of [COUNT, BLOCK] numbers, none negative, and a scale for each row, [COUNT]."""
    scale = tl.max(x, axis=1)
    y = tl.div_rn(x, tl.zeros_like(x) + tl.where(scale > 0, scale, 1.0)[:, None])
    up = tl.zeros_like(y) + 1.0
    levels = up * 128.0
    up, levels = _from_decade(y, up, levels, 1e-1, 1e1, 64.0)
    up, levels = _from_decade(y, up, levels, 1e-2, 1e2, 32.0)
    up, levels = _from_decade(y, up, levels, 1e-3, 1e3, 16.0)
    up, levels = _from_decade(y, up, levels, 1e-4, 1e4, 8.0)
    up, levels = _from_decade(y, up, levels, 1e-5, 1e5, 4.0)
    up, levels = _from_decade(y, up, levels, 1e-6, 1e6, 2.0)
    up, levels = _from_decade(y, up, levels, 1e-7, 1e7, 1.0)
    scaled = y * up
    place = tl.where(levels == 1, scaled, (scaled - 0.1) * 1.1111111)
    offset = tl.zeros_like(y) + 0.5
    if STOCHASTIC:
        offset = random.to(tl.float32) * (1.0 / 65536)
    k = place * levels + offset
    k = tl.where(k > 0, k, 0.0).to(tl.int32).to(tl.float32)
    code = levels - 1.0 + tl.where(k < levels, k, levels)
    return code.to(tl.int32).to(tl.uint8), scale

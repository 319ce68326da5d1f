"""The sign-split EMA step in Triton: all tensors of a table in one launch. Equations: the optimizer's module,
kssm_kernels/optim/sign_split_ema.py.

Operations and roundings come in the order of csrc/math/sign_split.h, so the bits are those of every other backend; in
``consolidate`` the order of the sum behind the rms is this one's own: chunks, then the chunks of a tensor, always alike.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.optim import _rounding as rounding
from kssm_kernels.optim._hyper import MODES, Hyper
from kssm_kernels.optim._table import FIELDS, Table
from kssm_kernels.triton._launch import launch, warps_of
from kssm_kernels.triton._sign_split import BLOCK, advance, decoded, encoded, random_words, stochastic_bfloat16

BLOCKS = 8  # of 256 elements, what 8-bit means share a scale in: a program's chunk; eight elements of each per thread
CHUNK = BLOCKS * rounding.BLOCK
LANES = 1024  # chunk sums that the rms adds at a time
ALIGNMENT = 16  # bytes: loads of 128 bits
ADDRESSES = FIELDS.index("n")
TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8,
}  # fmt: skip

WIDTH = tl.constexpr(len(FIELDS))
P, G, POSITIVE, NEGATIVE, TEMPERATURE, COMPENSATION, POSITIVE_SCALE, NEGATIVE_SCALE, CRYO, RMS, STEP, N, ROW, STREAM = (
    tl.constexpr(i) for i in range(len(FIELDS))
)


@triton.jit
def _pointer(fields, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(fields + FIELD)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def _read(pointer, e, n, WHOLE: tl.constexpr):
    """Elements e; zero behind the end, where a gradient of zero adds nothing to the sum of squares."""
    if WHOLE:  # no mask: one whose constancy is unknown would make loads of single elements
        return tl.load(pointer + e)
    else:
        return tl.load(pointer + e, mask=e < n, other=0)


@triton.jit
def _write(pointer, e, n, x, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + e, x)
    else:
        tl.store(pointer + e, x, mask=e < n)


@triton.jit
def _write_mean(
    pointer, scales, e, n, x, random,
    STATE: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if STATE == tl.uint8:
        codes, scale = encoded(x, random, STOCHASTIC)
        _write(pointer, e, n, codes, WHOLE)
        first = tl.min(e, axis=1)
        tl.store(scales + first // BLOCK, scale, mask=first < n)
    elif STOCHASTIC and STATE == tl.bfloat16:
        _write(pointer, e, n, stochastic_bfloat16(x, random), WHOLE)
    else:
        _write(pointer, e, n, x.to(STATE), WHOLE)


@triton.jit
def _chunk(
    fields, begin, n, values, scale, step, resistance, beta, fresh, eps, decay, cool, heat, floor, span,
    seed_low, seed_high,
    MODE: tl.constexpr, LAZY: tl.constexpr, SCALED: tl.constexpr, MAXIMIZE: tl.constexpr, PADDED: tl.constexpr,
    DECAYS: tl.constexpr, TEMPERED: tl.constexpr, PARAM: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    PARAM_ROUNDING: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Steps COUNT blocks of elements from ``begin``; returns the sum of (P + N)^2."""
    e = begin + tl.arange(0, COUNT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p_at = _pointer(fields, P, PARAM, ALIGNED)
    positive_at = _pointer(fields, POSITIVE, STATE, ALIGNED)
    negative_at = _pointer(fields, NEGATIVE, STATE, ALIGNED)
    positive_scales = _pointer(fields, POSITIVE_SCALE, tl.float32, False)
    negative_scales = _pointer(fields, NEGATIVE_SCALE, tl.float32, False)
    stored = _read(p_at, e, n, WHOLE)
    p = stored.to(tl.float32)
    if PARAM_ROUNDING == 2:
        lost_at = _pointer(fields, COMPENSATION, tl.bfloat16, ALIGNED)
        lost = _read(lost_at, e, n, WHOLE)
        p = p + lost.to(tl.float32)
    g = _read(_pointer(fields, G, GRADIENT, ALIGNED), e, n, WHOLE).to(tl.float32)
    positive = _read(positive_at, e, n, WHOLE)
    negative = _read(negative_at, e, n, WHOLE)
    if STATE == tl.uint8:
        positive = decoded(positive, values, positive_scales, e, n)
        negative = decoded(negative, values, negative_scales, e, n)
    else:
        positive = positive.to(tl.float32)
        negative = negative.to(tl.float32)
    temperature = p
    if TEMPERED:
        temperature_at = _pointer(fields, TEMPERATURE, tl.float32, ALIGNED)
        temperature = _read(temperature_at, e, n, WHOLE)
    steps = step + tl.zeros_like(p)
    if ROWS:  # some tensors of the table have a divisor per row
        cryo = tl.load(fields + CRYO)
        rows_at = cryo.to(tl.pointer_type(tl.float32)) + e // tl.load(fields + ROW)
        steps = tl.div_rn(steps, tl.load(rows_at, mask=(e < n) & (cryo != 0), other=1.0))

    new_p, positive, negative, temperature = advance(
        g, p, positive, negative, temperature, scale, steps, resistance, beta, fresh, eps, decay, cool, heat, floor,
        span, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS, TEMPERED,
    )  # fmt: skip

    words = tl.zeros_like(e).to(tl.uint32)
    if STOCHASTIC or PARAM_ROUNDING == 1:
        counter = tl.load(_pointer(fields, STEP, tl.int64, False))
        words = random_words(e, counter, tl.load(fields + STREAM), seed_low, seed_high)
    if PARAM_ROUNDING == 2:  # what did not move stays as it is, in its last bit too
        moved = new_p != p
        kept = new_p.to(tl.bfloat16)
        _write(p_at, e, n, tl.where(moved, kept, stored), WHOLE)
        _write(lost_at, e, n, tl.where(moved, (new_p - kept.to(tl.float32)).to(tl.bfloat16), lost), WHOLE)
    elif PARAM_ROUNDING == 1:
        _write(p_at, e, n, stochastic_bfloat16(new_p, words >> 16), WHOLE)
    else:
        _write(p_at, e, n, new_p.to(PARAM), WHOLE)
    _write_mean(positive_at, positive_scales, e, n, positive, words & 0xFFFF, STATE, STOCHASTIC, WHOLE)
    hashed = (words * 0x9E3779B1) >> 16
    _write_mean(negative_at, negative_scales, e, n, negative, hashed, STATE, STOCHASTIC, WHOLE)
    if TEMPERED:
        _write(temperature_at, e, n, temperature, WHOLE)
    size = positive + negative
    return tl.sum(tl.sum(size * size, axis=1), axis=0)


@triton.jit
def sign_split_kernel(
    rows, chunks, values, sums, lr_at, scale_at, found_at, lr, kappa, beta, fresh, eps, decay, cool, heat, floor, span,
    cryo, seed_low, seed_high,
    MODE: tl.constexpr, LAZY: tl.constexpr, MAXIMIZE: tl.constexpr, PADDED: tl.constexpr, DECAYS: tl.constexpr,
    TEMPERED: tl.constexpr, PARAM: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr,
    PARAM_ROUNDING: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    LR_TENSOR: tl.constexpr, SCALED: tl.constexpr, FOUND: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    found = 0.0
    if FOUND:
        found = tl.load(found_at).to(tl.float32)
    if found == 0.0:
        chunk = tl.program_id(0).to(tl.int64)
        fields = rows + tl.load(chunks + 2 * chunk) * WIDTH
        begin = tl.load(chunks + 2 * chunk + 1) * (COUNT * BLOCK)
        n = tl.load(fields + N)
        if LR_TENSOR:
            lr = tl.load(lr_at).to(tl.float32)
        step = tl.div_rn(as_scalar(lr), as_scalar(cryo))
        scale = 1.0
        if SCALED:
            scale = tl.load(scale_at).to(tl.float32)
        resistance = as_scalar(kappa)
        if MODE == 2:
            rms = tl.load(_pointer(fields, RMS, tl.float32, False))
            resistance = tl.where(rms > 0, tl.div_rn(resistance, tl.where(rms > 0, rms, 1.0)), 0.0)
        if begin + COUNT * BLOCK <= n:
            total = _chunk(
                fields, begin, n, values, scale, step, resistance, beta, fresh, eps, decay, cool, heat, floor, span,
                seed_low, seed_high, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS, TEMPERED, PARAM, GRADIENT, STATE,
                PARAM_ROUNDING, STOCHASTIC, ROWS, ALIGNED, COUNT, True,
            )  # fmt: skip
        else:
            total = _chunk(
                fields, begin, n, values, scale, step, resistance, beta, fresh, eps, decay, cool, heat, floor, span,
                seed_low, seed_high, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS, TEMPERED, PARAM, GRADIENT, STATE,
                PARAM_ROUNDING, STOCHASTIC, ROWS, ALIGNED, COUNT, False,
            )  # fmt: skip
        if MODE == 2:
            tl.store(sums + chunk, total)

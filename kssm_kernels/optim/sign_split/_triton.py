"""The sign-split EMA step in Triton: all tensors of a table in one launch. Equations: the optimizer's module,
kssm_kernels/optim/sign_split/__init__.py.

Operations and roundings come in the order of csrc/math/sign_split.h, so the bits are those of every other backend. In
``consolidate`` the order of the sum behind the rms is this one's own, and always the same: within chunks, then theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.optim.sign_split import _rounding as rounding
from kssm_kernels.optim.sign_split._hyper import MODES, Hyper
from kssm_kernels.optim.sign_split._table import FIELDS, GRADIENT, Table
from kssm_kernels.optim.sign_split._triton_rounding import BLOCK, advance, encoded, random_words, stochastic_bfloat16
from kssm_kernels.triton_math.launch import launch, warps_of

BLOCKS = 4  # of 256 elements, what 8-bit means share a scale in: a program's chunk, eight elements for each thread
CHUNK = BLOCKS * rounding.BLOCK
RUN = 8  # elements: 128 bits of the smallest that are loaded so
ALIGNMENT = 16  # bytes: accesses of 128 bits
LANES = 4096  # chunk sums that the rms adds at a time
TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}  # fmt: skip

WIDTH = tl.constexpr(len(FIELDS))
P, G, POSITIVE, NEGATIVE, TEMPERATURE, COMPENSATION, POSITIVE_SCALE, NEGATIVE_SCALE, CRYO, RMS, STEP, N, ROW, STREAM = (
    tl.constexpr(i) for i in range(len(FIELDS))
)
# Integers and single numbers whose value or place may be anything, without a kernel for each kind.
PLAIN = ["count", "lr_at", "scale_at", "found_at", "seed_low", "seed_high"]

_read_by_graphs: list[Tensor] = []  # a graph does not say when it is gone
_Words = np.ndarray[Any, np.dtype[np.int64]]


# ---- device ----


@triton.jit
def _pointer(address, begin, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To element ``begin`` of what lies at an address."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ALIGNED)
    return pointer + begin


@triton.jit
def _read_mean(pointer, scales, values, e, live, STATE: tl.constexpr):
    stored = tl.load(pointer + e, mask=live, other=0)
    if STATE.is_uint8():
        scale = tl.load(scales + e // BLOCK, mask=live, other=0.0)
        return tl.load(values + stored.to(tl.int32)) * scale
    else:
        return stored.to(tl.float32)


@triton.jit
def _write_mean(pointer, scales, e, live, x, random, STATE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STATE.is_uint8():
        codes, scale = encoded(x, random, STOCHASTIC)
        tl.store(pointer + e, codes, mask=live)
        at = tl.min(e, axis=1) // BLOCK
        tl.store(scales + at, scale, mask=tl.max(live.to(tl.int32), axis=1) > 0)
    elif STOCHASTIC and STATE.is_bf16():
        tl.store(pointer + e, stochastic_bfloat16(x, random), mask=live)
    else:
        tl.store(pointer + e, x.to(STATE), mask=live)


@triton.jit
def _chunk(
    fields, gradient, begin, left, values, scale, step, resistance, beta, fresh, eps, decay, cool, heat, floor, span,
    seed_low, seed_high,
    MODE: tl.constexpr, LAZY: tl.constexpr, SCALED: tl.constexpr, MAXIMIZE: tl.constexpr, PADDED: tl.constexpr,
    DECAYS: tl.constexpr, TEMPERED: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    ROUNDING: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Steps COUNT blocks of elements from ``begin``, ``left`` of them, which RUN divides; the sum of (P + N)^2."""
    e = tl.arange(0, COUNT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = e // RUN < left // RUN  # alike within runs, or else every load would be one of single elements
    p_at = _pointer(tl.load(fields + P), begin, PARAM, ALIGNED)
    positive_at = _pointer(tl.load(fields + POSITIVE), begin, STATE, ALIGNED)
    negative_at = _pointer(tl.load(fields + NEGATIVE), begin, STATE, ALIGNED)
    positive_scales = _pointer(tl.load(fields + POSITIVE_SCALE), begin // BLOCK, tl.float32, 0)
    negative_scales = _pointer(tl.load(fields + NEGATIVE_SCALE), begin // BLOCK, tl.float32, 0)
    stored = tl.load(p_at + e, mask=live, other=0)
    g = tl.load(_pointer(gradient, begin, GRAD, ALIGNED) + e, mask=live, other=0).to(tl.float32)
    positive = _read_mean(positive_at, positive_scales, values, e, live, STATE)
    negative = _read_mean(negative_at, negative_scales, values, e, live, STATE)
    p = stored.to(tl.float32)
    if ROUNDING == 2:
        lost_at = _pointer(tl.load(fields + COMPENSATION), begin, tl.bfloat16, ALIGNED)
        lost = tl.load(lost_at + e, mask=live, other=0)
        p = p + lost.to(tl.float32)
    temperature = p
    if TEMPERED:
        temperature_at = _pointer(tl.load(fields + TEMPERATURE), begin, tl.float32, ALIGNED)
        temperature = tl.load(temperature_at + e, mask=live, other=0)
    steps = tl.zeros_like(p) + step
    if ROWS:  # some tensors of the table have a divisor per row
        cryo = tl.load(fields + CRYO)
        rows_at = cryo.to(tl.pointer_type(tl.float32)) + (begin + e) // tl.load(fields + ROW)
        steps = tl.div_rn(steps, tl.load(rows_at, mask=live & (e < tl.where(cryo != 0, left, 0)), other=1.0))

    new_p, positive, negative, temperature = advance(
        g, p, positive, negative, temperature, scale, steps, resistance, beta, fresh, eps, decay, cool, heat, floor,
        span, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS, TEMPERED,
    )  # fmt: skip

    words = tl.zeros([COUNT, BLOCK], tl.uint32)
    if STOCHASTIC or ROUNDING == 1:
        counter = tl.load(tl.load(fields + STEP).to(tl.pointer_type(tl.int64)))
        words = random_words(begin, counter, tl.load(fields + STREAM), seed_low, seed_high, COUNT)
    if ROUNDING == 2:  # what did not move stays as it is, in its last bit too
        moved = new_p != p
        kept = new_p.to(tl.bfloat16)
        tl.store(p_at + e, tl.where(moved, kept, stored), mask=live)
        tl.store(lost_at + e, tl.where(moved, (new_p - kept.to(tl.float32)).to(tl.bfloat16), lost), mask=live)
    elif ROUNDING == 1:
        tl.store(p_at + e, stochastic_bfloat16(new_p, words >> 16), mask=live)
    else:
        tl.store(p_at + e, new_p.to(PARAM), mask=live)
    _write_mean(positive_at, positive_scales, e, live, positive, words & 0xFFFF, STATE, STOCHASTIC)
    hashed = (words * 0x9E3779B1) >> 16
    _write_mean(negative_at, negative_scales, e, live, negative, hashed, STATE, STOCHASTIC)
    if TEMPERED:
        tl.store(temperature_at + e, temperature, mask=live)
    size = positive + negative
    return tl.sum(tl.sum(size * size, axis=1), axis=0)


@triton.jit(do_not_specialize=PLAIN)
def _step_kernel(
    table, gradients, sums, values, lr_at, scale_at, found_at, count, lr, kappa, beta, fresh, eps, decay, cool, heat,
    floor, span, cryo, seed_low, seed_high,
    MODE: tl.constexpr, LAZY: tl.constexpr, MAXIMIZE: tl.constexpr, PADDED: tl.constexpr, DECAYS: tl.constexpr,
    TEMPERED: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    ROUNDING: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    LR_TENSOR: tl.constexpr, SCALED: tl.constexpr, FOUND: tl.constexpr, COUNT: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """One program for each chunk. table: rows, behind them the words of the chunks."""
    found = 0.0
    if FOUND:
        found = tl.load(found_at).to(tl.float32)
    if found == 0.0:
        chunk = tl.program_id(0)
        word = tl.load(table + count * WIDTH + chunk)
        tensor = word >> 32
        begin = (word & 0xFFFFFFFF) * (COUNT * BLOCK)
        fields = table + tensor * WIDTH
        gradient = tl.load(gradients + tensor)
        left = tl.minimum(tl.load(fields + N) - begin, COUNT * BLOCK).to(tl.int32)
        if LR_TENSOR:
            lr = tl.load(lr_at).to(tl.float32)
        step = tl.div_rn(lr, cryo)
        scale = 1.0
        if SCALED:
            scale = tl.load(scale_at).to(tl.float32)
        resistance = kappa
        if MODE == 2:
            rms = tl.load(tl.load(fields + RMS).to(tl.pointer_type(tl.float32)))
            resistance = tl.where(rms > 0, tl.div_rn(kappa, tl.where(rms > 0, rms, 1.0)), 0.0)
        total = 0.0
        if left % RUN == 0:
            total += _chunk(
                fields, gradient, begin, left, values, scale, step, resistance, beta, fresh, eps, decay, cool, heat,
                floor, span, seed_low, seed_high, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS, TEMPERED, PARAM, GRAD,
                STATE, ROUNDING, STOCHASTIC, ROWS, ALIGNED, COUNT, RUN,
            )  # fmt: skip
        else:  # an end of odd size: single elements, block by block, in few registers
            for done in range(0, left, BLOCK):
                total += _chunk(
                    fields, gradient, begin + done, left - done, values, scale, step, resistance, beta, fresh, eps,
                    decay, cool, heat, floor, span, seed_low, seed_high, MODE, LAZY, SCALED, MAXIMIZE, PADDED, DECAYS,
                    TEMPERED, PARAM, GRAD, STATE, ROUNDING, STOCHASTIC, ROWS, ALIGNED, 1, 1,
                )  # fmt: skip
        if MODE == 2:
            tl.store(sums + chunk, total)


@triton.jit(do_not_specialize=["count", "chunks", "found_at"])
def _rms_kernel(table, sums, found_at, count, chunks, FOUND: tl.constexpr, LANES: tl.constexpr):
    """One program for each tensor: the root of the mean of (P + N)^2, from the sums of its chunks."""
    found = 0.0
    if FOUND:
        found = tl.load(found_at).to(tl.float32)
    if found == 0.0:
        tensor = tl.program_id(0)
        fields = table + tensor.to(tl.int64) * WIDTH
        firsts = table + count * WIDTH + chunks
        first = tl.load(firsts + tensor)
        last = tl.load(firsts + tensor + 1)
        lane = tl.arange(0, LANES)
        total = tl.zeros([LANES], tl.float32)
        for begin in range(first, last, LANES):
            total += tl.load(sums + begin + lane, mask=begin + lane < last, other=0.0)
        mean = tl.div_rn(tl.sum(total, axis=0), tl.load(fields + N).to(tl.float32))
        tl.store(tl.load(fields + RMS).to(tl.pointer_type(tl.float32)), tl.sqrt_rn(mean))


# ---- host ----


def _cut(table: Table) -> _Words:
    """Number of the first chunk of each tensor, and of all chunks."""
    firsts = np.zeros(len(table.rows) + 1, dtype=np.int64)
    np.cumsum(-(-table.rows[:, N.value] // CHUNK), out=firsts[1:])
    return firsts


def _fixed(table: Table) -> _Words:
    """Rows; of each chunk its tensor (upper half) and its place in it; the numbers of first chunks."""
    firsts = _cut(table)
    tensor = np.repeat(np.arange(len(table.rows)), np.diff(firsts))
    words = (tensor << 32) | (np.arange(firsts[-1]) - firsts[tensor])
    return np.concatenate([table.rows.reshape(-1), words, firsts])


def _uploaded(words: _Words, p: Tensor, graph: bool) -> Tensor:
    """Words on the device, without waiting for it."""
    if graph:  # by way of launches' parameters: memory of the host would be read again in each replay
        target = torch.zeros(len(words), dtype=torch.int64, device=p.device)
        torch._foreach_add_(list(target.unbind()), words.tolist())
        return target
    host = torch.from_numpy(words.copy())
    return host.pin_memory().to(p.device, non_blocking=True) if p.is_cuda else host.to(p.device)


def _on_device(table: Table) -> tuple[Tensor, Tensor]:
    """What a table keeps for as long as it is, and this step's gradients, sent anew when they have moved.

    A graph uploads what is not there yet in each of its replays, into memory of its own: a step outside may come
    before the first. What it finds there it reads for as long as it lives.
    """
    p = table.tensors[0].p
    graph = p.is_cuda and torch.cuda.is_current_stream_capturing()
    fixed, gradients = table.device_chunks, table.device_rows
    if graph:
        _read_by_graphs.extend(t for t in (fixed, gradients) if t is not None)
    if fixed is None:
        fixed = _uploaded(_fixed(table), p, graph)
    if gradients is None:
        gradients = _uploaded(table.rows[:, GRADIENT], p, graph)
    if not graph:
        table.device_chunks, table.device_rows = fixed, gradients
        if p.is_cuda:  # memory of another stream must not be given away before this step is done
            for t in (fixed, gradients):
                t.record_stream(torch.cuda.current_stream(p.device))
    return fixed, gradients


@functools.cache
def _values(device: torch.device) -> Tensor:
    """The numbers of the 256 codes."""
    return rounding.dequantized(torch.arange(256, dtype=torch.uint8), torch.ones(1)).to(device)


def _beside(x: float | Tensor | None, p: Tensor) -> Tensor | None:
    """A number that lies in a tensor, on the device of the parameters."""
    return x.to(p.device, non_blocking=True) if isinstance(x, Tensor) else None


def step(table: Table, hyper: Hyper) -> None:
    """Steps all tensors of a table (kssm_kernels/optim/sign_split/_table.py) on their device and its current stream.

    Reads ``hyper.lr``, ``hyper.grad_scale`` and ``hyper.found_inf`` on the device if they are tensors there, and then
    does nothing where found_inf is not 0: no call waits for the device, so that a step can be captured in a graph.
    """
    first, rows = table.tensors[0], table.rows
    p = first.p
    lr = hyper.lr if isinstance(hyper.lr, Tensor) and hyper.lr.device == p.device else float(hyper.lr)
    lr_at, scale_at, found_at = (_beside(x, p) for x in (lr, hyper.grad_scale, hyper.found_inf))
    consolidate, lazy = MODES[hyper.mode] == "consolidate", hyper.lazy and MODES[hyper.mode] != "paper"
    chunks = int((-(-rows[:, N.value] // CHUNK)).sum())
    if not chunks:
        return
    fixed, gradients = _on_device(table)
    places = np.bitwise_or.reduce(rows[:, : POSITIVE_SCALE.value])
    sums = torch.empty(chunks, dtype=torch.float32, device=p.device) if consolidate else fixed
    floor, cool, heat = hyper.temperature or (0.0, 0.0, 0.0)
    stochastic = p.dtype == torch.bfloat16 and hyper.param_rounding == "stochastic"
    seed = (word - (1 << 32) if word >> 31 else word for word in (hyper.seed & 0xFFFFFFFF, hyper.seed >> 32))
    launch(
        _step_kernel, chunks, p,
        fixed, gradients, sums, fixed if first.positive_scale is None else _values(p.device),
        *(fixed if t is None else t for t in (lr_at, scale_at, found_at)), len(rows),
        0.0 if isinstance(lr, Tensor) else lr,
        float(hyper.kappa), float(hyper.beta), 1.0 - hyper.beta, float(hyper.eps), float(hyper.weight_decay),
        float(cool), float(heat), float(floor), 1.0 - floor, float(hyper.cryo), *seed,
        MODE=hyper.mode, LAZY=lazy, MAXIMIZE=hyper.maximize, PADDED=hyper.eps != 0, DECAYS=hyper.weight_decay != 0,
        TEMPERED=first.temperature is not None,
        PARAM=TYPES[p.dtype], GRAD=TYPES[first.g.dtype], STATE=TYPES[first.positive.dtype],
        ROUNDING=2 if first.compensation is not None else int(stochastic),
        STOCHASTIC=first.step is not None and hyper.state_rounding == "stochastic",
        ROWS=bool(rows[:, CRYO.value].any()), ALIGNED=0 if (places % ALIGNMENT).any() else ALIGNMENT,
        LR_TENSOR=lr_at is not None, SCALED=scale_at is not None, FOUND=found_at is not None,
        COUNT=BLOCKS, RUN=RUN, num_warps=warps_of(BLOCKS, rounding.BLOCK),
    )  # fmt: skip
    if consolidate:
        launch(
            _rms_kernel, len(rows), p, fixed, sums, fixed if found_at is None else found_at, len(rows), chunks,
            FOUND=found_at is not None, LANES=LANES, num_warps=8,
        )  # fmt: skip

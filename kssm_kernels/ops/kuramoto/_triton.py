"""The Kuramoto update in Triton, rows of up to FUSED_LIMIT oscillators: all steps in one launch, phases in registers.

Tiles as in order_parameters/_triton.py; a row of more than 256 oscillators (backward: 128) is shared by the warps of
its program. Longer rows: _triton_long.py. Protocol and host logic: _gpu.py.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.ops.kuramoto import _gpu
from kssm_kernels.ops.kuramoto._gpu import Call, End, Rows, Target, Targets
from kssm_kernels.ops.kuramoto._triton_long import adjoint_step, adjoint_sums, row_blocks_of, step
from kssm_kernels.ops.kuramoto._triton_step import call_arguments, gain, mean_field, pulls, read, take_step
from kssm_kernels.ops.order_parameters import _triton as order_parameters
from kssm_kernels.triton_math.harmonics import add_harmonics, groups_of, harmonics_adjoint, put_features
from kssm_kernels.triton_math.launch import lanes, launch, power_of_two, tile_of, warps_of
from kssm_kernels.triton_math.phase import as_float

__all__ = [
    "FUSED_LIMIT", "adjoint_step", "adjoint_sums", "backward", "forward", "fused_backward", "fused_forward",
    "row_blocks_of", "step",
]  # fmt: skip

FUSED_LIMIT = 1024  # at 2048 the backward kernel has 16 warps, 128 registers and spills

# What a target is summed over (constexpr): not wanted, nothing, the row, the rows of a part, both.
UNWANTED, FULL, ROW, PART, ALL = 0, 1, 2, 3, 4


@triton.jit
def _forward_kernel(
    theta, row_stride, column_stride, features, phases, rows, n, first, steps, groups,
    coupling, coupling_stride, coupling_value, omega, omega_stride, omega_value,
    phase_lag, phase_lag_stride, phase_lag_value, noise_scale, noise_scale_stride, noise_scale_value,
    dt, seed_low, seed_high,
    K: tl.constexpr, OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr,
    KEEPING: tl.constexpr, HARMONICS: tl.constexpr, HP: tl.constexpr, PHASES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_row = index < rows
    row = index[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    live = live_row[:, None] & (j < n)
    in_rows = tl.where(live_row, index, 0)[:, None]  # rows past the last read the first one's operands
    k = read(coupling, coupling_stride, coupling_value, in_rows, j, live, K)
    w = read(omega, omega_stride, omega_value, in_rows, j, live, OMEGA)
    a = read(phase_lag, phase_lag_stride, phase_lag_value, in_rows, j, live, PHASE_LAG)
    d = read(noise_scale, noise_scale_stride, noise_scale_value, in_rows, j, live, NOISE)
    x = tl.load(theta + row * row_stride + j.to(tl.int64) * column_stride, mask=live, other=0.0).to(tl.float32)
    moved = tl.zeros([ROWS, BLOCK], tl.float32)
    for taken in range(steps):
        at = tl.zeros([1, 1], tl.int32) + first + taken
        x, moved = take_step(
            x, moved, live, n, k, w, a, d, dt, row, j, at, taken + 1, steps, seed_low, seed_high,
            OMEGA, PHASE_LAG, NOISE, KEEPING,
        )  # fmt: skip
    if PHASES:
        tl.store(phases + row * n + j, x.to(phases.dtype.element_ty), mask=live)
    if HARMONICS > 0:
        sums_c = tl.zeros([ROWS, HP], tl.float32)
        sums_s = tl.zeros([ROWS, HP], tl.float32)
        sums_c, sums_s = add_harmonics(x, live, sums_c, sums_s, groups, HP)
        put_features(features, index, live_row, sums_c, sums_s, n, HARMONICS, HP)


@triton.jit
def _put(target, total, row, part, j, n, live, live_row, live_part, accumulate, KIND: tl.constexpr):
    """Stores one operand's gradient at the end of a row (FULL, ROW) or of a part (PART, ALL)."""
    if KIND == 1 or KIND == 3:
        if KIND == 1:
            at, mask = target + row[:, None] * n + j, live
        else:
            at, mask = target + part[:, None] * n + j, live_part[:, None] & (j < n)
        if accumulate:
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(target.dtype.element_ty), mask=mask)
    else:
        if KIND == 2:
            to, alive = target + row, live_row
        else:
            to, alive = target + part, live_part
        sums = tl.sum(total, axis=1)
        if accumulate:
            sums += tl.load(to, mask=alive, other=0.0)
        tl.store(to, sums, mask=alive)


@triton.jit
def _backward_kernel(
    theta, row_stride, column_stride, states, features, g_features, g_end, rows, n, first, steps, groups, run, parts,
    accumulate,
    coupling, coupling_stride, coupling_value, omega, omega_stride, omega_value,
    phase_lag, phase_lag_stride, phase_lag_value, noise_scale, noise_scale_stride, noise_scale_value,
    dt, seed_low, seed_high,
    to_theta, to_coupling, to_omega, to_phase_lag, to_noise_scale,
    K: tl.constexpr, OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr, G_END: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr, T4: tl.constexpr,
    KEEPING: tl.constexpr, HARMONICS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_part = part < parts
    j = tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros([ROWS, BLOCK], tl.float32)
    kept_stride = (tl.zeros([1, 1], tl.int64) + rows) * n
    t0, t1, t2, t3, t4 = zero, zero, zero, zero, zero
    for index in range(run):
        number = part * run + index
        live_row = live_part & (number < rows)
        row = number[:, None]
        live = live_row[:, None] & (j < n)
        in_rows = tl.where(live_row, number, 0)[:, None]  # rows past the last read the first one's operands
        k = read(coupling, coupling_stride, coupling_value, in_rows, j, live, K)
        w = read(omega, omega_stride, omega_value, in_rows, j, live, OMEGA)
        a = read(phase_lag, phase_lag_stride, phase_lag_value, in_rows, j, live, PHASE_LAG)
        d = read(noise_scale, noise_scale_stride, noise_scale_value, in_rows, j, live, NOISE)
        start = theta + row * row_stride + j.to(tl.int64) * column_stride
        kept = states + row * n + j  # of the state before step s: s - 1 strides further on
        x = tl.load(start, mask=live, other=0.0).to(tl.float32)
        moved = zero
        for s in range(steps - 1):
            at = tl.zeros([1, 1], tl.int32) + first + s
            x, moved = take_step(
                x, moved, live, n, k, w, a, d, dt, row, j, at, s + 1, steps - 1, seed_low, seed_high,
                OMEGA, PHASE_LAG, NOISE, KEEPING,
            )  # fmt: skip
            if KEEPING == 0:
                tl.store(kept + s * kept_stride, x, mask=live)
            else:
                tl.store(kept + s * kept_stride, x + moved, mask=live)
        tl.debug_barrier()  # a thread may read below what another has written
        g = zero
        if G_END:
            g = tl.load(g_end + row * n + j, mask=live, other=0.0).to(tl.float32)
        if HARMONICS > 0:
            end = x
            if steps > 0:
                at = tl.zeros([1, 1], tl.int32) + first + steps - 1
                end, moved = take_step(
                    x,
                    moved,
                    live,
                    n,
                    k,
                    w,
                    a,
                    d,
                    dt,
                    row,
                    j,
                    at,
                    1,
                    1,
                    seed_low,
                    seed_high,
                    OMEGA,
                    PHASE_LAG,
                    NOISE,
                    KEEPING,
                )
            g += harmonics_adjoint(end, features, g_features, number, live_row, n, groups, HARMONICS)
            g = tl.where(live, g, 0.0)
        if T1 == 1 or T1 == 2:
            t1 = zero
        if T2 == 1 or T2 == 2:
            t2 = zero
        if T3 == 1 or T3 == 2:
            t3 = zero
        if T4 == 1 or T4 == 2:
            t4 = zero
        for back in range(steps):
            s = steps - 1 - back
            at = tl.zeros([1, 1], tl.int32) + first + s
            sine, cosine, z_s, z_c = mean_field(x, live, n)
            gk, p, q, lag_s, lag_c = pulls(g, x, sine, cosine, z_s, z_c, k, a, dt, PHASE_LAG)
            if T1 > 0:
                t1 = gain(t1, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 1)
            if T2 > 0:
                t2 = gain(t2, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 2)
            if T3 > 0:
                t3 = gain(t3, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 3)
            if T4 > 0:
                t4 = gain(t4, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 4)
            size = as_float(n)
            g_c = tl.div_rn(-tl.sum(gk * lag_s, axis=1), size)[:, None]
            g_s = tl.div_rn(tl.sum(gk * lag_c, axis=1), size)[:, None]
            g = tl.fma(-gk, q, g)
            g = tl.fma(g_s + zero, cosine, tl.fma(-g_c + zero, sine, g))
            if s > 1:
                x = tl.load(kept + (s - 2) * kept_stride, mask=live, other=0.0).to(tl.float32)
            elif s == 1:
                x = tl.load(start, mask=live, other=0.0).to(tl.float32)
        if T0 == 1:
            _put(to_theta, g, number, part, j, n, live, live_row, live_part, False, T0)
        elif T0 > 1:
            t0 += g
        if T1 == 1 or T1 == 2:
            _put(to_coupling, t1, number, part, j, n, live, live_row, live_part, accumulate, T1)
        if T2 == 1 or T2 == 2:
            _put(to_omega, t2, number, part, j, n, live, live_row, live_part, accumulate, T2)
        if T3 == 1 or T3 == 2:
            _put(to_phase_lag, t3, number, part, j, n, live, live_row, live_part, accumulate, T3)
        if T4 == 1 or T4 == 2:
            _put(to_noise_scale, t4, number, part, j, n, live, live_row, live_part, accumulate, T4)
    every = live_part[:, None] & (j < n)
    if T0 > 2:
        _put(to_theta, t0, part, part, j, n, every, live_part, live_part, False, T0)
    if T1 > 2:
        _put(to_coupling, t1, part, part, j, n, every, live_part, live_part, accumulate, T1)
    if T2 > 2:
        _put(to_omega, t2, part, part, j, n, every, live_part, live_part, accumulate, T2)
    if T3 > 2:
        _put(to_phase_lag, t3, part, part, j, n, every, live_part, live_part, accumulate, T3)
    if T4 > 2:
        _put(to_noise_scale, t4, part, part, j, n, every, live_part, live_part, accumulate, T4)


def _memory(start: Rows) -> Tensor:
    assert start.tensor is not None
    return start.tensor


def fused_forward(
    call: Call, start: Rows, first: int, steps: int, harmonics: int, features: Tensor | None, phases: Tensor | None
) -> None:
    theta = _memory(start)
    rows, block = tile_of(call.n, FUSED_LIMIT)
    numbers, kinds = call_arguments(call, theta)
    launch(
        _forward_kernel,
        triton.cdiv(call.rows, rows),
        theta,
        *(theta, start.row_stride, start.column_stride, theta if features is None else features),
        *(theta if phases is None else phases, call.rows, call.n, first, steps, groups_of(harmonics), *numbers),
        **kinds,
        KEEPING=call.keeping,
        HARMONICS=harmonics,
        HP=power_of_two(harmonics, 16),
        PHASES=phases is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps_of(rows, block),
    )


def _kind(target: Target | None) -> int:
    if target is None:
        return UNWANTED
    return (FULL if target.per_column else ROW) if target.per_row else (PART if target.per_column else ALL)


def fused_backward(
    call: Call,
    start: Rows,
    first: int,
    steps: int,
    states: Tensor | None,
    end: End | None,
    g: Tensor | None,
    targets: Targets,
    parts: int,
    accumulate: bool,
) -> None:
    theta = _memory(start)
    rows, block = tile_of(call.n, FUSED_LIMIT)
    numbers, kinds = call_arguments(call, theta)
    harmonics = 0 if end is None else end.harmonics
    places: list[Any] = [theta if t is None else t.tensor for t in targets]
    launch(
        _backward_kernel,
        triton.cdiv(parts, rows),
        theta,
        *(theta, start.row_stride, start.column_stride, theta if states is None else states),
        *((theta, theta) if end is None else (end.features, end.g_features)),
        *(theta if g is None else g, call.rows, call.n, first, steps, groups_of(harmonics)),
        *(triton.cdiv(call.rows, parts), parts, accumulate),
        *numbers,
        *places,
        **kinds,
        **{f"T{i}": _kind(t) for i, t in enumerate(targets)},
        G_END=g is not None,
        KEEPING=call.keeping,
        HARMONICS=harmonics,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps_of(rows, block, per_thread=4 if lanes() == 32 else 8),  # eight want 250 registers
    )


forward = functools.partial(_gpu.forward, sys.modules[__name__], order_parameters)
backward = functools.partial(_gpu.backward, sys.modules[__name__], order_parameters)

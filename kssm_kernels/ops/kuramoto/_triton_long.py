"""The Kuramoto update in Triton, rows of any length: one launch per step, for the mean field needs the whole device.

Rows are cut in row blocks of ROW_BLOCK oscillators, one program each, whose sums are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.ops.kuramoto._gpu import Call, Targets
from kssm_kernels.ops.kuramoto._triton_step import advance, call_arguments, fold, gain, pulls, read
from kssm_kernels.triton_math.launch import launch
from kssm_kernels.triton_math.phase import as_float, sincos

ROW_BLOCK = 4096
BLOCK = 1024  # phases at a time: eight per thread


def row_blocks_of(n: int) -> int:
    return -(-n // ROW_BLOCK)


@triton.jit
def _mean(z, row, n):
    """(S, C) of the row as z [rows, 3] = (C, S, M) has them."""
    return tl.load(z + 3 * row + 1), tl.load(z + 3 * row)


@triton.jit
def _step_kernel(
    state, moved, z, out, rows, n, row_blocks, step,
    coupling, coupling_stride, coupling_value, omega, omega_stride, omega_value,
    phase_lag, phase_lag_stride, phase_lag_value, noise_scale, noise_scale_stride, noise_scale_value,
    dt, seed_low, seed_high,
    K: tl.constexpr, OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr,
    KEEPING: tl.constexpr, ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = index // row_blocks + tl.zeros([1, 1], tl.int64)
    begin = (index % row_blocks) * ROW_BLOCK
    at = tl.zeros([1, 1], tl.int32) + step
    z_s, z_c = _mean(z, row, n)
    for tile in range(0, ROW_BLOCK, BLOCK):
        j = begin + tile + tl.arange(0, BLOCK)[None, :]
        live = j < n
        x = tl.load(state + row * n + j, mask=live, other=0.0)
        k = read(coupling, coupling_stride, coupling_value, row, j, live, K)
        w = read(omega, omega_stride, omega_value, row, j, live, OMEGA)
        a = read(phase_lag, phase_lag_stride, phase_lag_value, row, j, live, PHASE_LAG)
        d = read(noise_scale, noise_scale_stride, noise_scale_value, row, j, live, NOISE)
        s, c = sincos(x)
        to = x
        if KEEPING > 0:
            to = tl.load(moved + row * n + j, mask=live, other=0.0)
        y = advance(x, to, s, c, z_s, z_c, k, w, a, d, dt, row, j, at, seed_low, seed_high, OMEGA, PHASE_LAG, NOISE)
        if KEEPING > 0:  # folded at every step: the state alone is then the rounded phase, which the mean field is of
            y, rest = fold(x, y, KEEPING)
            tl.store(moved + row * n + j, rest, mask=live)
        tl.store(out + row * n + j, y, mask=live)


@triton.jit
def _sums_kernel(
    state, z, g_after, out, rows, n, row_blocks,
    coupling, coupling_stride, coupling_value, phase_lag, phase_lag_stride, phase_lag_value, dt,
    K: tl.constexpr, PHASE_LAG: tl.constexpr, ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, 2, row_blocks]: each row block's share of gC / N and gS / N."""
    index = tl.program_id(0).to(tl.int64)
    row = index // row_blocks + tl.zeros([1, 1], tl.int64)
    begin = (index % row_blocks) * ROW_BLOCK
    z_s, z_c = _mean(z, row, n)
    sums_c = tl.zeros([1, BLOCK], tl.float32)
    sums_s = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(0, ROW_BLOCK, BLOCK):
        j = begin + tile + tl.arange(0, BLOCK)[None, :]
        live = j < n
        x = tl.load(state + row * n + j, mask=live, other=0.0)
        g = tl.load(g_after + row * n + j, mask=live, other=0.0)
        k = read(coupling, coupling_stride, coupling_value, row, j, live, K)
        a = read(phase_lag, phase_lag_stride, phase_lag_value, row, j, live, PHASE_LAG)
        s, c = sincos(x)
        gk, p, q, lag_s, lag_c = pulls(g, x, s, c, z_s, z_c, k, a, dt, PHASE_LAG)
        sums_c -= gk * lag_s
        sums_s += gk * lag_c
    scale = tl.div_rn(1.0, as_float(n))
    at = out + row * (2 * row_blocks) + index % row_blocks
    tl.store(at, tl.sum(sums_c, axis=1)[:, None] * scale)
    tl.store(at + row_blocks, tl.sum(sums_s, axis=1)[:, None] * scale)


@triton.jit
def _collect(target, total, row, j, n, live, KIND: tl.constexpr):
    """FULL (1): the target gains at once, and nothing is left; otherwise the total stays."""
    if KIND == 1:
        at = target + row * n + j
        tl.store(at, tl.load(at, mask=live, other=0.0) + total, mask=live)
        total = total * 0.0
    return total


@triton.jit
def _leave(target, total, index, KIND: tl.constexpr):
    if KIND == 2:
        at = target + index + tl.zeros([1], tl.int64)
        tl.store(at, tl.load(at) + tl.sum(total, axis=1))


@triton.jit
def _adjoint_kernel(
    state, z, gz, g_after, rows, n, row_blocks, step,
    coupling, coupling_stride, coupling_value, omega, omega_stride, omega_value,
    phase_lag, phase_lag_stride, phase_lag_value, noise_scale, noise_scale_stride, noise_scale_value,
    dt, seed_low, seed_high,
    to_coupling, to_omega, to_phase_lag, to_noise_scale,
    K: tl.constexpr, OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr, T4: tl.constexpr,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = index // row_blocks + tl.zeros([1, 1], tl.int64)
    begin = (index % row_blocks) * ROW_BLOCK
    at = tl.zeros([1, 1], tl.int32) + step
    z_s, z_c = _mean(z, row, n)
    g_c, g_s = tl.load(gz + 2 * row), tl.load(gz + 2 * row + 1)
    zero = tl.zeros([1, BLOCK], tl.float32)
    t1, t2, t3, t4 = zero, zero, zero, zero
    for tile in range(0, ROW_BLOCK, BLOCK):
        j = begin + tile + tl.arange(0, BLOCK)[None, :]
        live = j < n
        x = tl.load(state + row * n + j, mask=live, other=0.0)
        g = tl.load(g_after + row * n + j, mask=live, other=0.0)
        k = read(coupling, coupling_stride, coupling_value, row, j, live, K)
        a = read(phase_lag, phase_lag_stride, phase_lag_value, row, j, live, PHASE_LAG)
        s, c = sincos(x)
        gk, p, q, lag_s, lag_c = pulls(g, x, s, c, z_s, z_c, k, a, dt, PHASE_LAG)
        if T1 > 0:
            t1 = gain(t1, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 1)
            t1 = _collect(to_coupling, t1, row, j, n, live, T1)
        if T2 > 0:
            t2 = gain(t2, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 2)
            t2 = _collect(to_omega, t2, row, j, n, live, T2)
        if T3 > 0:
            t3 = gain(t3, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 3)
            t3 = _collect(to_phase_lag, t3, row, j, n, live, T3)
        if T4 > 0:
            t4 = gain(t4, g, gk, p, q, dt, row, j, at, seed_low, seed_high, 4)
            t4 = _collect(to_noise_scale, t4, row, j, n, live, T4)
        g = tl.fma(-gk, q, g)
        g = tl.fma(g_s + zero, c, tl.fma(-g_c + zero, s, g))
        tl.store(g_after + row * n + j, g, mask=live)
    _leave(to_coupling, t1, index, T1)
    _leave(to_omega, t2, index, T2)
    _leave(to_phase_lag, t3, index, T3)
    _leave(to_noise_scale, t4, index, T4)


def step(call: Call, state: Tensor, moved: Tensor | None, z: Tensor, index: int, out: Tensor) -> None:
    numbers, kinds = call_arguments(call, state)
    row_blocks = row_blocks_of(call.n)
    grid = call.rows * row_blocks
    kept = state if moved is None else moved
    arguments = (state, kept, z, out, call.rows, call.n, row_blocks, index, *numbers)
    launch(_step_kernel, grid, state, *arguments, **kinds, KEEPING=call.keeping, ROW_BLOCK=ROW_BLOCK, BLOCK=BLOCK)


def adjoint_sums(call: Call, state: Tensor, z: Tensor, g: Tensor) -> Tensor:
    numbers, kinds = call_arguments(call, state)
    row_blocks = row_blocks_of(call.n)
    out = torch.empty(call.rows, 2, row_blocks, dtype=torch.float32, device=state.device)
    arguments = (state, z, g, out, call.rows, call.n, row_blocks, *numbers[:3], *numbers[6:9], call.dt)
    meta = {"K": kinds["K"], "PHASE_LAG": kinds["PHASE_LAG"], "ROW_BLOCK": ROW_BLOCK, "BLOCK": BLOCK}
    launch(_sums_kernel, call.rows * row_blocks, state, *arguments, **meta)
    return out.sum(-1)


def adjoint_step(call: Call, state: Tensor, z: Tensor, gz: Tensor, index: int, g: Tensor, targets: Targets) -> None:
    numbers, kinds = call_arguments(call, state)
    row_blocks = row_blocks_of(call.n)
    places = [state if t is None else t.tensor for t in targets]
    wanted = {f"T{i}": 0 if t is None else 1 if t.per_column else 2 for i, t in enumerate(targets, 1)}
    arguments = (state, z, gz, g, call.rows, call.n, row_blocks, index, *numbers, *places)
    launch(
        _adjoint_kernel, call.rows * row_blocks, state, *arguments, **kinds, **wanted, ROW_BLOCK=ROW_BLOCK, BLOCK=BLOCK
    )

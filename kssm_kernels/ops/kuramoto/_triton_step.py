"""One mean-field step of a tile of phases and its adjoint. Equations: __init__.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.ops.kuramoto import _update
from kssm_kernels.ops.kuramoto._gpu import Call, Rows
from kssm_kernels.triton_math.phase import MAGIC, as_float, normals, sincos

# How a kernel reads an operand (constexpr): not there, a number, one number per row, one per oscillator.
ABSENT, NUMBER, PER_ROW, PER_OSCILLATOR = -1, 0, 1, 2

FOLD, TURN, REST = tl.constexpr(_update.FOLD), tl.constexpr(_update.TURN), tl.constexpr(_update.REST)
TURNS = tl.constexpr(0.15915494)  # 1 / 2 pi


def operand_arguments(operand: Rows | None, anything: Tensor) -> tuple[tuple[Any, ...], int]:
    """((memory, row stride, value), how to read it); ``anything`` stands for memory that is not read."""
    if operand is None:
        return (anything, 0, 0.0), ABSENT
    if operand.tensor is None:
        return (anything, 0, float(operand.value)), NUMBER
    return (operand.tensor, operand.row_stride, 0.0), PER_OSCILLATOR if operand.column_stride else PER_ROW


def call_arguments(call: Call, anything: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What the kernels call ``coupling, .., noise_scale_value, dt, seed_low, seed_high``, and their constexprs."""
    numbers: list[Any] = []
    kinds: dict[str, int] = {}
    operands = (call.coupling, call.omega, call.phase_lag, call.noise_scale)
    for name, operand in zip(("K", "OMEGA", "PHASE_LAG", "NOISE"), operands, strict=True):
        memory, kinds[name] = operand_arguments(operand, anything)
        numbers += memory
    low, high = call.seed & 0xFFFFFFFF, call.seed >> 32
    # as signed words: one type, and so one compiled kernel, for all seeds
    signed = (word - (1 << 32) if word >= 1 << 31 else word for word in (low, high))
    return (*numbers, call.dt, *signed), kinds


@triton.jit
def read(memory, row_stride, value, row, j, live, KIND: tl.constexpr):
    """An operand for rows ``row [ROWS, 1]`` and oscillators ``j [1, BLOCK]``: a number, [ROWS, 1] or [ROWS, BLOCK]."""
    if KIND == 2:
        return tl.load(memory + row * row_stride + j, mask=live, other=0.0)
    elif KIND == 1:
        return tl.load(memory + row * row_stride, mask=row >= 0, other=0.0)
    else:
        return value


@triton.jit
def mean_field(x, live, n):
    """sin x, cos x (zero where not live), and their means over n, [ROWS, 1]."""
    s, c = sincos(x)
    s = tl.where(live, s, 0.0)
    c = tl.where(live, c, 0.0)
    size = as_float(n)
    return s, c, tl.div_rn(tl.sum(s, axis=1), size)[:, None], tl.div_rn(tl.sum(c, axis=1), size)[:, None]


@triton.jit
def shifted(x, s, c, phase_lag, PHASE_LAG: tl.constexpr):
    if PHASE_LAG >= 0:
        s, c = sincos(x + phase_lag)
    return s, c


@triton.jit
def advance(
    x, to, s, c, z_s, z_c, coupling, omega, phase_lag, noise_scale, dt, row, j, step, seed_low, seed_high,
    OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """``to`` + dt (omega + K p) - delta xi, from phases x."""
    lag_s, lag_c = shifted(x, s, c, phase_lag, PHASE_LAG)
    velocity = coupling * tl.fma(z_s + x * 0.0, lag_c, -(z_c * lag_s))
    if OMEGA >= 0:
        velocity += omega
    y = tl.fma(dt + x * 0.0, velocity, to)
    if NOISE >= 0:
        xi = normals(row, j, step, seed_low, seed_high)
        y = tl.fma(-noise_scale + xi * 0.0, xi, y)
    return y


@triton.jit
def fold(x, moved, KEEPING: tl.constexpr):
    """``moved`` put into x, and what rounding cuts off: fold of csrc/math/phase_step.h."""
    y = moved
    if KEEPING == 2:
        turns = (x * TURNS + MAGIC) - MAGIC
        x = x - turns * TURN
        y = y - turns * REST
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


@triton.jit
def take_step(
    x, moved, live, n, coupling, omega, phase_lag, noise_scale, dt, row, j, step, taken, steps, seed_low, seed_high,
    OMEGA: tl.constexpr, PHASE_LAG: tl.constexpr, NOISE: tl.constexpr, KEEPING: tl.constexpr,
):  # fmt: skip
    """Phases x, or x + moved, of whole rows after step number ``step``, the last of ``taken`` of a launch's ``steps``.

    KEEPING: WHOLE, IN_TWO or WRAPPING of _gpu.py. Behind the last step ``moved`` is less than
    an ulp of x.
    """
    if KEEPING == 0:
        s, c, z_s, z_c = mean_field(x, live, n)
        x = advance(
            x,
            x,
            s,
            c,
            z_s,
            z_c,
            coupling,
            omega,
            phase_lag,
            noise_scale,
            dt,
            row,
            j,
            step,
            seed_low,
            seed_high,
            OMEGA,
            PHASE_LAG,
            NOISE,
        )
    else:
        theta = x + moved
        s, c, z_s, z_c = mean_field(theta, live, n)
        moved = advance(
            theta, moved, s, c, z_s, z_c, coupling, omega, phase_lag, noise_scale, dt, row, j, step,
            seed_low, seed_high, OMEGA, PHASE_LAG, NOISE,
        )  # fmt: skip
        if (taken % FOLD.value == 0) | (taken == steps):  # the interpreter counts in Python's numbers
            x, moved = fold(x, moved, KEEPING)
    return x, moved


@triton.jit
def pulls(g, x, s, c, z_s, z_c, coupling, phase_lag, dt, PHASE_LAG: tl.constexpr):
    """dt g K, p, q and (sin, cos) of theta + alpha."""
    lag_s, lag_c = shifted(x, s, c, phase_lag, PHASE_LAG)
    p = tl.fma(z_s + x * 0.0, lag_c, -(z_c * lag_s))
    q = tl.fma(z_s + x * 0.0, lag_s, z_c * lag_c)
    return dt * g * coupling, p, q, lag_s, lag_c


@triton.jit
def gain(total, g, gk, p, q, dt, row, j, step, seed_low, seed_high, WHICH: tl.constexpr):
    """What operand WHICH (1 coupling, 2 omega, 3 phase_lag, 4 noise_scale) gains in one step."""
    if WHICH == 1:
        total += dt * g * p
    elif WHICH == 2:
        total += dt * g
    elif WHICH == 3:
        total -= gk * q
    else:
        total -= g * normals(row, j, step, seed_low, seed_high)
    return total

"""The calls whose kernels are compiled and whose bytes are counted: sizes of a K-SSM layer, and one long ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.ops.kuramoto import _gpu
from kssm_kernels.ops.kuramoto._update import Update
from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split._hyper import hyper_of
from kssm_kernels.optim.sign_split._table import Table
from kssm_kernels.optim.sign_split._tensors import Tensors

N, HARMONICS = 192, 32


@dataclass(frozen=True)
class Case:
    """``call(kernels, rows, dtype)`` launches; ``kernels(op)`` is a GPU backend's module of the op.

    ``least(rows, size)``: bytes of the arrays it must read and write once, for elements of ``size`` bytes.
    ``operations``: float32 and integer operations per oscillator by the formulas, for the bound.
    """

    name: str
    kernels: tuple[str, ...]  # whose bulk path this is, as the compiler's listing names them
    rows: int
    n: int
    call: Callable[[Callable[[str], Any], int, torch.dtype], None]
    least: Callable[[int, int], int]
    operations: float
    backends: tuple[str, ...] = ("cuda", "triton")


# Operations per oscillator, a fused multiply-add as one: a sine and a cosine, a walk's start, one group of harmonics
# forward (two for the walk, eight products, two sums) and backward, one step and its adjoint, one normal.
SINCOS, START, GROUP_FORWARD, GROUP_BACKWARD, STEP, STEP_BACKWARD, NORMAL = 24, 16, 12, 12, 8, 20, 75


def _groups(harmonics: int) -> int:
    return math.ceil(harmonics / 5)


def _theta(rows: int, n: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return ((torch.rand(rows, n, generator=g) * 2 - 1) * math.pi).to(dtype)


def _order(harmonics: int, n: int, backward: bool) -> Callable[..., None]:
    def call(kernels: Callable[[str], Any], rows: int, dtype: torch.dtype) -> None:
        theta = _theta(rows, n, dtype)
        if backward:
            features = torch.full((rows, 3 * harmonics), 0.5, dtype=dtype)
            kernels("order_parameters").backward(theta, features, features.clone())
        else:
            kernels("order_parameters").forward(theta, harmonics)

    return call


def _update(make: Callable[[int], Update], n: int, backward: bool, shared: bool = False) -> Callable[..., None]:
    """``make(rows)``: the call's operands. Backward: gradients of all that are tensors."""

    def call(kernels: Callable[[str], Any], rows: int, dtype: torch.dtype) -> None:
        theta, u = _theta(1 if shared else rows, n, dtype), make(rows)
        theta = theta[0] if shared else theta
        module, batch_shape = kernels("kuramoto_update"), torch.Size([rows])
        if not backward:
            module.forward(theta, u, batch_shape)
            return
        features, g_features = (
            torch.full((rows, 3 * u.harmonics), 0.5, dtype=dtype) if u.harmonics else None for _ in range(2)
        )
        g_phases = torch.ones(rows, n, dtype=dtype) if u.return_phases else None
        needed = (True, *(isinstance(v, Tensor) for v in u[:4]))
        module.backward(theta, u, batch_shape, features, None, g_features, g_phases, needed)

    return call


def _plain(steps: int) -> Callable[[int], Update]:
    return lambda rows: Update(0.7, None, None, None, None, 0.1, steps, 0, True)


def _bank(rows: int) -> Update:
    """The v3 bank's call: one vector of phases, a shift and a coupling strength for each row, noise."""
    return Update(torch.rand(rows, 1), torch.rand(rows, 1), None, torch.rand(1), 7, 1.0, 1, HARMONICS, True)


def _bistable(backward: bool) -> Callable[..., None]:
    def call(kernels: Callable[[str], Any], rows: int, dtype: torch.dtype) -> None:
        params = torch.rand(rows, 10).to(dtype)
        module = kernels("bistable_coupling")
        if backward:
            module.backward(params, 0.1, 10.0, *(torch.ones(rows) for _ in range(3)))
        else:
            module.forward(params, 0.1, 10.0)

    return call


def _sign_split(kernels: Callable[[str], Any], rows: int, dtype: torch.dtype) -> None:
    """One tensor in the default mode, with means in float32."""
    n = rows * ELEMENTS
    p, g = torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype)
    absent: tuple[None, ...] = (None,) * 7
    tensors = Tensors(p, g, torch.ones(n), torch.ones(n), *absent, 1, 0)
    kernels("sign_split_ema").step(Table.of([tensors]), hyper_of(SignSplitEMA([p]).param_groups[0], None, None))


ROWS, LONG, ELEMENTS = 4096, 100_000, 256
# Calls of many steps, whose kernels keep phases in two: compiled, and not counted, for the interpreter takes minutes.
# 17 steps: nothing is taken off; 257: whole turns are (_update.py).
MANY_STEPS = [
    _update(_plain(steps), n, backward) for steps in (17, 257) for n in (N, LONG) for backward in (False, True)
]
F = 3 * HARMONICS
CASES = [
    Case(
        "order_parameters, forward", ("order_parameters_forward",), ROWS, N, _order(HARMONICS, N, False),
        lambda rows, size: rows * (N + F) * size,
        SINCOS + START + GROUP_FORWARD * _groups(HARMONICS),
    ),
    Case(
        "order_parameters, backward", ("order_parameters_backward",), ROWS, N, _order(HARMONICS, N, True),
        lambda rows, size: rows * (2 * N + 2 * F) * size,
        SINCOS + START + GROUP_BACKWARD * _groups(HARMONICS),
    ),
    Case(
        "order_parameters of one long ensemble, forward", ("order_parameters_forward",), 1, LONG,
        _order(HARMONICS, LONG, False),
        lambda rows, size: rows * (LONG + F) * size,
        SINCOS + START + GROUP_FORWARD * _groups(HARMONICS),
    ),
    Case(
        "kuramoto_update, 1 step, forward", ("kuramoto_forward",), ROWS, N, _update(_plain(1), N, False),
        lambda rows, size: rows * 2 * N * size,
        SINCOS + STEP,
    ),
    Case(
        "kuramoto_update, 1 step, backward", ("kuramoto_backward",), ROWS, N, _update(_plain(1), N, True),
        lambda rows, size: rows * 3 * N * size,
        SINCOS + STEP_BACKWARD,
    ),
    Case(
        "kuramoto_update, 16 steps, forward", ("kuramoto_forward",), ROWS, N, _update(_plain(16), N, False),
        lambda rows, size: rows * 2 * N * size,
        16 * (SINCOS + STEP),
    ),
    # the states before steps 2 .. 16 are written and all but the last read back, in float32
    Case(
        "kuramoto_update, 16 steps, backward", ("kuramoto_backward",), ROWS, N, _update(_plain(16), N, True),
        lambda rows, size: rows * N * (3 * size + (15 + 14) * 4),
        15 * (SINCOS + STEP) + 16 * (SINCOS + STEP_BACKWARD),
    ),
    Case(
        "kuramoto_features of the v3 bank, forward", ("kuramoto_forward",), ROWS, N, _update(_bank, N, False, True),
        lambda rows, size: N * size + rows * ((N + F) * size + 2 * 4),
        2 * SINCOS + STEP + NORMAL + START + GROUP_FORWARD * _groups(HARMONICS),
    ),
    # out: the shared phases' gradient of each run of rows, and two numbers per row
    Case(
        "kuramoto_features of the v3 bank, backward", ("kuramoto_backward",), ROWS, N, _update(_bank, N, True, True),
        lambda rows, size: rows * ((N + 2 * F) * size + 4 * 4) + min(rows, _gpu.AT_WORK // N) * (N + 1) * 4,
        3 * SINCOS + STEP + STEP_BACKWARD + 2 * NORMAL + START + GROUP_BACKWARD * _groups(HARMONICS),
    ),
    Case(
        "kuramoto_update of one long ensemble, 1 step, forward", ("kuramoto_step",), 1, LONG,
        _update(_plain(1), LONG, False),
        lambda rows, size: rows * LONG * 3 * 4,  # read for the mean field, read and written for the step, in float32
        2 * SINCOS + STEP,
    ),
    Case(
        "kuramoto_update of one long ensemble, 1 step, backward", ("kuramoto_sums", "kuramoto_adjoint"), 1, LONG,
        _update(_plain(1), LONG, True),
        lambda rows, size: rows * LONG * 6 * 4,  # mean field; sums: phases, g; adjoint: phases, g, g (in float32)
        3 * SINCOS + 2 * STEP_BACKWARD,
    ),
    Case(
        "bistable_coupling, forward", (), ROWS, 1, _bistable(False), lambda rows, size: rows * (10 * size + 3 * 4), 30,
    ),
    Case(
        "bistable_coupling, backward", (), ROWS, 1, _bistable(True), lambda rows, size: rows * (20 * size + 3 * 4), 60,
    ),
    # in: p, g, P, N; out: p, P, N; a division takes ten operations
    Case(
        "SignSplitEMA, normalized", ("sign_split_step",), ROWS, ELEMENTS, _sign_split,
        lambda rows, size: rows * ELEMENTS * (3 * size + 4 * 4), 30, ("cuda",),
    ),
]  # fmt: skip

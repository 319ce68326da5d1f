"""What it costs to keep the phases of a long call: theta [64, 192], float32, one thread.

A call of up to 16 steps adds each step to the phase itself; longer ones keep what they have added since in a number of
its own, and more than 256 steps also take whole turns off. The baseline is as many steps in calls of 16.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compare import Figure, check_op, milliseconds, record
from bench.interleave import SMOKE, Turns, rounds_for
from kssm_kernels import kuramoto_update
from tests.support import naive

SHAPE = (4, 192) if SMOKE else (64, 192)
PLAIN, DT = 16, 0.05
TARGET = 1.05  # of the plain calls' time


@pytest.mark.parametrize("calls", [4, 64])
def test_keeping_the_phases_of_a_long_call(benchmark: BenchmarkFixture, calls: int) -> None:
    torch.set_num_threads(1)
    theta, omega, grad = (torch.rand(SHAPE) * 2 - 1) * math.pi, torch.randn(SHAPE[-1]), torch.randn(SHAPE)
    steps = calls * PLAIN

    def whole(theta: torch.Tensor) -> torch.Tensor:
        return kuramoto_update(theta, 1.5, omega=omega.to(theta), dt=DT, steps=steps)

    def plain(theta: torch.Tensor) -> torch.Tensor:
        return kuramoto_update(theta, 1.5, omega=omega.to(theta), dt=DT, steps=PLAIN)

    check_op("kuramoto_update", plain, lambda t: naive.mean_field(t, 1.5, omega.to(t), DT, PLAIN), theta, grad)
    turns = [Turns(partial(function, theta)) for function in (whole, plain)]

    def round_of_all() -> None:
        for t in turns:
            t.turn()

    benchmark.pedantic(round_of_all, rounds=rounds_for(turns))
    if benchmark.stats is None:  # --benchmark-disable
        return
    together = milliseconds(turns[0].samples)
    apart = milliseconds([calls * s for s in turns[1].samples])
    case = f"kuramoto_update {steps} steps in one call, forward"
    record(benchmark, [Figure(case, f"{calls} calls of {PLAIN}", "ms", together, apart, "share", TARGET)])

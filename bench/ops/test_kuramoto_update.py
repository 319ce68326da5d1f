"""The mean-field update, 1 and 16 steps, theta [8, 512, 192], natural frequencies per oscillator, float32.

The baseline is the O(N) mean-field form in eager and under torch.compile, which unrolls the steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compare import check_op, compare, forward_backward
from bench.interleave import SMOKE
from kssm_kernels import kuramoto_update
from tests.support import naive

SHAPE = (2, 16, 192) if SMOKE else (8, 512, 192)
COUPLING, DT = 1.5, 0.1


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("steps", [1, 16])
def test_kuramoto_update(benchmark: BenchmarkFixture, steps: int, direction: str) -> None:
    theta = (torch.rand(SHAPE) * 2 - 1) * math.pi
    omega = torch.randn(SHAPE[-1])
    grad = torch.randn(SHAPE)

    def ours(theta: torch.Tensor) -> torch.Tensor:
        return kuramoto_update(theta, COUPLING, omega=omega, dt=DT, steps=steps)

    def eager(theta: torch.Tensor) -> torch.Tensor:
        return naive.mean_field(theta, COUPLING, omega.to(theta.dtype), DT, steps)

    functions = {"ours": ours, "eager": eager}
    if not SMOKE:
        functions["torch.compile"] = torch.compile(eager, dynamic=False)

    check_op("kuramoto_update", ours, eager, theta, grad)
    whole = theta.clone().requires_grad_()
    if direction == "forward":
        calls = {name: (lambda f=f: f(theta)) for name, f in functions.items()}
    else:
        calls = {name: forward_backward(f, (whole,), grad) for name, f in functions.items()}
    case = f"kuramoto_update {steps} step{'s' if steps > 1 else ''} {direction}"
    compare(benchmark, case, calls.pop("ours"), calls, {})

"""Case M: theta [8, 512, 192], 32 harmonics, float32, beside the family's formula in eager and under torch.compile; and
the pure-torch path beside the formula."""

from __future__ import annotations

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compare import FLOOR, check_op, compare, floor, forward_backward
from bench.interleave import SMOKE, THREADS
from kssm_kernels import order_parameters, use_backend
from tests.support import naive

SHAPE = (2, 16, 192) if SMOKE else (8, 512, 192)
HARMONICS = 32
# 1.4 times the floor is 71 % of it.
TARGETS = {
    "forward": {"eager": 110.0, "torch.compile": 16.0, FLOOR: 1 / 1.4},
    "forward and backward": {"eager": 150.0, "torch.compile": 28.0},
}


def ours(theta: torch.Tensor) -> torch.Tensor:
    return order_parameters(theta, HARMONICS)


def eager(theta: torch.Tensor) -> torch.Tensor:
    return naive.order_parameters(theta, HARMONICS)


@pytest.mark.parametrize("direction", TARGETS)
def test_order_parameters(benchmark: BenchmarkFixture, direction: str) -> None:
    theta = (torch.rand(SHAPE) * 2 - 1) * math.pi
    grad = torch.randn(*SHAPE[:-1], 3 * HARMONICS)
    functions = {"ours": ours, "eager": eager}
    if not SMOKE:
        functions["torch.compile"] = torch.compile(eager, dynamic=False)

    check_op("order_parameters", ours, eager, theta, grad)
    whole = theta.clone().requires_grad_()
    if direction == "forward":
        calls = {name: (lambda f=f: f(theta)) for name, f in functions.items()}
    else:
        calls = {name: forward_backward(f, (whole,), grad) for name, f in functions.items()}
    calls |= floor(theta.numel(), HARMONICS, 1 if direction == "forward" else 2, THREADS)
    compare(benchmark, f"order_parameters {direction}", calls.pop("ours"), calls, TARGETS[direction])


@pytest.mark.parametrize("direction", TARGETS)
def test_pure_torch_path(benchmark: BenchmarkFixture, direction: str) -> None:
    """What runs on a device without a kernel, here on the CPU: several times faster than the formula."""
    theta = (torch.rand(SHAPE) * 2 - 1) * math.pi
    grad = torch.randn(*SHAPE[:-1], 3 * HARMONICS)
    whole = theta.clone().requires_grad_()
    with use_backend("torch"):
        check_op("order_parameters in pure torch", ours, eager, theta, grad)
        if direction == "forward":
            calls = {f.__name__: (lambda f=f: f(theta)) for f in (ours, eager)}
        else:
            calls = {f.__name__: forward_backward(f, (whole,), grad) for f in (ours, eager)}
        compare(benchmark, f"order_parameters in pure torch, {direction}", calls.pop("ours"), calls, {"eager": 3.0})

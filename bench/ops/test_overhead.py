"""What a call costs on tiny tensors, and what ``import kssm_kernels`` adds to ``import torch``.

The primary figure is the excess over an empty Python function of the same two arguments, per call, in a loop of CALLS.
Context for calls with gradient: an ``autograd.Function`` that returns its input, through forward and through forward
and backward. No op that is differentiable in Python can cost less than that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.compare import Figure, check_op, record
from bench.interleave import SMOKE, Call, Quantiles, interleave
from kssm_kernels import bistable_coupling, kuramoto_features, kuramoto_update, order_parameters
from tests.support import naive

CALLS = 100 if SMOKE else 1000
LIMIT = {"without gradient": 5.0, "with gradient": 15.0}  # microseconds over an empty call
LIMIT_IMPORT = 50.0  # milliseconds
Op = Callable[[Tensor], Any]

OPS: dict[str, tuple[Op, Op, tuple[int, ...]]] = {
    "order_parameters": (lambda t: order_parameters(t, 2), lambda t: naive.order_parameters(t, 2), (1, 8)),
    "kuramoto_update": (lambda t: kuramoto_update(t, 1.0), lambda t: naive.mean_field(t, 1.0), (1, 8)),
    "kuramoto_features": (
        lambda t: kuramoto_features(t, 1.0, 2),
        lambda t: naive.order_parameters(naive.mean_field(t, 1.0), 2),
        (1, 8),
    ),
    "bistable_coupling": (
        lambda t: bistable_coupling(t)[0],
        lambda t: naive.bistable_coupling(t)[0],
        (1, 10),
    ),
}


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def empty(theta: Tensor) -> Tensor:
    return theta


def in_rows(function: Op) -> Op:
    """One row of results per row of input, also where an op returns one number per row."""
    return lambda t: function(t).reshape(*t.shape[:-1], -1)


def repeated(function: Op, theta: Tensor) -> Call:
    def loop() -> None:
        for _ in range(CALLS):
            function(theta)

    return loop


def through_backward(function: Op, theta: Tensor) -> Op:
    grad = torch.ones_like(function(theta))
    return lambda theta: torch.autograd.grad(function(theta), theta, grad)


def per_call(loops: Quantiles) -> Quantiles:
    scale = 1e6 / CALLS
    return Quantiles(loops.median * scale, loops.low * scale, loops.high * scale, loops.samples)


@pytest.mark.parametrize("op", OPS)
def test_call_overhead(benchmark: BenchmarkFixture, op: str) -> None:
    function, formula, shape = OPS[op]
    theta = torch.rand(shape)
    leaf = theta.clone().requires_grad_()
    check_op(op, in_rows(function), in_rows(formula), theta, torch.ones_like(in_rows(function)(theta)))

    measured = interleave(
        {
            "empty": repeated(empty, theta),
            "without gradient": repeated(function, theta),
            "with gradient": repeated(function, leaf),
            "identity": repeated(Identity.apply, leaf),
            "with backward": repeated(through_backward(function, leaf), leaf),
            "identity with backward": repeated(through_backward(Identity.apply, leaf), leaf),
        },
        seconds=0.2 if SMOKE else 3.0,
    )
    us = {name: per_call(q) for name, q in measured.items()}
    benchmark.pedantic(function, args=(theta,), rounds=10, iterations=CALLS, warmup_rounds=1)
    pairs = [
        ("without gradient", "an empty Python call", "empty", LIMIT["without gradient"]),
        ("with gradient", "an empty Python call", "empty", LIMIT["with gradient"]),
        ("with gradient", "an identity autograd.Function", "identity", None),
        ("with backward", "the identity with backward", "identity with backward", None),
    ]
    record(
        benchmark,
        [
            Figure(f"one call, {op} {shape} {mode}", against, "us", us[mode], us[base], "excess", limit)
            for mode, against, base, limit in pairs
        ],
    )


IMPORTS = "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); import kssm_kernels; "
IMPORTS += "print(time.perf_counter() - middle, middle - start)"


def test_import_time(benchmark: BenchmarkFixture) -> None:
    """Milliseconds of ``import kssm_kernels`` after ``import torch``, in a fresh process that measures them itself.

    The difference of two processes' times would drown in the seconds that torch takes; the fixture's time is of no use.
    """
    # an installed package has its bytecode; a checkout gets it from the first process, unless that is switched off
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    added: list[float] = []
    torch_itself: list[float] = []

    def fresh_process() -> None:
        shown = subprocess.run(
            [sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout
        ours, torchs = map(float, shown.split())
        added.append(1e3 * ours)
        torch_itself.append(1e3 * torchs)

    fresh_process()  # writes the bytecode and brings the files into memory
    added.clear()
    torch_itself.clear()
    benchmark.pedantic(fresh_process, rounds=2 if SMOKE else 9)
    ours, torchs = Quantiles.of(added), Quantiles.of(torch_itself)
    figure = Figure("import kssm_kernels", "import torch, just before", "ms", ours, torchs, "itself", LIMIT_IMPORT)
    record(benchmark, [figure])

"""Every op on every backend of a device, beside the family's formula in eager and under torch.compile.

    pytest tests bench -m gpu

writes docs/gpu_performance.md. Without a device the cases are skipped, and the last test runs the machinery on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.compare import check_op, forward_backward
from bench.device import COPY, Row, in_turn, write_page
from bench.interleave import SMOKE
from kssm_kernels import kuramoto_features, kuramoto_update, order_parameters, use_backend
from tests.support import devices, naive

ROUNDS = 2 if SMOKE else 30
COPIED = 1 << (16 if SMOKE else 28)  # bytes: larger than the caches of any device so far
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """``ours`` and ``formula`` map theta [..., N] to one tensor."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[[Tensor], Tensor]
    formula: Callable[[Tensor], Tensor]
    columns: int  # of the result, per ensemble
    backward: bool = False

    def least_traffic(self, dtype: torch.dtype) -> int:
        """theta in, the result out; backward as well: theta, the result and its gradient in, theta's gradient out."""
        ensembles, n = math.prod(self.shape[:-1]), self.shape[-1]
        numbers = ensembles * (n + self.columns)
        return (numbers + ensembles * (2 * n + 2 * self.columns) * self.backward) * dtype.itemsize


def features(theta: Tensor) -> Tensor:
    found = kuramoto_features(theta, 0.7, 32)
    assert isinstance(found, Tensor)
    return found


def _cases(rows: int, large: int) -> list[Case]:
    def update(steps: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return (
            lambda t: kuramoto_update(t, 0.7, omega=0.1, dt=0.1, steps=steps),
            lambda t: naive.mean_field(t, 0.7, 0.1, 0.1, steps),
        )

    def sums(harmonics: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return lambda t: order_parameters(t, harmonics), lambda t: naive.order_parameters(t, harmonics)

    def fused(t: Tensor) -> Tensor:
        return naive.order_parameters(naive.mean_field(t, 0.7), 32)

    return [
        *(Case(f"order_parameters [{rows}, 192], H 32", (rows, 192), *sums(32), 96, b) for b in (False, True)),
        *(Case(f"order_parameters [1, {large}], H 4", (1, large), *sums(4), 12, b) for b in (False, True)),
        *(Case(f"kuramoto_update [{rows}, 192], 1 step", (rows, 192), *update(1), 192, b) for b in (False, True)),
        *(Case(f"kuramoto_update [{rows}, 192], 16 steps", (rows, 192), *update(16), 192, b) for b in (False, True)),
        *(Case(f"kuramoto_update [1, {large}], 4 steps", (1, large), *update(4), large, b) for b in (False, True)),
        *(Case(f"kuramoto_features [{rows}, 192], H 32", (rows, 192), features, fused, 96, b) for b in (False, True)),
    ]


CASES = _cases(16, 4096) if SMOKE else _cases(4096, 10_000_000)


def measure(case: Case, dtype: torch.dtype, served: Sequence[str], device: str) -> list[Row]:
    """One row per backend, all timed in the same turns."""
    torch.manual_seed(0)
    theta = ((torch.rand(case.shape) * 2 - 1) * math.pi).to(device)
    grad = torch.randn(*case.shape[:-1], case.columns).to(device)
    for backend in served if case.shape[0] > 1 else ():  # the formula in float64 cannot afford the longest ensemble
        with use_backend(backend):
            check_op(case.name, case.ours, case.formula, theta, grad)
    theta, grad = theta.to(dtype), grad.to(dtype)
    functions = {**dict.fromkeys(served, case.ours), "eager": case.formula}
    if not SMOKE:
        functions["torch.compile"] = torch.compile(case.formula, dynamic=False)
    if case.backward:
        theta.requires_grad_()
        calls = {name: forward_backward(f, (theta,), grad) for name, f in functions.items()}
    else:
        calls = {name: (lambda f=f: f(theta)) for name, f in functions.items()}
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls[COPY] = lambda: target.copy_(source)
    times = in_turn(calls, lambda name: use_backend(name) if name in served else nullcontext(), device, ROUNDS)
    others = {name: times[name] for name in times if name not in served}
    name = case.name + (", forward and backward" if case.backward else ", forward")
    kind, least = str(dtype).removeprefix("torch."), case.least_traffic(dtype)
    return [Row(name, kind, backend, {"ours": times[backend], **others}, least, 2 * COPIED) for backend in served]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}{', backward' if c.backward else ''}")
def test_on_the_device(case: Case, dtype: torch.dtype, device_rows: list[Row]) -> None:
    device = devices.device_or_skip()
    device_rows += measure(case, dtype, devices.backends_of(device), device)


@pytest.mark.skipif(not SMOKE, reason="only a look at the machinery: KSSM_BENCH_SMOKE=1")
def test_the_machinery_on_the_cpu(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    found = benchmark.pedantic(
        lambda: [row for case in CASES for row in measure(case, torch.float32, ("torch",), "cpu")], rounds=1
    )
    write_page(found, "cpu", tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(CASES)

"""The uncoupled oscillator scan in pure torch: the parallel form over time against the loop, forward and backward.

One thread, float32, 8 heads, 4 harmonics. Both forms are forced on every shape; the ratios give the rule of
``kssm_kernels/ops/oscillator_scan/_parallel.py``, whose docstring has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.compare import check, compare
from bench.interleave import SMOKE
from kssm_kernels import oscillator_scan, use_backend
from kssm_kernels.ops.oscillator_scan import _parallel, runs_parallel

HEADS, HARMONICS = 8, 4
SHAPES = (
    [(1, 20, 64)]
    if SMOKE
    else [
        (1, 16, 64),
        (1, 64, 64),
        (1, 512, 64),
        (1, 4096, 64),
        (4, 16, 256),
        (4, 64, 256),
        (4, 512, 256),
        (4, 4096, 256),
        (12, 16, 256),
        (12, 64, 256),
        (12, 512, 256),
        (8, 512, 512),
        (12, 64, 512),
        (12, 512, 512),
    ]
)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_parallel, "wins", lambda s: not s.exact)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan(kind: str, exact: bool, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with use_backend("torch"):
        re, im, last = oscillator_scan(*inputs, kind=kind, heads=HEADS, harmonics=HARMONICS, exact=exact)
    return re, im, *last


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["stuart_landau", "moebius"])
def test_scan_parallel(benchmark: BenchmarkFixture, kind: str, shape: tuple[int, int, int]) -> None:
    inputs = [torch.randn(shape).requires_grad_() for _ in range(4)]
    grads = [torch.randn_like(r) for r in scan(kind, True, inputs)]

    def call(exact: bool, leaves: list[Tensor], given: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(scan(kind, exact, leaves), leaves, given)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = call(True, wide, [g.double() for g in grads])()
    loop, parallel = call(True, inputs, grads), call(False, inputs, grads)
    check("oscillator_scan", parallel(), loop(), truth)
    rows, steps, width = shape
    chosen = "chosen" if runs_parallel(rows, steps, width) else "not chosen"
    compare(benchmark, f"{kind} {list(shape)}, parallel form {chosen}", parallel, {"loop": loop}, {})

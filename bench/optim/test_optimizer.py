"""One step of SignSplitEMA beside torch's fused AdamW, which moves as many bytes, and the formula in eager: one large
tensor, and many small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.compare import COPY, check, compare, copy_of
from bench.interleave import SMOKE
from kssm_kernels.optim import SignSplitEMA
from tests.support import naive

SHAPES = {
    "one tensor of 20M": [(50_000,) if SMOKE else (20_000_000,)],
    "400 tensors of 10k": [(100, 100)] * (4 if SMOKE else 400),
}
FORMULA, ADAMW, FOREACH = "eager", "AdamW(fused=True)", "foreach"
# Bytes per element: p, P and N read and written, g read.
STATES = {torch.float32: 28, torch.bfloat16: 20, torch.uint8: 16}
TARGETS = {
    ("one tensor of 20M", torch.float32): {ADAMW: 1.0, FORMULA: 20.0},
    ("one tensor of 20M", torch.bfloat16): {ADAMW: 1.25},
    ("400 tensors of 10k", torch.float32): {ADAMW: 1.0, FOREACH: 5.0},
    ("400 tensors of 10k", torch.bfloat16): {ADAMW: 1.25},
}


def parameters(case: str, device: str = "cpu") -> list[nn.Parameter]:
    found = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES[case]]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def formula(params: list[nn.Parameter]) -> Callable[[], None]:
    means = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, (positive, negative) in zip(params, means, strict=True):
            assert p.grad is not None
            naive.sign_split_ema(p, p.grad, positive, negative)

    return step


def check_two_steps(state_dtype: torch.dtype, device: str = "cpu", **options: bool) -> None:
    """Two steps of the optimizer against the formula in float64. Low-precision means move u by their own rounding."""
    p = torch.randn(10_000, device=device)
    gradients = [torch.randn(10_000, device=device) for _ in range(2)]

    def stepped(dtype: torch.dtype) -> Tensor:
        q, means = p.to(dtype, copy=True), [torch.zeros(10_000, dtype=dtype, device=device) for _ in range(2)]
        for g in gradients:
            naive.sign_split_ema(q, g.to(dtype), *means)
        return q

    mine = nn.Parameter(p.clone())
    optimizer = SignSplitEMA([mine], state_dtype=state_dtype, **options)
    for g in gradients:
        mine.grad = g
        optimizer.step()
    # lr times the relative error of a mean, twice; in units of the largest parameter, about 4
    slack = {torch.float32: 1e-7, torch.bfloat16: 1e-5, torch.uint8: 1e-4}[state_dtype]
    check("SignSplitEMA", [mine.detach()], [stepped(torch.float32)], [stepped(torch.float64)], slack)


@pytest.mark.parametrize("state_dtype", STATES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", SHAPES)
def test_step(benchmark: BenchmarkFixture, case: str, state_dtype: torch.dtype) -> None:
    check_two_steps(state_dtype, fused=True)
    elements = sum(torch.Size(shape).numel() for shape in SHAPES[case])
    calls = {
        "ours": SignSplitEMA(parameters(case), state_dtype=state_dtype, fused=True).step,
        ADAMW: torch.optim.AdamW(parameters(case), fused=True).step,
        COPY: copy_of(STATES[state_dtype] * elements),
    }
    if state_dtype == torch.float32:
        calls[FORMULA] = formula(parameters(case))
        if len(SHAPES[case]) > 1:
            calls[FOREACH] = SignSplitEMA(parameters(case), foreach=True).step
            calls["AdamW(foreach=True)"] = torch.optim.AdamW(parameters(case), foreach=True).step
    name = f"SignSplitEMA, {case}, states in {str(state_dtype).removeprefix('torch.')}"
    compare(benchmark, name, calls.pop("ours"), calls, TARGETS.get((case, state_dtype), {}))

"""One step of SignSplitEMA on a device, by every kernel of it, beside torch's AdamW and the formula in eager.

pytest tests bench -m gpu
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from bench.compare import copy_of
from bench.device import COPY, Row, in_turn
from bench.interleave import SMOKE
from bench.optim.test_optimizer import FORMULA, SHAPES, STATES, check_two_steps, formula, parameters
from kssm_kernels import use_backend
from kssm_kernels.optim import SignSplitEMA
from tests.support import devices

ROUNDS = 2 if SMOKE else 30


def measure(case: str, state_dtype: torch.dtype, served: Sequence[str], device: str) -> list[Row]:
    """One row per backend, all timed in the same turns."""
    calls = {}
    for backend in served:
        with use_backend(backend):
            check_two_steps(state_dtype, device)
            calls[backend] = SignSplitEMA(parameters(case, device), state_dtype=state_dtype).step
    if device != "cpu":
        calls["AdamW(fused=True)"] = torch.optim.AdamW(parameters(case, device), fused=True).step
        calls["AdamW(foreach=True)"] = torch.optim.AdamW(parameters(case, device), foreach=True).step
    calls[FORMULA] = formula(parameters(case, device))
    least = STATES[state_dtype] * sum(torch.Size(shape).numel() for shape in SHAPES[case])
    calls[COPY] = copy_of(least, device)
    times = in_turn(calls, lambda name: use_backend(name) if name in served else nullcontext(), device, ROUNDS)
    others = {name: times[name] for name in times if name not in served}
    kind = f"float32, states in {str(state_dtype).removeprefix('torch.')}"
    name = f"SignSplitEMA, {case}"
    return [Row(name, kind, backend, {"ours": times[backend], **others}, least, least) for backend in served]


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", STATES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", SHAPES)
def test_on_the_device(case: str, state_dtype: torch.dtype, device_rows: list[Row]) -> None:
    device = devices.device_or_skip()
    served = [backend for backend in devices.backends_of(device) if backend != "torch"]
    device_rows += measure(case, state_dtype, served, device)


@pytest.mark.skipif(not SMOKE, reason="only a look at the machinery: KSSM_BENCH_SMOKE=1")
@pytest.mark.parametrize("case", SHAPES)
def test_the_machinery_on_the_cpu(case: str) -> None:
    assert [row.backend for row in measure(case, torch.float32, ("cpu",), "cpu")] == ["cpu"]

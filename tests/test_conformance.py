"""Every op on every backend, through both doors, in every dtype, against the equations in float64."""

from __future__ import annotations

import pytest
import torch

from tests import gpu
from tests.cases import CASES, DOORS, DTYPES, Case
from tests.tolerance import check


def is_long(case: Case) -> bool:
    """Cases that take the interpreter of Triton seconds: many trips through a loop."""
    return case.harmonics > 64 or case.steps > 8 or case.shape[-1] > 4096


def combinations(backend: str) -> list[tuple[Case, torch.dtype, str]]:
    """All that a backend serves; interpreted, long cases and the second door in float32 only, and not together."""
    found = [(c, dtype, door) for c in CASES for dtype in DTYPES for door in DOORS if gpu.serves(backend, dtype)]
    if backend != "triton":
        return found
    return [(c, d, door) for c, d, door in found if is_long(c) + (d != torch.float32) + (door != "direct") < 2]


ROWS = [(backend, *rest) for backend in gpu.backends_of("cpu") for rest in combinations(backend)]
NAMES = [f"{c.name}-{str(d).removeprefix('torch.')}-{door}-{backend}" for backend, c, d, door in ROWS]


@pytest.mark.parametrize(("backend", "case", "dtype", "door"), ROWS, ids=NAMES, indirect=["backend"])
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, backend: str, door: str) -> None:
    check(case, dtype, door)

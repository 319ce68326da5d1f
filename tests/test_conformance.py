"""Every op on every backend, through both doors, in every dtype, against the equations in float64."""

from __future__ import annotations

import pytest
import torch

from tests.cases import CASES, DOORS, DTYPES, Case
from tests.tolerance import check


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, backend: str, door: str) -> None:
    check(case, dtype, door)

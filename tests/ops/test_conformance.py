"""Every op on every backend in every dtype against the equations in float64, by both paths with the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kssm_kernels import bistable_coupling, order_parameters, use_backend
from tests.support import devices, naive
from tests.support.cases import DTYPES, EAGER, PATHS, Case, through
from tests.support.conformance import check
from tests.support.specs import CASES


def is_long(case: Case) -> bool:
    """Cases that take the interpreter of Triton seconds: many trips through a loop."""
    return case.harmonics > 64 or case.steps > 8 or case.shape[-1] > 4096


def combinations(backend: str) -> list[tuple[Case, torch.dtype]]:
    """All that a backend serves; interpreted, long cases in float32 only."""
    found = [(case, dtype) for case in CASES for dtype in DTYPES if devices.serves(backend, dtype, case.op)]
    return [(c, d) for c, d in found if backend != "triton" or d == torch.float32 or not is_long(c)]


def paths(backend: str, case: Case, dtype: torch.dtype) -> Sequence[str]:
    """Both; interpreted, the eager one alone where a second run takes long: 16 bits are for small cases then."""
    small = dtype == torch.float32 or (dtype == torch.bfloat16 and math.prod(case.shape) <= 100)
    return PATHS if backend != "triton" or (small and not is_long(case)) else (EAGER,)


ROWS = [(backend, *rest) for backend in devices.backends_of("cpu") for rest in combinations(backend)]
NAMES = [f"{c.name}-{str(d).removeprefix('torch.')}-{backend}" for backend, c, d in ROWS]


@pytest.mark.parametrize(("backend", "case", "dtype"), ROWS, ids=NAMES, indirect=["backend"])
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, dtype, paths=paths(backend, case, dtype))


@pytest.mark.parametrize("path", PATHS)
def test_the_clamp_s_bounds_belong_to_it(path: str, backend: str) -> None:
    """u is what is divided by 1 (to float32: 1e-6 is added to 2^7) at .25 .5 1 2 3; both bounds pass a gradient on."""
    raw = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0])
    params = torch.zeros(5, 10)
    params[:, 0] = params[:, 6] = 128.0  # a g = 2^14, which takes no 1e-6 up
    params[:, 3] = 128.0 * raw  # d
    params.requires_grad_()
    with through(path):
        strength, u, _ = bistable_coupling(params, (0.5, 2.0))
        (gradient,) = torch.autograd.grad(u.sum(), params, retain_graph=True)
        (of_strength,) = torch.autograd.grad(strength.sum(), params)
    assert u.tolist() == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert (128.0 * gradient[:, 3]).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert (of_strength[:, 3] != 0).tolist() == [False, True, True, True, False]


@pytest.mark.skipif("triton" not in devices.backends_of("cpu"), reason="TRITON_INTERPRET=1 is not set")
def test_triton_adds_segments_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six row blocks, two at a time: three sums, two, one."""
    from kssm_kernels.ops.order_parameters import _triton as module

    monkeypatch.setattr(module, "ADDED_AT_ONCE", 2)
    theta: Tensor = torch.randn(2, 12_288)
    with use_backend("triton"):
        features = order_parameters(theta, 2)
    torch.testing.assert_close(features, naive.order_parameters(theta.double(), 2).float(), rtol=1e-5, atol=1e-6)

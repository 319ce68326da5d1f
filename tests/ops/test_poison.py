"""The net under the other tests: memory that torch hands out uninitialised is NaN: an output left unwritten fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kssm_kernels
from kssm_kernels.backends import cpu
from tests.support.cases import Case, evaluate
from tests.support.conformance import assert_same_bits, check
from tests.support.specs import arguments, by_package
from tests.support.tolerance import assert_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_way_to_get_uninitialised_memory_gives_nan(dtype: torch.dtype) -> None:
    some = torch.ones(3, dtype=dtype)
    for got in (
        torch.empty(5, dtype=dtype),
        torch.empty_like(some),
        some.new_empty(5),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        some.clone().resize_(9)[3:],
    ):
        assert got.isnan().all()


def test_an_op_that_leaves_one_row_unwritten_fails_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(theta: torch.Tensor, harmonics: int) -> torch.Tensor:
        out = theta.new_empty((*theta.shape[:-1], 3 * harmonics))
        out[:-1] = right(theta, harmonics)[:-1]
        return out

    right = kssm_kernels.order_parameters
    case = Case("order_parameters", (4, 7), 3)
    with kssm_kernels.use_backend("torch"):
        check(case, torch.float64)
        monkeypatch.setattr(kssm_kernels, "order_parameters", forgetful)
        with pytest.raises(AssertionError, match=r"9 of 36 outside the tolerance; the worst at \(3, 0\): kernel nan"):
            check(case, torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        Case("order_parameters", (3, 5), 2),
        Case("kuramoto_update", (3, 5), coupling=(3, 1), omega=(5,), phase_lag=(1,), noise_scale=(3, 5)),
        Case("kuramoto_features", (5,), 2, coupling=(3, 1), omega=(3, 1), phase_lag=(), noise_scale=()),
        Case("bistable_coupling", (4, 10)),
    ],
    ids=lambda c: c.op,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_kernel_that_writes_nothing_gives_nan_everywhere(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> None:
        return None

    names = ("order_parameters", "kuramoto", "bistable_coupling")
    stub = SimpleNamespace(**{f"{n}_{way}": nothing for n in names for way in ("forward", "backward")})
    monkeypatch.setattr(cpu, "extension", stub)
    with kssm_kernels.use_backend("cpu"):
        for name, value in evaluate(by_package, case, arguments(case, dtype), dtype).items():
            assert value.isnan().all(), name


def test_the_rule_prints_index_and_the_three_values() -> None:
    truth = torch.zeros(2, 3, dtype=torch.float64)
    kernel = truth.clone()
    kernel[1, 2] = 0.5
    assert_within("x", kernel, truth, 0.2, 0.1)
    with pytest.raises(AssertionError, match=r"x: 1 of 6 .* at \(1, 2\): kernel 0.5, truth 0.0, bound 3.000e-01"):
        assert_within("x", kernel, truth, 0.1, 0.1)


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, 1.0 + 2**-52], dtype=torch.float64),
        torch.tensor([1.0, torch.nan], dtype=torch.float64),
        torch.ones(2),
    ],
    ids=["an ulp", "NaN", "float32"],
)
def test_a_path_with_other_bits_than_the_eager_one_fails(other: torch.Tensor) -> None:
    eager = torch.ones(2, dtype=torch.float64)
    assert_same_bits("dispatcher", {"x": eager.clone()}, {"x": eager})
    with pytest.raises(AssertionError, match=r"x: .* by the dispatcher path"):
        assert_same_bits("dispatcher", {"x": other}, {"x": eager})

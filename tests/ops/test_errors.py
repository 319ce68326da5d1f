"""Bad arguments are refused with what was got and what was wanted; NaN and infinity go where mathematics sends them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import kssm_kernels
from kssm_kernels import bistable_coupling, kuramoto_features, kuramoto_update, order_parameters
from tests.support.cases import PATHS, through
from tests.support.tolerance import harmonic_slack

T, INT = torch.zeros, torch.int64
order: Any = order_parameters  # without their types: the point is to break them
update: Any = kuramoto_update
features: Any = kuramoto_features
bistable: Any = bistable_coupling
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("int theta", lambda: order(T(3, dtype=INT), 1), TypeError, r"theta.*float32.*got torch.int64"),
    ("complex theta", lambda: update(T(3, dtype=torch.complex64), 1.0), TypeError, r"theta.*got torch.complex64"),
    ("list theta", lambda: order([1.0], 1), TypeError, r"theta must be a torch.Tensor, got list"),
    ("no axis", lambda: order(T(()), 1), ValueError, r"\[\.\.\., N\].*got \(\)"),
    ("empty last axis", lambda: order(T(2, 0), 1), ValueError, r"N >= 1.*got \(2, 0\)"),
    ("empty last axis, update", lambda: update(T(2, 0), 1.0), ValueError, r"N >= 1.*got \(2, 0\)"),
    ("harmonics 0", lambda: order(T(3), 0), ValueError, r"harmonics must be from 1 to 256, got 0"),
    ("harmonics 257", lambda: order(T(3), 257), ValueError, r"harmonics must be from 1 to 256, got 257"),
    ("harmonics 0, features", lambda: features(T(3), 1.0, 0), ValueError, r"kuramoto_features: harmonics.*got 0"),
    ("harmonics float", lambda: order(T(3), 2.0), TypeError, r"harmonics must be an int, got float"),
    ("harmonics bool", lambda: order(T(3), True), TypeError, r"harmonics must be an int, got bool"),
    ("coupling None", lambda: update(T(3), None), TypeError, r"coupling.*got None"),
    ("coupling str", lambda: update(T(3), "1"), TypeError, r"coupling.*got str"),
    ("coupling inf", lambda: update(T(3), math.inf), ValueError, r"coupling must be finite, got inf"),
    ("coupling int tensor", lambda: update(T(3), T(1, dtype=torch.int32)), TypeError, r"coupling.*got torch.int32"),
    ("coupling shape", lambda: update(T(2, 3), T(2)), ValueError, r"coupling.*\(2, 3\).*got \(2,\).*unsqueeze"),
    ("omega shape", lambda: update(T(2, 3), 1.0, omega=T(4)), ValueError, r"omega.*1 .*or 3 .*got \(4,\)"),
    ("omega device", lambda: update(T(3), 1.0, omega=T(3, device="meta")), ValueError, r"omega.*cpu.*got meta"),
    ("theta device", lambda: update(T(3, device="meta"), T(3)), ValueError, r"coupling.*device meta, got cpu"),
    ("lag device", lambda: features(T(3), 1.0, 2, phase_lag=T((), device="meta")), ValueError, r"phase_lag.*meta"),
    ("lead", lambda: update(T(2, 3), T(4, 1)), ValueError, r"leading axes.*\(2, 3\), \(4, 1\)"),
    ("noise shape", lambda: update(T(2, 3), 1.0, noise_scale=T(2)), ValueError, r"noise_scale.*got \(2,\)"),
    ("dt inf", lambda: update(T(3), 1.0, dt=math.inf), ValueError, r"dt must be finite, got inf"),
    ("dt tensor", lambda: update(T(3), 1.0, dt=T(())), TypeError, r"dt must be a number, got Tensor"),
    ("steps -1", lambda: update(T(3), 1.0, steps=-1), ValueError, r"steps must be from 0 to \d+, got -1"),
    ("steps float", lambda: update(T(3), 1.0, steps=1.5), TypeError, r"steps must be an int, got float"),
    ("seed 2^64", lambda: update(T(3), 1.0, noise_scale=1.0, seed=2**64), ValueError, r"seed must be from.*got 184467"),
    ("seed float", lambda: update(T(3), 1.0, noise_scale=1.0, seed=1.0), TypeError, r"seed.*got float"),
    ("seed vector", lambda: update(T(3), 1.0, noise_scale=1.0, seed=T(2, dtype=INT)), ValueError, r"seed.*\(2,\)"),
    ("params last axis", lambda: bistable(T(3, 9)), ValueError, r"\[\.\.\., 10\], got \(3, 9\)"),
    ("params dtype", lambda: bistable(T(10, dtype=INT)), TypeError, r"params.*got torch.int64"),
    ("clamp order", lambda: bistable(T(10), (2.0, 1.0)), ValueError, r"clamp.*low <= high, got \(2.0, 1.0\)"),
    ("clamp nan", lambda: bistable(T(10), (math.nan, 1.0)), ValueError, r"clamp.*got \(nan, 1.0\)"),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str, backend: str, path: str) -> None:
    with through(path), pytest.raises(error, match=message):
        call()


def test_the_message_names_the_function_that_was_called() -> None:
    with pytest.raises(ValueError, match=r"^kuramoto_update: theta"):
        kuramoto_update(T(2, 0), 1.0)
    with pytest.raises(ValueError, match=r"^kuramoto_features: coupling"):
        kuramoto_features(T(2), T(3), 1)


def test_backend_names() -> None:
    with pytest.raises(ValueError, match=r"got backend 'gpu', want one of .*'torch'"), kssm_kernels.use_backend("gpu"):
        pass
    assert "torch" in kssm_kernels.available_backends()
    with kssm_kernels.use_backend("torch"):
        assert order_parameters(T(3, device="meta"), 2).shape == (6,)
    for name in set(kssm_kernels.available_backends()) - {"torch"}:
        with kssm_kernels.use_backend(name), pytest.raises(RuntimeError, match=f"{name}.*meta"):
            order_parameters(T(3, device="meta"), 2)


def test_an_error_inside_the_block_leaves_the_choice_of_backend_as_it_was() -> None:
    first = kssm_kernels.available_backends()[0]
    with kssm_kernels.use_backend(first):
        with pytest.raises(ZeroDivisionError), kssm_kernels.use_backend("torch"):
            raise ZeroDivisionError
        if first != "torch":  # still in force: it cannot serve this device and says so
            with pytest.raises(RuntimeError, match=first):
                order_parameters(T(3, device="meta"), 2)
    assert order_parameters(T(3, device="meta"), 2).shape == (6,)


# ---- NaN and infinity ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_one_bad_phase_spoils_its_ensemble_and_no_other(bad: float, n: int, dtype: torch.dtype, backend: str) -> None:
    theta = torch.randn(3, n).to(dtype)
    spoiled = theta.clone()
    spoiled[1, n // 2] = bad
    results: list[list[Tensor]] = []
    for start in (theta, spoiled):
        leaf = start.clone().requires_grad_()
        a = order_parameters(leaf, 40)
        b, c = kuramoto_features(leaf, 0.5, 5, omega=0.1, dt=0.2, steps=3, return_phases=True)
        (gradient,) = torch.autograd.grad([a, b, c], leaf, [torch.ones_like(v) for v in (a, b, c)])
        results.append([a, b, c, gradient])
    for fine, got in zip(*results, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], fine[[0, 2]])
        assert fine.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_operand_spoils_what_it_touches(bad: float, backend: str) -> None:
    theta = torch.randn(2, 5)
    for name in ("coupling", "omega", "phase_lag", "noise_scale"):
        value = torch.full((2, 5), 0.1)
        value[1, 3] = bad
        rest: dict[str, Any] = {"coupling": 0.5, name: value, "seed": 1}
        out = kuramoto_update(theta, **rest)
        assert not out[1, 3].isfinite(), name
        assert out[0].isfinite().all(), name
        assert out[1, :3].isfinite().all(), name


def test_bistable_with_bad_parameters(backend: str) -> None:
    params = torch.ones(3, 10)
    params[:, 2] = 0.0
    params[1, 3] = math.nan
    k, u, delta = bistable_coupling(params)
    assert k[1].isnan()
    assert u[1].isnan()
    assert k[[0, 2]].isfinite().all()
    assert delta.isfinite().all()
    zero = bistable_coupling(torch.zeros(2, 10))  # 0 / 1e-6: u = 0, clamped to 0.1
    assert torch.allclose(zero[1], torch.tensor(0.1))
    params[:, 3] = 1e38
    params[:, 0] = 1e-30  # overflow inside: u = inf before the clamp, 10 after
    assert bistable_coupling(params)[1].eq(10.0).all()


# ---- phases of any finite size ----

HUGE = {
    torch.float32: [1e4, 1e5, 1e6, 12345678.0, 1e10, 1e20, 1e30, torch.finfo(torch.float32).max],
    torch.float64: [1e6, 1e10, 1e15, 1e22, 6381956970095103.0 * 2.0**797, 1e300, torch.finfo(torch.float64).max],
    torch.bfloat16: [1e4, 1e6, 1e30, torch.finfo(torch.bfloat16).max],
    torch.float16: [1e3, 65504.0],
}


@pytest.mark.parametrize("dtype", HUGE, ids=str)
def test_order_parameters_of_huge_phases(dtype: torch.dtype, backend: str) -> None:
    """One oscillator per ensemble: C_n and S_n are cos(n theta) and sin(n theta) of the very number stored."""
    values = torch.tensor([s * v for v in HUGE[dtype] for s in (1, -1)], dtype=torch.float64).to(dtype)
    assert values.isfinite().all()
    harmonics = 5
    got = order_parameters(values[:, None], harmonics).double()
    bound = harmonic_slack(harmonics, dtype) + torch.finfo(dtype).eps * (torch.finfo(dtype).bits == 16)
    with mpmath.workdps(400):
        for row, value in zip(got, values.tolist(), strict=True):
            for n in range(1, harmonics + 1):
                angle = mpmath.mpf(value) * n
                assert abs(row[n - 1].item() - float(mpmath.cos(angle))) <= bound, (value, n)
                assert abs(row[harmonics + n - 1].item() - float(mpmath.sin(angle))) <= bound, (value, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e6, 1e9, 1e20, 1e30])
@pytest.mark.parametrize("n", [3, 50])
def test_pull_between_huge_phases(size: float, n: int, dtype: torch.dtype, backend: str) -> None:
    """dL/dK_j = p_j = Im(Z exp(-i theta_j)): the pull itself, whatever the phases round to afterwards."""
    theta = (torch.rand(2, n, dtype=torch.float64) * 2 - 1).mul(size).to(dtype)
    coupling = torch.ones(2, n, dtype=dtype, requires_grad=True)
    (pull,) = torch.autograd.grad(kuramoto_update(theta, coupling).sum(), coupling)
    exact = theta.double()  # torch's float64 cos and sin reduce any argument exactly
    c, s = exact.cos(), exact.sin()
    want = s.mean(-1, keepdim=True) * c - c.mean(-1, keepdim=True) * s
    assert (pull.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_vector_polynomial_and_the_exact_reduction_meet(dtype: torch.dtype, backend: str) -> None:
    """Sweeps 13 decades, so that wherever a kernel changes its reduction, both sides and the seam are seen."""
    theta = torch.logspace(-3, 10, 20000, dtype=torch.float64).to(dtype)[:, None]
    got = order_parameters(theta, 1).double()
    want = torch.cat([theta.double().cos(), theta.double().sin()], -1)
    assert (got[:, :2] - want).abs().max() <= harmonic_slack(1, dtype)

"""Gradients: gradcheck in float64 on every backend and both paths, backward twice, and what autograd must be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kssm_kernels
from tests.support.cases import PATHS, SEED, Case, cotangents, evaluate, through
from tests.support.specs import arguments, by_package

Function = Callable[..., Any]

CASES = [
    Case("order_parameters", (2, 5), 3),
    Case("order_parameters", (1,), 1),
    Case("order_parameters", (3, 4), 20, layout="transposed"),
    Case("order_parameters", (2, 3), 40, phases="axes"),
    Case("kuramoto_update", (2, 5), coupling=(), omega=(5,), phase_lag=(2, 1), noise_scale=(1,)),
    Case("kuramoto_update", (2, 5), coupling=(2, 5), omega=(2, 5), phase_lag=(5,), noise_scale=(2, 5), dt=0.3, steps=4),
    Case("kuramoto_update", (4,), coupling=(2, 1), omega=(2, 4), phase_lag=(), noise_scale=(4,), steps=2),
    Case("kuramoto_update", (1, 3), coupling=(1,), phase_lag=0.4, dt=0.02, steps=73),
    Case("kuramoto_features", (2, 5), 3, coupling=(2, 1), omega=(5,), phase_lag=(2, 1), noise_scale=(1,)),
    Case("kuramoto_features", (5,), 3, coupling=(2, 3, 1), omega=(2, 3, 1), noise_scale=(), return_phases=False),
    Case("kuramoto_features", (2, 3), 6, coupling=(3,), phase_lag=(3,), dt=0.3, steps=3, layout="every-second"),
    Case("bistable_coupling", (3, 10)),
    Case("bistable_coupling", (2, 2, 10), clamp=None),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradcheck(case: Case, backend: str, path: str) -> None:
    args = arguments(case, torch.float64)
    names = [k for k, v in args.items() if isinstance(v, Tensor)]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        with through(path):
            return tuple(by_package(case, {**args, **dict(zip(names, leaves, strict=True))}).values())

    leaves = tuple(args[k].detach().clone().requires_grad_() for k in names)
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_gradient_is_the_same_whether_or_not_others_are_asked_for(case: Case, backend: str) -> None:
    args = arguments(case, torch.float64)
    everything = evaluate(by_package, case, args, torch.float64)
    for name in [k for k, v in args.items() if isinstance(v, Tensor)]:
        leaf = args[name].detach().requires_grad_()
        outputs = by_package(case, {**args, name: leaf})
        given = cotangents(case, outputs, torch.float64)
        used = [k for k, v in outputs.items() if v.requires_grad]
        (alone,) = torch.autograd.grad([outputs[k] for k in used], leaf, [given[k] for k in used])
        torch.testing.assert_close(alone, everything[f"d {name}"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("which", ["features", "phases"])
@pytest.mark.parametrize("path", PATHS)
def test_gradient_through_one_output_only(which: str, backend: str, path: str) -> None:
    theta = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    with through(path):
        features, phases = kssm_kernels.kuramoto_features(theta, 0.7, 3, return_phases=True)
    (got,) = torch.autograd.grad((features if which == "features" else phases).square().sum(), theta)
    moved = kssm_kernels.kuramoto_update(theta, 0.7)
    alone = kssm_kernels.order_parameters(moved, 3) if which == "features" else moved
    (want,) = torch.autograd.grad(alone.square().sum(), theta)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[8], CASES[9], CASES[11]], ids=lambda c: c.name)
def test_second_backward_through_the_same_graph(case: Case, backend: str, path: str) -> None:
    args = arguments(case, torch.float32)
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if isinstance(v, Tensor)}
    with through(path):
        outputs = by_package(case, {**args, **leaves})
    given = list(cotangents(case, outputs, torch.float32).values())
    before = [v.detach().clone() for v in (*leaves.values(), *outputs.values(), *given)]

    def once(retain: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(list(outputs.values()), list(leaves.values()), given, retain_graph=retain)

    first, second = once(True), once(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = (*leaves.values(), *outputs.values(), *given)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "backward wrote into its inputs"
    with pytest.raises(RuntimeError, match="second time"):
        once(False)


DOUBLE: dict[str, Function] = {
    "order_parameters": lambda t: kssm_kernels.order_parameters(t, 2),
    "kuramoto_features": lambda t: kssm_kernels.kuramoto_features(t, 1.0, 2),
    "kuramoto_update": lambda t: kssm_kernels.kuramoto_update(t, 1.0),
    "bistable_coupling": lambda t: kssm_kernels.bistable_coupling(t)[0],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", DOUBLE)
def test_double_backward_is_refused_by_name(op: str, backend: str, path: str) -> None:
    theta = torch.rand(2, 10, dtype=torch.float64, requires_grad=True)
    with through(path):
        loss = DOUBLE[op](theta).square().sum()
    (first,) = torch.autograd.grad(loss, theta, create_graph=True)
    assert torch.isfinite(first).all()
    # both names of the pass are the user's: kuramoto_update is the same op with no harmonics
    with pytest.raises(RuntimeError, match=r"(order_parameters|kuramoto_\w+|bistable_coupling): double backward"):
        first.sum().backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("saved", ["theta", "coupling", "features"])
def test_a_saved_tensor_changed_in_place_is_caught(saved: str, backend: str, path: str) -> None:
    theta = torch.randn(2, 5, requires_grad=True)
    inner, coupling = theta * 1.0, torch.ones(2, 1)
    with through(path):
        features = kssm_kernels.kuramoto_features(inner, coupling, 2)
    loss = features.sum()
    with torch.no_grad():
        {"theta": inner, "coupling": coupling, "features": features}[saved].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_asked_no_graph_made(backend: str) -> None:
    theta = torch.randn(2, 5)
    assert not kssm_kernels.order_parameters(theta, 2).requires_grad
    assert not kssm_kernels.kuramoto_update(theta, torch.ones(1)).requires_grad
    theta.requires_grad_()
    with torch.no_grad():
        assert not kssm_kernels.kuramoto_features(theta, 1.0, 2).requires_grad
    assert kssm_kernels.kuramoto_update(theta.detach(), torch.ones(1, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert kssm_kernels.order_parameters(theta, 2).isfinite().all()


def test_gradients_come_in_the_operands_own_dtype_and_shape(backend: str) -> None:
    theta = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    coupling = torch.ones(3, 1, dtype=torch.float32, requires_grad=True)
    omega = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    kssm_kernels.kuramoto_update(theta, coupling, omega=omega).float().sum().backward()
    for leaf in (theta, coupling, omega):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == leaf.dtype


def test_cotangents_of_any_stride(backend: str) -> None:
    theta = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    features = kssm_kernels.order_parameters(theta, 2)
    given = torch.randn(6, 4, dtype=torch.float64).t()
    (a,) = torch.autograd.grad(features, theta, given, retain_graph=True)
    (b,) = torch.autograd.grad(features, theta, given.contiguous(), retain_graph=True)
    assert torch.equal(a, b)
    (c,) = torch.autograd.grad(features.sum(), theta, retain_graph=True)
    (d,) = torch.autograd.grad(features, theta, torch.ones(4, 6, dtype=torch.float64))
    assert torch.equal(c, d)


def test_clamp_passes_the_gradient_at_its_bounds_and_stops_it_beyond(backend: str) -> None:
    # c = 0, g = 1 and a = 1 - 1e-6: u_raw = d, on, inside and outside the bounds [0.5, 2]
    params = torch.zeros(5, 10, dtype=torch.float64)
    params[:, 0], params[:, 6] = 1.0 - 1e-6, 1.0
    params[:, 3] = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    params.requires_grad_()
    _, u, _ = kssm_kernels.bistable_coupling(params, (0.5, 2.0))
    raw = params[:, 3] / (params[:, 0] + 1e-6)
    (got,) = torch.autograd.grad(u.sum(), params)
    (want,) = torch.autograd.grad(raw.clamp(0.5, 2.0).sum(), params)
    assert got[:, 3].tolist() == want[:, 3].tolist()
    assert got[0].eq(0).all()
    assert got[4].eq(0).all()


def test_noise_of_the_backward_pass_is_that_of_the_forward(backend: str) -> None:
    scale = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    theta = torch.zeros(3, 40, dtype=torch.float64)
    out = kssm_kernels.kuramoto_update(theta, 0.0, noise_scale=scale, seed=SEED, steps=3)
    given = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, scale, given)
    xi = sum(kssm_kernels.philox_normal(3, 40, seed=SEED, step=k).double() for k in range(3))
    torch.testing.assert_close(got, -(given * xi).sum().reshape(1), rtol=1e-12, atol=1e-12)

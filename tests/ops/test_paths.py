"""The dispatcher path: torch's machinery (compile, export, opcheck, vmap, autocast) takes every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kssm_kernels
from kssm_kernels import FusedKuramoto, bistable_coupling, kuramoto_features, kuramoto_update, order_parameters
from tests.support.cases import SEED
from tests.support.graphs import CountingBackend


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _samples() -> list[tuple[str, Any, tuple[Any, ...]]]:
    ops: Any = torch.ops.kssm_kernels
    seed = torch.tensor(SEED)
    one = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rest = (seed, torch.tensor(0.1, dtype=torch.float64), 2)
    return [
        ("order_parameters", ops.order_parameters, (_leaf(2, 5), 3)),
        ("strided", ops.order_parameters, (torch.randn(5, 4).t().requires_grad_(), 2)),
        ("vector", ops.order_parameters, (_leaf(5), 1)),
        ("empty", ops.order_parameters, (_leaf(0, 5), 2)),
        ("kuramoto, both", ops.kuramoto, (_leaf(2, 5), _leaf(2, 1), _leaf(5), one, _leaf(1), *rest, 3, True)),
        (
            "kuramoto, features",
            ops.kuramoto,
            (_leaf(5), _leaf(2, 3, 1), None, None, None, None, torch.tensor(1.0).double(), 1, 3, False),
        ),
        ("kuramoto, phases", ops.kuramoto, (_leaf(2, 5), one, None, None, _leaf(2, 5), *rest, 0, True)),
        ("bistable", ops.bistable_coupling, (_leaf(3, 10), torch.tensor(0.1).double(), torch.tensor(10.0).double())),
    ]


@pytest.mark.parametrize("index", range(8), ids=lambda i: _samples()[i][0])
def test_opcheck(index: int, backend: str) -> None:
    _, op, args = _samples()[index]
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("needed", [[True] * 5, [True, False, True, False, False]])
def test_opcheck_of_the_backward_op(needed: list[bool], backend: str) -> None:
    theta, coupling, omega = torch.randn(2, 5), torch.rand(2, 1), torch.rand(5)
    lag, scale = (torch.tensor(0.1), torch.rand(1)) if all(needed) else (None, None)
    ops: Any = torch.ops.kssm_kernels
    dt = torch.tensor(0.1, dtype=torch.float64)
    features, phases = ops.kuramoto(theta, coupling, omega, lag, scale, torch.tensor(1), dt, 2, 3, True)
    g = torch.ones_like(features), torch.ones_like(phases)
    args = (theta, coupling, omega, lag, scale, torch.tensor(1), dt, 2, 3, features, phases, *g, needed)
    torch.library.opcheck(ops.kuramoto_backward.default, args)
    features = order_parameters(theta, 3)
    torch.library.opcheck(ops.order_parameters_backward.default, (theta, features, torch.ones_like(features)))


# ---- torch.compile and torch.export ----


def _everything(theta: Tensor, coupling: Tensor, params: Tensor) -> Tensor:
    k, u, delta = bistable_coupling(params)
    moved = kuramoto_update(theta, coupling, omega=0.2, phase_lag=0.1, dt=0.3, steps=2, noise_scale=0.1, seed=5)
    features, phases = kuramoto_features(moved, k.unsqueeze(-1), 4, return_phases=True)
    return features.sum() + phases.sin().sum() + order_parameters(phases, 3).square().sum() + (u * delta).sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    leaves = torch.randn(3, 7), torch.rand(3, 1), torch.rand(3, 10)
    compiled = torch.compile(_everything, fullgraph=True, backend=compiler)
    results = []
    for function in (_everything, compiled):
        inputs = [v.clone().requires_grad_() for v in leaves]
        value = function(*inputs)
        value.backward()
        results.append([value.detach(), *(v.grad for v in inputs)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-5)


def test_compile_with_dynamic_shapes_makes_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    counting = CountingBackend()
    compiled = torch.compile(
        lambda t, k: kuramoto_features(t, k, 3, return_phases=True), fullgraph=True, dynamic=True, backend=counting
    )
    for rows, n in ((2, 5), (3, 7), (9, 40)):
        theta, coupling = torch.randn(rows, n), torch.rand(rows, 1)
        for got, want in zip(
            compiled(theta, coupling), kuramoto_features(theta, coupling, 3, return_phases=True), strict=True
        ):
            assert torch.equal(got, want)
    assert counting.graphs == 1


def test_compile_with_numbers_that_change_between_calls(backend: str) -> None:
    """A float that changes becomes symbolic in the second graph; the checks of the arguments must live with that."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t, k, dt: kuramoto_update(t, k, omega=k, dt=dt, phase_lag=k), fullgraph=True, backend="aot_eager"
    )
    theta = torch.randn(2, 5)
    for k, dt in ((0.5, 0.1), (0.6, 0.2), (0.7, 0.3)):
        want = kuramoto_update(theta, k, omega=k, dt=dt, phase_lag=k)
        torch.testing.assert_close(compiled(theta, k, dt), want)


def test_compile_draws_fresh_noise_on_every_call(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: kuramoto_update(t, 0.0, noise_scale=1.0), fullgraph=True, backend="aot_eager")
    theta = torch.zeros(2, 8)
    torch.manual_seed(1)
    a, b = compiled(theta), compiled(theta)
    assert not torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(kuramoto_update(theta, 0.0, noise_scale=1.0), a)


def test_compiled_bank_keeps_its_diagnostics(backend: str) -> None:
    torch._dynamo.reset()
    bank = FusedKuramoto(8, 6, n_harmonics=2, noise="off")
    x = torch.randn(2, 3, 8)
    want = bank(x)
    regular = bank.get_regularization_loss()
    bank.last_u_val = bank.last_delta_val = None
    got = torch.compile(bank, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(bank.get_regularization_loss(), regular)
    (got[0].sum() + bank.get_regularization_loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters() if p is not bank.delta_param)


class _Model(nn.Module):
    def forward(self, theta: Tensor, params: Tensor) -> Tensor:
        k, _, _ = bistable_coupling(params)
        features = kuramoto_features(theta, k.unsqueeze(-1), 3, dt=0.5)
        assert isinstance(features, Tensor)
        return features + order_parameters(kuramoto_update(theta, 0.1), 3)


def test_export(backend: str) -> None:
    args = torch.randn(4, 6), torch.rand(4, 10)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(_Model(), args, dynamic_shapes=({0: rows}, {0: rows}))
    targets = {str(n.target) for n in program.graph.nodes}
    assert {"kssm_kernels.order_parameters.default", "kssm_kernels.kuramoto.default"} <= targets
    other = torch.randn(9, 6), torch.rand(9, 10)
    assert torch.equal(program.module()(*other), _Model()(*other))


# ---- vmap, torch.func, autocast, subclasses ----


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_matches_the_loop_forward_and_backward(in_dim: int, backend: str) -> None:
    batch, shape = 3, [2, 5]
    theta = torch.randn(*shape[:in_dim], batch, *shape[in_dim:], dtype=torch.float64, requires_grad=True)
    coupling = torch.rand(batch, 2, 1, dtype=torch.float64, requires_grad=True)
    omega = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def one(t: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        features, phases = kuramoto_features(t, k, 3, omega=omega, dt=0.3, steps=2, return_phases=True)
        return features, phases, order_parameters(t, 2), kuramoto_update(t, 0.3)

    got = torch.func.vmap(one, in_dims=(in_dim, 0))(theta, coupling)
    rows = [one(t, k) for t, k in zip(theta.unbind(in_dim), coupling.unbind(0), strict=True)]
    want = tuple(torch.stack(v) for v in zip(*rows, strict=True))
    weights = [torch.randn_like(v) for v in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(list(v), [theta, coupling, omega], weights) for v in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("operand", ["scalar", "vector", "per ensemble"])
def test_vmap_over_an_operand_alone(operand: str, backend: str) -> None:
    theta = torch.randn(2, 5, dtype=torch.float64)
    shape = {"scalar": (), "vector": (5,), "per ensemble": (2, 1)}[operand]
    values = torch.rand(4, *shape, dtype=torch.float64, requires_grad=True)

    def one(k: Tensor) -> Tensor:
        return kuramoto_update(theta, k, phase_lag=k, steps=2, dt=0.2)

    got, want = torch.func.vmap(one)(values), torch.stack([one(k) for k in values])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(want)
    a, b = (torch.autograd.grad(v, values, weight)[0] for v in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_vmap_of_the_bistable_coupling_and_twice_nested(backend: str) -> None:
    params = torch.rand(3, 4, 10, dtype=torch.float64)
    once = torch.func.vmap(lambda p: torch.stack(bistable_coupling(p)), in_dims=1, out_dims=2)(params)
    torch.testing.assert_close(once, torch.stack(bistable_coupling(params)))
    theta = torch.randn(3, 4, 5, dtype=torch.float64)
    twice = torch.func.vmap(torch.func.vmap(lambda t: kuramoto_features(t, 0.5, 2)))(theta)
    torch.testing.assert_close(twice, kuramoto_features(theta, 0.5, 2))


def test_vmap_gives_every_member_its_own_noise(backend: str) -> None:
    def one(t: Tensor) -> Tensor:
        return kuramoto_update(t, 0.0, noise_scale=1.0, seed=3)

    theta = torch.zeros(4, 6)
    assert torch.equal(torch.func.vmap(one)(theta), one(theta))
    compiled = torch.compile(lambda t: torch.func.vmap(one)(t), backend="aot_eager")
    assert torch.equal(compiled(theta), one(theta))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_ops_in_their_inputs_dtype(half: torch.dtype, backend: str) -> None:
    theta = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=half):
        got = kuramoto_features(theta, 0.5, 4)
        low = order_parameters(theta.to(half), 4)
    assert got.dtype == torch.float32
    assert torch.equal(got, kuramoto_features(theta, 0.5, 4))
    assert low.dtype == half
    got.sum().backward()
    assert theta.grad is not None
    assert theta.grad.dtype == torch.float32


def test_bank_under_autocast_trains(backend: str) -> None:
    bank = FusedKuramoto(16, 12, n_harmonics=4, noise="off")
    x = torch.randn(2, 5, 16)
    plain = bank(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, _ = bank(x)
        loss = out.float().square().mean() + bank.get_regularization_loss()
    loss.backward()
    assert (out.float() - plain).abs().max() < 0.1 * plain.abs().max()  # two linear layers in bfloat16, 8 bits each
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in bank.named_parameters() if n != "delta_param")


class _Tagged(Tensor):
    pass


def test_a_tensor_subclass_goes_in(backend: str) -> None:
    plain = torch.randn(3, 5)
    got = order_parameters(plain.as_subclass(_Tagged), 2)
    assert torch.equal(torch.as_tensor(got).as_subclass(Tensor), order_parameters(plain, 2))


def test_fake_tensors_know_shape_and_dtype(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        theta, coupling = torch.empty(7, dtype=torch.bfloat16), torch.empty(2, 3, 1)
        features, phases = kssm_kernels.kuramoto_features(theta, coupling, 4, return_phases=True)
        assert (features.shape, phases.shape) == ((2, 3, 12), (2, 3, 7))
        assert features.dtype == phases.dtype == torch.bfloat16
        k, _, _ = bistable_coupling(torch.empty(2, 10, dtype=torch.bfloat16))
        assert (k.shape, k.dtype) == ((2,), torch.float32)

"""Derivatives in every direction: torch.func, forward mode, batched gradients, vmap, and what torch traces.

The truth is the same call by the naive formula in float64, differentiated by torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

import kssm_kernels
from kssm_kernels import FusedKuramoto, bistable_coupling, kuramoto_features, kuramoto_update, order_parameters
from tests.support import naive
from tests.support.cases import DISPATCHER, through

SEED, STEPS = 7, 12
Function = Callable[..., Tensor]


def _kuramoto(*args: Tensor) -> Tensor:
    theta, coupling, omega, lag, scale = args
    given: dict[str, Any] = {"omega": omega, "phase_lag": lag, "noise_scale": scale, "dt": 0.1, "steps": STEPS}
    features, phases = kuramoto_features(theta, coupling, 3, seed=SEED, return_phases=True, **given)
    return torch.cat([features, phases], -1)


def _kuramoto_naive(*args: Tensor) -> Tensor:
    theta, coupling, omega, lag, scale = args
    rows, n = theta.shape[0], theta.shape[-1]
    xi = torch.stack([kssm_kernels.philox_normal(rows, n, seed=SEED, step=k).double() for k in range(STEPS)])
    given: dict[str, Any] = {"omega": omega, "phase_lag": lag, "noise_scale": scale, "xi": xi}
    phases = naive.kuramoto_update(theta, coupling, dt=0.1, steps=STEPS, **given)
    return torch.cat([naive.order_parameters(phases, 3), phases], -1)


def _arguments(name: str) -> tuple[Tensor, ...]:
    wide = torch.float64
    theta = torch.randn(3, 5, dtype=wide)
    if name == "kuramoto":
        scale = 0.1 * torch.rand(1, dtype=wide)
        return (theta, torch.rand(3, 1, dtype=wide), torch.randn(5, dtype=wide), torch.rand((), dtype=wide), scale)
    return (torch.rand(4, 10, dtype=wide) + 0.2,) if name == "bistable" else (theta,)


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "order_parameters": (lambda t: order_parameters(t, 3), lambda t: naive.order_parameters(t, 3)),
    "kuramoto": (_kuramoto, _kuramoto_naive),
    "bistable": (
        lambda p: torch.stack(bistable_coupling(p)),
        lambda p: torch.stack(naive.bistable_coupling(p, (0.1, 10.0))),
    ),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


def _close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@every
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_functional_jacobians(name: str, transform: Any, backend: str) -> None:
    ours, equation = FUNCTIONS[name]
    args = _arguments(name)
    for i in range(len(args)):
        _close(transform(ours, argnums=i)(*args), transform(equation, argnums=i)(*args))


@every
@pytest.mark.parametrize(("strategy", "vectorize"), [("reverse-mode", True), ("forward-mode", True)])
def test_autograd_jacobians(name: str, strategy: str, vectorize: bool, backend: str) -> None:
    ours, equation = FUNCTIONS[name]
    args = _arguments(name)
    _close(jacobian(ours, args, strategy=strategy, vectorize=vectorize), jacobian(equation, args))


@every
def test_gradcheck_in_both_modes(name: str, backend: str) -> None:
    args = tuple(a.requires_grad_() for a in _arguments(name))
    assert gradcheck(FUNCTIONS[name][0], args, check_forward_ad=True, check_batched_grad=True, eps=1e-7, atol=1e-5)


@every
def test_grad_vjp_and_jvp(name: str, backend: str) -> None:
    ours, equation = FUNCTIONS[name]
    args = _arguments(name)
    along = tuple(torch.randn_like(a) for a in args)
    _close(torch.func.jvp(ours, args, along), torch.func.jvp(equation, args, along))
    weight = torch.randn_like(equation(*args))
    _close(torch.func.vjp(ours, *args)[1](weight), torch.func.vjp(equation, *args)[1](weight))
    _close(*(torch.func.grad(lambda *a, f=f: (f(*a) * weight).sum())(*args) for f in (ours, equation)))


@every
def test_a_tangent_of_one_argument_alone(name: str, backend: str) -> None:
    ours, equation = FUNCTIONS[name]
    args = _arguments(name)
    for i, arg in enumerate(args):

        def one(f: Function, x: Tensor, i: int = i) -> Tensor:
            return f(*args[:i], x, *args[i + 1 :])

        along = torch.randn_like(arg)
        got, want = (torch.func.jvp(lambda x, f=f: one(f, x), (arg,), (along,)) for f in (ours, equation))
        _close(got, want)


def test_per_sample_gradients_and_vmap_inside_grad(backend: str) -> None:
    ours, equation = FUNCTIONS["order_parameters"]
    (theta,) = _arguments("order_parameters")
    for wrapped in (
        lambda f: torch.func.vmap(torch.func.grad(lambda t: f(t).square().sum())),
        lambda f: torch.func.grad(lambda t: torch.func.vmap(f)(t).square().sum()),
        lambda f: torch.func.grad(lambda t: torch.func.jvp(f, (t,), (torch.ones_like(t),))[1].square().sum()),
    ):
        _close(wrapped(ours)(theta), wrapped(equation)(theta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_keeps_the_dtype(dtype: torch.dtype, backend: str) -> None:
    theta, along = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    got = torch.func.jvp(lambda t: kuramoto_features(t, 0.5, 3, steps=2), (theta,), (along,))
    want = torch.func.jvp(
        lambda t: naive.order_parameters(naive.kuramoto_update(t, 0.5, steps=2), 3),
        (theta.double(),),
        (along.double(),),
    )
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[1].double(), want[1], rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


def test_forward_mode_through_a_long_call(backend: str) -> None:
    theta, omega = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    _, tangent = torch.func.jvp(
        lambda w: kuramoto_update(theta, 0.0, omega=w, dt=0.1, steps=1000), (omega,), (torch.ones_like(omega),)
    )
    _close(tangent, torch.full_like(theta, 100.0))


@pytest.mark.parametrize("name", ["order_parameters", "kuramoto", "bistable"])
@pytest.mark.parametrize("way", ["hessian", "create_graph", "grad of grad"])
def test_second_derivatives_are_refused_by_name(name: str, way: str, backend: str) -> None:
    ours, args = FUNCTIONS[name][0], _arguments(name)

    def scalar(first: Tensor) -> Tensor:
        return ours(first, *args[1:]).square().sum()

    def twice(first: Tensor) -> Any:
        if way == "hessian":
            return torch.func.hessian(scalar)(first)
        if way == "grad of grad":
            return torch.func.grad(lambda t: torch.func.grad(scalar)(t).sum())(first)
        leaf = first.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
        return gradient.sum().backward()

    with pytest.raises(RuntimeError, match=r"(order_parameters|kuramoto_\w+|bistable_\w+): double backward is not"):
        twice(args[0])


def test_functional_call_of_a_bank_with_its_regularization(backend: str) -> None:
    bank = FusedKuramoto(8, 6, n_harmonics=2, noise="off")
    x, parameters = torch.randn(2, 3, 8), dict(bank.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(bank, given, (x,))[0]
        return out.square().mean() + bank.get_regularization_loss()

    got = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in bank.named_parameters():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], want)


# ---- batched gradients of an eager graph ----


@every
def test_batched_gradients(name: str, backend: str) -> None:
    ours, _ = FUNCTIONS[name]
    args = tuple(a.requires_grad_() for a in _arguments(name))
    out = ours(*args)
    weights = torch.randn(4, *out.shape, dtype=torch.float64)
    rows = [torch.autograd.grad(out, args, w, retain_graph=True) for w in weights]
    want = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    _close(torch.autograd.grad(out, args, weights, is_grads_batched=True, retain_graph=True), want)
    for axis in (0, 1):
        got = torch.func.vmap(lambda w: torch.autograd.grad(out, args, w, retain_graph=True), in_dims=axis)(
            weights.movedim(0, axis)
        )
        _close(got, want)


@every
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_of_autograd_grad_after_the_dispatcher_path(name: str, axis: int, backend: str) -> None:
    """Backward gets members along any axis, and cotangents that are shared (a stride of 0) or not."""
    ours, _ = FUNCTIONS[name]
    args = tuple(a.requires_grad_() for a in _arguments(name))
    with through(DISPATCHER):
        out = ours(*args)
    weights = torch.randn(4, *out.shape, dtype=torch.float64)
    want = torch.stack([torch.autograd.grad(out, args[0], w, retain_graph=True)[0] for w in weights])

    def gradient(w: Tensor) -> Tensor:
        return torch.autograd.grad(out, args[0], w, retain_graph=True)[0]

    _close(torch.func.vmap(gradient, in_dims=axis)(weights.movedim(0, axis)), want)
    shared = weights[:1].expand(4, *out.shape)
    _close(torch.func.vmap(gradient)(shared), want[:1].expand_as(want))


def _backward_calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """The dispatcher's backward ops as functions of their tensors: name -> (function, those of one member)."""
    ops: Any = torch.ops.kssm_kernels
    wide = torch.float64
    theta, params = torch.randn(3, 5, dtype=wide), torch.rand(4, 10, dtype=wide) + 0.2
    number = torch.tensor(0.1, dtype=wide)
    operands = (torch.rand(3, 1, dtype=wide), torch.randn(5, dtype=wide), torch.rand((), dtype=wide))
    saved = tuple(torch.rand(3, k, dtype=wide) for k in (6, 5, 6, 5))

    def kuramoto(*t: Tensor) -> Any:
        return ops.kuramoto_backward(*t[:4], None, None, number, 2, 2, *t[4:], [True] * 4 + [False])[:4]

    def noisy(*t: Tensor) -> Any:
        return ops.kuramoto_backward(*t[:4], t[3], torch.tensor(SEED), number, 2, 2, *t[4:], [True] * 5)

    return {
        "order_parameters": (ops.order_parameters_backward, (theta, saved[0], saved[2])),
        "kuramoto": (kuramoto, (theta, *operands, *saved)),
        "kuramoto with noise": (noisy, (theta, *operands, *saved)),
        "bistable": (
            lambda p, *g: ops.bistable_coupling_backward(p, number, 10 * number, *g),
            (params, *torch.rand(3, 4, dtype=wide)),
        ),
    }


@pytest.mark.parametrize("name", ["order_parameters", "kuramoto", "kuramoto with noise", "bistable"])
def test_vmap_of_the_backward_ops_over_any_of_their_arguments(name: str, backend: str) -> None:
    """Members along the first or the last axis, of one argument alone, of all but one, and of all."""
    function, member = _backward_calls()[name]
    count = len(member)
    alone = [[i == k for i in range(count)] for k in range(count)]
    for mapped in (*alone, *([not m for m in row] for row in alone), [True] * count):
        for last in (False, True):
            dims = tuple((t.dim() if last else 0) if m else None for t, m in zip(member, mapped, strict=True))
            given = [
                t if d is None else torch.stack([t, 1.5 * t, t - 0.25], d) for t, d in zip(member, dims, strict=True)
            ]
            got = torch.func.vmap(function, in_dims=dims, randomness="same")(*given)
            rows = [
                function(*(t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True)))
                for i in range(3)
            ]
            want = torch.stack(rows) if isinstance(got, Tensor) else tuple(map(torch.stack, zip(*rows, strict=True)))
            _close(got, want)


# ---- randomness under vmap ----


def test_vmap_draws_noise_as_its_randomness_says(backend: str) -> None:
    def moved(t: Tensor) -> Tensor:
        return kuramoto_update(t, 0.0, noise_scale=1.0)

    theta = torch.zeros(4, 6)
    different = torch.vmap(moved, randomness="different")(theta)
    assert all(not torch.equal(different[0], row) for row in different[1:])
    same = torch.vmap(moved, randomness="same")(theta)
    assert all(torch.equal(same[0], row) for row in same[1:])
    assert same[0].std() > 0.1
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(moved)(theta)


def test_a_seed_of_each_member_s_own(backend: str) -> None:
    def moved(seed: Tensor) -> Tensor:
        return kuramoto_update(torch.zeros(5), 0.0, noise_scale=1.0, seed=seed)

    seeds = torch.arange(3)
    assert torch.equal(torch.func.vmap(moved)(seeds), torch.stack([moved(s) for s in seeds]))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_the_gradient_under_vmap_sees_the_noise_of_the_forward_pass(randomness: str, backend: str) -> None:
    theta = torch.zeros(4, 6, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64)

    def loss(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        out = kuramoto_update(t, 0.0, noise_scale=s, seed=3)
        return out.sum(), out

    gradient, out = torch.func.vmap(
        torch.func.grad(loss, argnums=1, has_aux=True), in_dims=(0, None), randomness=randomness
    )(theta, scale)
    _close(gradient, (out / scale).sum(-1))  # d out / d s = -xi = out / s


def test_a_bank_under_vmap_keeps_its_regularization(backend: str) -> None:
    bank = FusedKuramoto(8, 6, n_harmonics=2, noise="off")
    x = torch.randn(2, 3, 8)
    bank(x)
    want = bank.get_regularization_loss()
    for mapped in (torch.vmap(bank), torch.vmap(torch.vmap(bank))):
        bank.last_u_val = bank.last_delta_val = None
        mapped(x)
        torch.testing.assert_close(bank.get_regularization_loss(), want)
    bank.get_regularization_loss().backward()
    assert bank.to_params.weight.grad is not None


# ---- tracing and compiling ----


class _All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = FusedKuramoto(8, 6, n_harmonics=2, noise="off")

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        out, r, theta = self.bank(x)
        phases = kuramoto_update(theta, k, omega=0.1, steps=2)
        return out.sum(-1) + r + kuramoto_features(phases, 0.3, 2).sum(-1) + order_parameters(phases, 2).sum(-1)


def test_a_trace_computes_and_differentiates(backend: str) -> None:
    model = _All()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (torch.randn(3, 8), torch.rand(3, 1)))
    x, k = torch.randn(3, 8), torch.rand(3, 1)
    want = model(x, k)
    assert torch.equal(traced(x, k), want)
    parameters = list(model.parameters())
    got = torch.autograd.grad(traced(x, k).sum(), parameters, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(want.sum(), parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b)


NUMBERS = [0.1, 0.2, 0.3, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9]
SWEEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "coupling, and arithmetic with it": lambda t, v: kuramoto_update(t + v, v, dt=0.1),
    "dt, and arithmetic with it": lambda t, v: kuramoto_update(t, 0.5, dt=v) + v,
    "omega": lambda t, v: kuramoto_update(t, 0.5, omega=v) * v,
    "phase_lag": lambda t, v: kuramoto_update(t, 0.5, phase_lag=v) * v,
    "noise_scale": lambda t, v: kuramoto_update(t, 0.5, noise_scale=v, seed=3) * v,
    "features": lambda t, v: kuramoto_features(t, v, 3, omega=v, phase_lag=v, dt=v) * v,
    "clamp": lambda t, v: torch.stack(bistable_coupling(t, (0.01 * v, v))) * v,
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_a_compiled_sweep_is_right_in_two_graphs(name: str, compiler: str, backend: str) -> None:
    if getattr(torch._dynamo.config, "specialize_float", True):
        pytest.skip("this torch (before 2.6) makes a graph of its own for every float, whoever takes it")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    theta, sweep = torch.rand(3, 10) + 0.2, SWEEPS[name]
    compiled = torch.compile(sweep, fullgraph=True, backend=compiler)
    for value in NUMBERS:
        torch.testing.assert_close(compiled(theta, value), sweep(theta, value), rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_functional_derivatives_are_right(backend: str) -> None:
    theta = torch.randn(3, 5)
    for function in (
        lambda t: torch.func.grad(lambda y: order_parameters(y, 2).square().sum())(t),
        lambda t: torch.func.jvp(lambda y: order_parameters(y, 2), (t,), (torch.ones_like(t),))[1],
        lambda t: torch.func.vmap(lambda y: order_parameters(y, 2))(t),
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(theta), function(theta))
    compiled = torch.compile(lambda t: order_parameters(t, 2).square().sum(), backend="aot_eager")
    compiled(theta)
    torch.testing.assert_close(
        torch.func.grad(compiled)(theta), torch.func.grad(lambda t: order_parameters(t, 2).square().sum())(theta)
    )

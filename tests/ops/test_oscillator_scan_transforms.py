"""The scan in torch's machinery: forward mode, torch.func, vmap, the registered op, compile, export and trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from kssm_kernels import oscillator_scan, oscillator_step
from tests.support.cases import DISPATCHER, Args, through
from tests.support.graphs import CountingBackend
from tests.support.oscillator_scan import KINDS, SEQUENCES, by_equation, by_package, drawn, gradients, leaves

OP = "oscillator_scan"

Function = Callable[..., Tensor]
RESET = torch.tensor([[False, True, False], [False, False, False]])
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stuart_landau": ({"phase_lag": (2, 2)}, {"reset": RESET}),
    "moebius": ({"phase_lag": (2,)}, {"kind": "moebius", "reset": RESET}),
    "tied": ({"forget": False}, {"tied_leak": True}),
    "free": ({"coupling": False}, {"kind": "moebius"}),
    "closed": ({"communities": 3, "phase_lag": (2,)}, {"reset": RESET}),
    "closed moebius": ({"communities": 3, "coupling": False, "listen": False}, {"kind": "moebius", "reset": RESET}),
}
every = pytest.mark.parametrize("name", CASES)


def functions(name: str) -> tuple[Function, Function, tuple[Tensor, ...]]:
    """By the package and by the equation, of the tensors alone, and these."""
    operands, options = CASES[name]
    args = drawn((2,), 3, 2, 2, initial=(), **operands)
    names = list(args)

    def flat(call: Callable[..., Any]) -> Function:
        def function(*given: Tensor) -> Tensor:
            found = call(dict(zip(names, given, strict=True)), heads=2, harmonics=2, return_states=True, **options)
            return torch.cat([v.flatten() for v in found.values()])

        return function

    return flat(by_package), flat(by_equation), tuple(args.values())


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# ---- derivatives ----


@every
def test_jvp_vjp_and_grad(name: str, backend: str) -> None:
    ours, equation, args = functions(name)
    along = tuple(torch.randn_like(a) for a in args)
    close(torch.func.jvp(ours, args, along), torch.func.jvp(equation, args, along))
    weight = torch.randn_like(equation(*args))
    close(torch.func.vjp(ours, *args)[1](weight), torch.func.vjp(equation, *args)[1](weight))
    close(*(torch.func.grad(lambda *a, f=f: (f(*a) * weight).sum())(*args) for f in (ours, equation)))


@every
def test_a_tangent_of_one_argument_alone(name: str, backend: str) -> None:
    ours, equation, args = functions(name)
    for i, arg in enumerate(args):

        def one(x: Tensor, f: Function, i: int = i) -> Tensor:
            return f(*args[:i], x, *args[i + 1 :])

        along = torch.randn_like(arg)
        got, want = (torch.func.jvp(lambda x, f=f: one(x, f), (arg,), (along,)) for f in (ours, equation))
        close(got, want)


def test_a_tangent_does_not_depend_on_what_is_kept(backend: str) -> None:
    p, *rest = drawn((2,), 5, 2, 2).values()
    along = torch.randn_like(p)
    results = [
        torch.func.jvp(lambda x, n=n: oscillator_scan(x, *rest, save=n)[0], (p,), (along,))[1] for n in ("all", 2, 7)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every
def test_jacobians(name: str, backend: str) -> None:
    ours, equation, args = functions(name)
    want = jacobian(equation, args)
    close(jacobian(ours, args, vectorize=True), want)
    close(jacobian(ours, args, strategy="forward-mode", vectorize=True), want)
    for i in (0, len(args) - 1):
        close(torch.func.jacrev(ours, argnums=i)(*args), want[i])
        close(torch.func.jacfwd(ours, argnums=i)(*args), want[i])


@every
def test_gradcheck_in_both_modes(name: str, backend: str) -> None:
    ours, _, args = functions(name)
    own = tuple(a.requires_grad_() for a in args)
    checks = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(ours, own, eps=1e-7, atol=1e-5, **checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_mode_keeps_the_dtypes(dtype: torch.dtype, backend: str) -> None:
    args = drawn((2,), 3, 2, 2, dtype=dtype)
    given = tuple(args.values())
    along = tuple(torch.randn_like(a) for a in given)

    def function(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(by_package(dict(zip(args, t, strict=True)), heads=2).values())

    found, tangents = torch.func.jvp(function, given, along)
    assert [t.dtype for t in tangents] == [f.dtype for f in found] == [dtype] * 2 + [torch.float32] * 2
    wide = torch.func.jvp(function, tuple(a.double() for a in given), tuple(a.double() for a in along))
    for got, want in zip(tangents, wide[1], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


@every
@pytest.mark.parametrize("way", ["hessian", "grad of grad"])
def test_second_derivatives_are_refused_by_name(name: str, way: str, backend: str) -> None:
    ours, _, args = functions(name)

    def scalar(first: Tensor) -> Tensor:
        return ours(first, *args[1:]).square().sum()

    twice = torch.func.hessian(scalar) if way == "hessian" else torch.func.grad(
        lambda t: torch.func.grad(scalar)(t).sum()
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"oscillator_scan: double backward is not"):
        twice(args[0])


@every
@pytest.mark.parametrize("path", ["eager", DISPATCHER])
def test_batched_gradients(name: str, path: str, backend: str) -> None:
    ours, _, args = functions(name)
    own = tuple(a.requires_grad_() for a in args)
    with through(path):
        out = ours(*own)
    weights = torch.randn(3, *out.shape, dtype=torch.float64)
    rows = [torch.autograd.grad(out, own, w, retain_graph=True) for w in weights]
    want = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    close(torch.autograd.grad(out, own, weights, is_grads_batched=True, retain_graph=True), want)

    def gradient(w: Tensor) -> Any:
        return torch.autograd.grad(out, own, w, retain_graph=True)

    close(torch.func.vmap(gradient, in_dims=1)(weights.movedim(0, 1)), want)
    shared = torch.func.vmap(gradient)(weights[:1].expand(3, -1))
    close(shared, tuple(v[:1].expand_as(v) for v in want))


# ---- vmap ----


def mapped(names: tuple[str, ...], axis: int, kind: str) -> tuple[Function, list[Tensor], list[Tensor]]:
    """A call as a function of what is mapped, its values with the members along ``axis``, and member by member."""
    args: Args = drawn((2,), 4, 2, 3, phase_lag=(2,), initial=(2,))
    args["reset"] = torch.rand(2, 4) < 0.4
    members = []
    for name in names:
        v = args[name]
        rows = [torch.rand(v.shape) < 0.4 if v.dtype == torch.bool else v + 0.3 * torch.randn_like(v) for _ in range(3)]
        members.append(torch.stack(rows))
    given = [m.movedim(0, axis if m.dim() > axis else 0).requires_grad_(m.is_floating_point()) for m in members]

    def function(*t: Tensor) -> Tensor:
        own = {**args, **dict(zip(names, t, strict=True))}
        reset = own.pop("reset")
        found = by_package(own, kind=kind, heads=2, harmonics=2, reset=reset)
        return torch.cat([v.flatten() for v in found.values()])

    return function, given, members


EVERYTHING = (*SEQUENCES, "phase_lag", "initial_re", "initial_im", "reset")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "names", [EVERYTHING, SEQUENCES, *((n,) for n in EVERYTHING), ("initial_re", "reset")], ids="+".join
)
def test_vmap_is_the_loop_forward_and_backward(names: tuple[str, ...], axis: int, kind: str, backend: str) -> None:
    function, given, _ = mapped(names, axis, kind)
    dims = tuple(axis if t.dim() > axis else 0 for t in given)
    got = torch.func.vmap(function, in_dims=dims)(*given)
    rows = [function(*(t.select(d, i) for t, d in zip(given, dims, strict=True))) for i in range(3)]
    want = torch.stack(rows)
    close(got, want)
    moving = [t for t in given if t.requires_grad]
    if moving:
        weight = torch.randn_like(want)
        close(*(torch.autograd.grad(v, moving, weight) for v in (got, want)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [SEQUENCES, ("phase_lag",), ("p", "initial_im", "reset")], ids="+".join)
def test_vmap_of_grad_is_the_loop(names: tuple[str, ...], kind: str, backend: str) -> None:
    function, given, _ = mapped(names, 0, kind)
    still = [t.detach() for t in given]
    weight = torch.randn_like(function(*(t[0] for t in still)))
    grad = torch.func.grad(lambda *t: (function(*t) * weight).sum(), argnums=0)
    close(torch.func.vmap(grad)(*still), torch.stack([grad(*(t[i] for t in still)) for i in range(3)]))
    inside = torch.func.grad(lambda *t: (torch.func.vmap(function)(*t) * weight).sum())(*still)
    close(inside, torch.func.vmap(grad)(*still))


def test_vmap_twice_and_of_a_step(backend: str) -> None:
    args = drawn((3, 4), 5, 2, 3)
    want = by_package(args, heads=2)["order_re"]
    twice = torch.func.vmap(torch.func.vmap(lambda *t: oscillator_scan(*t)[0]))(*args.values())
    close(twice, want)
    now = [v[..., 0, :] for v in args.values()]
    close(torch.func.vmap(lambda *t: oscillator_step(*t)[1], in_dims=1, out_dims=1)(*now), oscillator_step(*now)[1])


# ---- the registered op ----


def _sample(kind: str, every_step: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    args = leaves(drawn((2,), 4, 2, 3, phase_lag=(2,), initial=(), communities=3, dtype=dtype))
    return (*args.values(), torch.rand(2, 4) < 0.3, kind, 2, 3, False, every_step, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every_step", [1, 3])
def test_opcheck(every_step: int, kind: str, backend: str) -> None:
    op: Any = torch.ops.kssm_kernels.oscillator_scan
    torch.library.opcheck(op.default, _sample(kind, every_step))


def test_opcheck_of_fewer_operands_and_of_none_kept(backend: str) -> None:
    op: Any = torch.ops.kssm_kernels.oscillator_scan
    p, q, gate, phase = (v.detach() for v in _sample("moebius", 1, torch.bfloat16)[:4])
    none = (None,) * 9
    torch.library.opcheck(op.default, (p, q, gate, phase, *none, "moebius", 2, 0, False, 0, True))
    empty = [v[:, :0].requires_grad_() for v in (p, q, gate, phase)]
    torch.library.opcheck(op.default, (*empty, *none, "stuart_landau", 2, 2, False, 1, True))


@pytest.mark.parametrize("needed", [[True] * 12, [True, False] * 6])
def test_opcheck_of_the_backward_op(needed: list[bool], backend: str) -> None:
    ops: Any = torch.ops.kssm_kernels
    sample = tuple(v.detach() if isinstance(v, Tensor) else v for v in _sample("stuart_landau", 1))
    found = ops.oscillator_scan(*sample)
    given = [torch.randn_like(v) for v in found]
    torch.library.opcheck(ops.oscillator_scan_backward.default, (*sample, *found[4:], *given, needed))


# ---- compile, export, trace ----


def _loss(*t: Tensor) -> Tensor:
    p, q, gate, phase, coupling, forget, lag = t
    re, im, last = oscillator_scan(2 * p, q, gate, phase, coupling, forget, phase_lag=lag, kind="moebius", save=2)
    second = oscillator_scan(p, q, gate, phase, coupling, tied_leak=True, initial_state=last, return_states=True)
    step = oscillator_step(p[:, 0], q[:, 0], gate[:, 0], phase[:, 0], heads=2, state=last)
    return (re * im).sum() + second[0].square().sum() + second[3][1].sum() + step[1].sum() + step[2][0].sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    args = drawn((2,), 5, 2, 3, phase_lag=(2,), dtype=torch.float32)
    results = []
    for function in (_loss, torch.compile(_loss, fullgraph=True, backend=compiler)):
        own = list(leaves(args).values())
        value = function(*own)
        results.append([value.detach(), *torch.autograd.grad(value, own)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_with_dynamic_shapes_makes_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    counting = CountingBackend()

    def function(*t: Tensor) -> Any:
        return oscillator_scan(*t, heads=2, harmonics=3)[:2]

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    for batch, steps, n in ((3, 5, 4), (4, 7, 5), (5, 40, 16)):  # torch takes sizes that are equal at first for one
        args = drawn((batch,), steps, 2, n, dtype=torch.float32).values()
        for got, want in zip(compiled(*args), function(*args), strict=True):
            assert torch.equal(got, want)
    assert counting.graphs == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_sweep_of_the_phase_lag_is_right_in_two_graphs(compiler: str, backend: str) -> None:
    if getattr(torch._dynamo.config, "specialize_float", True):
        pytest.skip("this torch (before 2.6) makes a graph of its own for every float, whoever takes it")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = list(drawn((2,), 3, 2, 3, dtype=torch.float32).values())

    def sweep(lag: float) -> Tensor:
        return oscillator_scan(*args, phase_lag=lag)[0] * lag

    compiled = torch.compile(sweep, fullgraph=True, backend=compiler)
    for lag in (0.1, 0.2, 0.3, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9):
        torch.testing.assert_close(compiled(lag), sweep(lag), rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 4 * 6 + 4)
        self.lag = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        p, q, gate, phase, k, f = self.projection(x).split([6, 6, 6, 6, 2, 2], -1)
        re, im, last = oscillator_scan(p, q, gate, phase, k, f, phase_lag=self.lag, kind="moebius")
        return torch.cat([re.flatten(-2), im.flatten(-2)], -1) + last[0].sum()


def test_export_with_dynamic_batch_and_time(backend: str) -> None:
    layer = Layer()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("time", min=2, max=4096)}
    program = torch.export.export(layer, (torch.randn(3, 5, 8),), dynamic_shapes=(sizes,))
    assert "kssm_kernels.oscillator_scan.default" in {str(n.target) for n in program.graph.nodes}
    other = torch.randn(4, 70, 8)
    assert torch.equal(program.module()(other), layer(other))


def test_a_trace_computes_and_differentiates(backend: str) -> None:
    layer = Layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (torch.randn(2, 5, 8),))
    x = torch.randn(2, 5, 8)
    assert torch.equal(traced(x), layer(x))
    parameters = list(layer.parameters())
    a, b = (torch.autograd.grad(f(x).sum(), parameters) for f in (traced, layer))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_mixes_dtypes_and_trains(half: torch.dtype, backend: str) -> None:
    layer, x = Layer(), torch.randn(2, 5, 8)
    plain = layer(x)
    with torch.autocast("cpu", dtype=half):
        out = layer(x)
    out.float().square().mean().backward()
    assert torch.dist(out.float(), plain, math.inf) < 0.1 * plain.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())


class Tagged(Tensor):
    pass


def test_a_tensor_subclass_goes_in(backend: str) -> None:
    args = drawn((2,), 3, 2, 3)
    got = oscillator_scan(*(v.as_subclass(Tagged) for v in args.values()))
    for a, b in zip(got[:2], oscillator_scan(*args.values()), strict=False):
        assert torch.equal(a.as_subclass(Tensor), b)


def test_fake_tensors_know_shape_and_dtype(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        wide = [torch.empty(3, 7, 12, dtype=torch.bfloat16) for _ in range(4)]
        re, im, last, states = oscillator_scan(*wide, heads=4, harmonics=5, return_states=True)
        assert re.shape == im.shape == (3, 7, 4, 5)
        assert re.dtype == im.dtype == torch.bfloat16
        assert [v.shape for v in (*last, *states)] == [(3, 12)] * 2 + [(3, 7, 12)] * 2
        assert {v.dtype for v in (*last, *states)} == {torch.float32}
        marks = torch.empty(3, dtype=torch.int32)
        packed = oscillator_scan(*(v[:1] for v in wide), heads=4, cu_seqlens=marks)
        assert packed[0].shape == (1, 7, 4, 4)


def test_derivatives_after_the_dispatcher_path_are_those_of_the_eager_one(backend: str) -> None:
    args = drawn((2,), 9, 2, 3, phase_lag=(2,), initial=(), dtype=torch.float32)
    results = []
    for path in ("eager", DISPATCHER):
        own = leaves(args)
        with through(path):
            results.append(gradients(by_package(own, heads=2, save=4), own))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())

"""The uncoupled scan in parallel over time, in pure torch: equal to the loop, and run where the rule says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kssm_kernels import oscillator_scan, use_backend
from kssm_kernels.ops import _entry
from kssm_kernels.ops.oscillator_scan import _parallel, runs_parallel
from kssm_kernels.ops.oscillator_scan._scan import KINDS, Scan
from tests.support.mps import MPS, OnMPS, Trace, faults

B, D, G, H = 2, 6, 2, 3
# relative to 1 + |value|. Both forms are off by rounding alone; measured on the grid below: 5e-15 and 3e-6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def pure_torch() -> Iterator[None]:
    torch.manual_seed(0)
    with use_backend("torch"):
        yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parallel form for every shape that allows it."""
    monkeypatch.setattr(_parallel, "wins", lambda s: not s.exact and s.coupling is None)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the parallel form ran")

    monkeypatch.setattr(_parallel, "states", fail)
    monkeypatch.setattr(_parallel, "adjoint", fail)


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def four(steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(dtype, B, steps, D) for _ in range(4)]


def both(inputs: list[Tensor], leaves: list[Tensor], **given: Any) -> list[list[Tensor]]:
    """Results and gradients by the loop, then by the parallel form."""
    found, grads = [], None
    for exact in (True, False):
        results = flat(oscillator_scan(*inputs, heads=G, harmonics=H, exact=exact, **given))
        grads = grads or [torch.randn_like(r) for r in results]
        found.append([*results, *torch.autograd.grad(results, leaves, grads)])
    return found


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 64, 100, 1000])
@kinds
def test_equals_the_loop(kind: str, steps: int, dtype: torch.dtype) -> None:
    cases = itertools.product((False, True), (False, True), (False, True), ("all", 3, 64, "returned"))
    for forget, reset, initial, save in list(cases)[:: 1 if steps < 1000 else 5]:  # five is coprime to 32: all values
        inputs = four(steps, dtype)
        leaves, given = list(inputs), {}
        if forget:
            given["forget"] = leaf(dtype, B, steps, G)
            leaves.append(given["forget"])
        if initial:
            given["initial_state"] = leaf(dtype, B, D), leaf(dtype, 1, D)
            leaves += given["initial_state"]
        if reset:
            given["reset"] = torch.rand(B, steps) < 0.1
        given |= {"return_states": True} if save == "returned" else {"save": save}
        assert_close(*both(inputs, leaves, kind=kind, **given), TOLERANCE[dtype])


@pytest.mark.usefixtures("forced")
@kinds
@pytest.mark.parametrize("outputs", [(0, 1), (2, 3), (0,), (2,), (4,), (5,)], ids=str)
def test_gradients_of_some_results(kind: str, outputs: tuple[int, ...]) -> None:
    inputs, reset = four(70), torch.rand(B, 70) < 0.1
    found = []
    for exact in (True, False):
        results = flat(
            oscillator_scan(*inputs, kind=kind, heads=G, harmonics=H, reset=reset, return_states=True, exact=exact)
        )
        found.append(list(torch.autograd.grad([results[i].square().sum() for i in outputs], inputs)))
    assert_close(*found, 1e-13)


@pytest.mark.usefixtures("forced")
@kinds
def test_axes_strides_and_documents(kind: str) -> None:
    steps = 33
    inputs = [torch.randn(D, steps, 1, dtype=torch.float64).transpose(0, 2).requires_grad_() for _ in range(4)]
    marks = torch.tensor([0, 5, 5, 6, 33, 33])
    assert_close(*both(inputs, inputs, kind=kind, cu_seqlens=marks), 1e-13)
    inputs = [leaf(torch.float64, steps, D) for _ in range(4)]
    assert_close(*both(inputs, inputs, kind=kind), 1e-13)
    inputs = [leaf(torch.float64, 0, 3, steps, D) for _ in range(4)]
    assert_close(*both(inputs, inputs, kind=kind), 1e-13)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("size", [1.0, 1e4, 1e20, 3e38])
@pytest.mark.parametrize("gate", [-12.0, 0.0, 9.0])
def test_long_moebius_with_strong_writes(gate: float, size: float) -> None:
    inputs = [(torch.randn(1, 4096, D) * scale).clamp(-3e38, 3e38) for scale in (size, size, 3.0, 1.0)]
    inputs[2] = inputs[2] + gate
    leaves = [x.requires_grad_() for x in inputs]
    re, im, last, states = oscillator_scan(*leaves, kind="moebius", heads=G, return_states=True, exact=False)
    assert all(t.isfinite().all() for t in flat((re, im, last, states)))
    assert torch.hypot(states[0].double(), states[1].double()).max() <= 1 + 4 * torch.finfo(torch.float32).eps
    gradients = torch.autograd.grad(re.sum() + im.sum() + last[0].sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.usefixtures("forced")
@kinds
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 2, 3], ids=["write", "gate", "phase"])
def test_a_nan_stays_in_its_document_and_row(kind: str, where: int, broken: float) -> None:
    steps, first, behind = 300, 37, 41  # the second of the three documents
    inputs = four(steps, torch.float32)
    reset = torch.zeros(B, steps, dtype=torch.bool)
    reset[:, [first, behind]] = True
    initial = leaf(torch.float32, B, D), leaf(torch.float32, B, D)

    def run(inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given: dict[str, Any] = {"kind": kind, "heads": G, "harmonics": H, "reset": reset, "initial_state": initial}
        re, im, last, states = oscillator_scan(*inputs, return_states=True, exact=False, **given)
        results = [re, im, *states]
        total = sum(r.nan_to_num().square().sum() for r in results)
        return [*results, *torch.autograd.grad(total, inputs, retain_graph=True)], [
            *last,
            *torch.autograd.grad(total, initial),
        ]

    sane, sane_ends = run(inputs)
    damaged = [x.detach().clone() for x in inputs]
    damaged[where][1, first + 1] = broken
    found, found_ends = run([x.requires_grad_() for x in damaged])
    for a, b in zip(sane, found, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1, :first], b[1, :first])
        assert torch.equal(a[1, behind:], b[1, behind:])
    for a, b in zip(sane_ends, found_ends, strict=True):
        assert torch.equal(a[0], b[0])
    for a, b in zip(sane_ends[:2], found_ends[:2], strict=True):
        assert torch.equal(a[1], b[1])


@pytest.mark.usefixtures("forced")
@kinds
def test_a_nan_does_not_go_back_in_time(kind: str) -> None:
    inputs = four(300, torch.float32)
    sane = oscillator_scan(*inputs, kind=kind, heads=G, exact=False)
    damaged = [x.detach().clone() for x in inputs]
    damaged[3][:, 77] = float("nan")
    found = oscillator_scan(*damaged, kind=kind, heads=G, exact=False)
    assert torch.equal(sane[0][:, :77], found[0][:, :77])
    assert found[0][:, 77:].isnan().all()


# ---- which form runs ----


def scan_of(p: Tensor, coupling: Tensor | None, exact: bool, every: int = 1) -> Scan:
    return Scan(p, p, p, p, coupling, *[None] * 8, "moebius", G, H, False, every, exact)


def test_the_rule() -> None:
    p = torch.zeros(4, 64, 256)
    assert _parallel.wins(scan_of(p, None, False))
    assert not _parallel.wins(scan_of(p, None, True))
    assert not _parallel.wins(scan_of(p, torch.zeros(4, 64, G), False))
    assert [runs_parallel(1, t, 64) for t in (15, 16, 4096)] == [False, True, True]
    assert [runs_parallel(rows, 64, 256) for rows in (0, 16, 17)] == [True, True, False]
    assert [runs_parallel(16, 4096, 256, every) for every in (0, 1, 64, 65)] == [True, True, True, False]


@pytest.mark.parametrize("every", [1, 2, 3, 16, 17, 1000, 5000])
def test_a_span_ends_with_a_kept_state(every: int) -> None:
    for width in (1, 64, 1000, 4096):
        length = _parallel.span(scan_of(torch.zeros(1, 64, width), None, False, every))
        assert length % every == 0
        assert length == every or length * width <= max(_parallel.AT_ONCE, 16 * width)


@pytest.mark.usefixtures("forbidden")
@kinds
def test_never_if_exact_or_coupled_or_short(kind: str) -> None:
    inputs = four(64)
    coupling = leaf(torch.float64, B, 64, G)
    for given in ({"exact": True}, {}, {"exact": False, "coupling": coupling}):
        sum(r.sum() for r in flat(oscillator_scan(*inputs, kind=kind, heads=G, **given))).backward()
    oscillator_scan(*four(15), kind=kind, heads=G, exact=False)
    with pytest.raises(AssertionError, match="the parallel form ran"):
        oscillator_scan(*inputs, kind=kind, heads=G, exact=False)


# ---- derivatives ----


def function(kind: str, reset: Tensor, **given: Any) -> Callable[..., tuple[Tensor, ...]]:
    def call(*args: Tensor) -> tuple[Tensor, ...]:
        p, q, gate, phase, forget, *initial = args
        state: Any = tuple(initial)
        results = oscillator_scan(
            *(p, q, gate, phase, None, forget), kind=kind, initial_state=state, reset=reset, exact=False, **given
        )
        return tuple(flat(results))

    return call


def arguments(steps: int) -> tuple[Tensor, ...]:
    initial = 0.3 * torch.randn(2, B, D, dtype=torch.float64)
    return *four(steps), leaf(torch.float64, B, steps, G), *(x.requires_grad_() for x in initial)


@pytest.mark.usefixtures("forced")
@kinds
@pytest.mark.parametrize("given", [{"return_states": True}, {"save": 2}], ids=str)
def test_gradcheck(kind: str, given: dict[str, Any]) -> None:
    reset = torch.zeros(B, 7, dtype=torch.bool)
    reset[1, 3] = reset[0, 0] = True
    assert gradcheck(function(kind, reset, harmonics=2, **given), arguments(7))


@pytest.mark.usefixtures("forced")
@kinds
def test_forward_mode_and_vmap(kind: str) -> None:
    steps = 20
    args = tuple(x.detach() for x in arguments(steps))
    call = function(kind, torch.rand(B, steps) < 0.1, harmonics=2)
    tangents = tuple(torch.randn_like(x) for x in args)
    values, moved = torch.func.jvp(call, args, tangents)
    assert_close(list(call(*args)), list(values), 1e-13)
    _, pull = torch.func.vjp(call, *args)
    grads = tuple(torch.randn_like(v) for v in values)
    pulled = pull(grads)
    left = sum((g * m).sum() for g, m in zip(grads, moved, strict=True))
    right = sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    many = tuple(torch.stack([x, 2 * x]) for x in args)
    mapped = torch.func.vmap(call)(*many)
    for i in range(2):
        assert_close(list(call(*(x[i] for x in many))), [r[i] for r in mapped], 1e-13)


# ---- Metal ----


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_mps(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_entry, "_dispatch_modes", lambda: 0)
    monkeypatch.setattr(_entry, "_PLAIN", _entry._PLAIN | {OnMPS})
    with Trace() as trace:

        def on_device(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=MPS, requires_grad=True)

        inputs = [on_device(B, 20, D) for _ in range(4)]
        forget, initial = on_device(B, 20, G), (on_device(D), on_device(D))
        for reset in (None, torch.zeros(B, 20, dtype=torch.bool, device=MPS)):
            given: dict[str, Any] = {"initial_state": initial, "reset": reset, "save": 3, "exact": False}
            results = flat(oscillator_scan(*inputs, None, forget, kind=kind, harmonics=H, **given))
            leaves = [*inputs, forget, *initial]
            gradients = torch.autograd.grad(sum(r.float().sum() for r in results), leaves)
            assert all(isinstance(x, OnMPS) for x in (*results, *gradients))
    assert faults(trace.calls) == []

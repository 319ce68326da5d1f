"""The closed loop of the scan: the guarantees of the open one, and what the loop alone can break."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kssm_kernels import oscillator_scan, oscillator_step
from tests.support.cases import DISPATCHER, PATHS, Result, threads, through
from tests.support.oscillator_scan import (
    KINDS,
    SEQUENCES,
    assert_same_bits,
    both,
    by_equation,
    by_package,
    drawn,
    gradients,
    leaves,
)

OP = "oscillator_scan"

kinds = pytest.mark.parametrize("kind", KINDS)
TIMED = (*SEQUENCES, "listen")
LOOPS: dict[str, dict[str, Any]] = {
    "listening": {"communities": 5, "coupling": False},
    "coupled": {"communities": 17, "phase_lag": (3,), "listen": False},
    "without a forget gate": {"communities": 4, "forget": False, "coupling": False},
}
loops = pytest.mark.parametrize("which", LOOPS)


def marks(steps: int, *where: int, batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, steps, dtype=torch.bool)
    mask[:, list(where)] = True
    return mask


@kinds
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("save", ["all", 2])
def test_gradcheck(save: Any, path: str, kind: str, backend: str) -> None:
    args = drawn((2,), 3, 2, 2, initial=(), communities=3, phase_lag=(2,))
    names = list(args)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        with through(path):
            own = dict(zip(names, given, strict=True))
            return tuple(by_package(own, kind=kind, heads=2, harmonics=2, save=save, reset=marks(3, 2)).values())

    given = tuple(v.clone().requires_grad_() for v in args.values())
    assert torch.autograd.gradcheck(function, given, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


@kinds
@loops
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 25])
def test_any_number_of_sequences(rows: int, which: str, kind: str, backend: str) -> None:
    """Kernels take some side by side; the last ones may be fewer."""
    args = drawn((rows,), 19, 3, 5, initial=(), **LOOPS[which])
    options = {"kind": kind, "heads": 3, "harmonics": 2, "reset": marks(19, 3, 16, batch=rows)}
    got, own = both(args, save=5, **options), leaves(args)
    outputs = by_equation(own, **options)
    want = outputs | {f"d {k}": v for k, v in gradients(outputs, own).items()}
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-9, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")


@kinds
@pytest.mark.parametrize(("heads", "oscillators"), [(2, 100), (1, 1024), (40, 1)])
def test_heads_of_any_size(heads: int, oscillators: int, kind: str, backend: str) -> None:
    args = drawn((2,), 3, heads, oscillators, communities=3)
    options = {"kind": kind, "heads": heads, "harmonics": 1}
    got, own = both(args, **options), leaves(args)
    outputs = by_equation(own, **options)
    want = outputs | {f"d {k}": v for k, v in gradients(outputs, own).items()}
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-9, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")


@kinds
def test_a_gradient_is_the_same_whichever_others_are_asked_for(kind: str, backend: str) -> None:
    args = drawn((2,), 7, 3, 5, initial=(2,), communities=4)
    options = {"kind": kind, "heads": 3, "reset": marks(7, 3)}
    everything = both(args, **options)
    for name in args:
        own = {**args, name: args[name].clone().requires_grad_()}
        alone = gradients(by_package(own, **options), own)
        assert torch.equal(alone[name], everything[f"d {name}"]), name


@kinds
@loops
@pytest.mark.parametrize("save", [1, 2, 3, 64, 1000])
def test_the_interval_of_kept_states_changes_no_bit(save: int, which: str, kind: str, backend: str) -> None:
    args = drawn((2,), 70, 3, 5, initial=(2,), dtype=torch.float32, **LOOPS[which])
    options = {"kind": kind, "heads": 3, "reset": marks(70, 0, 5, 6, 63, 64, 69)}
    assert_same_bits(both(args, save=save, **options), both(args, save="all", **options))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, kind: str, backend: str) -> None:
    args = drawn((15,), 20, 7, 9, initial=(), communities=6, dtype=dtype)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(both(args, kind=kind, heads=7, reset=marks(20, 4, batch=15), save=8))
    by_torch = ("d communities", "d feedback")  # products of torch, which promises no more of itself
    for other in [results[3]] if backend == "torch" else results[1:]:
        kept = results[3].keys() if other is results[3] else [k for k in other if k not in by_torch]
        assert_same_bits({k: other[k] for k in kept}, {k: results[1][k] for k in kept})


@kinds
def test_a_sequence_does_not_depend_on_its_neighbours(kind: str, backend: str) -> None:
    args = drawn((9,), 20, 5, 3, initial=(9,), communities=4, dtype=torch.float32)
    whole = by_package(args, kind=kind, heads=5)
    shared = ("communities", "feedback")
    rows = by_package({k: v if k in shared else v[[7]] for k, v in args.items()}, kind=kind, heads=5)
    rest = {"rtol": 1e-4, "atol": 1e-5} if backend == "torch" else {"rtol": 0, "atol": 0}  # torch promises no bits
    for k, v in rows.items():
        torch.testing.assert_close(v[0], whole[k][7], **rest, msg=lambda m, k=k: f"{k}: {m}")


@kinds
@loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_in_chunks_has_the_bits_of_the_whole(
    dtype: torch.dtype, which: str, kind: str, backend: str
) -> None:
    args = drawn((2,), 140, 3, 7, initial=(), dtype=dtype, **LOOPS[which])
    whole = by_package(args, kind=kind, heads=3)
    for cuts in ((1,), (64,), (3, 64, 128), (0, 70, 70)):
        found: list[Result] = []
        rest = {k: v for k, v in args.items() if k not in TIMED}
        for first, last in itertools.pairwise((0, *cuts, 140)):
            part = {k: v[:, first:last] for k, v in args.items() if k in TIMED}
            found.append(by_package({**rest, **part}, kind=kind, heads=3))
            rest |= {f"initial_{k}": found[-1][f"last_{k}"] for k in ("re", "im")}
        for k, v in whole.items():
            got = found[-1][k] if k.startswith("last") else torch.cat([o[k] for o in found], 1)
            assert torch.equal(got, v), (k, cuts)


@kinds
@loops
@pytest.mark.parametrize("oscillators", [1, 5, 16])
def test_steps_have_the_bits_of_the_scan(oscillators: int, which: str, kind: str, backend: str) -> None:
    args = drawn((2,), 5, 3, oscillators, initial=(), dtype=torch.float32, **LOOPS[which])
    whole = by_package(args, kind=kind, heads=3)
    state: Any = (args["initial_re"], args["initial_im"])
    for t in range(5):
        now = {k: args[k][:, t] for k in SEQUENCES if k in args}
        listen = args["listen"][:, t] if "listen" in args else None
        re, im, state = oscillator_step(
            **now,
            state=state,
            kind=kind,
            heads=3,
            phase_lag=args.get("phase_lag"),
            feedback=(args["communities"], args["feedback"], listen),
        )
        assert torch.equal(re, whole["order_re"][:, t])
        assert torch.equal(im, whole["order_im"][:, t])
    assert torch.equal(state[0], whole["last_re"])
    assert torch.equal(state[1], whole["last_im"])


@kinds
@pytest.mark.parametrize("name", ["p", "gate", "forget", "listen", "initial_re"])
def test_a_nan_stays_in_its_sequence(name: str, kind: str, backend: str) -> None:
    args = drawn((3,), 6, 2, 5, initial=(3,), communities=4, dtype=torch.float32)
    spoiled = {k: v.clone() for k, v in args.items()}
    spoiled[name].select(0, 1).flatten()[0] = math.nan
    fine, bad = (by_package(a, kind=kind, heads=2, return_states=True) for a in (args, spoiled))
    assert bad["order_re"][1, -1].isnan().all()  # through the loop it reaches every head
    for k, v in fine.items():
        assert torch.equal(bad[k][[0, 2]], v[[0, 2]]), k


@kinds
@pytest.mark.parametrize("size", [1e4, 1e20, 3e38])
def test_any_finite_loop_gives_finite_states(size: float, kind: str, backend: str) -> None:
    args = drawn((2,), 8, 2, 8, initial=(), communities=4, dtype=torch.float32)
    args["p"], args["feedback"] = args["p"] * min(size, 1e30), args["feedback"] * min(size, 1e18)
    found = by_package(args, kind=kind, heads=2, return_states=True)
    if kind == "moebius":
        assert all(v.isfinite().all() for v in found.values())
        radius = found["states_re"].double().square() + found["states_im"].double().square()
        assert radius.max() <= (1 + 4 * 2**-23) ** 2
    else:
        assert found["order_re"].isfinite().all()


def test_a_loop_of_nothing_is_an_open_one(backend: str) -> None:
    args = drawn((2,), 9, 2, 5, initial=(), communities=4)
    still = {**args, "feedback": torch.zeros_like(args["feedback"])}
    opened = {k: v for k, v in args.items() if k not in ("communities", "feedback", "listen")}
    got, want = by_package(still, heads=2), by_package(opened, heads=2)
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-13, atol=1e-15)


@kinds
@pytest.mark.parametrize("path", PATHS)
def test_autocast_does_not_reach_into_the_loop(path: str, kind: str, backend: str) -> None:
    args = drawn((2,), 9, 2, 5, communities=4, dtype=torch.float32)
    want = both(args, kind=kind, heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16), through(path):
        got = both(args, kind=kind, heads=2)
    assert_same_bits(got, want)


def test_weights_of_other_dtypes(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, communities=3, dtype=torch.float32)
    halves = {k: v.to(torch.bfloat16) if k in ("communities", "listen", "gate") else v for k, v in args.items()}
    exact = {k: v.float() for k, v in halves.items()}
    got, want = both(halves, heads=2), both(exact, heads=2)
    for k, v in want.items():
        assert got[k].dtype == (halves[k[2:]].dtype if k[:2] == "d " else torch.float32), k
        torch.testing.assert_close(got[k].float(), v, rtol=1e-2, atol=1e-2, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("path", PATHS)
def test_vmap_over_weights_and_over_sequences(path: str, backend: str) -> None:
    args = drawn((2,), 4, 2, 3, communities=3)
    names = list(args)

    def run(*given: Tensor) -> Tensor:
        found = by_package(dict(zip(names, given, strict=True)), heads=2, harmonics=2)
        return torch.cat([v.flatten() for v in found.values()])

    for batched in (("communities", "feedback"), ("feedback",), ("p", "listen"), tuple(names)):
        dims = tuple(0 if n in batched else None for n in names)
        given = [torch.stack([args[n], 0.7 * args[n]]) if n in batched else args[n] for n in names]
        each = [[v if d is None else v[i] for v, d in zip(given, dims, strict=True)] for i in range(2)]
        torch.testing.assert_close(torch.func.vmap(run, dims)(*given), torch.stack([run(*e) for e in each]))
        grad = torch.func.grad(lambda *a: run(*a).square().sum(), argnums=tuple(range(len(names))))
        for got, want in zip(
            torch.func.vmap(grad, dims)(*given), zip(*(grad(*e) for e in each), strict=True), strict=True
        ):
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=1e-11)


def test_compile_and_export_take_a_closed_loop() -> None:
    class Looped(torch.nn.Module):
        def forward(self, p: Tensor, c: Tensor, u: Tensor, k: Tensor) -> Tensor:
            return oscillator_scan(p, p, p, p, heads=2, feedback=(c, u, k))[0]

    given = torch.randn(2, 5, 6), torch.randn(3, 6), torch.randn(24, 6), torch.randn(2, 5, 3)
    want = Looped()(*given)
    assert torch.equal(torch.compile(Looped(), backend="aot_eager", fullgraph=True)(*given), want)
    program = torch.export.export(Looped(), given)
    assert torch.equal(program.module()(*given), want)


def test_on_the_dispatcher_s_path_gradients_are_the_same(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, communities=3, initial=())
    want = both(args, heads=2)
    with through(DISPATCHER):
        assert_same_bits(both(args, heads=2), want)

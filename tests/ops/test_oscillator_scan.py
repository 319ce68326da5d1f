"""The scan of coupled oscillators: gradients, what is kept for them, chunks, steps and packed documents."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kssm_kernels import oscillator_scan, oscillator_step
from tests.support.cases import PATHS, Args, Result, threads, through
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
RESETS = {"none": (), "first and last": (0, 4), "adjacent": (1, 2)}
COUPLED: dict[str, dict[str, Any]] = {
    "coupled": {"phase_lag": (3,)},
    "free": {"coupling": False},
    "without a forget gate": {"forget": False, "phase_lag": 0.7},
}


def reset_at(steps: int, *marks: int, batch: tuple[int, ...] = (2,)) -> Tensor:
    mask = torch.zeros(*batch, steps, dtype=torch.bool)
    mask[..., list(marks)] = True
    return mask


# ---- gradients ----


def check_gradients(args: Args, path: str, **options: Any) -> None:
    names = [k for k, v in args.items() if isinstance(v, Tensor)]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        with through(path):
            return tuple(by_package({**args, **dict(zip(names, given, strict=True))}, **options).values())

    given = tuple(args[k].detach().clone().requires_grad_() for k in names)
    assert torch.autograd.gradcheck(function, given, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


@kinds
@pytest.mark.parametrize(("marks", "save"), [("none", 3), ("first and last", 3), ("adjacent", 3), ("adjacent", "all")])
def test_gradcheck(marks: str, save: Any, kind: str, backend: str) -> None:
    args = drawn((), 5, 1, 3, phase_lag=(1,), initial=())
    reset = reset_at(5, *RESETS[marks], batch=()) if RESETS[marks] else None
    check_gradients(args, "eager", kind=kind, heads=1, harmonics=3, save=save, reset=reset)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [*KINDS, "tied leak", "free", "states"])
def test_gradcheck_of_the_other_calls(case: str, path: str, backend: str) -> None:
    kind = case if case in KINDS else "stuart_landau"
    given: dict[str, Any] = {"coupling": case != "free", "forget": case != "tied leak"}
    lag = None if case == "free" else (2, 2)
    args = drawn((2,), 3, 2, 1, phase_lag=lag, initial=(2,), **given)
    options = {"tied_leak": case == "tied leak", "return_states": case == "states"}
    check_gradients(args, path, kind=kind, heads=2, harmonics=2, reset=reset_at(3, 2), **options)


@kinds
def test_a_sequence_that_is_cut_short_by_saturated_gates(kind: str, backend: str) -> None:
    """Gates open, gates shut and a strong coupling: nothing of a gradient is lost to 1 - g or 1 - f rounded to zero."""
    args = drawn((2,), 6, 2, 3, initial=())
    args["gate"] = torch.tensor([-30.0, 30.0, -8.0, 8.0, -1.0, 1.0]).double().reshape(6, 1).expand(2, 6, 6).clone()
    args["forget"] = torch.tensor([-30.0, 30.0, -8.0, 8.0, -1.0, 1.0]).double().reshape(6, 1).expand(2, 6, 2).clone()
    args["coupling"] = torch.tensor([30.0, -30.0, 8.0, -8.0, 1.0, -1.0]).double().reshape(6, 1).expand(2, 6, 2).clone()
    options = {"kind": kind, "heads": 2, "harmonics": 2}
    got = both(args, **options)
    own = leaves(args)
    outputs = by_equation(own, **options)
    want = outputs | {f"d {k}": v for k, v in gradients(outputs, own).items()}
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-9, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


@kinds
def test_a_gradient_is_the_same_whichever_others_are_asked_for(kind: str, backend: str) -> None:
    args = drawn((2,), 7, 3, 5, phase_lag=(3,), initial=(2,))
    options = {"kind": kind, "heads": 3, "reset": reset_at(7, 3)}
    everything = both(args, **options)
    for name in [k for k, v in args.items() if isinstance(v, Tensor)]:
        own = {**args, name: args[name].clone().requires_grad_()}
        alone = gradients(by_package(own, **options), own)
        assert torch.equal(alone[name], everything[f"d {name}"]), name


@kinds
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("outputs", [("order_re",), ("order_im",), ("last_re",), ("last_im",), ("states_im",)])
def test_a_cotangent_that_is_not_there_is_zero(outputs: tuple[str, ...], path: str, kind: str, backend: str) -> None:
    args, options = drawn((2,), 7, 3, 5, initial=()), {"kind": kind, "heads": 3, "return_states": True}
    own = leaves(args)
    with through(path):
        found = by_package(own, **options)
    names = [k for k, v in own.items() if isinstance(v, Tensor)]
    weights = {k: torch.randn_like(v) if k in outputs else torch.zeros_like(v) for k, v in found.items()}
    some = torch.autograd.grad([found[k] for k in outputs], [own[k] for k in names], [weights[k] for k in outputs],
                               retain_graph=True)  # fmt: skip
    every = torch.autograd.grad(list(found.values()), [own[k] for k in names], list(weights.values()))
    for k, a, b in zip(names, some, every, strict=True):
        assert torch.equal(a, b), k


@kinds
@pytest.mark.parametrize("path", PATHS)
def test_cotangents_of_any_stride_and_a_second_backward(path: str, kind: str, backend: str) -> None:
    args = drawn((2,), 7, 3, 5, phase_lag=(3,), initial=(2,))
    own = leaves(args)
    with through(path):
        outputs = by_package(own, kind=kind, heads=3, save=3)
    names = [k for k, v in own.items() if isinstance(v, Tensor)]
    plain = [torch.randn_like(v) for v in outputs.values()]
    laid = [torch.stack([v, 7 * v], -1)[..., 0] for v in plain]
    turned = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in plain]
    before = [v.clone() for v in (*plain, *outputs.values())]
    found = [
        torch.autograd.grad(list(outputs.values()), [own[k] for k in names], given, retain_graph=True)
        for given in (plain, plain, laid, turned)
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*plain, *outputs.values()), strict=True))
    one = torch.autograd.grad(outputs["order_re"].sum(), own["p"], retain_graph=True)[0]  # a stride of 0
    (want,) = torch.autograd.grad(outputs["order_re"], own["p"], torch.ones_like(outputs["order_re"]))
    assert torch.equal(one, want)


@kinds
@pytest.mark.parametrize("path", PATHS)
def test_double_backward_is_refused_by_name(path: str, kind: str, backend: str) -> None:
    own = leaves(drawn((2,), 3, 1, 3))
    with through(path):
        loss = by_package(own, kind=kind, heads=1)["order_re"].square().sum()
    (first,) = torch.autograd.grad(loss, own["p"], create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match=r"oscillator_scan: double backward"):
        first.sum().backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("saved", [*SEQUENCES, "phase_lag", "initial_re", "reset", "states_re"])
def test_a_saved_tensor_changed_in_place_is_caught(saved: str, path: str, backend: str) -> None:
    own = leaves(drawn((2,), 4, 2, 3, phase_lag=(2,), initial=(2,)))
    inner = {k: v * 1.0 for k, v in own.items()}
    reset = reset_at(4, 2)
    with through(path):
        found = by_package(inner, heads=2, reset=reset, return_states=True)
    with torch.no_grad():
        if saved == "reset":
            reset.logical_not_()
        else:
            {**inner, **found}[saved].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found["order_re"].sum().backward()


def test_no_gradient_asked_no_graph_made(backend: str) -> None:
    args = drawn((2,), 3, 1, 3)
    assert not any(v.requires_grad for v in by_package(args, heads=1).values())
    with torch.no_grad():
        assert not any(v.requires_grad for v in by_package(leaves(args), heads=1).values())
    with torch.inference_mode():
        assert by_package(args, heads=1)["order_re"].isfinite().all()
    lag = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert by_package({**args, "phase_lag": lag}, heads=1)["last_re"].requires_grad


def test_tensors_of_several_dtypes(backend: str) -> None:
    """All are computed in that of p; gradients come in the operand's own dtype and shape."""
    args = drawn((2,), 5, 3, 4, phase_lag=(3,), initial=(1,), dtype=torch.float32)
    dtypes = dict(zip(args, itertools.cycle((torch.float32, torch.bfloat16, torch.float64, torch.float16))))
    dtypes["p"] = torch.bfloat16
    own = leaves({k: v.to(dtypes[k]) for k, v in args.items()})
    outputs = by_package(own, heads=3)
    assert [v.dtype for v in outputs.values()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    found = gradients(outputs, own)
    same = leaves({k: v.float() for k, v in own.items()})
    wide = by_package(same, heads=3)
    for k, v in outputs.items():
        assert torch.equal(v, wide[k].to(v.dtype)), k
    for k, v in gradients(wide, same).items():
        assert (found[k].dtype, found[k].shape) == (dtypes[k], args[k].shape)
        torch.testing.assert_close(found[k].float(), v, rtol=0.05, atol=0.05 * float(v.abs().max()))


# ---- what is kept for backward, and threads ----


@kinds
@pytest.mark.parametrize("which", COUPLED)
@pytest.mark.parametrize("save", [1, 2, 3, 64, 1000])
def test_the_interval_of_kept_states_changes_no_bit(save: int, which: str, kind: str, backend: str) -> None:
    args = drawn((2,), 70, 3, 5, initial=(2,), dtype=torch.float32, **COUPLED[which])
    options = {"kind": kind, "heads": 3, "reset": reset_at(70, 0, 5, 6, 63, 64, 69)}
    assert_same_bits(both(args, save=save, **options), both(args, save="all", **options))


@kinds
def test_returned_states_are_those_of_the_shorter_sequences(kind: str, backend: str) -> None:
    args = drawn((2,), 6, 2, 7, initial=(), dtype=torch.float32)
    found = by_package(args, kind=kind, heads=2, return_states=True)
    for t in range(6):
        short = {k: v[:, : t + 1] if k in SEQUENCES else v for k, v in args.items()}
        last = by_package(short, kind=kind, heads=2)
        for part in ("re", "im"):
            assert torch.equal(found[f"states_{part}"][:, t], last[f"last_{part}"])
    # a graph or none, states or none: the same numbers
    assert_same_bits({k: v for k, v in found.items() if k[0] != "s"}, by_package(args, kind=kind, heads=2))
    plain = {k: v.detach() for k, v in by_package(leaves(args), kind=kind, heads=2, return_states=True).items()}
    assert_same_bits(plain, found)


@kinds
@pytest.mark.parametrize("which", COUPLED)
def test_results_that_need_not_be_exact_are_close(which: str, kind: str, backend: str) -> None:
    args = drawn((2,), 130, 2, 3, initial=(2,), **({**COUPLED[which], "phase_lag": None}))
    options = {"kind": kind, "heads": 2, "reset": reset_at(130, 0, 63, 64, 100)}
    got, want = both(args, exact=False, **options), both(args, **options)
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-10, atol=1e-11, msg=lambda m, k=k: f"{k}: {m}")


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, kind: str, backend: str) -> None:
    args = drawn((5,), 20, 7, 9, phase_lag=(7,), initial=(), dtype=dtype)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(both(args, kind=kind, heads=7, reset=reset_at(20, 4, batch=(5,)), save=8))
    for other in [results[3]] if backend == "torch" else results[1:]:  # torch promises no more of itself
        assert_same_bits(other, results[1])


@kinds
def test_a_sequence_does_not_depend_on_its_neighbours(kind: str, backend: str) -> None:
    """Kernels take several sequences and heads at a time: whichever others those are, the bits are the same."""
    args = drawn((6,), 5, 5, 3, initial=(6,), dtype=torch.float32)
    whole = both(args, kind=kind, heads=5)
    rows = both({k: v[[4]] for k, v in args.items()}, kind=kind, heads=5)
    for k, v in rows.items():
        if not k.startswith("d "):  # the cotangents drawn are others
            assert torch.equal(v[0], whole[k][4]), k
    head = {k: v[..., 3:4] if k in ("coupling", "forget") else v[..., 9:12] for k, v in args.items()}
    alone = by_package(head, kind=kind, heads=1)
    assert torch.equal(alone["order_re"][..., 0, :], whole["order_re"][..., 3, :])
    assert torch.equal(alone["last_im"], whole["last_im"][..., 9:12])


def test_outputs_of_two_calls_share_no_memory(backend: str) -> None:
    args = drawn((2,), 3, 2, 3, initial=())
    first = by_package(args, heads=2, return_states=True)
    kept = {k: v.clone() for k, v in first.items()}
    second = by_package({**args, "p": args["p"] + 1}, heads=2, return_states=True)
    assert_same_bits(first, kept)
    memory = [v.untyped_storage().data_ptr() for v in (*args.values(), *first.values(), *second.values())]
    assert len(set(memory)) == len(memory)


# ---- chunks and steps ----


@kinds
@pytest.mark.parametrize("which", COUPLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_in_chunks_has_the_bits_of_the_whole(
    dtype: torch.dtype, which: str, kind: str, backend: str
) -> None:
    args = drawn((2,), 140, 3, 7, initial=(), dtype=dtype, **COUPLED[which])
    whole = by_package(args, kind=kind, heads=3)
    for cuts in ((1,), (139,), (64,), (65, 66), (3, 64, 128), (0, 70, 70)):
        orders: list[Result] = []
        rest = {k: v for k, v in args.items() if k not in SEQUENCES}
        for first, last in itertools.pairwise((0, *cuts, 140)):
            part = {k: v[:, first:last] for k, v in args.items() if k in SEQUENCES}
            orders.append(by_package({**rest, **part}, kind=kind, heads=3))
            rest |= {f"initial_{k}": orders[-1][f"last_{k}"] for k in ("re", "im")}
        for k, v in whole.items():
            got = orders[-1][k] if k.startswith("last") else torch.cat([o[k] for o in orders], 1)
            assert torch.equal(got, v), (k, cuts)


@kinds
@pytest.mark.parametrize("which", COUPLED)
@pytest.mark.parametrize("oscillators", [1, 5, 16])
def test_steps_have_the_bits_of_the_scan(oscillators: int, which: str, kind: str, backend: str) -> None:
    args = drawn((2,), 5, 3, oscillators, initial=(), dtype=torch.float32, **COUPLED[which])
    whole = by_package(args, kind=kind, heads=3)
    state: Any = (args["initial_re"], args["initial_im"])
    rest: dict[str, Any] = {k: v for k, v in args.items() if k == "phase_lag"}
    for t in range(5):
        now = {k: args[k][:, t] for k in SEQUENCES if k in args}
        re, im, state = oscillator_step(**now, **rest, state=state, kind=kind, heads=3)
        assert torch.equal(re, whole["order_re"][:, t])
        assert torch.equal(im, whole["order_im"][:, t])
    assert torch.equal(state[0], whole["last_re"])
    assert torch.equal(state[1], whole["last_im"])


def test_steps_differentiate_as_the_scan(backend: str) -> None:
    args = drawn((), 4, 2, 3, initial=(), phase_lag=(2,))
    tied = {**{k: v for k, v in args.items() if k != "forget"}}
    own, other = leaves(tied), leaves(tied)
    state: Any = (own["initial_re"], own["initial_im"])
    total = torch.zeros((), dtype=torch.float64)
    for t in range(4):
        now = {k: own[k][t] for k in SEQUENCES if k in own}
        re, im, state = oscillator_step(**now, state=state, phase_lag=own["phase_lag"], heads=2, tied_leak=True)
        total = total + (re.sum() - 2 * im.sum()) * (t + 1)
    found = by_package(other, heads=2, tied_leak=True)
    weight = torch.arange(1, 5, dtype=torch.float64).reshape(4, 1, 1)
    want = (weight * (found["order_re"] - 2 * found["order_im"])).sum()
    (total + state[0].sum()).backward()
    (want + found["last_re"].sum()).backward()
    for k, v in other.items():
        torch.testing.assert_close(own[k].grad, v.grad, rtol=1e-11, atol=1e-13, msg=lambda m, k=k: f"{k}: {m}")


# ---- packed documents ----


@kinds
@pytest.mark.parametrize("marks", [(0, 3, 4, 11), (0, 0, 5, 5, 11), (0, 11), (0, 1, 2, 10, 11, 11)])
def test_packed_documents_are_separate_calls(marks: tuple[int, ...], kind: str, backend: str) -> None:
    args = drawn((1,), 11, 2, 5, phase_lag=(2,), initial=(), dtype=torch.float64)
    own, other = leaves(args), leaves(args)
    where = torch.tensor(marks, dtype=torch.int32)
    packed = by_package(own, kind=kind, heads=2, cu_seqlens=where, return_states=True)
    masked = by_package(args, kind=kind, heads=2, return_states=True, reset=_mask(marks, 11))
    assert_same_bits({k: v.detach() for k, v in packed.items()}, masked)
    parts: list[Result] = []
    for first, last in itertools.pairwise(marks):
        document = {k: v[:, first:last] if k in SEQUENCES else v for k, v in other.items()}
        parts.append(by_package(document, kind=kind, heads=2, return_states=True))
    joined = {k: torch.cat([p[k] for p in parts], 1) for k in packed if not k.startswith("last")}
    assert_same_bits({k: packed[k] for k in joined}, joined)
    got = gradients({k: packed[k] for k in joined}, own)
    for k, v in gradients(joined, other).items():
        torch.testing.assert_close(got[k], v, rtol=1e-11, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


def _mask(marks: tuple[int, ...], steps: int) -> Tensor:
    return reset_at(steps, *(m for m in marks[:-1] if m < steps), batch=(1,))


@kinds
def test_an_empty_sequence_returns_the_initial_state(kind: str, backend: str) -> None:
    """As it was given, also where the first step would move it to the edge of the disc."""
    args = leaves(drawn((2,), 0, 2, 3, initial=(2,), phase_lag=(2,)))
    args["initial_re"] = (args["initial_re"].detach() * 5).requires_grad_()
    found = by_package(args, kind=kind, heads=2, return_states=True)
    assert found["order_re"].shape == (2, 0, 2, 4)
    assert found["states_im"].shape == (2, 0, 6)
    assert torch.equal(found["last_re"], args["initial_re"])
    weight = torch.randn_like(found["last_re"])
    names = list(args)
    grads = dict(zip(names, torch.autograd.grad(found["last_re"], list(args.values()), weight), strict=True))
    assert torch.equal(grads["initial_re"], weight)
    assert all(not v.any() for k, v in grads.items() if k != "initial_re")


def test_on_the_meta_device(backend: str) -> None:
    if backend != "torch":
        pytest.skip("other backends refuse this device")
    args = {k: v.to("meta") for k, v in drawn((2,), 7, 2, 3, initial=()).items()}
    own = {k: v.requires_grad_() for k, v in args.items()}
    re, _, last = oscillator_scan(
        *(own[k] for k in SEQUENCES), initial_state=(own["initial_re"], own["initial_im"]), harmonics=3
    )
    assert (re.shape, last[0].shape) == ((2, 7, 2, 3), (2, 6))
    (re.sum() + last[1].sum()).backward()
    assert all(v.grad is not None and v.grad.shape == v.shape for v in own.values())

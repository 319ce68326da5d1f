"""Bad arguments of the scan and of its step are refused with what was got and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kssm_kernels
from tests.support.cases import PATHS, through
from tests.support.oscillator_scan import SEQUENCES, assert_same_bits, by_package, drawn

OP = "oscillator_scan"

T, INT, BOOL = torch.zeros, torch.int64, torch.bool
run: Any = kssm_kernels.oscillator_scan  # without its type: the point is to break it
one: Any = kssm_kernels.oscillator_step


def scan(**changed: Any) -> Any:
    """A call that is right, [2, 3, 4] with two heads, but for what is changed."""
    given: dict[str, Any] = {k: T(2, 3, 4) for k in ("p", "q", "gate", "phase")}
    given |= {"coupling": T(2, 3, 2), "forget": T(2, 3, 2)}
    return run(**(given | changed))


def free(**changed: Any) -> Any:
    return scan(**{"coupling": None, "forget": None, "heads": 2, **changed})


def loop(c: Any = None, u: Any = None, k: Any = None, **changed: Any) -> Any:
    """With three communities."""
    c, u = T(3, 4) if c is None else c, T(18, 6) if u is None else u
    return scan(**{"feedback": (c, u, T(2, 3, 3) if k is None else k), **changed})


def packed(marks: Any, **changed: Any) -> Any:
    given = {k: T(1, 3, 4) for k in ("p", "q", "gate", "phase")}
    return run(**{**given, "heads": 2, "cu_seqlens": marks, **changed})


def step(**changed: Any) -> Any:
    given: dict[str, Any] = {k: T(4) for k in ("p", "q", "gate", "phase")} | {"coupling": T(2), "forget": T(2)}
    return one(**(given | changed))


def marks(*values: int) -> Tensor:
    return torch.tensor(values)


TIED = r"tied_leak is for stuart_landau with coupling and without forget, got kind="
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("p list", lambda: scan(p=[1.0]), TypeError, r"p must be a torch.Tensor, got list"),
    ("p int", lambda: scan(p=T(2, 3, 4, dtype=INT)), TypeError, r"p must be float32.*got torch.int64"),
    ("p complex", lambda: scan(p=T(2, 3, 4, dtype=torch.complex64)), TypeError, r"p must be.*got torch.complex64"),
    ("p sparse", lambda: scan(p=T(2, 3, 4).to_sparse()), TypeError, r"p must be a dense tensor, got layout torch.spa"),
    ("p one axis", lambda: run(T(4), T(4), T(4), T(4), heads=2), ValueError, r"p must.*T, D\] with D.*got \(4,\)"),
    ("p no width", lambda: free(p=T(2, 3, 0)), ValueError, r"p must have shape.*D >= 1, got \(2, 3, 0\)"),
    ("q None", lambda: scan(q=None), TypeError, r"q must be a torch.Tensor, got NoneType"),
    ("q shape", lambda: scan(q=T(3, 4)), ValueError, r"q must have shape \[\.\.\., T, D\] = \(2, 3, 4\), got \(3, 4\)"),
    ("gate dtype", lambda: scan(gate=T(2, 3, 4, dtype=BOOL)), TypeError, r"gate must be.*got torch.bool"),
    ("gate shape", lambda: scan(gate=T(2, 4, 4)), ValueError, r"gate must have shape.*\(2, 3, 4\), got \(2, 4, 4\)"),
    ("phase shape", lambda: scan(phase=T(2, 3, 1)), ValueError, r"phase must have shape.*got \(2, 3, 1\)"),
    ("phase device", lambda: scan(phase=T(2, 3, 4, device="meta")), ValueError, r"phase must be on.*cpu, got meta"),
    ("kind", lambda: scan(kind="kuramoto"), ValueError, r"kind must be one of 'stuart_landau', 'moebius', got 'kuram"),
    ("kind None", lambda: scan(kind=None), ValueError, r"kind must be one of.*got None"),
    ("no heads", lambda: free(heads=None), ValueError, r"heads must be given where neither coupling nor forget"),
    ("heads 0", lambda: free(heads=0), ValueError, r"heads must be from 1 to \d+, got 0"),
    ("heads 3", lambda: free(heads=3), ValueError, r"heads must divide D = 4 into heads of 1 to 1024.*got 3"),
    ("heads float", lambda: free(heads=2.0), TypeError, r"heads must be an int, got float"),
    ("heads bool", lambda: free(heads=True), TypeError, r"heads must be an int, got bool"),
    ("heads of others", lambda: scan(heads=4), ValueError, r"coupling must.*T, G\] = \(2, 3, 4\).*2, 3, 2\)"),
    ("1025 oscillators", lambda: run(*T(4, 1, 1, 1025), heads=1), ValueError, r"heads must divide.*1024 osc.*got 1"),
    ("harmonics -1", lambda: scan(harmonics=-1), ValueError, r"harmonics must be from 0 to 32, got -1"),
    ("harmonics 33", lambda: scan(harmonics=33), ValueError, r"harmonics must be from 0 to 32, got 33"),
    ("harmonics float", lambda: scan(harmonics=1.0), TypeError, r"harmonics must be an int, got float"),
    ("harmonics bool", lambda: scan(harmonics=True), TypeError, r"harmonics must be an int, got bool"),
    ("coupling number", lambda: scan(coupling=1.0), TypeError, r"coupling must be a torch.Tensor, got float"),
    ("coupling int", lambda: scan(coupling=T(2, 3, 2, dtype=INT)), TypeError, r"coupling must be float32.*int64"),
    ("coupling shape", lambda: scan(coupling=T(3, 2)), ValueError, r"coupling must have.*, T, G\].*\(3, 2"),
    ("coupling device", lambda: scan(coupling=T(2, 3, 2, device="meta")), ValueError, r"coupling must be on p's dev"),
    ("forget shape", lambda: scan(forget=T(2, 3, 4)), ValueError, r"forget must have shape.*2, 3, 2\), got \(2, 3, 4"),
    ("forget str", lambda: scan(forget="0"), TypeError, r"forget must be a torch.Tensor, got str"),
    ("lag shape", lambda: scan(phase_lag=T(3)), ValueError, r"phase_lag must broadcast to.*\(2, 2\), got \(3,\)"),
    ("lag axes", lambda: scan(phase_lag=T(2, 3, 2)), ValueError, r"phase_lag must broadcast.*got \(2, 3, 2\)"),
    ("lag int", lambda: scan(phase_lag=T(2, dtype=INT)), TypeError, r"phase_lag must be float32.*got torch.int64"),
    ("lag str", lambda: scan(phase_lag="0"), TypeError, r"phase_lag must be a number or a torch.Tensor, got str"),
    ("lag bool", lambda: scan(phase_lag=True), TypeError, r"phase_lag must be a number or a torch.*got bool"),
    ("lag inf", lambda: scan(phase_lag=math.inf), ValueError, r"phase_lag must be finite, got inf"),
    ("lag nan", lambda: scan(phase_lag=math.nan), ValueError, r"phase_lag must be finite, got nan"),
    ("lag device", lambda: scan(phase_lag=T(2, device="meta")), ValueError, r"phase_lag must be on p's dev"),
    ("lag of nothing", lambda: free(phase_lag=0.5), ValueError, r"phase_lag is that of the coupling, which is None"),
    ("state tensor", lambda: scan(initial_state=T(4)), TypeError, r"initial_state must be a pair.*got Tensor"),
    ("state triple", lambda: scan(initial_state=(T(4),) * 3), TypeError, r"initial_state must be a pair of.*got tuple"),
    ("state half", lambda: scan(initial_state=(T(4), None)), ValueError, r"initial_state must be a pair.*one tensor"),
    ("state number", lambda: scan(initial_state=(0.0, 0.0)), TypeError, r"initial_state\[0\] must be a tor.*got float"),
    ("state shape", lambda: scan(initial_state=(T(4), T(2))), ValueError, r"initial_state\[1\] must broadcast.*\(2,\)"),
    ("state int", lambda: scan(initial_state=(T(4, dtype=INT), T(4))), TypeError, r"initial_state\[0\] must be.*int64"),
    ("tied moebius", lambda: scan(kind="moebius", forget=None, tied_leak=True), ValueError, TIED + "'moebius'"),
    ("tied forget", lambda: scan(tied_leak=True), ValueError, TIED + r".*forget given"),
    ("tied free", lambda: free(tied_leak=True), ValueError, TIED + r".*coupling None"),
    ("reset int", lambda: scan(reset=T(2, 3, dtype=INT)), TypeError, r"reset must be a bool tensor, got torch.int64"),
    ("reset list", lambda: scan(reset=[True]), TypeError, r"reset must be a bool tensor, got list"),
    ("reset shape", lambda: scan(reset=T(3, dtype=BOOL)), ValueError, r"reset must have shape.*\(2, 3\), got \(3,\)"),
    ("reset device", lambda: scan(reset=T(2, 3, dtype=BOOL, device="meta")), ValueError, r"reset must be on p's dev"),
    ("loop tensor", lambda: scan(feedback=T(3, 4)), TypeError, r"feedback must be \(C, U, k\) or None, got Tensor"),
    ("loop pair", lambda: scan(feedback=(T(3, 4), T(18, 6))), TypeError, r"feedback must be.* or None, got tuple"),
    ("loop C None", lambda: scan(feedback=(None, T(18, 6), None)), TypeError, r"feedback must be.*got None for one"),
    ("loop C list", lambda: loop(c=[1.0]), TypeError, r"feedback\[0\] must be a torch.Tensor, got list"),
    ("loop C shape", lambda: loop(c=T(3, 5)), ValueError, r"feedback\[0\].*\[M, D = 4\], got \(3, 5\)"),
    ("loop C none", lambda: loop(c=T(0, 4)), ValueError, r"feedback\[0\].*\[M, D = 4\], got \(0, 4\)"),
    ("loop C axes", lambda: loop(c=T(2, 3, 4)), ValueError, r"feedback\[0\] must have shape.*got \(2, 3, 4\)"),
    ("loop U shape", lambda: loop(u=T(16, 6)), ValueError, r"feedback\[1\].*4 D \+ G, 2 M\] = \(18, 6\), got"),
    ("loop U free", lambda: loop(forget=None), ValueError, r"feedback\[1\].*\[4 D, 2 M\] = \(16, 6\), got \(18, 6\)"),
    ("loop U int", lambda: loop(u=T(18, 6, dtype=INT)), TypeError, r"feedback\[1\] must be float32.*got torch.int64"),
    ("loop k shape", lambda: loop(k=T(2, 3, 2)), ValueError, r"feedback\[2\].*T, M\] = \(2, 3, 3\), got \(2, 3, 2\)"),
    ("loop k device", lambda: loop(k=T(2, 3, 3, device="meta")), ValueError, r"feedback\[2\] must be on p's dev"),
    ("step loop", lambda: step(feedback=(T(3, 4), T(18, 6), T(()))), ValueError, r"feedback\[2\] must.*M\], got \(\)"),
    ("save word", lambda: scan(save="every"), ValueError, r"save must be 'all' or a number of steps, got 'every'"),
    ("save 0", lambda: scan(save=0), ValueError, r"save must be from 1 to \d+, got 0"),
    ("save float", lambda: scan(save=2.0), TypeError, r"save must be an int, got float"),
    ("save bool", lambda: scan(save=True), TypeError, r"save must be an int, got bool"),
    ("two resets", lambda: packed(marks(0, 3), reset=T(1, 3, dtype=BOOL)), ValueError, r"reset and cu_seqlens say"),
    ("marks list", lambda: packed([0, 3]), TypeError, r"cu_seqlens must be an int32 or int64 tensor.*got list"),
    ("marks float", lambda: packed(T(2)), TypeError, r"cu_seqlens must be.*got torch.float32 \(2,\)"),
    ("marks axes", lambda: packed(marks(0, 3)[None]), TypeError, r"cu_seqlens must be.*torch.int64 \(1, 2\)"),
    ("marks batch", lambda: scan(cu_seqlens=marks(0, 3)), ValueError, r"cu_seqlens packs.*got \(2, 3, 4\)"),
    ("marks device", lambda: packed(marks(0, 3).to("meta")), ValueError, r"cu_seqlens must be on p's dev"),
    ("step p", lambda: step(p=T(())), ValueError, r"p must have shape.*G\] or \[\.\.\., M\], got \(\)"),
    ("step q", lambda: step(q=T(3)), ValueError, r"q must have shape"),
    ("step state", lambda: step(state=T(4)), TypeError, r"state must be a pair of tensors.*got Tensor"),
    ("step int", lambda: step(p=T(4, dtype=INT)), TypeError, r"p must be float32.*got torch.int64"),
    ("step heads", lambda: step(coupling=None, forget=None), ValueError, r"heads must be given"),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "call", "error", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_arguments(
    name: str, call: Callable[[], Any], error: type[Exception], message: str, path: str, backend: str
) -> None:
    op = "oscillator_step" if name.startswith("step") else "oscillator_scan"
    with through(path), pytest.raises(error, match=f"^{op}: {message}"):
        call()


@pytest.mark.parametrize("bad", [(1, 3), (0, 2), (0, 4), (0, 2, 1, 3), (), (0, -1, 3), tuple(range(9))])
def test_documents_that_do_not_fill_the_sequence(bad: tuple[int, ...], backend: str) -> None:
    with pytest.raises(ValueError, match=r"^oscillator_scan: cu_seqlens must grow from 0 to T = 3, got \["):
        packed(torch.tensor(bad, dtype=INT))


def test_the_registered_op_checks_what_it_is_given(backend: str) -> None:
    op: Any = torch.ops.kssm_kernels.oscillator_scan
    rest = (None,) * 9
    with pytest.raises(ValueError, match="oscillator_scan: heads must divide"):
        op(*T(4, 2, 3, 4), *rest, "moebius", 3, 4, False, 1, True)
    with pytest.raises(ValueError, match="oscillator_scan: gate must have shape"):
        op(*T(2, 2, 3, 4), T(2, 3, 5), T(2, 3, 4), *rest, "moebius", 2, 4, False, 1, True)


def test_numbers_of_numpy_are_taken(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, phase_lag=0.5)
    want = by_package(args, heads=2, harmonics=3, save=2)
    number = {**args, "phase_lag": np.float64(0.5)}
    got = by_package(number, heads=np.int64(2), harmonics=np.int32(3), save=np.uint8(2))
    assert_same_bits(got, want)
    zero = by_package({**args, "phase_lag": np.float32(0)}, heads=2)
    assert_same_bits(zero, by_package({**args, "phase_lag": None}, heads=2))
    assert_same_bits(zero, by_package({**args, "phase_lag": 0}, heads=2))


def test_arguments_are_left_as_they_were(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, phase_lag=(2,), initial=())
    before = {k: v.clone() for k, v in args.items()}
    reset = torch.rand(2, 5) < 0.5
    mask = reset.clone()
    by_package(args, heads=2, reset=reset)
    assert_same_bits(args, before)
    assert torch.equal(reset, mask)


# ---- memory that is not what a shape suggests ----


def test_views_of_something_larger(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, phase_lag=(2,), initial=(2,), dtype=torch.float32)
    want = by_package(args, heads=2, reset=torch.tensor([[True, False, True, False, False]] * 2))
    kept = torch.tensor([True, False, True, False, False]).expand(2, 5)
    for lay in (
        lambda v: torch.stack([v, v * math.nan], -1)[..., 0],
        lambda v: torch.nn.functional.pad(v, (3, 2), value=math.nan)[..., 3:-2],
        lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
        lambda v: v.flip(-1).contiguous().flip(-1),
    ):
        got = by_package({k: lay(v) for k, v in args.items()}, heads=2, reset=kept)
        assert_same_bits(got, want)


def test_lazily_negated_parts_of_complex_tensors(backend: str) -> None:
    args = drawn((2,), 5, 2, 3, phase_lag=(2,), initial=(2,))
    lazy = {k: torch.complex(torch.zeros_like(v), -v).conj().imag for k, v in args.items()}
    assert all(v.is_neg() for v in lazy.values())
    assert_same_bits(by_package(lazy, heads=2), by_package(args, heads=2))
    own = {k: v.clone().requires_grad_() for k, v in args.items()}
    found = by_package(own, heads=2)
    weight = torch.randn_like(found["order_im"])
    negated = torch.complex(weight, -weight).conj().imag
    a, b = (torch.autograd.grad(found["order_im"], own["p"], w, retain_graph=True)[0] for w in (weight, negated))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*SEQUENCES, "phase_lag", "initial_re"])
def test_a_storage_that_was_freed_is_not_read(name: str, backend: str) -> None:
    args = drawn((2,), 50, 2, 30, phase_lag=(2, 2), initial=(2,))
    args[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        by_package(args, heads=2)

"""No op, bank, model or training step asks of an `mps` device what it lacks: forward and backward, found by a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kssm import data
from kssm.train.checkpoint import build_model
from kssm.train.config import ModelConfig, TrainConfig
from torch import Tensor, nn

from kssm_kernels import (
    FusedKuramoto,
    FusedKuramotoV1,
    FusedKuramotoV2,
    bistable_coupling,
    kuramoto_features,
    kuramoto_update,
    order_parameters,
    oscillator_scan,
    oscillator_step,
    philox_normal,
)
from kssm_kernels.ops import _entry
from tests.support.mps import FORBIDDEN_DTYPES, MPS, OnMPS, Trace, faults, kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """An empty trace that sees the eager path, which eager calls on a device take.

    A dispatch mode or a subclass of Tensor would be sent by the dispatcher path, of which a mode sees the outside.
    """
    monkeypatch.setattr(_entry, "_dispatch_modes", lambda: 0)
    monkeypatch.setattr(_entry, "_PLAIN", _entry._PLAIN | {OnMPS})
    with Trace() as running:
        yield running


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=MPS, requires_grad=True)


def check(trace: Trace, results: Any, leaves: list[Tensor]) -> None:
    """Differentiates the results; they, the gradients and all between must be what the device can do."""
    results = list(results) if isinstance(results, tuple) else [results]
    torch.stack([r.float().square().mean() for r in results]).sum().backward()
    gradients = [x.grad for x in leaves]
    assert all(isinstance(x, OnMPS) for x in [*results, *gradients])
    assert [g.dtype for g in gradients if g is not None] == [x.dtype for x in leaves]
    assert faults(trace.calls) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("harmonics", [1, 3, 40, 150])
def test_order_parameters(trace: Trace, harmonics: int, dtype: torch.dtype) -> None:
    theta = leaf(dtype, 2, 3, 33)
    check(trace, order_parameters(theta, harmonics), [theta])


NOISE = {"seed": 2**63 + 7, "noise_scale": (2, 1, 33)}
KURAMOTO: dict[str, dict[str, Any]] = {
    "numbers": {"coupling": 2.0, "omega": 0.5, "phase_lag": 0.3, "noise_scale": 0.1, "seed": torch.tensor(5)},
    "one coupling strength": {"coupling": ()},
    "each ensemble its own": {"coupling": (2, 3, 1), "omega": (3, 1), "phase_lag": (2, 1, 1), "noise_scale": (3, 1)},
    "each oscillator its own": {"coupling": (33,), "omega": (2, 3, 33), "phase_lag": (33,), **NOISE, "steps": 2},
}
OPS: dict[str, Callable[..., Any]] = {
    "update": kuramoto_update,
    "features": lambda theta, coupling, **rest: kuramoto_features(theta, coupling, 5, **rest),
    "both": lambda theta, coupling, **rest: kuramoto_features(theta, coupling, 5, return_phases=True, **rest),
}


@pytest.mark.parametrize(("op", "dtype"), [*((op, torch.float32) for op in OPS), *(("both", d) for d in DTYPES[1:])])
@pytest.mark.parametrize("case", KURAMOTO)
def test_kuramoto(trace: Trace, case: str, op: str, dtype: torch.dtype) -> None:
    given = {k: leaf(dtype, *v) if isinstance(v, tuple) else v for k, v in KURAMOTO[case].items()}
    theta = leaf(dtype, 2, 3, 33)
    leaves = [theta, *(v for v in given.values() if isinstance(v, OnMPS))]
    check(trace, OPS[op](theta, given.pop("coupling"), dt=0.1, **given), leaves)


def test_a_trajectory_too_long_to_keep(trace: Trace) -> None:
    theta, coupling = leaf(torch.bfloat16, 33), leaf(torch.float32, 2, 1)
    # without noise: it is the same at every step, and its 300 calls at each of 65 steps take ten seconds to trace
    results = kuramoto_features(theta, coupling, 3, phase_lag=0.1, steps=65, return_phases=True)
    check(trace, results, [theta, coupling])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamp", [(0.1, 10.0), None])
def test_bistable_coupling(trace: Trace, clamp: tuple[float, float] | None, dtype: torch.dtype) -> None:
    params = leaf(dtype, 4, 10)
    check(trace, bistable_coupling(params, clamp), [params])


SCANS: dict[str, dict[str, Any]] = {
    "all": {"forget": (2, 5, 3), "phase_lag": (2, 3), "initial_state": ((6,), (2, 6)), "reset": True, "save": 2},
    "a number, states": {"phase_lag": 0.5, "initial_state": ((2, 6), (6,)), "return_states": True, "harmonics": 2},
    "free": {"coupling": None, "heads": 3, "harmonics": 0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "kind"),
    [*((case, kind) for case in SCANS for kind in ("stuart_landau", "moebius")), ("all", "tied leak")],
)
def test_oscillator_scan(trace: Trace, case: str, kind: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {"coupling": (2, 5, 3), **SCANS[case]}
    if kind == "tied leak":
        given = {k: v for k, v in given.items() if k != "forget"} | {"tied_leak": True}
    else:
        given["kind"] = kind
    leaves = [leaf(dtype, 2, 5, 6) for _ in range(4)]
    for name in ("coupling", "forget", "phase_lag"):
        if isinstance(given.get(name), tuple):
            given[name] = leaf(dtype, *given[name])
            leaves.append(given[name])
    if "initial_state" in given:
        given["initial_state"] = tuple(leaf(dtype, *shape) for shape in given["initial_state"])
        leaves += given["initial_state"]
    if "reset" in given:
        given["reset"] = torch.zeros(2, 5, dtype=torch.bool, device=MPS)
    re, im, *pairs = oscillator_scan(*leaves[:4], **given)
    used = [v for v in (re, im, *(part for pair in pairs for part in pair)) if v.numel()]
    check(trace, tuple(used), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["stuart_landau", "moebius"])
@pytest.mark.parametrize("save", ["all", 2])
def test_a_closed_loop(trace: Trace, save: Any, kind: str, dtype: torch.dtype) -> None:
    wide, forget = [leaf(dtype, 2, 5, 6) for _ in range(4)], leaf(dtype, 2, 5, 3)
    loop = leaf(dtype, 4, 6), leaf(dtype, 27, 8), leaf(dtype, 2, 5, 4)
    reset = torch.zeros(2, 5, dtype=torch.bool, device=MPS)
    re, im, last = oscillator_scan(*wide, None, forget, kind=kind, feedback=loop, reset=reset, save=save)
    check(trace, (re, im, *last), [*wide, forget, *loop])


def test_packed_documents_and_a_step(trace: Trace) -> None:
    wide = [leaf(torch.float32, 1, 5, 6) for _ in range(4)]
    marks = torch.zeros(3, dtype=torch.int32, device=MPS)
    re, _, last = oscillator_scan(*wide, heads=2, cu_seqlens=marks)
    now = [leaf(torch.float32, 1, 6) for _ in range(4)]
    step = oscillator_step(*now, heads=2, state=last, kind="moebius")
    check(trace, (re, step[0], step[2][1]), [*wide, *now])


def test_philox_normal(trace: Trace) -> None:
    assert isinstance(philox_normal(3, 40, seed=2**64 - 1, step=9, device=MPS), OnMPS)
    assert faults(trace.calls) == []


BANKS: dict[str, Callable[[], nn.Module]] = {
    "v1": lambda: FusedKuramotoV1(16),
    "v2": lambda: FusedKuramotoV2(16, 8),
    "v3": lambda: FusedKuramoto(16, 8, n_harmonics=4),
    "v3, monostable": lambda: FusedKuramoto(16, 8, n_harmonics=4, clamp=None, noise="always"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BANKS)
def test_bank(trace: Trace, name: str, dtype: torch.dtype) -> None:
    bank, x = BANKS[name]().to(MPS, dtype), leaf(dtype, 2, 3, 16)
    check(trace, bank(x), [x, *(p for k, p in bank.named_parameters() if k != "coupling")])


@pytest.mark.parametrize("arch", ["v1", "v2", "v3"])
def test_training_step(trace: Trace, text: Path, tmp_path: Path, arch: Any) -> None:
    pytest.importorskip("tqdm", reason="the trainer needs the train extra")
    from kssm.train.trainer import Trainer

    model = ModelConfig(arch=arch, dim=16, layers=1, oscillators=8, harmonics=3, dropout=0.1)
    config = replace(TrainConfig(), context=8, batch_size=2, accumulate=2, eval_tokens=16, model=model)
    data.write_corpus(data.read_corpus([text], "char"), tmp_path)
    dataset = data.Dataset(tmp_path)
    trainer = Trainer(config, dataset, build_model(config, len(dataset.vocabulary)), MPS)
    assert all(isinstance(value, OnMPS) for value in trainer.train_step().values())
    assert all(isinstance(p, OnMPS) for p in trainer.model.parameters())
    assert faults(trace.calls) == []


# ---- the trace can fail ----

PLANTED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "float64": (lambda x: x.double(), "_to_copy: torch.float64"),
    "float64, made there": (lambda x: torch.ones(2, dtype=torch.float64, device=x.device), "ones: torch.float64"),
    "complex128": (lambda x: x.to(torch.complex128), "_to_copy: torch.complex128"),
    "uint64": (lambda x: torch.empty(2, dtype=torch.uint64, device=x.device), "empty.memory_format: torch.uint64"),
    "an operator without a kernel": (torch.special.airy_ai, "special_airy_ai: torch "),
    "an integer remainder": (lambda x: x.long() % 7, "remainder.Scalar: torch.int64"),
    "an integer magnitude in place": (lambda x: x.int().abs_(), "abs_: torch.int32"),
    "a range of bfloat16": (lambda x: torch.arange(3, dtype=torch.bfloat16, device=x.device), "arange: torch.bfloat16"),
    "a byte's bits": (lambda x: x.byte() >> 4, "__rshift__.Scalar: torch.uint8"),
    "a copy to the CPU": (lambda x: x.cpu() + 1, "_to_copy: a result on the CPU"),
    "a number for Python": (lambda x: x.sum().item(), "_local_scalar_dense: a result on the CPU"),
    "a branch": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense: a result on the CPU"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    act, want = PLANTED[name]
    with Trace() as trace:
        x = torch.zeros(4, device="mps")
        act(x.sin())
    found = faults(trace.calls)
    assert any(fault.startswith(want) for fault in found), found


def test_a_planted_float64_and_a_forbidden_call_are_both_found(trace: Trace) -> None:
    theta = leaf(torch.float32, 2, 8)
    order_parameters(theta, 3).sum().backward()
    assert faults(trace.calls) == []
    theta.double().cos()
    torch.arange(3, device=MPS) % 2
    assert {fault.partition(":")[0] for fault in faults(trace.calls)} == {"_to_copy", "cos", "remainder.Scalar"}


def test_a_tensor_from_the_cpu_is_refused_and_a_number_is_not() -> None:
    with Trace() as trace:
        x = torch.zeros(4, device="mps")
        assert isinstance(x + torch.tensor(1.0), OnMPS)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)
    assert faults(trace.calls) == []


def test_the_list_of_kernels_is_that_of_torch() -> None:
    known = kernels()
    if known is None:
        pytest.skip("this torch is packaged without torchgen, whose list of kernels it is")
    assert len(known) > 2000
    assert known["add.Tensor"]  # its own kernel, by way of add.out
    assert known["ones"]  # one kernel for all devices
    assert not known["geqrf"]
    assert FORBIDDEN_DTYPES.keys().isdisjoint(DTYPES)


def test_mps_as_the_default_device(trace: Trace) -> None:
    theta, scale = leaf(torch.float32, 33), leaf(torch.float32, 2, 1)
    with torch.device(MPS):
        check(trace, kuramoto_update(theta, 1.0, noise_scale=scale), [theta, scale])

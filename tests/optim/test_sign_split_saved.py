"""What load_state_dict refuses, and what it takes: other optimizers' dicts, older ones, numpy's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kssm_kernels.optim import FreezeController, SignSplitEMA, sign_split
from tests.support.sign_split import EVERYTHING, IMPLEMENTATIONS, WEIGHT, WRONG_STATES, assert_same, made, running

implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)
Z = torch.zeros


def kept(p: Tensor, optimizer: SignSplitEMA) -> dict[str, Any]:
    return copy.deepcopy({"p": p.detach(), "state": dict(optimizer.state[p]), "groups": optimizer.state_dict()})


def assert_kept(p: Tensor, optimizer: SignSplitEMA, before: dict[str, Any]) -> None:
    now = kept(p, optimizer)
    assert torch.equal(now["p"], before["p"])
    assert list(now["state"]) == list(before["state"])
    for name, t in before["state"].items():
        assert torch.equal(now["state"][name], t), name
    assert now["groups"]["param_groups"] == before["groups"]["param_groups"]


# ---- states ----

wrong = pytest.mark.parametrize(
    ("key", "change", "words"), WRONG_STATES, ids=[f"{case[0]} {i}" for i, case in enumerate(WRONG_STATES)]
)


@wrong
def test_a_saved_state_of_another_kind_is_refused(key: str, change: Callable[[Any], Any], words: str) -> None:
    """By load_state_dict, which leaves the optimizer as it was: it goes on like one that was not asked."""
    _, optimizer = made((80, 64), torch.bfloat16, **EVERYTHING)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = change(saved["state"][0].get(key))
    other, mine = made((80, 64), torch.bfloat16, steps=2, **EVERYTHING)
    before = kept(other, mine)
    with pytest.raises(ValueError, match="the saved state " + words):
        mine.load_state_dict(saved)
    assert_kept(other, mine, before)
    same, twin = made((80, 64), torch.bfloat16, steps=2, **EVERYTHING)
    for q in (other, same):
        q.grad = torch.ones_like(q)
    mine.step()
    twin.step()
    assert_same(([other], mine), ([same], twin))


@pytest.mark.parametrize("key", ["positive", "negative", "positive_scale", "negative_scale"])
def test_a_missing_half_of_a_state_is_refused(key: str) -> None:
    _, optimizer = made((80, 64), **EVERYTHING)
    saved = optimizer.state_dict()
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=f"{key}' of {WEIGHT}.* is missing"):
        optimizer.load_state_dict(saved)


def test_a_saved_state_without_its_memory_is_refused() -> None:
    """torch's own copy of it ends in a segmentation fault."""
    p, optimizer = made((80, 64))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["negative"].untyped_storage().resize_(100)
    before = kept(p, optimizer)
    with pytest.raises(RuntimeError, match=r"the saved state 'negative'.*storage of 100 bytes"):
        optimizer.load_state_dict(saved)
    assert_kept(p, optimizer, before)


@implementations
def test_a_checkpoint_of_a_smaller_layer(name: str) -> None:
    with running(name) as chosen:
        _, optimizer = made((64, 64), **chosen)
        other, mine = made((65, 64), steps=0, **chosen)
        with pytest.raises(ValueError, match=rf"{WEIGHT}, of shape \(65, 64\),.*got .*\(64, 64\)"):
            mine.load_state_dict(optimizer.state_dict())
        assert not mine.state
        other.grad = torch.ones_like(other)
        mine.step()


def test_the_number_of_a_parameter_counts_over_groups() -> None:
    def of(rows: int) -> SignSplitEMA:
        params = [nn.Parameter(Z(3)), nn.Parameter(Z(rows, 2))]
        optimizer = SignSplitEMA([{"params": [p]} for p in params])
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"of parameter 1, of shape \(5, 2\)"):
        of(5).load_state_dict(of(4).state_dict())


def test_other_groups_are_refused() -> None:
    _, optimizer = made((4,))
    with pytest.raises(ValueError, match=r"the saved groups have \[2\] parameters, want \[1\]"):
        optimizer.load_state_dict(SignSplitEMA([nn.Parameter(Z(4)), nn.Parameter(Z(4))]).state_dict())


def test_training_on_does_not_change_what_was_loaded() -> None:
    """Scales, counters and divisors included, which lie on the right device as they are."""
    p, optimizer = made((80, 64), torch.bfloat16, **EVERYTHING)
    optimizer.state[p]["cryo"] = torch.ones(80)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved["state"][0])
    optimizer.load_state_dict(saved)
    optimizer.state[p]["cryo"].fill_(2.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for name, t in before.items():
        assert torch.equal(saved["state"][0][name], t), name


def test_eight_bits_begin_at_4096_elements() -> None:
    for n, dtype in ((4095, torch.float32), (4096, torch.uint8)):
        p, optimizer = made((n,), state_dtype=torch.uint8)
        assert optimizer.state[p]["positive"].dtype == dtype


# ---- what is not ours, what is older, and numpy's numbers ----


@pytest.mark.parametrize(
    "theirs",
    [torch.optim.AdamW, torch.optim.SGD, lambda p: torch.optim.SGD(p, momentum=0.9), torch.optim.Adagrad],
    ids=["AdamW", "SGD", "momentum", "Adagrad"],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_another_optimizers_state_dict(theirs: Any, steps: int) -> None:
    p, optimizer = made((4, 3))
    q = nn.Parameter(Z(4, 3))
    other = theirs([q])
    q.grad = torch.ones_like(q)
    for _ in range(steps):
        other.step()
    before = kept(p, optimizer)
    with pytest.raises(ValueError, match=r"SignSplitEMA: this is the state_dict of another optimizer: its groups have"):
        optimizer.load_state_dict(other.state_dict())
    assert_kept(p, optimizer, before)
    for junk in ({}, {"model": {}}, [1]):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            optimizer.load_state_dict(junk)  # type: ignore[arg-type]
    assert_kept(p, optimizer, before)
    optimizer.step()


OPTIONS = list(SignSplitEMA([nn.Parameter(Z(1))]).defaults)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_dict_of_an_older_release_lacks_an_option(option: str) -> None:
    p, optimizer = made((4, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    want = saved["param_groups"][0].pop(option)
    mine = SignSplitEMA([p], lr=0.05)
    mine.load_state_dict(saved)
    assert mine.param_groups[0][option] == want
    mine.step()


def test_a_group_that_no_step_could_use_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    controller = FreezeController(SignSplitEMA([p], temperature=True), [("p", p)], {"a": ["p"]})
    mine = controller.optimizer
    saved = copy.deepcopy(mine.state_dict())
    saved["param_groups"][0]["beta"] = 2.0
    saved["freeze"]["steps"] = 7
    before = kept(p, mine)
    with pytest.raises(ValueError, match="beta"):
        mine.load_state_dict(saved)
    assert_kept(p, mine, before)
    assert controller.steps == 0
    saved["param_groups"][0]["beta"] = 0.5
    mine.load_state_dict(saved)
    assert controller.steps == 7


@implementations
def test_numbers_of_numpy(name: str) -> None:
    numbers: dict[str, Any] = {
        "lr": np.float32(0.25), "beta": np.float64(0.5), "kappa": np.int64(2), "eps": np.float16(0.0),
        "weight_decay": np.float32(0.125), "cryo": np.int32(2), "seed": np.int64(7), "lazy": np.bool_(True),
        "temperature": {"floor": np.float32(0.5), "cool": np.float64(0.5), "heat": np.array(0.25)},
    }  # fmt: skip
    own = {k: v.item() for k, v in numbers.items() if k != "temperature"}
    own["temperature"] = {k: v.item() for k, v in numbers["temperature"].items()}
    with running(name) as chosen:
        theirs, mine = (made((30,), steps=3, **x, **chosen) for x in (numbers, own))
    assert torch.equal(theirs[0], mine[0])
    group = theirs[1].param_groups[0]
    assert {k: type(group[k]) for k in own} == {k: type(v) for k, v in own.items()}
    for bad in ({"seed": np.float64(1.0)}, {"seed": np.bool_(True)}, {"lr": np.bool_(True)}, {"lr": np.ones(2)}):
        with pytest.raises((TypeError, ValueError)):
            made((30,), **bad)


@implementations
def test_a_scheduler_that_makes_numpys_numbers(name: str, tmp_path: Any) -> None:
    with running(name) as chosen:
        p, optimizer = made((30,), **chosen)
        q, plain = made((30,), **chosen)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: np.float32(0.5))  # type: ignore[arg-type,return-value]
        plain.param_groups[0]["lr"] = float(np.float32(0.5)) * 0.05
        assert isinstance(optimizer.param_groups[0]["lr"], np.generic)
        optimizer.param_groups[0]["cryo"] = np.float32(1.0)
        for o in (optimizer, plain):
            o.step()
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
        assert type(optimizer.param_groups[0]["lr"]) is float
        optimizer.step()


# ---- older torch ----


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, NotImplementedError])
def test_a_torch_whose_increment_version_takes_a_tensor_only(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """2.4.1 raises RuntimeError for a list, at import of the package."""
    bumped: list[Tensor] = []

    def one_tensor(t: Any) -> None:
        if not isinstance(t, Tensor):
            raise error("increment_version expects a tensor")
        bumped.append(t)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", one_tensor)
    assert not sign_split._takes_lists()
    monkeypatch.setattr(sign_split, "_TAKES_LISTS", False)
    p, _ = made((3,))
    assert bumped[0] is p

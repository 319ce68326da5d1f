"""FreezeController: petals, the rules by which they freeze, thaw and grow, what is saved, and its errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from kssm_kernels.optim import FreezeController, SignSplitEMA

COOL = 0.75  # memory of four steps: petals may freeze at age 4 and thaw over 4 steps
Petals = dict[str, list[str | tuple[str, slice]]]
TWO: Petals = {"low": [("weight", slice(0, 3))], "high": [("weight", slice(3, None)), "bias"]}


def made(
    petals: Petals | None = None, seed: int = 0, options: dict[str, Any] | None = None, **rules: Any
) -> tuple[nn.Linear, SignSplitEMA, FreezeController]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 6)
    given: dict[str, Any] = {"temperature": {"cool": COOL, "floor": 1.0}, **(options or {})}
    optimizer = SignSplitEMA(model.parameters(), lr=0.01, **given)
    rules = {"every": 1, **rules}
    return model, optimizer, FreezeController(optimizer, model.named_parameters(), petals or TWO, **rules)


def pushed(model: nn.Linear, optimizer: SignSplitEMA, controller: FreezeController, sign: float = 1.0) -> None:
    """A step in which every element of low is pushed back and forth, and every one of high one way."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert model.weight.grad is not None
    model.weight.grad[:3] *= sign
    optimizer.step()
    controller.step()


def set_temperatures(optimizer: SignSplitEMA, model: nn.Linear, low: Tensor | float, high: Tensor | float) -> None:
    optimizer.state[model.weight]["temperature"][:3] = low
    optimizer.state[model.weight]["temperature"][3:] = high
    optimizer.state[model.bias]["temperature"].fill_(1.0)


def cold(part: float, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    """Temperatures of which the part ``part`` is solid."""
    t = torch.full((math.prod(shape),), 0.9)
    t[: round(part * len(t))] = 0.1
    return t.reshape(shape)


def checked(controller: FreezeController, model: nn.Linear, low: Tensor | float) -> None:
    """A check that finds these temperatures, without a step of the optimizer between."""
    set_temperatures(controller.optimizer, model, low, 1.0)
    controller.step()


def test_balanced_weights_freeze_and_driven_ones_do_not() -> None:
    model, optimizer, controller = made()
    for k in range(40):
        pushed(model, optimizer, controller, (-1.0) ** k)
    report = controller.report()
    assert report["low"].frozen
    assert report["low"].solid == 1.0
    assert report["low"].temperature < 0.55
    assert report["low"].cryo == 10.0
    assert not report["high"].frozen
    assert report["high"].solid == 0.0
    assert report["high"].temperature > 0.55


def test_the_mean_temperature_of_the_report_is_that_of_the_petal() -> None:
    model, optimizer, controller = made()
    pushed(model, optimizer, controller)
    checked(controller, model, torch.linspace(0, 1, 12).reshape(3, 4))
    assert controller.report()["low"].temperature == pytest.approx(0.5, abs=1e-6)
    assert controller.report()["low"].solid == pytest.approx(7 / 12)  # 0, 1/11, .. 6/11 = .5454
    assert controller.report()["high"].temperature == pytest.approx(1.0)


def test_three_consecutive_checks_and_a_minimum_age() -> None:
    model, optimizer, controller = made()
    pushed(model, optimizer, controller)
    for low in (0.1, 0.1, 0.9, 0.1, 0.1):
        checked(controller, model, low)
        assert not controller.report()["low"].frozen
    checked(controller, model, 0.1)
    assert controller.report()["low"].frozen
    model, optimizer, controller = made(checks=1)
    pushed(model, optimizer, controller)  # age 1
    for age in (2, 3, 4):
        checked(controller, model, 0.1)
        assert controller.report()["low"].frozen == (age >= 4)


@pytest.mark.parametrize(("part", "freezes"), [(7 / 12, False), (8 / 12, True)])  # 1 - 1/e = .632
def test_the_fraction_at_which_a_petal_freezes(part: float, freezes: bool) -> None:
    model, optimizer, controller = made(min_age=0, checks=1)
    pushed(model, optimizer, controller)
    checked(controller, model, cold(part))
    assert controller.report()["low"].solid == pytest.approx(part)
    assert controller.report()["low"].frozen == freezes


def test_hysteresis() -> None:
    model, optimizer, controller = made(min_age=0, checks=1)
    pushed(model, optimizer, controller)
    checked(controller, model, 0.1)
    checked(controller, model, cold(5 / 12))  # too few to freeze, too many to thaw
    assert controller.report()["low"].frozen
    checked(controller, model, cold(4 / 12))
    assert not controller.report()["low"].frozen


def test_checks_come_every_so_many_steps() -> None:
    model, optimizer, controller = made(every=3, checks=1, min_age=0)
    pushed(model, optimizer, controller)
    for steps in (2, 3):
        checked(controller, model, 0.1)
        assert controller.report()["low"].frozen == (steps == 3)


def test_a_frozen_petal_moves_a_tenth_and_its_states_go_on() -> None:
    model, optimizer, controller = made(min_age=0, checks=1)
    free, other, _ = made(min_age=0, checks=1)
    for a, b in ((model, optimizer), (free, other)):
        for p in a.parameters():
            p.grad = torch.ones_like(p)
        b.step()
    checked(controller, model, 0.1)
    set_temperatures(other, free, 0.1, 1.0)
    before = model.weight.detach().clone()
    optimizer.step()
    other.step()
    moved, whole = before - model.weight.detach(), before - free.weight.detach()
    torch.testing.assert_close(moved[:3], whole[:3] / 10, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(moved[3:], whole[3:], rtol=0, atol=0)
    for name in ("positive", "negative", "temperature"):
        assert torch.equal(optimizer.state[model.weight][name], other.state[free.weight][name]), name


def test_a_thaw_starts_anew_and_lets_go_geometrically() -> None:
    model, optimizer, controller = made(checks=1)
    pushed(model, optimizer, controller)
    for _ in range(4):
        checked(controller, model, 0.1)
    assert controller.report()["low"].frozen
    checked(controller, model, 0.9)
    state = optimizer.state[model.weight]
    assert (state["temperature"][:3] == 1).all()
    for name in ("positive", "negative"):
        assert not state[name][:3].any()
        assert state[name][3:].eq(0).all() == (name == "negative")  # the other petal keeps its means
    found = [float(state["cryo"][0])]
    for _ in range(4):
        checked(controller, model, 0.9)
        found.append(float(state["cryo"][0]))
    assert found == pytest.approx([10 ** (k / 4) for k in (4, 3, 2, 1, 0)])
    assert (state["cryo"][3:] == 1).all()


def test_a_petal_does_not_freeze_while_it_thaws() -> None:
    model, optimizer, controller = made(checks=1)
    pushed(model, optimizer, controller)
    for low in (0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1):
        checked(controller, model, low)
        assert controller.report()["low"].frozen == (controller.steps == 4), controller.steps


def test_the_model_is_asked_for_more_petals_once() -> None:
    wanted: list[int] = []
    petals: Petals = {str(k): [("weight", slice(k, k + 1))] for k in range(6)}
    model, optimizer, controller = made(petals, min_age=0, checks=1, on_expand=wanted.append)
    pushed(model, optimizer, controller)
    t = optimizer.state[model.weight]["temperature"]
    t.copy_(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.9, 0.9]).unsqueeze(1))
    controller.step()
    assert wanted == []  # 4 of 6
    t[4] = 0.1
    controller.step()
    controller.step()
    assert wanted == [3]  # 5 of 6 are more than 0.8
    extra = nn.Parameter(torch.zeros(3, 4))
    optimizer.add_param_group({"params": [extra]})
    for k in range(3):
        controller.add(f"new {k}", [("extra", slice(k, k + 1))], [("extra", extra)])
    assert len(controller.report()) == 9
    controller.step()
    assert wanted == [3]  # 5 of 9


@pytest.mark.parametrize("test", ["kl_all", "kl_fraction"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_balance_of_the_means(test: str, state_dtype: torch.dtype) -> None:
    """KL of (1/2 + d, 1/2 - d) from even shares is 2 d^2 and higher terms: 0.02 at d = 0.0997."""
    options = {"temperature": None, "state_dtype": state_dtype}
    model, optimizer, controller = made(options=options, test=test, min_age=0, checks=1)
    pushed(model, optimizer, controller)
    state = optimizer.state[model.weight]
    for share, freezes in ((0.61, False), (0.59, True)):
        state["positive"][:3], state["negative"][:3] = share, 1 - share
        controller.step()
        assert controller.report()["low"].frozen == freezes
        assert math.isnan(controller.report()["low"].temperature)
    model, optimizer, controller = made(options=options, test=test, min_age=0, checks=1)
    pushed(model, optimizer, controller)
    state = optimizer.state[model.weight]
    state["positive"][:3], state["negative"][:3] = 0.5, 0.5
    state["positive"][0, :3] = 0.9  # three of twelve weights
    controller.step()
    assert controller.report()["low"].solid == 0.75
    assert controller.report()["low"].frozen == (test == "kl_fraction")


def test_eight_bit_means_have_a_balance_and_thaw_to_zero() -> None:
    model = nn.Linear(64, 80)
    optimizer = SignSplitEMA(model.parameters(), temperature=True, state_dtype=torch.uint8)
    petals: Petals = {"low": [("weight", slice(0, 3))]}
    rules: dict[str, Any] = {"every": 1, "min_age": 0, "checks": 1}
    controller = FreezeController(optimizer, model.named_parameters(), petals, test="kl_fraction", **rules)
    for sign in (1.0, -1.0, 1.0, -1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, sign)
        optimizer.step()
    state = optimizer.state[model.weight]
    assert state["positive"].dtype == torch.uint8
    controller.step()
    assert controller.report()["low"].frozen
    state["negative"][:3] = 0
    controller.step()
    assert not controller.report()["low"].frozen
    assert not state["positive"][:3].any()
    assert state["positive"][3:].all()


def test_weights_without_a_gradient_count_as_not_solid() -> None:
    model, optimizer, controller = made({"all": ["weight", "bias"]}, min_age=0, checks=1)
    model.bias.grad = torch.ones(6)
    optimizer.step()
    optimizer.state[model.bias]["temperature"].zero_()
    controller.step()
    assert controller.report()["all"].solid == pytest.approx(6 / 30)


# ---- saved and resumed ----


def run(steps: range, model: nn.Linear, optimizer: SignSplitEMA, controller: FreezeController) -> None:
    for k in steps:
        pushed(model, optimizer, controller, (-1.0) ** k if k < 14 else 1.0)


@pytest.mark.parametrize("at", [3, 9, 16, 19])  # young, frozen, thawing
def test_resumed_equals_uninterrupted(at: int, tmp_path: Path) -> None:
    whole = made()
    run(range(24), *whole)
    first = made()
    run(range(at), *first)
    torch.save({"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    model, optimizer, controller = made(seed=1)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(range(at, 24), model, optimizer, controller)
    assert controller.report() == whole[2].report()
    assert controller.state_dict() == whole[2].state_dict()
    for p, q in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_run_above_freezes_and_thaws() -> None:
    model, optimizer, controller = made()
    frozen = []
    for k in range(24):
        run(range(k, k + 1), model, optimizer, controller)
        frozen.append((controller.report()["low"].frozen, controller.report()["low"].cryo))
    assert frozen[8] == (True, 10.0)
    assert not frozen[-1][0]
    assert any(1 < cryo < 10 for _, cryo in frozen)


def test_beside_a_distributed_checkpoint() -> None:
    """torch.distributed.checkpoint hands on state and groups of an optimizer alone: the controller goes beside them."""
    model, optimizer, controller = made()
    run(range(9), model, optimizer, controller)
    _, saved = dcp.get_state_dict(model, optimizer)
    beside = controller.state_dict()
    again, resumed, other = made(seed=1)
    dcp.set_state_dict(again, resumed, model_state_dict=model.state_dict(), optim_state_dict=saved)
    other.load_state_dict(beside)
    run(range(9, 24), model, optimizer, controller)
    run(range(9, 24), again, resumed, other)
    assert other.report() == controller.report()
    assert torch.equal(again.weight, model.weight)


def test_an_optimizer_saved_without_a_controller_loads() -> None:
    _, optimizer, controller = made()
    saved = optimizer.state_dict()
    del saved["freeze"]
    optimizer.load_state_dict(saved)
    assert controller.steps == 0


# ---- errors, before anything changes ----


@pytest.mark.parametrize(
    ("petals", "rules", "error", "words"),
    [
        ({"a": ["none.*"]}, {}, ValueError, "no parameter is named 'none"),
        ({"a": [("none", slice(2))]}, {}, ValueError, "no parameter is named 'none'"),
        ({"a": ["*"], "b": [("weight", slice(5, 6))]}, {}, ValueError, "petals 'a' and 'b' share rows"),
        ({"a": ["weight", ("weight", slice(5, 6))]}, {}, ValueError, "share rows"),
        ({"a": [("weight", slice(6, 9))]}, {}, ValueError, "no row"),
        ({"a": []}, {}, ValueError, "no parameter that trains"),
        (TWO, {"test": "force"}, ValueError, "test must be one of"),
        (TWO, {"every": 0}, ValueError, "every and checks must be at least 1"),
        (TWO, {"checks": 0}, ValueError, "every and checks must be at least 1"),
        (TWO, {"cryo": 0.5}, ValueError, "cryo must be at least 1, got 0.5"),
        (TWO, {"thaw_below": 0.9}, ValueError, "want 0 <= thaw_below <= freeze_at <= 1"),
        (TWO, {"tau": math.nan}, ValueError, "tau must be"),
        (TWO, {"min_age": -1}, ValueError, "min_age must be"),
    ],
)
def test_bad_petals_and_rules(petals: Petals, rules: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made(petals, **rules)


def test_the_test_of_temperature_wants_temperatures() -> None:
    with pytest.raises(TypeError, match="has no temperature"):
        made(options={"temperature": None})


def test_a_parameter_of_another_optimizer() -> None:
    model = nn.Linear(4, 6)
    optimizer = SignSplitEMA([model.weight], temperature=True)
    with pytest.raises(ValueError, match="is not in the optimizer"):
        FreezeController(optimizer, model.named_parameters(), {"a": ["bias"]})


def test_a_petal_of_a_name_that_is_taken() -> None:
    model, _, controller = made()
    with pytest.raises(ValueError, match="there is a petal 'low' already"):
        controller.add("low", ["bias"], model.named_parameters())


def test_other_petals_than_those_saved() -> None:
    _, optimizer, _ = made()
    _, other, controller = made({"all": ["*"]})
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"the saved petals are .*high.*, this controller has"):
        other.load_state_dict(optimizer.state_dict())
    assert controller.state_dict() == before
    assert not other.state

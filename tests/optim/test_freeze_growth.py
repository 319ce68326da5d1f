"""FreezeController at the edges of its rules: when more petals are asked for, and what a thaw forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.test_freeze import Petals, checked, made, pushed, set_temperatures


@pytest.mark.parametrize(("frozen", "wanted"), [(5, [3]), (4, [])])
def test_half_as_many_petals_rounded_up_above_four_fifths(frozen: int, wanted: list[int]) -> None:
    """Of five petals all ask for ceil(5 / 2), and four for none: 4 / 5 is 0.8, not more."""
    asked: list[int] = []
    petals: Petals = {str(k): [("weight", slice(k, k + 1))] for k in range(5)}
    model, optimizer, controller = made(petals, min_age=0, checks=1, on_expand=asked.append)
    pushed(model, optimizer, controller)
    optimizer.state[model.weight]["temperature"].fill_(0.9)[:frozen] = 0.1
    controller.step()
    assert sum(r.frozen for r in controller.report().values()) == frozen
    assert asked == wanted


def test_a_resumed_controller_does_not_ask_again() -> None:
    asked: list[int] = []
    rules: dict[str, Any] = {"min_age": 0, "checks": 1, "on_expand": asked.append}
    petals: Petals = {"all": ["weight"]}
    model, optimizer, controller = made(petals, **rules)
    pushed(model, optimizer, controller)
    optimizer.state[model.weight]["temperature"].fill_(0.1)
    controller.step()
    assert asked == [1]
    _, resumed, other = made(petals, seed=1, **rules)
    resumed.load_state_dict(optimizer.state_dict())
    assert other.report()["all"].frozen
    other.step()
    assert asked == [1]


def test_a_thaw_forgets_both_means() -> None:
    """Pushed both ways before it, so that both are there to be forgotten; the other petal's stay."""
    model, optimizer, controller = made(checks=1)
    for sign in (1.0, -1.0, 1.0, -1.0):
        pushed(model, optimizer, controller, sign)
    set_temperatures(optimizer, model, 0.1, 1.0)
    controller.step()
    state = optimizer.state[model.weight]
    assert controller.report()["low"].frozen
    assert state["positive"][:3].all()
    assert state["negative"][:3].all()
    high = state["positive"][3:].clone()
    checked(controller, model, 0.9)
    assert not controller.report()["low"].frozen
    for name in ("positive", "negative"):
        assert not state[name][:3].any(), name
    assert torch.equal(state["positive"][3:], high)

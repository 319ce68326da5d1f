"""Devices: every backend gets the calls that are its own; where there is none nothing happens and nothing raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kssm.options import UsageError
from kssm.train import device as devices
from kssm.train.device import (
    memory_in_use,
    release_memory,
    resolve_device,
    restore_generators,
    save_generators,
    synchronize,
    total_memory,
)

from tests.train.runs import metrics, train

STATE = torch.arange(4, dtype=torch.uint8)
Calls = list[tuple[Any, ...]]


class Backend(SimpleNamespace):
    """A backend module that notes what is asked of it: the names in ``signatures``, with as many arguments."""

    def __init__(self, calls: Calls, signatures: dict[str, tuple[int, Any]]) -> None:
        super().__init__(is_available=lambda: True)
        for name, (count, result) in signatures.items():
            setattr(self, name, self._noted(calls, name, count, result))

    @staticmethod
    def _noted(calls: Calls, name: str, count: int, result: Any) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            assert len(arguments) == count, f"{name} takes {count} arguments, got {arguments}"
            calls.append((name, *arguments))
            return result

        return function


COMMON: dict[str, tuple[int, Any]] = {
    "empty_cache": (0, None),
    "get_rng_state": (1, STATE),
    "set_rng_state": (2, None),
}
SIGNATURES: dict[str, dict[str, tuple[int, Any]]] = {
    "cuda": {**COMMON, "synchronize": (1, None), "memory_allocated": (1, 123)},
    "mps": {**COMMON, "synchronize": (0, None), "current_allocated_memory": (0, 123)},
    "xpu": {**COMMON, "synchronize": (1, None), "memory_allocated": (1, 123)},
}


@pytest.fixture(params=SIGNATURES)
def present(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.device, Calls]:
    """A device whose backend is there, and the calls that reach it."""
    calls: Calls = []
    monkeypatch.setattr(torch, request.param, Backend(calls, SIGNATURES[request.param]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: request.param == "mps")
    return torch.device(request.param, 0), calls


def test_each_backend_gets_its_own_calls(present: tuple[torch.device, Calls]) -> None:
    device, calls = present
    which = () if device.type == "mps" else (device,)
    synchronize(device)
    release_memory(device)
    assert memory_in_use(device) == 123
    count = "current_allocated_memory" if device.type == "mps" else "memory_allocated"
    assert calls == [("synchronize", *which), ("empty_cache",), (count, *which)]


def test_generators_of_a_device_are_kept_with_the_cpus(present: tuple[torch.device, Calls]) -> None:
    device, calls = present
    states = save_generators(device)
    drawn = torch.rand(3)
    assert states.keys() == {"cpu", device.type}
    restore_generators(device, states)
    assert torch.equal(torch.rand(3), drawn)
    assert calls == [("get_rng_state", device), ("set_rng_state", STATE, device)]


def test_a_state_of_the_cpu_alone_restores_the_cpu_alone(present: tuple[torch.device, Calls]) -> None:
    device, calls = present
    restore_generators(device, {"cpu": torch.get_rng_state()})
    assert calls == []


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_nothing_is_asked_for_a_device_without_a_backend(present: tuple[torch.device, Calls], name: str) -> None:
    device, (_, calls) = torch.device(name), present
    synchronize(device)
    release_memory(device)
    assert memory_in_use(device) is None
    assert save_generators(device).keys() == {"cpu"}
    assert total_memory(device) > 2**20
    assert calls == []


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize("built", [False, True], ids=["not in this torch", "not on this machine"])
def test_a_backend_that_cannot_run_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str, built: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if built:
        monkeypatch.setattr(torch, name, SimpleNamespace(is_available=lambda: False))
    else:
        monkeypatch.delattr(torch, name)
    device = torch.device(name)
    synchronize(device)
    release_memory(device)
    assert memory_in_use(device) is None
    assert save_generators(device).keys() == {"cpu"}


def test_an_xpu_of_torch_2_4_counts_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "xpu", Backend([], COMMON))
    assert memory_in_use(torch.device("xpu")) is None


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("nonsense", "meta"):  # meta has no numbers to bring back
        with pytest.raises(UsageError, match=f"--device {name} cannot be used"):
            resolve_device(name)


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda count, device: torch.zeros(count))
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_a_device_with_memory_of_its_own_is_asked_for_all_of_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    properties = {torch.device(name, 1): SimpleNamespace(total_memory=123)}
    monkeypatch.setattr(torch, name, SimpleNamespace(get_device_properties=properties.__getitem__))
    assert total_memory(torch.device(name, 1)) == 123


def test_the_machines_memory_is_all_of_it_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    assert total_memory(torch.device("cpu")) == 40960


def test_a_run_releases_memory_after_each_evaluation_and_before_its_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro", reason="the trainer needs the train extra")
    from kssm.train import checkpoint, trainer

    done: list[str] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            done.append(name)
            return original(*arguments)

        return function

    monkeypatch.setattr(trainer.Trainer, "sample", noted("sample", trainer.Trainer.sample))
    monkeypatch.setattr(trainer, "save_checkpoint", noted("save", checkpoint.save_checkpoint))
    monkeypatch.setattr(trainer, "release_memory", noted("release", devices.release_memory))
    monkeypatch.setattr(trainer, "synchronize", noted("wait", devices.synchronize))
    monkeypatch.setattr(trainer, "memory_in_use", lambda device: 7)
    assert train(text, tmp_path / "run", "--max-steps", 2, "--log-every", 2) == 0
    assert done == ["save", "wait", "sample", "release", "save"]
    assert metrics(tmp_path / "run")[0]["memory_in_use"] == 7

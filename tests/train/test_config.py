"""The checks of a run's options: the bounds themselves pass, what lies beyond is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from kssm import KSSMv1
from kssm.models import ARCHITECTURES, Architecture
from kssm.options import Bound, UsageError
from kssm.train.checkpoint import build_model, load_config, save_config
from kssm.train.config import ModelConfig, OptimizerConfig, TrainConfig, check, check_same_run, least_memory

from tests.train.runs import kssm, train

GROUPS = {"model": ModelConfig, "optimizer": OptimizerConfig}


def changed(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    for group, kind in GROUPS.items():
        if name in {f.name for f in dataclasses.fields(kind)}:
            return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("batch_size", [1], [0]),
        ("harmonics", [1, 256], [0, 257]),
        ("feedback", [0, 1], [-1]),
        ("mlp", [0, 1], [-1]),
        ("sample_tokens", [0], [-1]),
        ("warmup_steps", [0], [-1]),
        ("seed", [0, 2**62], [-1, 2**62 + 1]),
        ("lr", [1e-9], [0.0, float("inf"), float("nan")]),
        ("clip", [1e-9], [0.0, float("inf"), float("nan")]),
        ("weight_decay", [0.0], [-1e-9, float("inf"), float("nan")]),
        ("lambda_reg", [0.0], [-1e-9, float("inf"), float("nan")]),
        ("dropout", [0.0, 0.999], [-1e-9, 1.0, float("nan")]),
        ("beta1", [0.0, 0.999], [-1e-9, 1.0, float("nan")]),
        ("beta2", [0.0, 0.999], [-1e-9, 1.0, float("nan")]),
        ("lr_floor", [0.0, 1.0], [-1e-9, 1.001, float("nan")]),
        ("eval_tokens", [TrainConfig.context], [TrainConfig.context - 1]),
    ],
)
def test_bounds(name: str, inside: list[Any], outside: list[Any]) -> None:
    config = changed(TrainConfig(), "arch", "v3")  # which has the widest bounds
    for value in inside:
        check(changed(config, name, value))
    for value in outside:
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be .*got {value}"):
            check(changed(config, name, value))


FREE = {"out", "resume", "max_steps", "device", "eval_every", "eval_tokens", "sample_tokens", "log_every"}
NAMES = [f.name for kind in (TrainConfig, *GROUPS.values()) for f in dataclasses.fields(kind) if f.name not in GROUPS]


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_run_may_change_its_length_its_device_and_its_reports_only(name: str) -> None:
    asked = changed(TrainConfig(), name, "another")
    if name in FREE:
        check_same_run(TrainConfig(), asked)
    else:
        with pytest.raises(UsageError, match=f" has --{name.replace('_', '-')} .*, got another$"):
            check_same_run(TrainConfig(), asked)


@pytest.mark.parametrize(
    ("arch", "size"),
    [("v1", "oscillators"), ("v1", "harmonics"), ("v2", "oscillators"), ("v3", "harmonics"), ("v4", "oscillators")],
)
def test_the_least_memory_grows_with_a_bank_as_its_weights_do(arch: str, size: str) -> None:
    def both(value: int) -> tuple[int, int]:
        config = changed(changed(TrainConfig(batch_size=0), "arch", arch), size, value)
        with torch.device("meta"):
            return least_memory(config, 96), sum(p.numel() for p in build_model(config, 96).parameters())

    (memory, weights), (more_memory, more_weights) = both(104), both(208)
    assert more_memory - memory == 16 * (more_weights - weights)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_parameters_are_counted_exactly(arch: str, layers: int) -> None:
    architecture = ModelConfig(arch=arch, dim=12, heads=2, layers=layers, oscillators=8, harmonics=3).architecture()
    assert architecture.parameters(11, 16) == sum(p.numel() for p in architecture.build(11, 16).parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architectures_fields_are_options(arch: str) -> None:
    config = ModelConfig(arch=arch, dim=12, layers=3, oscillators=8, harmonics=5, dropout=0.25, tied=False)
    taken = dataclasses.asdict(config.architecture())
    assert taken.items() <= dataclasses.asdict(config).items()
    assert ("oscillators" in taken) == arch.startswith("v")
    assert "dim" in taken


def test_an_unknown_architecture_is_named() -> None:
    config = TrainConfig(model=ModelConfig(arch="v9"))
    known = ", ".join(ARCHITECTURES)
    for call in (lambda: check(config), lambda: build_model(config, 96), lambda: least_memory(config, 96)):
        with pytest.raises(UsageError, match=f"^--arch must be one of {known}, got v9$"):
            call()


@dataclasses.dataclass(frozen=True)
class Even(Architecture):
    """A generation with a bound of its own."""

    dim: Annotated[int, Bound("even", lambda value: value % 2 == 0)]

    def build(self, vocabulary_size: int, context: int) -> KSSMv1:
        return KSSMv1(vocabulary_size, self.dim)

    def activations(self) -> int:
        return self.dim


def test_a_generation_is_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "even", Even)
    config = TrainConfig(context=4, batch_size=1, model=ModelConfig(arch="even", dim=8))
    check(config)
    weights = sum(p.numel() for p in build_model(config, 11).parameters())
    assert least_memory(config, 11) == 16 * weights + 4 * 4 * (2 * 11 + 8)
    check(changed(TrainConfig(), "dim", 7))
    with pytest.raises(UsageError, match=r"^--dim must be even, got 7$"):
        check(changed(config, "dim", 7))


# A config.json as it was written before each architecture had a configuration of its own.
OLD = """{
 "preset": "v2",
 "data": [
  "text/a.txt",
  "text/b"
 ],
 "out": "runs/v2",
 "resume": false,
 "tokens": "char",
 "context": 16,
 "max_steps": 2,
 "batch_size": 4,
 "accumulate": 1,
 "seed": 3,
 "device": "cpu",
 "eval_every": 4,
 "eval_tokens": 64,
 "sample_tokens": 20,
 "log_every": 1,
 "model": {
  "arch": "v2",
  "dim": 16,
  "layers": 2,
  "oscillators": 8,
  "harmonics": 3,
  "dropout": 0.1,
  "tied": false
 },
 "optimizer": {
  "lr": 0.001,
  "lr_floor": 0.1,
  "warmup_steps": 2,
  "weight_decay": 0.1,
  "beta1": 0.9,
  "beta2": 0.99,
  "clip": 1.0,
  "lambda_reg": 0.01
 }
}"""


def known_to(old: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """What is written without the options that came later, in the order written."""
    kept = {k: v for k, v in written.items() if k in old}
    return {k: known_to(old[k], v) if isinstance(v, dict) else v for k, v in kept.items()}


def test_an_old_config_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(OLD)
    config = load_config(tmp_path)
    assert config == TrainConfig(
        preset="v2",
        data=(Path("text/a.txt"), Path("text/b")),
        out=tmp_path,
        context=16,
        max_steps=2,
        batch_size=4,
        seed=3,
        device="cpu",
        eval_every=4,
        eval_tokens=64,
        sample_tokens=20,
        log_every=1,
        model=ModelConfig(arch="v2", dim=16, layers=2, oscillators=8, harmonics=3, dropout=0.1, tied=False),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, weight_decay=0.1),
    )
    check(config)
    save_config(config)
    text = (tmp_path / "config.json").read_text()
    written = json.loads(text)
    assert text == json.dumps(written, indent=1)
    assert json.dumps(known_to(json.loads(OLD), written), indent=1) == OLD.replace(
        '"runs/v2"', json.dumps(str(tmp_path))
    )


def test_a_run_with_an_old_config_goes_on(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the trainer needs the train extra")
    run = tmp_path / "run"
    options = "--preset v2 --layers 2 --seed 3 --max-steps 2"
    assert train(text, run, *options.split()) == 0
    old = OLD.replace('"text/a.txt",\n  "text/b"', json.dumps(str(text)))
    (run / "config.json").write_text(old)
    assert kssm("train", "--out", run, "--resume", "--max-steps", 3) == 0
    written = known_to(json.loads(old), json.loads((run / "config.json").read_text()))
    assert written == json.loads(old) | {"out": str(run), "max_steps": 3}
    assert kssm("sample", run, "--prompt", "lock", "--tokens", 3, "--device", "cpu") == 0

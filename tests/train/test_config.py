"""The checks of a run's options: the bounds themselves pass, what lies beyond is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kssm.options import UsageError
from kssm.train.checkpoint import build_model
from kssm.train.config import ModelConfig, OptimizerConfig, TrainConfig, check, check_same_run, least_memory

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
    for value in inside:
        check(changed(TrainConfig(), name, value))
    for value in outside:
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be .*got {value}"):
            check(changed(TrainConfig(), name, value))


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
    ("arch", "size"), [("v1", "oscillators"), ("v1", "harmonics"), ("v2", "oscillators"), ("v3", "harmonics")]
)
def test_the_least_memory_grows_with_a_bank_as_its_weights_do(arch: str, size: str) -> None:
    def both(value: int) -> tuple[int, int]:
        config = changed(changed(TrainConfig(batch_size=0), "arch", arch), size, value)
        with torch.device("meta"):
            return least_memory(config, 96), sum(p.numel() for p in build_model(config, 96).parameters())

    (memory, weights), (more_memory, more_weights) = both(100), both(200)
    assert 0.95 <= (more_memory - memory) / (16 * (more_weights - weights)) <= 1

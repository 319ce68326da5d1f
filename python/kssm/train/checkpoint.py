"""A run on disk: its configuration, its checkpoint, and the model they describe."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kssm.data import Dataset, Vocabulary
from kssm.models import LanguageModel
from kssm.options import UsageError
from kssm.train.config import TrainConfig

__all__ = ["build_model", "load_checkpoint", "load_config", "load_run", "save_checkpoint"]

CONFIG, CHECKPOINT = "config.json", "checkpoint.pt"


def build_model(config: TrainConfig, vocabulary_size: int) -> LanguageModel:
    """The model of a configuration, freshly initialised, with as many positions as ``config.context``."""
    return config.model.architecture().build(vocabulary_size, config.context)


def save_config(config: TrainConfig) -> None:
    text = json.dumps(config.to_dict() | {"resume": False}, indent=1)
    _replace(config.out / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load_config(run: Path) -> TrainConfig:
    """The configuration in a run's folder, whatever the folder is called now; raises UsageError if there is none."""
    try:
        values = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        return TrainConfig.from_dict(values | {"out": str(run)})
    except FileNotFoundError as error:
        raise UsageError(f"{run} holds no run: there is no {CONFIG} in it") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{run / CONFIG} cannot be read: {error}") from error


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint beside the old one, then take its place: a crash leaves one of the two whole."""
    _replace(run / CHECKPOINT, lambda path: torch.save(state, path))


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The checkpoint's tensors, on the CPU, and numbers; raises UsageError if it is missing or broken."""
    path = run / CHECKPOINT
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{run} holds no {CHECKPOINT}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def load_run(run: Path, device: torch.device) -> tuple[LanguageModel, Vocabulary]:
    """The trained model of a run, in evaluation mode, and its vocabulary; raises UsageError if there is none."""
    config = load_config(run)
    vocabulary = Dataset(run).vocabulary
    state = load_checkpoint(run)
    model = build_model(config, len(vocabulary))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), vocabulary


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".new")
    write(temporary)
    os.replace(temporary, path)

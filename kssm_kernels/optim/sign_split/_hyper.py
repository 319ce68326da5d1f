"""Hyper-parameters of a group: defaults per mode, checks, and their form for one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NAME = "SignSplitEMA"
MODES = ("paper", "normalized", "consolidate")  # in the order of SignSplitMode in csrc/math/sign_split.h
BETA = {"paper": 0.99, "normalized": 0.9, "consolidate": 0.99}
KAPPA = {"paper": 1.0, "normalized": 1.0, "consolidate": 30.0}
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
LR_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARAM_ROUNDING = ("nearest", "stochastic", "kahan")
STATE_ROUNDING = ("nearest", "stochastic")
OPTIONS = (
    "lr", "mode", "beta", "kappa", "eps", "weight_decay", "lazy", "temperature", "maximize", "state_dtype", "foreach",
    "fused", "cryo", "param_rounding", "state_rounding", "seed",
)  # fmt: skip
# Those that tell its groups from other optimizers'.
OWN = {"mode", "beta", "kappa", "lazy", "temperature", "state_dtype", "cryo", "param_rounding", "state_rounding"}


class Hyper(NamedTuple):
    """What one step of a group does, as the implementations take it.

    ``lr``, ``grad_scale`` and ``found_inf`` may be tensors; a kernel on a device reads them there.
    """

    lr: float | Tensor
    mode: int
    beta: float
    kappa: float
    eps: float
    weight_decay: float
    lazy: bool
    maximize: bool
    cryo: float
    temperature: tuple[float, float, float] | None  # floor, cool, heat
    param_rounding: str
    state_rounding: str
    seed: int
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def hyper_of(group: Mapping[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> Hyper:
    heat, lr = group["temperature"], group["lr"]
    if isinstance(lr, Tensor):
        _check_lr(lr)
    return Hyper(
        lr.resolve_neg() if isinstance(lr, Tensor) else float(lr),
        MODES.index(group["mode"]),
        float(group["beta"]),
        float(group["kappa"]),
        float(group["eps"]),
        float(group["weight_decay"]),
        group["lazy"],
        group["maximize"],
        float(group["cryo"]),
        None if heat is None else (heat["floor"], heat["cool"], heat["heat"]),
        group["param_rounding"],
        group["state_rounding"],
        int(group["seed"]),
        grad_scale,
        found_inf,
    )


def calibrated_heat(cool: float, beta: float) -> float:
    """The heat at which T settles at 1/2 where r is at its noise floor, E|r| = sqrt((1-b)/(1+b)).

    >>> round(calibrated_heat(0.99, 0.9), 4)
    0.0436
    """
    return (1.0 - cool) / math.sqrt((1.0 - beta) / (1.0 + beta))


def plain(value: Any) -> Any:
    """numpy's numbers, which a scheduler's arithmetic may leave, as Python's."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _one_of(name: str, value: object, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{NAME}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _number(name: str, value: object, low: float, high: float, *, open_above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{NAME}: {name} must be a number, got {type(value).__name__}")
    if not (low <= value < high if open_above else low <= value <= high):
        raise ValueError(f"{NAME}: {name} must be in [{low}, {high}{')' if open_above else ']'}, got {value}")


def _check_lr(lr: object) -> None:
    if not isinstance(lr, Tensor):
        _number("lr", lr, 0.0, math.inf, open_above=True)
    elif lr.numel() != 1 or lr.dtype not in LR_DTYPES:
        raise ValueError(f"{NAME}: a tensor lr must hold one floating-point number, got {lr.dtype} {tuple(lr.shape)}")


def _resolved_temperature(given: object, beta: float) -> dict[str, float] | None:
    if given is None or given is False:
        return None
    if given is not True and not isinstance(given, Mapping):
        raise TypeError(f"{NAME}: temperature must be None, True or a mapping, got {type(given).__name__}")
    chosen = {} if given is True else {name: plain(value) for name, value in given.items()}
    unknown = sorted(set(chosen) - {"floor", "cool", "heat"})
    if unknown:
        raise ValueError(f"{NAME}: temperature has floor, cool and heat, got {', '.join(map(repr, unknown))}")
    floor, cool = chosen.get("floor", 1.0), chosen.get("cool", 0.99)
    _number("temperature floor", floor, 0.0, 1.0)
    _number("temperature cool", cool, 0.0, 1.0)
    heat = chosen.get("heat")
    heat = calibrated_heat(cool, beta) if heat is None else heat
    _number("temperature heat", heat, 0.0, math.inf, open_above=True)
    return {"floor": float(floor), "cool": float(cool), "heat": float(heat)}


def resolve(group: dict[str, Any]) -> None:
    """Puts the mode's defaults where the group has None, and raises for what no step could use."""
    group.update((name, plain(group[name])) for name in OPTIONS)
    _one_of("mode", group["mode"], MODES)
    for name, defaults in (("beta", BETA), ("kappa", KAPPA)):
        if group[name] is None:
            group[name] = defaults[group["mode"]]
    _check_lr(group["lr"])
    _number("beta", group["beta"], 0.0, 1.0, open_above=True)
    for name in ("kappa", "eps", "weight_decay"):
        _number(name, group[name], 0.0, math.inf, open_above=True)
    _number("cryo", group["cryo"], 1.0, math.inf, open_above=True)
    _one_of("state_dtype", group["state_dtype"], STATE_DTYPES)
    _one_of("param_rounding", group["param_rounding"], PARAM_ROUNDING)
    _one_of("state_rounding", group["state_rounding"], STATE_ROUNDING)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{NAME}: seed must be an int from 0 to 2^64 - 1, got {seed!r}")
    if group["fused"] and group["foreach"]:
        raise ValueError(f"{NAME}: at most one of foreach and fused can be True, got both")
    group["temperature"] = _resolved_temperature(group["temperature"], group["beta"])

"""The optimizers that are compared, each with the grid its options are tuned over; those that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.optim import SignSplitEMA

Options = dict[str, float]
Params = Iterable[Tensor]


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of an interpolated momentum."""

    def __init__(self, params: Params, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.add_(torch.lerp(p.grad, mean, fast).sign_(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - slow)


class Symmetric(torch.optim.Optimizer):
    """The control of consolidate: u = g / (1 + kappa S / rms(S)), S the EMA of |g|. It knows no signs."""

    def __init__(self, params: Params, lr: float, kappa: float = 30.0, beta: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "kappa": kappa, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p].setdefault("size", torch.zeros_like(p))
                s.lerp_(p.grad.abs(), 1 - group["beta"])
                rms = s.square().mean().sqrt().clamp_min(1e-12)
                p.addcdiv_(p.grad, 1 + group["kappa"] * s / rms, value=-group["lr"])


class OnlineEWC(torch.optim.SGD):
    """SGD on loss + strength / 2 sum F (p - anchor)^2; F <- decay F + Fisher of the task that has ended.

    The penalty's part of the step is implicit, so that no strength makes it diverge.
    """

    def __init__(self, params: Params, lr: float, strength: float, decay: float = 0.9) -> None:
        super().__init__(params, lr=lr)
        self.strength, self.decay = strength, decay

    @torch.no_grad()
    def end_task(self, fishers: Iterable[Tensor]) -> None:
        for p, fisher in zip(self.param_groups[0]["params"], fishers, strict=True):
            old = self.state[p].get("fisher")
            self.state[p]["fisher"] = fisher if old is None else self.decay * old + fisher
            self.state[p]["anchor"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        for p in self.param_groups[0]["params"]:
            if "fisher" in self.state[p]:
                pull = self.param_groups[0]["lr"] * self.strength * self.state[p]["fisher"]
                p.add_(pull * self.state[p]["anchor"]).div_(1 + pull)


@dataclass(frozen=True)
class Recipe:
    name: str
    make: Callable[..., torch.optim.Optimizer]
    grid: tuple[Options, ...]


def _lr(*values: float, **others: tuple[float, ...]) -> tuple[Options, ...]:
    grid: list[Options] = [{"lr": value} for value in values]
    for name, choices in others.items():
        grid = [{**options, name: choice} for options in grid for choice in choices]
    return tuple(grid)


def _sign_split(mode: str, beta: float | None = None) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **options: SignSplitEMA(params, mode=mode, beta=beta, **options)


def _momentum(params: Params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _adamw(params: Params, lr: float, beta: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(beta, 0.999), weight_decay=0.0)


ADAPTIVE = (0.0003, 0.001, 0.002, 0.005, 0.01, 0.02)
PLAIN = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0)
SINGLE = (
    Recipe("SGD", torch.optim.SGD, _lr(*PLAIN)),
    Recipe("SGD, momentum 0.9", _momentum, _lr(0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    Recipe("AdamW", _adamw, _lr(*ADAPTIVE)),
    Recipe("AdamW, first beta 0.8", partial(_adamw, beta=0.8), _lr(*ADAPTIVE)),
    Recipe("Lion", Lion, _lr(0.0001, 0.0003, 0.001, 0.002, 0.005)),
    Recipe("SignSplitEMA normalized", _sign_split("normalized"), _lr(*ADAPTIVE)),
    Recipe("SignSplitEMA normalized, beta 0.8", _sign_split("normalized", beta=0.8), _lr(*ADAPTIVE)),
    Recipe("SignSplitEMA paper", _sign_split("paper"), _lr(*PLAIN)),
    Recipe("SignSplitEMA consolidate", _sign_split("consolidate"), _lr(0.2, 0.5, 1.0, 2.0, 5.0, 10.0)),
)
_SLOW = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_SLOW_ADAPTIVE = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)
_RESISTED = _lr(0.3, 1.0, 3.0, 10.0, 30.0, kappa=(10.0, 30.0, 100.0, 300.0))
CONTINUAL = (
    Recipe("SGD", torch.optim.SGD, _lr(*_SLOW)),
    Recipe("SGD, momentum 0.9", _momentum, _lr(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
    Recipe("AdamW", _adamw, _lr(*_SLOW_ADAPTIVE)),
    Recipe("Lion", Lion, _lr(0.00001, *_SLOW_ADAPTIVE[:-1])),
    Recipe("Adagrad", torch.optim.Adagrad, _lr(0.001, 0.003, 0.01, 0.03, 0.1)),
    Recipe("online EWC on SGD", OnlineEWC, _lr(0.03, 0.1, 0.3, 1.0, strength=(3.0, 30.0, 300.0, 3000.0))),
    Recipe("SignSplitEMA normalized", _sign_split("normalized"), _lr(*_SLOW_ADAPTIVE)),
    Recipe("SignSplitEMA paper", _sign_split("paper"), _lr(*_SLOW)),
    Recipe("SignSplitEMA consolidate", _sign_split("consolidate"), _RESISTED),
    Recipe("symmetric control", Symmetric, _RESISTED),
)
# Where tasks share their outputs the best learning rates are lower.
_LOW = {
    "SGD": _lr(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "SGD, momentum 0.9": _lr(0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01),
    "AdamW": _lr(0.000003, 0.00001, 0.00003, 0.0001, 0.0003, 0.001),
    "Lion": _lr(0.000003, 0.00001, 0.00003, 0.0001, 0.0003, 0.001),
    "Adagrad": _lr(0.0001, 0.0003, 0.001, 0.003, 0.01),
    "online EWC on SGD": _lr(0.003, 0.01, 0.03, 0.1, strength=(30.0, 300.0, 3000.0, 30000.0)),
    "SignSplitEMA normalized": _lr(0.00001, 0.00003, 0.0001, 0.0003, 0.001),
    "SignSplitEMA paper": _lr(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "SignSplitEMA consolidate": _lr(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, kappa=(10.0, 30.0, 100.0)),
    "symmetric control": _lr(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, kappa=(10.0, 30.0, 100.0)),
}
SHARED = tuple(replace(recipe, grid=_LOW[recipe.name]) for recipe in CONTINUAL)

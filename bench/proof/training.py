"""Training, evaluation, and tuning on seeds and data that the tables do not use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.proof.optimizers import Options, Recipe
from bench.proof.tasks import Part

TUNING_SEED = 1000
Schedule = Callable[[int, int], float]


class Effort(NamedTuple):
    """How much is run: seeds of the tables and of the tuning, a factor on the steps, points of a grid (0: all)."""

    seeds: int | None = None
    quick: bool = False

    def several(self, usual: int) -> range:
        return range(1 if self.quick else self.seeds or usual)

    def tuning(self, usual: int) -> range:
        return range(TUNING_SEED, TUNING_SEED + (1 if self.quick else usual))

    def steps(self, usual: int) -> int:
        return 3 if self.quick else usual

    def grid(self, recipe: Recipe) -> tuple[Options, ...]:
        return recipe.grid[:1] if self.quick else recipe.grid


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[Part],
    steps: int,
    *,
    mask: Tensor | None = None,
    gradient_scale: float = 1.0,
    schedule: Schedule | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """``mask`` is added to the logits, ``gradient_scale`` multiplies the gradients, ``after`` sees each step."""
    params = list(model.parameters())
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        if schedule is not None:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step, steps)
        x, y = next(data)
        logits = model(x)
        loss = loss_of(logits if mask is None else logits + mask, y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if gradient_scale != 1.0:
            for p in params:
                assert p.grad is not None
                p.grad.mul_(gradient_scale)
        optimizer.step()
        if after is not None:
            after(step)


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, mask: Tensor | None = None) -> tuple[float, float]:
    """Loss and accuracy in percent; an infinite loss where training has diverged."""
    logits = model(part.x)
    if mask is not None:
        logits = logits + mask
    loss = float(loss_of(logits, part.y))
    right = float((logits.argmax(-1) == part.y).float().mean()) * 100
    return (loss if math.isfinite(loss) else math.inf), right


class Tuned(NamedTuple):
    options: Options
    at_edge: bool  # the best lr is the smallest or the largest of its grid


def tune(effort: Effort, recipe: Recipe, seeds: range, cost: Callable[[Options, int], float]) -> Tuned:
    """The options with the least mean cost over the seeds for tuning."""
    grid = effort.grid(recipe)
    costs = [sum(cost(options, seed) for seed in seeds) / len(seeds) for options in grid]
    best = grid[costs.index(min(costs))]
    rates = sorted({options["lr"] for options in recipe.grid})
    return Tuned(best, best["lr"] in (rates[0], rates[-1]))

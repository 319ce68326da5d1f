"""Five tasks one after the other: two classes of digits each, or all digits with their pixels permuted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.proof import tasks
from bench.proof.optimizers import CONTINUAL, SHARED, OnlineEWC, Options, Recipe
from bench.proof.tasks import Part, Parts
from bench.proof.training import Effort, evaluate, loss_of, train, tune

TASKS, STEPS = 5, 200


class Task(NamedTuple):
    parts: Parts
    mask: Tensor | None  # added to the logits


def split_heads(parts: Parts, seed: int) -> list[Task]:
    """Two classes each, in an order of the seed's, each class an output of its own: the others' logits are masked."""
    found = []
    for pair in _pairs(seed):
        mask = torch.full((10,), -1e9)
        mask[pair] = 0.0
        found.append(Task(Parts(*(_only(part, pair) for part in parts)), mask))
    return found


def split(parts: Parts, seed: int) -> list[Task]:
    """The same tasks on two outputs that all of them share: is it the first class of the pair or the second?"""
    mask = torch.full((10,), -1e9)
    mask[:2] = 0.0
    found = []
    for pair in _pairs(seed):
        chosen = (_only(part, pair) for part in parts)
        found.append(Task(Parts(*(Part(part.x, (part.y == pair[1]).long()) for part in chosen)), mask))
    return found


def _pairs(seed: int) -> Tensor:
    return torch.randperm(10, generator=torch.Generator().manual_seed(seed)).view(TASKS, 2)


def _only(part: Part, pair: Tensor) -> Part:
    rows = torch.isin(part.y, pair)
    return Part(part.x[rows], part.y[rows])


def permuted(parts: Parts, seed: int) -> list[Task]:
    """All ten classes, the pixels in an order of each task's."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=generator) for _ in range(TASKS)]
    return [Task(Parts(*(Part(p.x[:, order], p.y) for p in parts)), None) for order in orders]


def fishers(model: nn.Module, task: Task) -> list[Tensor]:
    """Mean squared gradient of each image's loss: the empirical Fisher information's diagonal."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, params, (x[None],))
        return loss_of(logits if task.mask is None else logits + task.mask, y[None])

    part = task.parts.train
    each = vmap(grad(loss), (None, 0, 0))(params, part.x[:200], part.y[:200])
    return [g.square().mean(0) for g in each.values()]


class Outcome(NamedTuple):
    """Percent, on the validation images or on the test images: means over tasks."""

    final: float  # accuracy after the last task
    learned: float  # accuracy right after a task
    forgetting: float  # of all tasks but the last: best accuracy so far, less the accuracy after the last


def run(effort: Effort, sequence: list[Task], recipe: Recipe, options: Options, seed: int, test: bool) -> Outcome:
    model = tasks.mlp(seed)
    optimizer = recipe.make(model.parameters(), **options)
    table = []
    for number, task in enumerate(sequence):
        data = tasks.batches(task.parts.train, 100 * seed + number, 32)
        train(model, optimizer, data, effort.steps(STEPS), mask=task.mask)
        if isinstance(optimizer, OnlineEWC):
            optimizer.end_task(fishers(model, task))
        parts = [(t.parts.test if test else t.parts.validation, t.mask) for t in sequence]
        table.append([evaluate(model, part, mask)[1] for part, mask in parts])
    accuracy = torch.tensor(table)  # [after task, on task]
    best = torch.stack([accuracy[i:, i].max() for i in range(TASKS - 1)])
    forgotten = (best - accuracy[-1, :-1]).mean()
    return Outcome(float(accuracy[-1].mean()), float(accuracy.diagonal().mean()), float(forgotten))


def _experiment(effort: Effort, make: Any, recipes: tuple[Recipe, ...] = CONTINUAL) -> dict[str, Any]:
    parts, rows = tasks.digits(), []
    for recipe in recipes:

        def cost(options: Options, seed: int, recipe: Recipe = recipe) -> float:
            return -run(effort, make(parts, seed), recipe, options, seed, test=False).final

        tuned = tune(effort, recipe, effort.tuning(3), cost)
        got = [run(effort, make(parts, s), recipe, tuned.options, s, test=True) for s in effort.several(10)]
        final, learned, forgetting = zip(*got, strict=True)
        row = {"name": recipe.name, "options": tuned.options, "at_edge": tuned.at_edge, "grid": recipe.grid}
        rows.append({**row, "final": final, "learned": learned, "forgetting": forgetting})
    return {"rows": rows, "steps": effort.steps(STEPS)}


def split_digits(effort: Effort, text: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    return _experiment(effort, split, SHARED)


def split_digits_heads(effort: Effort, text: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    return _experiment(effort, split_heads)


def permuted_digits(effort: Effort, text: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    return _experiment(effort, permuted)

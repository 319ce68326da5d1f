"""One task: digits and characters; dtypes of the states; gradients of other scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bench.proof import tasks
from bench.proof.optimizers import SINGLE, Options, Recipe
from bench.proof.training import Effort, evaluate, train, tune
from kssm_kernels.optim import SignSplitEMA

Result = dict[str, Any]
DIGITS_STEPS, LM_STEPS = 600, 500
NORMALIZED = "SignSplitEMA normalized"
SCALES = (1e-4, 1.0, 1e4)
STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float32", {}),
    ("bfloat16, nearest", {"state_dtype": torch.bfloat16}),
    ("bfloat16, stochastic", {"state_dtype": torch.bfloat16, "state_rounding": "stochastic"}),
    ("8 bits, nearest", {"state_dtype": torch.uint8}),
    ("8 bits, stochastic", {"state_dtype": torch.uint8, "state_rounding": "stochastic"}),
)


def _digits_run(effort: Effort, parts: tasks.Parts, recipe: Recipe, options: Options, seed: int, **how: Any) -> Any:
    model = tasks.mlp(seed)
    optimizer = recipe.make(model.parameters(), **options)
    train(model, optimizer, tasks.batches(parts.train, seed), effort.steps(DIGITS_STEPS), **how)
    return model


def digits(effort: Effort, text: Path | None, earlier: Result) -> Result:
    """Loss and accuracy on the test images, each optimizer with the lr that was best on the validation images."""
    parts, rows = tasks.digits(), []
    for recipe in SINGLE:

        def cost(options: Options, seed: int, recipe: Recipe = recipe) -> float:
            return evaluate(_digits_run(effort, parts, recipe, options, seed), parts.validation)[0]

        tuned = tune(effort, recipe, effort.tuning(2), cost)
        models = [_digits_run(effort, parts, recipe, tuned.options, seed) for seed in effort.several(5)]
        loss, accuracy = zip(*(evaluate(model, parts.test) for model in models), strict=True)
        rows.append(_row(recipe, tuned, loss=loss, accuracy=accuracy))
    return {"rows": rows, "steps": effort.steps(DIGITS_STEPS)}


def _row(recipe: Recipe, tuned: Any, **values: Any) -> Result:
    return {"name": recipe.name, "options": tuned.options, "at_edge": tuned.at_edge, "grid": recipe.grid, **values}


def _lm_run(effort: Effort, parts: tasks.Parts, recipe: Recipe, options: dict[str, Any], seed: int) -> Any:
    model = tasks.language_model(seed)
    optimizer = recipe.make(model.parameters(), **options)
    train(model, optimizer, tasks.character_batches(parts.train, seed), effort.steps(LM_STEPS))
    return model


def lm(effort: Effort, text: Path | None, earlier: Result) -> Result:
    """Loss in nats per character on text not trained on."""
    parts, rows = tasks.characters(tasks.text(text)), []
    for recipe in SINGLE:

        def cost(options: Options, seed: int, recipe: Recipe = recipe) -> float:
            return evaluate(_lm_run(effort, parts, recipe, options, seed), parts.validation)[0]

        tuned = tune(effort, recipe, effort.tuning(2), cost)
        models = [_lm_run(effort, parts, recipe, tuned.options, seed) for seed in effort.several(5)]
        loss, accuracy = zip(*(evaluate(model, parts.test) for model in models), strict=True)
        rows.append(_row(recipe, tuned, loss=loss, accuracy=accuracy))
    return {
        "rows": rows,
        "steps": effort.steps(LM_STEPS),
        "text": "a file" if text else "Python's help topics (pydoc_data.topics)",
        "characters": len(tasks.text(text)),
        "parameters": sum(p.numel() for p in tasks.language_model(0).parameters()),
    }


def _tuned(earlier: Result, experiment: str) -> dict[str, Options]:
    if experiment not in earlier:
        raise SystemExit(f"its learning rates are those of {experiment!r}: run that first")
    return {row["name"]: row["options"] for row in earlier[experiment]["rows"]}


def states(effort: Effort, text: Path | None, earlier: Result) -> Result:
    """The character LM with the states of normalized (beta 0.9) in fewer bits."""
    options = _tuned(earlier, "lm")[NORMALIZED]
    parts, rows = tasks.characters(tasks.text(text)), []
    recipe = next(r for r in SINGLE if r.name == NORMALIZED)
    for name, more in STATES:
        how = dataclasses.replace(recipe, name=name)
        models = [_lm_run(effort, parts, how, {**options, **more}, seed) for seed in effort.several(5)]
        rows.append({"name": name, "bytes": _state_bytes(more), "loss": [evaluate(m, parts.test)[0] for m in models]})
    sizes = [p.numel() for p in tasks.language_model(0).parameters()]
    large = sum(n for n in sizes if n >= 4096)
    return {"rows": rows, "options": options, "large": large, "parameters": sum(sizes)}


def _state_bytes(how: dict[str, Any]) -> float:
    """Bytes of state per parameter, as they lie in memory after a step."""
    model = tasks.language_model(0)
    optimizer = SignSplitEMA(model.parameters(), **how)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held) / sum(p.numel() for p in model.parameters())


def scale(effort: Effort, text: Path | None, earlier: Result) -> Result:
    """Digits with gradients times 1e-4, 1 and 1e4, at the lr tuned for 1."""
    options = _tuned(earlier, "digits")
    parts, rows = tasks.digits(), []
    for recipe in SINGLE:
        losses = []
        for factor in SCALES:
            how = {"gradient_scale": factor}
            runs = [_digits_run(effort, parts, recipe, options[recipe.name], s, **how) for s in effort.several(5)]
            losses.append([evaluate(model, parts.test)[0] for model in runs])
        rows.append({"name": recipe.name, "losses": losses})
    return {"rows": rows, "scales": SCALES}

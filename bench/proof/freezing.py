"""Temperatures under pure noise, and when each test of the FreezeController fires on digits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bench.proof import tasks
from bench.proof.training import Effort, evaluate, train
from kssm_kernels.optim import FreezeController, SignSplitEMA

STEPS, PETALS = 1500, 8
TAU = 0.02  # nats: the controller's default for its KL tests
RATES = {"normalized": 0.002, "paper": 0.5}  # beta 0.9 and 0.99
TESTS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "temperature, at half": {"test": "temperature", "freeze_at": 0.5},
    "KL, all": {"test": "kl_all"},
    "KL, fraction": {"test": "kl_fraction"},
}


def _warm_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (steps / 3))


SCHEDULES = {
    "constant": lambda step, steps: 1.0,
    "cosine to 0": lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
    "warm-up over a third": _warm_up,
}


def noise_floor(effort: Effort, text: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    """Mean temperature and |r| of 20,000 weights whose gradients are independent Gaussian noise."""
    rows = []
    for beta in (0.8, 0.9, 0.99):
        heat, size, balanced = [], [], []
        for seed in effort.several(3):
            generator = torch.Generator().manual_seed(seed)
            p = torch.zeros(20_000)
            optimizer = SignSplitEMA([p], beta=beta, temperature=True)
            for _ in range(effort.steps(1500)):
                p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            state = optimizer.state[p]
            positive, negative = state["positive"], state["negative"]
            heat.append(float(state["temperature"].mean()))
            size.append(float(((positive - negative) / (positive + negative + 1e-12)).abs().mean()))
            share = positive / (positive + negative)
            kl = math.log(2) + torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)
            balanced.append(float((kl < TAU).float().mean()))
        floor = math.sqrt((1 - beta) / (1 + beta))
        rows.append({"beta": beta, "temperature": heat, "r": size, "floor": floor, "balanced": balanced})
    return {"rows": rows}


def _run(effort: Effort, parts: tasks.Parts, mode: str, schedule: str, test: str | None, seed: int) -> dict[str, Any]:
    """One training; without a test nothing freezes."""
    model = tasks.mlp(seed)
    optimizer = SignSplitEMA(model.parameters(), lr=RATES[mode], mode=mode, temperature=True)
    first: dict[str, Any] = {"step": None, "share": None, "loss": None}
    controller = None
    if test is not None:
        rows = 128 // PETALS
        petals: dict[str, Any] = {
            f"hidden {i}": [(name, slice(i * rows, (i + 1) * rows)) for name in ("0.weight", "0.bias")]
            for i in range(PETALS)
        }
        controller = FreezeController(
            optimizer, model.named_parameters(), {**petals, "read-out": ["2.*"]}, tau=TAU, **TESTS[test]
        )
    thaws = 0
    frozen: set[str] = set()

    def after(step: int) -> None:
        nonlocal thaws, frozen
        assert controller is not None
        controller.step()
        now = {name for name, petal in controller.petals.items() if petal.frozen}
        thaws += len(frozen - now)
        frozen = now
        if now and first["step"] is None:
            loss, accuracy = evaluate(model, parts.test)
            first.update(step=step + 1, loss=loss, accuracy=accuracy)

    watch = None if controller is None else after
    data = tasks.batches(parts.train, seed)
    train(model, optimizer, data, effort.steps(STEPS), schedule=SCHEDULES[schedule], after=watch)
    loss, accuracy = evaluate(model, parts.test)
    states = [optimizer.state[p] for p in model.parameters()]
    untouched = sum(int(((s["positive"] == 0) & (s["negative"] == 0)).sum()) for s in states)
    share = untouched / sum(p.numel() for p in model.parameters())
    run = {"first": first, "frozen": len(frozen), "thaws": thaws, "loss": loss, "accuracy": accuracy}
    return {**run, "untouched": share}


def freezing(effort: Effort, text: Path | None, earlier: dict[str, Any]) -> dict[str, Any]:
    parts, rows = tasks.digits(), []
    for mode in RATES:
        for schedule in SCHEDULES:
            for test in (None, *TESTS):
                runs = [_run(effort, parts, mode, schedule, test, seed) for seed in effort.several(5)]
                rows.append({"mode": mode, "schedule": schedule, "test": test, "runs": runs})
    return {"rows": rows, "steps": effort.steps(STEPS), "petals": PETALS + 1}

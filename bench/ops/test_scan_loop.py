"""The closed loop of the oscillator scan, and a model on it: 64 communities, heads of eight oscillators, float32.

Beside the op the same equations as a loop of torch over time, and a GRU of width 272, whose step has 1.3 times as many
products: its projections are among them, those of the scan's inputs are not. Beside a training step of K-SSM v4 that of
the GRU model of nearly its size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kssm.models import LanguageModel
from kssm.train.config import PRESETS, ModelConfig
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn import functional

import kssm_kernels
from bench.compare import check, compare
from bench.interleave import SMOKE, THREADS, Call
from bench.scan import DIRECTIONS, Scan, name_of
from tests.support.oscillator_scan import KINDS

LOOP, GRU = "torch loop, complex", "torch.nn.GRU"
TARGETS = {LOOP: 10.0, GRU: 1.0}
SIZE, COMMUNITIES, GRU_WIDTH = ((2, 5, 16), 3, 17) if SMOKE else ((12, 64, 256), 64, 272)
SECONDS = 0.1 if SMOKE else 4.0  # of a case
VOCABULARY = 65

kinds = pytest.mark.parametrize("kind", KINDS)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
numbers_of_threads = pytest.mark.parametrize("threads", [THREADS, 1])


def gru_call(direction: str) -> Call:
    rows, steps, _ = SIZE
    gru = nn.GRU(GRU_WIDTH, GRU_WIDTH, batch_first=True)
    x, grad = torch.randn(rows, steps, GRU_WIDTH, requires_grad=True), torch.randn(rows, steps, GRU_WIDTH)
    if direction == "forward":
        return torch.no_grad()(partial(gru, x))
    return lambda: torch.autograd.grad(gru(x)[0], [x, *gru.parameters()], grad)


@numbers_of_threads
@directions
@kinds
def test_closed_loop(benchmark: BenchmarkFixture, kind: str, direction: str, threads: int) -> None:
    torch.set_num_threads(threads)
    scan = Scan(kind, SIZE, False, COMMUNITIES)
    scan.check()
    loop = scan.call(scan.loop, direction, [torch.complex(*scan.grads)])
    others = {LOOP: loop, f"{GRU}, width {GRU_WIDTH}": gru_call(direction)}
    targets = {name: TARGETS[name.partition(", width")[0]] for name in others}
    compare(
        benchmark, name_of(f"{scan.case}, {direction}", threads), scan.our_call(direction), others, targets, SECONDS
    )


# ---- a model ----


def model_of(arch: str) -> LanguageModel:
    preset = PRESETS["v4-100k" if SMOKE else "v4-1m"]
    options = preset.model if arch == "v4" else ModelConfig(arch=arch, dim=9 if SMOKE else 256)
    return options.architecture().build(VOCABULARY, preset.context)


def training_step(model: LanguageModel, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def gradients_of(model: LanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@numbers_of_threads
def test_training_step(benchmark: BenchmarkFixture, threads: int) -> None:
    """The time of 768 tokens: 1000 * 768 / ms tokens a second."""
    torch.set_num_threads(threads)
    ours, gru = model_of("v4"), model_of("gru")
    tokens = torch.randint(0, VOCABULARY, (SIZE[0], SIZE[1] + 1))
    wide = model_of("v4").double()
    wide.load_state_dict(ours.state_dict())
    part = tokens[:2, :17]
    found = gradients_of(ours, part)
    with kssm_kernels.use_backend("torch"):
        framework, truth = gradients_of(ours, part), gradients_of(wide, part)
    check("training step", found, framework, truth)
    compare(
        benchmark,
        name_of(f"training step of K-SSM v4, 0.81M parameters, B={SIZE[0]} T={SIZE[1]}", threads),
        training_step(ours, tokens),
        {"GRU model, 0.82M parameters": training_step(gru, tokens)},
        {},
        SECONDS,
    )

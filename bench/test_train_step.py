"""One training step of K-SSM v3: width 384, 6 layers, 192 oscillators, 32 harmonics, batch 4, length 512.

The vocabulary has 256 tokens. A step is forward, cross entropy plus regularisation, backward and AdamW. Beside it: the
same model with the original banks, and with the banks taken out, which bounds the ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kssm import KSSMv3
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from bench.baselines import NoBank, philox_draw, with_banks
from bench.compare import BANK_SLACK, check, compare
from bench.interleave import SMOKE, Call
from tests.support.naive import OriginalBank

VOCABULARY, OSCILLATORS, HARMONICS = 256, 192, 32
REGULARISATION = 0.01  # the trainer's default weight
WIDTH, LAYERS, BATCH, LENGTH = (64, 2, 1, 16) if SMOKE else (384, 6, 4, 512)


def loss_of(model: KSSMv3, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    # not model.regularization_loss(): that asks FusedKuramoto banks only
    regularisation = torch.stack([block.oscillators.get_regularization_loss() for block in model.blocks]).mean()
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + REGULARISATION * regularisation


def training_step(model: KSSMv3, tokens: Tensor) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()

    return step


def gradients_of(model: KSSMv3, tokens: Tensor) -> tuple[Tensor, ...]:
    """Loss and its gradient for every parameter, with the noise of seed 0."""
    torch.manual_seed(0)
    loss = loss_of(model, tokens)
    return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))


def original_bank(draw: Callable[[Tensor], Tensor] = torch.randn_like) -> OriginalBank:
    bank = OriginalBank(WIDTH, OSCILLATORS, n_harmonics=HARMONICS)
    bank.draw = draw
    return bank


def test_train_step(benchmark: BenchmarkFixture) -> None:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    ours = KSSMv3(VOCABULARY, WIDTH, LAYERS, OSCILLATORS, HARMONICS)
    original = with_banks(ours, original_bank)
    bare = with_banks(ours, NoBank)
    same_noise = with_banks(ours, lambda: original_bank(philox_draw))
    part = tokens[:1, :65]
    check(
        "training step",
        gradients_of(ours, part),
        gradients_of(same_noise, part),
        gradients_of(same_noise.double(), part),
        BANK_SLACK,
    )

    baselines = {
        "original banks": training_step(original, tokens),
        "banks taken out": training_step(bare, tokens),
    }
    case = f"K-SSM v3 training step, width {WIDTH}, {LAYERS} layers"
    compare(benchmark, case, training_step(ours, tokens), baselines, {"original banks": 3.5})

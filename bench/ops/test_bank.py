"""FusedKuramoto forward plus backward at width 384, batch 4, length 512, in training mode, with its noise.

Beside it: the original bank's formula in eager, and the bank's two linear layers alone. Both banks contain those and no
kernel here touches them, so they bound the ratio.
"""

from __future__ import annotations

import copy

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.baselines import philox_draw
from bench.compare import BANK_SLACK, check, compare, forward_backward
from bench.interleave import SMOKE, Call
from kssm_kernels import FusedKuramoto
from tests.support.naive import OriginalBank

WIDTH, OSCILLATORS, HARMONICS = 384, 192, 32
BATCH, LENGTH = (1, 16) if SMOKE else (4, 512)


def gradients_of(bank: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of the input and of every parameter, with the noise of seed 0."""
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    out = bank(x)[0]
    return (out.detach(), *torch.autograd.grad(out, [x, *bank.parameters()], grad))


def linear_layers(bank: FusedKuramoto, x: Tensor, grad: Tensor) -> Call:
    """Forward and backward of ``to_params`` and ``readout``, each on an input and a gradient of its own."""
    features = torch.randn(*x.shape[:-1], 3 * HARMONICS, requires_grad=True)
    inputs = [x, features, *bank.to_params.parameters(), *bank.readout.parameters()]
    params_grad = torch.randn(*x.shape[:-1], 10)
    return lambda: torch.autograd.grad((bank.to_params(x), bank.readout(features)), inputs, (params_grad, grad))


def test_bank(benchmark: BenchmarkFixture) -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    grad = torch.randn(BATCH, LENGTH, WIDTH)
    ours = FusedKuramoto(WIDTH, OSCILLATORS, n_harmonics=HARMONICS)
    original = OriginalBank(WIDTH, OSCILLATORS, n_harmonics=HARMONICS)
    original.load_state_dict(ours.state_dict())

    same_noise = copy.deepcopy(original)
    same_noise.draw = philox_draw
    check(
        "FusedKuramoto",
        gradients_of(ours, x, grad),
        gradients_of(same_noise, x, grad),
        gradients_of(same_noise.double(), x.double(), grad.double()),
        BANK_SLACK,
    )

    baselines = {
        "original bank": forward_backward(lambda x: original(x)[0], [x, *original.parameters()], grad),
        "its two linear layers alone": linear_layers(ours, x, grad),
    }
    fused = forward_backward(lambda x: ours(x)[0], [x, *ours.parameters()], grad)
    compare(benchmark, "FusedKuramoto forward and backward", fused, baselines, {"original bank": 25.0})

"""What the banks of a model are measured against, beside the formulas in tests/support/naive.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from kssm_kernels import philox_normal

Model = TypeVar("Model", bound=nn.Module)


def philox_draw(theta: Tensor) -> Tensor:
    """The noise that the fused bank draws from the same state of torch's generator, so that the two can be compared."""
    seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
    n = theta.shape[-1]
    return philox_normal(theta.numel() // n, n, seed=seed).to(theta.dtype).view_as(theta)


class NoBank(nn.Module):
    """A bank that costs nothing: what is left of a model bounds any speed-up of its banks."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return x, x.new_zeros(()), None

    def get_regularization_loss(self) -> Tensor:
        return torch.zeros(())


def with_banks(model: Model, bank: Callable[[], nn.Module]) -> Model:
    """A copy of a KSSMv3 with other banks, which get the model's parameters if they have any."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        other = bank()
        if not isinstance(other, NoBank):
            other.load_state_dict(block.oscillators.state_dict())
        block.oscillators = other
    return model

"""K-SSM v3: stacked bistable banks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kssm.models.base import Harmonics, check_sizes
from kssm.models.stacked import Block, StackedConfig, StackedLM
from kssm_kernels import FusedKuramoto

__all__ = ["KSSMv3", "V3Config"]


class _BlockV3(Block):
    """``h + bank(norm1(h))``, then ``h + ffn(norm2(h))``."""

    def __init__(self, hidden_dim: int, oscillators: FusedKuramoto) -> None:
        ffn = nn.Sequential(nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim))
        super().__init__(hidden_dim, oscillators, ffn)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        out, r, _ = self.oscillators(self.norm1(h))
        h = h + out
        return h + self.ffn(self.norm2(h)), r


class KSSMv3(StackedLM):
    """K-SSM v3: stacked bistable banks; each block's oscillator path runs through its order parameters.

    Equation: ``h = embed(token) + pos_embed``; per block ``h <- h + bank(norm1(h))``, then ``h <- h + ffn(norm2(h))``
    (FFN 4D, GELU); ``logits = output_head(final_norm(h))``.

    State dict: ``embed``, ``pos_embed [1, P, D]``, ``blocks.{i}.{oscillators, norm1, norm2, ffn}``, ``final_norm``,
    ``output_head`` (no bias; when tied, the same tensor as ``embed.weight``).

    Args:
        vocab_size: V. hidden_dim: D. n_layers: blocks. n_oscillators: N per block. n_harmonics: H, 1 to 256.
        max_positions: P, the longest T.
        tied: share the head's matrix with the embedding. At a vocabulary of 50,257 the sizes below have 27.0M
            parameters tied and 46.3M untied: the published 46M counts the untied model.
        clamp: bounds of the bistability variable u, or None for the monostable ablation.
        noise: phase noise in ``"train"`` mode only, ``"always"`` (the published behaviour) or ``"off"``. Its seed comes
            from torch's default generator.

    Raises: ValueError for a bad size or shape or T > P, TypeError for tokens that are not int64.

    >>> import torch
    >>> from kssm import KSSMv3
    >>> model = KSSMv3(65, hidden_dim=32, n_layers=2, n_oscillators=16, n_harmonics=4)
    >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape, model.last_r.shape
    (torch.Size([2, 9, 65]), torch.Size([2]))
    >>> model.regularization_loss().shape
    torch.Size([])
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int = 384,
        n_layers: int = 6,
        n_oscillators: int = 192,
        n_harmonics: int = 32,
        max_positions: int = 1024,
        *,
        tied: bool = True,
        clamp: tuple[float, float] | None = (0.1, 10.0),
        noise: Literal["train", "always", "off"] = "train",
    ) -> None:
        check_sizes(
            "KSSMv3", vocab_size=vocab_size, hidden_dim=hidden_dim, n_layers=n_layers, max_positions=max_positions
        )
        banks = (
            FusedKuramoto(hidden_dim, n_oscillators, n_harmonics=n_harmonics, clamp=clamp, noise=noise)
            for _ in range(n_layers)
        )
        blocks: list[Block] = [_BlockV3(hidden_dim, bank) for bank in banks]
        super().__init__(vocab_size, hidden_dim, max_positions, blocks, tied)

    def regularization_loss(self) -> Tensor:
        """Mean over blocks of the bank's bistability terms, of the last call; a differentiable scalar.

        Raises: RuntimeError before the first call.
        """
        banks: list[Any] = [block.oscillators for block in self.blocks]  # FusedKuramoto, or what stands in for it
        return torch.stack([bank.get_regularization_loss() for bank in banks]).mean()


@dataclass(frozen=True)
class V3Config(StackedConfig):
    """A stack with order parameters H in each block; ``tied``: one matrix for embedding and head."""

    harmonics: Harmonics
    tied: bool

    def build(self, vocabulary_size: int, context: int) -> KSSMv3:
        return KSSMv3(vocabulary_size, self.dim, self.layers, self.oscillators, self.harmonics, context, tied=self.tied)

"""K-SSM v2: stacked banks beside a residual."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kssm.models.base import check_sizes
from kssm.models.stacked import Block, StackedConfig, StackedLM
from kssm.options import Probability
from kssm_kernels import FusedKuramotoV2

__all__ = ["KSSMv2", "V2Config"]


class _BlockV2(Block):
    """``h + dropout(bank(norm1(h)) - norm1(h))``, then ``h + ffn(norm2(h))``."""

    def __init__(self, hidden_dim: int, n_oscillators: int, dropout: float) -> None:
        # dropout inside the FFN is the original's; it puts the second matrix at ffn.3
        ffn = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * hidden_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        super().__init__(hidden_dim, FusedKuramotoV2(hidden_dim, n_oscillators), ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(h)
        out, r, _ = self.oscillators(x)
        h = h + self.dropout(out - x)
        return h + self.ffn(self.norm2(h)), r


class KSSMv2(StackedLM):
    """K-SSM v2: stacked banks whose phases return to the hidden state through a residual.

    Equation: ``h = embed(token) + pos_embed``; per block ``h <- h + dropout(bank(norm1(h)) - norm1(h))``, then
    ``h <- h + ffn(norm2(h))`` (FFN 4D, GELU, dropout); ``logits = output_head(final_norm(h))``.

    State dict: ``embed``, ``pos_embed [1, P, D]``, ``blocks.{i}.{oscillators, norm1, norm2, ffn}``, ``final_norm``,
    ``output_head`` (no bias). The head is not tied to the embedding: only so do the sizes below have the published 28M
    parameters at a vocabulary of 50,257 (28.4M; tied they have 15.5M).

    Args:
        vocab_size: V. hidden_dim: D. n_layers: blocks. n_oscillators: N per block. max_positions: P, the longest T.
        dropout: probability, in [0, 1).

    Raises: ValueError for a bad size or shape or T > P, TypeError for tokens that are not int64.

    >>> import torch
    >>> from kssm import KSSMv2
    >>> model = KSSMv2(65, hidden_dim=32, n_layers=2, n_oscillators=16)
    >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape, model.last_r.shape
    (torch.Size([2, 9, 65]), torch.Size([2]))
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int = 256,
        n_layers: int = 4,
        n_oscillators: int = 128,
        max_positions: int = 512,
        dropout: float = 0.1,
    ) -> None:
        check_sizes(
            "KSSMv2", vocab_size=vocab_size, hidden_dim=hidden_dim, n_layers=n_layers, max_positions=max_positions
        )
        blocks: list[Block] = [_BlockV2(hidden_dim, n_oscillators, dropout) for _ in range(n_layers)]
        super().__init__(vocab_size, hidden_dim, max_positions, blocks, tied=False)


@dataclass(frozen=True)
class V2Config(StackedConfig):
    """A stack with dropout."""

    dropout: Probability

    def build(self, vocabulary_size: int, context: int) -> KSSMv2:
        return KSSMv2(vocabulary_size, self.dim, self.layers, self.oscillators, context, self.dropout)

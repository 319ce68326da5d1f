"""What K-SSM v2 and v3 share: blocks of an oscillator bank and a feed-forward network, stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kssm.models.base import LanguageModel, LayeredArchitecture
from kssm.models.layers import INIT_STD, SmallEmbedding, SmallLinear
from kssm.options import Size

__all__ = ["Block", "StackedConfig", "StackedLM"]


class Block(nn.Module):
    """``h [B, T, D] -> (h [B, T, D], R [B, T])``."""

    def __init__(self, hidden_dim: int, oscillators: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.oscillators = oscillators
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = ffn


class StackedLM(LanguageModel):
    """Embedding and learned positions, blocks, a final norm, an output head without bias."""

    def __init__(self, vocab_size: int, hidden_dim: int, max_positions: int, blocks: list[Block], tied: bool) -> None:
        super().__init__(vocab_size, max_positions)
        self.tied = tied
        self.embed = SmallEmbedding(vocab_size, hidden_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, max_positions, hidden_dim))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(hidden_dim)
        self.output_head = SmallLinear(hidden_dim, vocab_size)
        self._reset_own()

    def reset_parameters(self) -> None:
        self._reset_own()
        super().reset_parameters()

    def _reset_own(self) -> None:
        nn.init.normal_(self.pos_embed, std=INIT_STD)
        if self.tied:  # to_empty gives either module a tensor of its own
            self.output_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self._check_tokens(tokens)
        h = self.embed(tokens) + self.pos_embed[:, : tokens.shape[1]]
        mean_r = []
        for block in self.blocks:
            h, r = block(h)
            mean_r.append(r.detach().mean())
        self.last_r = torch.stack(mean_r)
        logits: Tensor = self.output_head(self.final_norm(h))
        return logits


@dataclass(frozen=True)
class StackedConfig(LayeredArchitecture):
    """Width D, number of blocks, oscillators N in each."""

    dim: Size
    oscillators: Size

    def activations(self) -> int:
        # Of width D the results of both norms, of width 4D the FFN's middle before and after GELU.
        return self.layers * (10 * self.dim + self.oscillators)

"""A transformer decoder with the parts that have become usual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm.models.base import LayeredArchitecture, RecurrentLM, State, check_sizes
from kssm.models.layers import SmallEmbedding, SmallLinear
from kssm.options import Probability, Size, UsageError

__all__ = ["GPT", "GPTConfig", "rotary", "rotate"]

Turns = tuple[Tensor, Tensor]


def rotary(start: int, end: int, width: int, like: Tensor) -> Turns:
    """Cosine and sine ``[end - start, width / 2]`` of the angles ``t * 10000^(-2 i / width)`` at the positions t."""
    # In bfloat16 position 257 is 256. Nothing is kept in buffers, which a model made on the meta device would lack.
    kind = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=like.device, dtype=kind) / width
    angles = torch.arange(start, end, device=like.device, dtype=kind)[:, None] * 10000.0**-exponents
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """``x [..., T, width]`` with the pair (i, i + width / 2) of each position turned by its angle."""
    cos, sin = turns
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _mlp_width(dim: int) -> int:  # three matrices of it have the parameters of two of 4 dim
    return -(-dim // 3) * 8


class _Block(nn.Module):
    """``h + attention(norm1(h))``, then ``h + swiglu(norm2(h))``; also the keys and values seen so far."""

    def __init__(self, dim: int, heads: int, dropout: float, branches: int) -> None:
        super().__init__()
        self.heads, width = heads, _mlp_width(dim)
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.qkv = SmallLinear(dim, 3 * dim, dim**-0.5)
        self.attention_out = SmallLinear(dim, dim, (branches * dim) ** -0.5)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.gate_up = SmallLinear(dim, 2 * width, dim**-0.5)
        self.mlp_out = SmallLinear(width, dim, (branches * width) ** -0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, turns: Turns, past: State) -> tuple[Tensor, State]:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, turns), rotate(k, turns)
        mask = None
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            new, seen = q.shape[2], k.shape[2]  # is_causal would let the first new token see the first token alone
            mask = torch.ones(new, seen, dtype=torch.bool, device=h.device).tril(seen - new)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        h = h + self.dropout(self.attention_out(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(h)).chunk(2, dim=-1)
        return h + self.dropout(self.mlp_out(functional.silu(gate) * up)), (k, v)


class GPT(RecurrentLM):
    """A causal transformer: RMSNorm before each branch, rotary positions, SwiGLU, no biases, a head of its own.

    Equation: ``h = embed(token)``; per block ``h <- h + attention(norm1(h))``, then
    ``h <- h + mlp_out(silu(gate) * up)`` with ``[gate | up] = gate_up(norm2(h))``, both of width 8/3 D up to a multiple
    of 8; ``logits = output_head(final_norm(h))``. Attention takes the softmax of ``q k / sqrt(D / heads)``, q and k
    turned by their positions. Dropout falls on the embedding and on both branches. The state of :meth:`advance` is the
    keys and values ``[B, heads, tokens seen, D / heads]`` of every block. Embedding and head start as N(0, 0.02), other
    matrices with a deviation of 1 / sqrt(inputs), those that add to the residual over sqrt(2 layers).

    Args:
        vocab_size: V. dim: D. n_layers: blocks. heads: attention heads; D / heads must be even.
        max_positions: the most tokens of a sequence, or None for no limit.
        dropout: probability, in [0, 1).

    Raises: ValueError for a bad size or shape or too long a sequence, TypeError for tokens that are not int64.

    Source: H. Touvron et al. 2023 (LLaMA); rotary positions: J. Su et al. 2021; SwiGLU: N. Shazeer 2020.

    >>> import torch
    >>> from kssm import GPT
    >>> model, tokens = GPT(65, dim=32, n_layers=2, heads=4), torch.randint(65, (2, 9))
    >>> logits, state = model.advance(tokens[:, :5])
    >>> rest, _ = model.advance(tokens[:, 5:], state)
    >>> torch.allclose(torch.cat([logits, rest], dim=1), model(tokens), atol=1e-5)
    True
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        n_layers: int = 4,
        heads: int = 4,
        max_positions: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_sizes("GPT", vocab_size=vocab_size, dim=dim, n_layers=n_layers, heads=heads)
        if dim % (2 * heads):
            raise ValueError(f"GPT: dim must be a multiple of twice the {heads} heads, got {dim}")
        super().__init__(vocab_size, max_positions)
        self.head_dim = dim // heads
        self.embed = SmallEmbedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout, 2 * n_layers) for _ in range(n_layers))
        self.final_norm = nn.RMSNorm(dim, eps=1e-6)
        self.output_head = SmallLinear(dim, vocab_size)

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check_tokens(tokens)
        start = 0 if state is None else state[0].shape[2]
        end = start + tokens.shape[1]
        if self.max_positions is not None and end > self.max_positions:
            raise ValueError(f"GPT: at most {self.max_positions} positions, got {end} with those before")
        h = self.dropout(self.embed(tokens))
        turns = rotary(start, end, self.head_dim, h)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h, seen = block(h, turns, () if state is None else state[2 * i : 2 * i + 2])
            kept += seen
        return self.output_head(self.final_norm(h)), tuple(kept)


@dataclass(frozen=True)
class GPTConfig(LayeredArchitecture):
    """Width D, blocks, attention heads in each, dropout."""

    dim: Size
    heads: Size
    dropout: Probability

    def build(self, vocabulary_size: int, context: int) -> GPT:
        return GPT(vocabulary_size, self.dim, self.layers, self.heads, context, self.dropout)

    def check(self) -> None:
        if self.dim % (2 * self.heads):
            raise UsageError(f"--dim must be a multiple of twice the --heads {self.heads}, got {self.dim}")

    def activations(self) -> int:
        # Of width D the results of both norms and of attention, q, k and v; of the MLP's gate, up and their product.
        return self.layers * (6 * self.dim + 3 * _mlp_width(self.dim))

"""A selective state-space model (Mamba) in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm.models.base import LayeredArchitecture, RecurrentLM, State, check_sizes
from kssm.models.layers import SmallEmbedding, SmallLinear
from kssm.options import Size

__all__ = ["SelectiveSSM", "SelectiveSSMConfig", "selective_scan"]

EXPAND, STATE, WIDTH = 2, 16, 4  # inner width E = 2 D, numbers of state per channel, taps of the convolution


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``s_t = exp(delta_t a) s_{t-1} + delta_t b_t u_t`` per channel, ``y_t = sum over states of c_t s_t``.

    Shapes: u and delta ``[B, T, E]``, a ``[E, S]`` negative, b and c ``[B, T, S]``, s ``[B, E, S]`` the state before;
    returns y ``[B, T, E]`` and the last state. One step after the other: no factor leaves (0, 1], so nothing overflows.
    """
    steps = delta.transpose(0, 1).unsqueeze(-1)  # time first: each step's part then lies in one piece
    decay = (steps * a).exp()
    driven = (delta * u).transpose(0, 1).unsqueeze(-1) * b.transpose(0, 1).unsqueeze(-2)
    states = []
    for decay_t, driven_t in zip(decay.unbind(0), driven.unbind(0), strict=True):
        s = torch.addcmul(driven_t, decay_t, s)
        states.append(s)
    y = torch.stack(states) @ c.transpose(0, 1).unsqueeze(-1)
    return y.squeeze(-1).transpose(0, 1), s


class _TimeSteps(nn.Linear):
    """Before softplus; starts at time steps from 0.001 to 0.1, evenly spread in their logarithm."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = self.in_features**-0.5
            self.weight.uniform_(-bound, bound)
            delta = self.bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus


class _Block(nn.Module):
    """``h + mixer(norm(h))``; also the block's new state."""

    def __init__(self, dim: int, residual_std: float) -> None:
        super().__init__()
        inner, self.rank = EXPAND * dim, math.ceil(dim / 16)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, WIDTH, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATE, bias=False)
        self.dt_proj = _TimeSteps(self.rank, inner)
        self.a_log = nn.Parameter(torch.empty(inner, STATE))
        self.skip = nn.Parameter(torch.empty(inner))
        self.out_proj = SmallLinear(inner, dim, residual_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.a_log.copy_(torch.arange(1, STATE + 1, dtype=self.a_log.dtype).log().expand_as(self.a_log))
            self.skip.fill_(1)

    def forward(self, h: Tensor, tail: Tensor, s: Tensor) -> tuple[Tensor, State]:
        u, gate = self.in_proj(self.norm(h)).chunk(2, dim=-1)
        seen = torch.cat([tail, u.transpose(1, 2)], dim=2)
        u = functional.silu(self.conv(seen)).transpose(1, 2)
        low, b, c = self.x_proj(u).split([self.rank, STATE, STATE], dim=-1)
        y, s = selective_scan(u, functional.softplus(self.dt_proj(low)), -self.a_log.exp(), b, c, s)
        y = (y + self.skip * u) * functional.silu(gate)
        return h + self.out_proj(y), (seen[:, :, 1 - WIDTH :], s)


class SelectiveSSM(RecurrentLM):
    """Mamba: linear recurrences whose time steps, inputs and outputs depend on the token.

    Equation: ``h = embed(token)``; per block ``[u | g] = in_proj(norm(h))``, each of width E = 2 D; u <- silu of a
    causal convolution of each channel over 4 tokens; ``[low | b | c] = x_proj(u)``,
    ``delta = softplus(dt_proj(low))``; with 16 states per channel ``s <- exp(-delta exp(a_log)) s + delta b u`` and
    ``y = c s + skip u``; ``h <- h + out_proj(y silu(g))``. ``logits = output_head(final_norm(h))``, norms RMS.

    The state of :meth:`advance` is, per block, the last 3 tokens' u ``[B, E, 3]`` and s ``[B, E, 16]``. There is no
    limit on a sequence's length. The scan over time is a loop in torch: correct everywhere, fast nowhere.

    Start: ``a_log = log(1..16)``, skip 1, delta of 0.001 to 0.1, embedding and head N(0, 0.02), what adds to the
    residual divided by sqrt(layers). ``a_log`` is not to decay: it is a rate, not a weight.

    Args: vocab_size: V. dim: D. n_layers: blocks.

    Raises: ValueError for a bad size or shape, TypeError for tokens that are not int64.

    Source: A. Gu, T. Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"; sizes and start
    are those of their code.

    >>> import torch
    >>> from kssm import SelectiveSSM
    >>> model, tokens = SelectiveSSM(65, dim=16, n_layers=2), torch.randint(65, (2, 9))
    >>> logits, state = model.advance(tokens[:, :5])
    >>> rest, _ = model.advance(tokens[:, 5:], state)
    >>> torch.allclose(torch.cat([logits, rest], dim=1), model(tokens), atol=1e-5)
    True
    """

    undecayed = frozenset({"a_log"})

    def __init__(self, vocab_size: int, dim: int = 128, n_layers: int = 7) -> None:
        check_sizes("SelectiveSSM", vocab_size=vocab_size, dim=dim, n_layers=n_layers)
        super().__init__(vocab_size, max_positions=None)
        self.embed = SmallEmbedding(vocab_size, dim)
        # Mamba's own: nn.Linear's Kaiming start over sqrt(layers), here as a normal of the same variance.
        residual_std = 1 / math.sqrt(3 * EXPAND * dim * n_layers)
        self.blocks = nn.ModuleList(_Block(dim, residual_std) for _ in range(n_layers))
        self.final_norm = nn.RMSNorm(dim, eps=1e-5)
        self.output_head = SmallLinear(dim, vocab_size)

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check_tokens(tokens)
        h = self.embed(tokens)
        if state is None:
            shape = len(tokens), EXPAND * h.shape[-1]
            state = (h.new_zeros(*shape, WIDTH - 1), h.new_zeros(*shape, STATE)) * len(self.blocks)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            h, after = block(h, *state[2 * i : 2 * i + 2])
            kept += after
        return self.output_head(self.final_norm(h)), tuple(kept)


@dataclass(frozen=True)
class SelectiveSSMConfig(LayeredArchitecture):
    """Width D, blocks."""

    dim: Size

    def build(self, vocabulary_size: int, context: int) -> SelectiveSSM:
        return SelectiveSSM(vocabulary_size, self.dim, self.layers)

    def activations(self) -> int:
        # Of width E u before and after the convolution, the gate and y; the decay and the state of every channel.
        return self.layers * EXPAND * self.dim * (4 + 2 * STATE)

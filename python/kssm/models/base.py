"""The K-SSM language models v1, v2 and v3: tokens in, logits and the order parameter R of every layer out.

In all three nothing crosses positions: token t's logits depend on token t (and, in v2 and v3, on its position) alone,
so the best any of them can reach is the entropy of a token given the one before it.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm_kernels import FusedKuramoto, FusedKuramotoV1, FusedKuramotoV2, order_parameters

__all__ = ["KSSMv1", "KSSMv2", "KSSMv3", "OscillatorLM"]

# A tied head multiplies by the embedding: at nn.Embedding's N(0, 1) the first logits would have a standard deviation
# of sqrt(D) (20 at D = 384) and the first loss lie tens of nats above log(vocabulary); at 0.02 it starts there.
INIT_STD = 0.02


def _check_sizes(model: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{model}: {name} must be an int of at least 1, got {size!r}")


class OscillatorLM(nn.Module, ABC):
    """What the K-SSM models have in common.

    ``model(tokens [B, T] int64)`` returns logits ``[B, T, V]``, in nats, not normalised. After a call ``last_r`` is the
    mean order parameter R of each layer, ``[layers]``, dimensionless, in [0, 1], without gradient; None before one.
    ``max_positions`` is the longest T, or None where the model has no positions.
    """

    vocab_size: int
    max_positions: int | None
    last_r: Tensor | None

    def __init__(self, vocab_size: int, max_positions: int | None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.last_r = None

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor: ...

    def reset_parameters(self) -> None:
        """Every parameter as a new model has it (after ``to_empty`` of a model made on the meta device, say)."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def regularization_loss(self) -> Tensor:
        """What the model wants added to its loss, of the last call; a scalar, zero but for v3."""
        return next(self.parameters()).new_zeros(())

    def _check_tokens(self, tokens: Tensor) -> None:
        name = type(self).__name__
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name}: tokens must be int64, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"{name}: tokens must have shape [B, T], got {tuple(tokens.shape)}")
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            raise ValueError(f"{name}: at most {self.max_positions} positions, got a sequence of {tokens.shape[1]}")

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``tokens [B, T] int64``, T >= 1, by sampling; returns ``[B, T + max_new_tokens]`` int64.

        Each new token is drawn from ``softmax(logits / temperature)`` of the last position, among the ``top_k`` most
        likely tokens if given; temperature 0 takes the most likely one. The model sees at most its ``max_positions``
        last tokens, in evaluation mode; its own mode is restored. Same generator state, same text.

        Raises: ValueError for an empty prompt, a negative length or temperature, or ``top_k < 1``.

        >>> import torch
        >>> from kssm import KSSMv1
        >>> prompt = torch.zeros(2, 1, dtype=torch.int64)
        >>> KSSMv1(65).generate(prompt, 7, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 8])
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens must have shape [B, T] with T >= 1, got {tuple(tokens.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                window = tokens if self.max_positions is None else tokens[:, -self.max_positions :]
                logits = self(window)[:, -1]
                if temperature == 0:
                    following = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None and top_k < self.vocab_size:
                        smallest_kept = logits.topk(top_k).values[:, -1:]
                        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
                    probabilities = functional.softmax(logits / temperature, dim=-1)
                    following = torch.multinomial(probabilities, 1, generator=generator)
                tokens = torch.cat([tokens, following], dim=1)
        finally:
            self.train(was_training)
        return tokens


class KSSMv1(OscillatorLM):
    """K-SSM v1: the order parameters of one oscillator bank are the only path from token to logits.

    Equation: ``f = to_freq(embed(token))``; the v1 bank turns f into phases theta ``[B, T, N]`` in radians;
    ``logits = output_head(readout(order_parameters(theta, H)))``, the readout two GELU layers (3H -> D -> D).

    State dict: ``embed``, ``to_freq``, ``oscillators.{omega, coupling}``, ``readout.{0, 2}``, ``output_head``. The
    columns of ``readout.0.weight`` follow the layout ``[C_1..C_H | S_1..S_H | M_1..M_H]``. ``oscillators.coupling``
    takes no part in the output and gets no gradient. 65 characters give 48,833 parameters.

    Args:
        vocab_size: V. embed_dim: D. n_oscillators: N. n_harmonics: H, 1 to 256. coupling_strength: K, 1/step.

    Raises: ValueError for a bad size or shape, TypeError for tokens that are not int64.

    >>> import torch
    >>> from kssm import KSSMv1
    >>> model = KSSMv1(65)
    >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape, model.last_r.shape
    (torch.Size([2, 9, 65]), torch.Size([1]))
    >>> sum(p.numel() for p in model.parameters())
    48833
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 128,
        n_oscillators: int = 64,
        n_harmonics: int = 8,
        coupling_strength: float = 2.0,
    ) -> None:
        _check_sizes("KSSMv1", vocab_size=vocab_size, embed_dim=embed_dim, n_harmonics=n_harmonics)
        super().__init__(vocab_size, max_positions=None)
        self.n_harmonics = n_harmonics
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.to_freq = nn.Linear(embed_dim, n_oscillators)
        self.oscillators = FusedKuramotoV1(n_oscillators, coupling_strength)
        self.readout = nn.Sequential(
            nn.Linear(3 * n_harmonics, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim), nn.GELU()
        )
        self.output_head = nn.Linear(embed_dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        self._check_tokens(tokens)
        _, _, r, theta = self.oscillators(self.to_freq(self.embed(tokens)))
        self.last_r = r.detach().mean().reshape(1)
        logits: Tensor = self.output_head(self.readout(order_parameters(theta, self.n_harmonics)))
        return logits


class _Block(nn.Module):
    """``h [B, T, D] -> (h [B, T, D], R [B, T])``."""

    def __init__(self, hidden_dim: int, oscillators: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.oscillators = oscillators
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = ffn


class _BlockV2(_Block):
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


class _BlockV3(_Block):
    """``h + bank(norm1(h))``, then ``h + ffn(norm2(h))``."""

    def __init__(self, hidden_dim: int, oscillators: FusedKuramoto) -> None:
        ffn = nn.Sequential(nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim))
        super().__init__(hidden_dim, oscillators, ffn)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        out, r, _ = self.oscillators(self.norm1(h))
        h = h + out
        return h + self.ffn(self.norm2(h)), r


class _SmallEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class _SmallLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class _StackedLM(OscillatorLM):
    """Embedding and learned positions, blocks, a final norm, an output head without bias."""

    def __init__(self, vocab_size: int, hidden_dim: int, max_positions: int, blocks: list[_Block], tied: bool) -> None:
        super().__init__(vocab_size, max_positions)
        self.tied = tied
        self.embed = _SmallEmbedding(vocab_size, hidden_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, max_positions, hidden_dim))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(hidden_dim)
        self.output_head = _SmallLinear(hidden_dim, vocab_size, bias=False)
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


class KSSMv2(_StackedLM):
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
        _check_sizes(
            "KSSMv2", vocab_size=vocab_size, hidden_dim=hidden_dim, n_layers=n_layers, max_positions=max_positions
        )
        blocks: list[_Block] = [_BlockV2(hidden_dim, n_oscillators, dropout) for _ in range(n_layers)]
        super().__init__(vocab_size, hidden_dim, max_positions, blocks, tied=False)


class KSSMv3(_StackedLM):
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
        _check_sizes(
            "KSSMv3", vocab_size=vocab_size, hidden_dim=hidden_dim, n_layers=n_layers, max_positions=max_positions
        )
        banks = (
            FusedKuramoto(hidden_dim, n_oscillators, n_harmonics=n_harmonics, clamp=clamp, noise=noise)
            for _ in range(n_layers)
        )
        blocks: list[_Block] = [_BlockV3(hidden_dim, bank) for bank in banks]
        super().__init__(vocab_size, hidden_dim, max_positions, blocks, tied)

    def regularization_loss(self) -> Tensor:
        """Mean over blocks of the bank's bistability terms, of the last call; a differentiable scalar.

        Raises: RuntimeError before the first call.
        """
        banks: list[Any] = [block.oscillators for block in self.blocks]  # FusedKuramoto, or what stands in for it
        return torch.stack([bank.get_regularization_loss() for bank in banks]).mean()

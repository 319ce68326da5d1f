"""K-SSM v1: one oscillator bank, and nothing beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kssm.models.base import Architecture, Harmonics, LanguageModel, check_sizes
from kssm.options import Size
from kssm_kernels import FusedKuramotoV1, order_parameters

__all__ = ["KSSMv1", "V1Config"]


class KSSMv1(LanguageModel):
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
        check_sizes("KSSMv1", vocab_size=vocab_size, embed_dim=embed_dim, n_harmonics=n_harmonics)
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


@dataclass(frozen=True)
class V1Config(Architecture):
    """Width D of the embedding and the readout, oscillators N, order parameters H."""

    dim: Size
    oscillators: Size
    harmonics: Harmonics

    def build(self, vocabulary_size: int, context: int) -> KSSMv1:
        return KSSMv1(vocabulary_size, self.dim, self.oscillators, self.harmonics)

    def activations(self) -> int:
        return self.dim + self.oscillators

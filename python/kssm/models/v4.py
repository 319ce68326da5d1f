"""K-SSM v4: oscillators whose state runs through the sequence, in a loop closed by their order parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm.models.base import Harmonics, LayeredArchitecture, RecurrentLM, State, check_sizes
from kssm.models.layers import SmallEmbedding, SmallLinear
from kssm.options import Size, UsageError, at_least
from kssm_kernels import OscillatorBank

__all__ = ["KSSMv4", "Kind", "Readout", "V4Config"]

Kind = Literal["moebius", "stuart_landau"]
Readout = Literal["heads", "communities"]

MOST_HARMONICS, LARGEST_HEAD = 32, 1024  # of the scan


class _BlockV4(nn.Module):
    """``h + bank(norm1(h))``, without ``h +`` in the last block; then ``h + mlp_out(gelu(mlp_in(norm2(h))))``."""

    def __init__(self, dim: int, bank: OscillatorBank, mlp: int, n_layers: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.oscillators = bank
        self.norm2 = nn.RMSNorm(dim, eps=1e-6) if mlp else None
        # without biases: the MLP of zero is zero
        self.mlp_in = SmallLinear(dim, mlp, 1 / math.sqrt(dim)) if mlp else None
        self.mlp_out = SmallLinear(mlp, dim, 1 / math.sqrt(2 * mlp * n_layers)) if mlp else None

    def forward(self, h: Tensor, state: State | None) -> tuple[Tensor, State, Tensor]:
        bank = self.oscillators
        z_re, z_im, after = bank.order_parameters(self.norm1(h), None if state is None else (state[0], state[1]))
        out = bank.read(z_re, z_im)
        h = out if self.last else h + out
        if self.norm2 is not None and self.mlp_in is not None and self.mlp_out is not None:
            h = h + self.mlp_out(functional.gelu(self.mlp_in(self.norm2(h))))
        with torch.no_grad():
            r = bank.coherence(z_re.detach(), z_im.detach()).mean()
        return h, after, r


class KSSMv4(RecurrentLM):
    """K-SSM v4: stacked recurrent banks; order parameters are the only path from tokens to logits.

    Equation: ``h = embed(token)``; per block ``h <- h + bank(norm1(h))`` with
    :class:`kssm_kernels.OscillatorBank`, in the last one ``h <- bank(norm1(h))``; where there is an MLP, then
    ``h <- h + mlp_out(gelu(mlp_in(norm2(h))))``; ``logits = output_head(final_norm(h))``. Norms are RMSNorm. Nothing
    behind the last bank has a bias: without its order parameters all logits are 0. Without an MLP the final norm
    takes out what multiplies all of them alike: their proportions count, and the phases.

    The state of :meth:`advance` is (re, im), ``[B, oscillators]`` each, of every block's oscillators. There are no
    positions, and there is no limit on a sequence's length. ``last_r``: mean over tokens and over heads or communities
    of ``|Z_1|``, that of a community divided by ``sum_j |C_mj|``.

    Start: embedding N(0, 1/2), head N(0, 0.02), mlp_in N(0, 1 / sqrt(D)), mlp_out N(0, 1 / sqrt(2 layers mlp)), all
    by their deviations; banks as their class has it.

    Args:
        vocab_size: V. dim: D. n_layers: blocks. n_oscillators: of each bank. heads: G, a divisor of n_oscillators.
        n_harmonics: H, 1 to 32. kind: ``"moebius"`` or ``"stuart_landau"``.
        readout: ``"communities"`` or ``"heads"``. communities: how many the readout has.
        feedback: how many communities close the loop, 0: open. listen: whether tokens say how strongly each counts.
        coupling: whether a head's oscillators feel their mean field. forget: whether heads have a forget gate.
        mlp: width of the MLP, 0 for none.

    Raises: ValueError for a bad size, mode or shape, TypeError for tokens that are not int64.

    >>> import torch
    >>> from kssm import KSSMv4
    >>> model = KSSMv4(65, dim=16, n_oscillators=24, heads=3, communities=5, feedback=4)
    >>> tokens = torch.randint(65, (2, 9))
    >>> logits, state = model.advance(tokens[:, :5])
    >>> rest, _ = model.advance(tokens[:, 5:], state)
    >>> torch.allclose(torch.cat([logits, rest], dim=1), model(tokens), atol=1e-5)
    True
    >>> model.last_r.shape
    torch.Size([2])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        n_layers: int = 2,
        n_oscillators: int = 256,
        heads: int = 32,
        n_harmonics: int = 2,
        *,
        kind: Kind = "moebius",
        readout: Readout = "communities",
        communities: int = 80,
        feedback: int = 80,
        listen: bool = True,
        coupling: bool = False,
        forget: bool = True,
        mlp: int = 0,
    ) -> None:
        check_sizes("KSSMv4", vocab_size=vocab_size, dim=dim, n_layers=n_layers)
        if mlp != 0:
            check_sizes("KSSMv4", mlp=mlp)
        super().__init__(vocab_size, max_positions=None)
        self.embed = SmallEmbedding(vocab_size, dim, 0.5)
        self.blocks = nn.ModuleList()
        for i in range(n_layers):
            bank = OscillatorBank(
                dim,
                n_oscillators,
                heads,
                kind=kind,
                coupling=coupling,
                forget=forget,
                harmonics=n_harmonics,
                readout=readout,
                communities=communities,
                feedback=feedback,
                listen=listen,
                layers=n_layers,
            )
            self.blocks.append(_BlockV4(dim, bank, mlp, n_layers, last=i == n_layers - 1))
        self.final_norm = nn.RMSNorm(dim, eps=1e-6)
        self.output_head = SmallLinear(dim, vocab_size, 0.02)

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check_tokens(tokens)
        h = self.embed(tokens)
        kept: list[Tensor] = []
        mean_r = []
        for i, block in enumerate(self.blocks):
            h, after, r = block(h, None if state is None else state[2 * i : 2 * i + 2])
            kept += after
            mean_r.append(r)
        self.last_r = torch.stack(mean_r)
        return self.output_head(self.final_norm(h)), tuple(kept)


@dataclass(frozen=True)
class V4Config(LayeredArchitecture):
    """Width D, blocks, and what the bank of each is made of; ``mlp`` is the width of the MLP behind it, or 0."""

    dim: Size
    oscillators: Size
    heads: Size
    harmonics: Harmonics
    kind: Kind
    readout: Readout
    communities: Size
    feedback: Annotated[int, at_least(0)]
    listen: bool
    coupling: bool
    forget: bool
    mlp: Annotated[int, at_least(0)]

    def build(self, vocabulary_size: int, context: int) -> KSSMv4:
        return KSSMv4(
            vocabulary_size,
            self.dim,
            self.layers,
            self.oscillators,
            self.heads,
            self.harmonics,
            kind=self.kind,
            readout=self.readout,
            communities=self.communities,
            feedback=self.feedback,
            listen=self.listen,
            coupling=self.coupling,
            forget=self.forget,
            mlp=self.mlp,
        )

    def check(self) -> None:
        if self.harmonics > MOST_HARMONICS:
            raise UsageError(f"--harmonics must be at most {MOST_HARMONICS} with --arch v4, got {self.harmonics}")
        if self.oscillators % self.heads:
            raise UsageError(f"--oscillators must be a multiple of the --heads {self.heads}, got {self.oscillators}")
        if self.oscillators > LARGEST_HEAD * self.heads:
            most = LARGEST_HEAD * self.heads
            raise UsageError(f"--oscillators must be at most {most} with --heads {self.heads}, got {self.oscillators}")

    def activations(self) -> int:
        # Of width D the results of the norms; what the scan is given; its states; the MLP's middle around GELU.
        given = 4 * self.oscillators + self.heads * (self.coupling + self.forget)
        given += self.feedback * self.listen
        norms = self.dim * (2 if self.mlp else 1)
        return self.layers * (norms + given + 2 * self.oscillators + 2 * self.mlp)

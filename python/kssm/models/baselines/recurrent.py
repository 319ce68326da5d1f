"""Gated recurrent networks: torch's GRU and LSTM between an embedding and a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kssm.models.base import LayeredArchitecture, RecurrentLM, State, check_sizes
from kssm.options import Probability, Size

__all__ = ["GRU", "LSTM", "GRUConfig", "LSTMConfig"]


def _start(rnn: nn.RNNBase, gates: int) -> None:
    """Per gate orthogonal for what comes from the state, Glorot for what comes from below; biases zero."""
    for name, parameter in rnn.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
            continue
        for gate in parameter.chunk(gates):
            (nn.init.orthogonal_ if name.startswith("weight_hh") else nn.init.xavier_uniform_)(gate)


class _StartedGRU(nn.GRU):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            _start(self, 3)


class _StartedLSTM(nn.LSTM):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            _start(self, 4)
            for name, parameter in self.named_parameters():
                if name.startswith("bias_ih"):  # the two biases of a gate add up
                    parameter.chunk(4)[1].fill_(1)


class _GatedLM(RecurrentLM):
    """Embedding, recurrent layers of the same width, head; dropout on what goes into each of them but the first."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], vocab_size: int, dim: int, n_layers: int, dropout: float):
        check_sizes(type(self).__name__, vocab_size=vocab_size, dim=dim, n_layers=n_layers)
        super().__init__(vocab_size, max_positions=None)
        self.embed = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        between = dropout if n_layers > 1 else 0.0  # torch warns where there is nothing between
        self.rnn = kind(dim, dim, n_layers, batch_first=True, dropout=between)
        self.output_head = nn.Linear(dim, vocab_size)


class GRU(_GatedLM):
    """Stacked gated recurrent units.

    Equation: per layer, from x and the state h, ``r = sigmoid(W_r x + U_r h + b_r)``,
    ``z = sigmoid(W_z x + U_z h + b_z)``, ``n = tanh(W_n x + b_n + r (U_n h + c_n))``, ``h <- (1 - z) n + z h``; the
    first x is ``embed(token)``, a layer's h is the next one's x, and ``logits = output_head(last h)``. Dropout falls
    on every layer's h on its way up, never on its way through time.

    The state of :meth:`advance` is h, ``[layers, B, D]``. There is no limit on a sequence's length.

    Start: U orthogonal per gate, W Glorot, biases zero.

    Args: vocab_size: V. dim: D. n_layers: layers. dropout: probability, in [0, 1).

    Raises: ValueError for a bad size or shape, TypeError for tokens that are not int64.

    Source: K. Cho et al. 2014; dropout as in W. Zaremba et al. 2014; orthogonal start: A. Saxe et al. 2013.

    >>> import torch
    >>> from kssm import GRU
    >>> model, tokens = GRU(65, dim=16), torch.randint(65, (2, 9))
    >>> logits, (h,) = model.advance(tokens)
    >>> logits.shape, h.shape
    (torch.Size([2, 9, 65]), torch.Size([2, 2, 16]))
    """

    def __init__(self, vocab_size: int, dim: int = 256, n_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__(_StartedGRU, vocab_size, dim, n_layers, dropout)

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check_tokens(tokens)
        out, h = self.rnn(self.embed(tokens), None if state is None else state[0])
        return self.output_head(self.dropout(out)), (h,)


class LSTM(_GatedLM):
    """Stacked long short-term memory cells.

    Equation: per layer, from x and the state (h, c), ``i, f, o = sigmoid(W x + U h + b)`` and
    ``g = tanh(W_g x + U_g h + b_g)``; ``c <- f c + i g``, ``h <- o tanh(c)``; the first x is ``embed(token)``, a
    layer's h is the next one's x, and ``logits = output_head(last h)``. Dropout falls on every layer's h on its way up,
    never on its way through time.

    The state of :meth:`advance` is h and c, ``[layers, B, D]`` each. There is no limit on a sequence's length.

    Start: U orthogonal per gate, W Glorot, biases zero but 1 for the forget gate f.

    Args: vocab_size: V. dim: D. n_layers: layers. dropout: probability, in [0, 1).

    Raises: ValueError for a bad size or shape, TypeError for tokens that are not int64.

    Source: S. Hochreiter, J. Schmidhuber 1997; dropout as in W. Zaremba et al. 2014; forget bias: R. Jozefowicz et al.
    2015.

    >>> import torch
    >>> from kssm import LSTM
    >>> model, tokens = LSTM(65, dim=16), torch.randint(65, (2, 9))
    >>> logits, (h, c) = model.advance(tokens)
    >>> logits.shape, h.shape, c.shape
    (torch.Size([2, 9, 65]), torch.Size([2, 2, 16]), torch.Size([2, 2, 16]))
    """

    def __init__(self, vocab_size: int, dim: int = 224, n_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__(_StartedLSTM, vocab_size, dim, n_layers, dropout)

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check_tokens(tokens)
        out, last = self.rnn(self.embed(tokens), state)
        return self.output_head(self.dropout(out)), tuple(last)


@dataclass(frozen=True)
class _GatedConfig(LayeredArchitecture):
    """Width D, layers, dropout."""

    dim: Size
    dropout: Probability


class GRUConfig(_GatedConfig):
    """A GRU's width D, layers and dropout."""

    def build(self, vocabulary_size: int, context: int) -> GRU:
        return GRU(vocabulary_size, self.dim, self.layers, self.dropout)

    def activations(self) -> int:
        return self.layers * 4 * self.dim  # r, z, n, h


class LSTMConfig(_GatedConfig):
    """An LSTM's width D, layers and dropout."""

    def build(self, vocabulary_size: int, context: int) -> LSTM:
        return LSTM(vocabulary_size, self.dim, self.layers, self.dropout)

    def activations(self) -> int:
        return self.layers * 6 * self.dim  # i, f, g, o, c, h

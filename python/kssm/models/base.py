"""What every K-SSM generation is: a language model, and the configuration that builds it."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm.options import between

__all__ = ["Architecture", "Harmonics", "OscillatorLM", "check_sizes"]

Harmonics = Annotated[int, between(1, 256)]


def check_sizes(model: str, **sizes: int) -> None:
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


@dataclass(frozen=True)
class Architecture(ABC):
    """The options of one generation, and the model that they describe.

    A generation's fields are options of ``kssm train`` under their names, with their bounds as metadata of their types
    (:mod:`kssm.options`).
    """

    @abstractmethod
    def build(self, vocabulary_size: int, context: int) -> OscillatorLM:
        """The model, freshly initialised, for sequences of up to ``context`` tokens."""

    @abstractmethod
    def activations(self) -> int:
        """Numbers that a forward pass keeps of each token for the backward pass, at the very least; without logits."""

    def parameters(self, vocabulary_size: int, context: int) -> int:
        """The model's number of parameters, counted on the meta device: exact, and without memory for them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(vocabulary_size, context).parameters())

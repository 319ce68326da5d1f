"""What every model here is: a language model, and the configuration that builds it."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kssm.options import Size, between

__all__ = ["Architecture", "Harmonics", "LanguageModel", "LayeredArchitecture", "RecurrentLM", "State", "check_sizes"]

Harmonics = Annotated[int, between(1, 256)]
State: TypeAlias = tuple[Tensor, ...]


def check_sizes(model: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{model}: {name} must be an int of at least 1, got {size!r}")


class LanguageModel(nn.Module, ABC):
    """What all models have in common.

    ``model(tokens [B, T] int64)`` returns logits ``[B, T, V]``, in nats, not normalised. ``max_positions`` is the
    longest T, or None where there is no limit. After a call ``last_r`` of a model with oscillators is the mean order
    parameter R of each layer, ``[layers]``, dimensionless, in [0, 1], without gradient; None before one, and always
    None for a model without oscillators. ``undecayed`` are the last parts of the names of parameters that are matrices
    by their shape alone: weight decay leaves them out.
    """

    undecayed: frozenset[str] = frozenset()
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
        state: State | None = None
        try:
            for _ in range(max_new_tokens):
                logits, state = self._last_logits(tokens, state)
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

    def _last_logits(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """Logits ``[B, V]`` behind the last token; ``state`` is what the call for all tokens but this one returned."""
        window = tokens if self.max_positions is None else tokens[:, -self.max_positions :]
        return self(window)[:, -1], None


class RecurrentLM(LanguageModel):
    """A model that can go on from where it was: all that later tokens need of earlier ones is a state.

    :meth:`generate` reads the prompt once and then one token at a time, at the cost of a token each, as long as the
    sequence has no more than ``max_positions`` tokens.
    """

    @abstractmethod
    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits ``[B, T, V]`` of ``tokens [B, T] int64``, T >= 1, and the state to go on from.

        ``state`` is what the call for the tokens before these returned; None at a sequence's beginning. What it holds
        is the model's own affair. Gradients flow through it: detach its tensors to cut them.

        Raises: TypeError for tokens that are not int64, ValueError for a bad shape or, with those that the state has
        seen, more than ``max_positions`` tokens.
        """

    def forward(self, tokens: Tensor) -> Tensor:
        return self.advance(tokens)[0]

    def _check_tokens(self, tokens: Tensor) -> None:
        super()._check_tokens(tokens)
        if tokens.shape[1] < 1:
            shape = tuple(tokens.shape)
            raise ValueError(f"{type(self).__name__}: tokens must have shape [B, T] with T >= 1, got {shape}")

    def _last_logits(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            return super()._last_logits(tokens, None)  # every token's place in the window is another one now
        logits, state = self.advance(tokens if state is None else tokens[:, -1:], state)
        return logits[:, -1], state


@dataclass(frozen=True)
class Architecture(ABC):
    """The options of one kind of model, and the model that they describe.

    Its fields are options of ``kssm train`` under their names, with their bounds as metadata of their types
    (:mod:`kssm.options`).
    """

    @abstractmethod
    def build(self, vocabulary_size: int, context: int) -> LanguageModel:
        """The model, freshly initialised, for sequences of up to ``context`` tokens."""

    def check(self) -> None:
        """Raise UsageError where values that are possible by themselves do not go together."""
        return None

    @abstractmethod
    def activations(self) -> int:
        """Numbers that a forward pass keeps of each token for the backward pass, at the very least; without logits."""

    def parameters(self, vocabulary_size: int, context: int) -> int:
        """The model's number of parameters, counted on the meta device: exact, and without memory for them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(vocabulary_size, context).parameters())


@dataclass(frozen=True)
class LayeredArchitecture(Architecture):
    """A stack of layers; each but the first two has as many parameters as the second."""

    layers: Size

    def parameters(self, vocabulary_size: int, context: int) -> int:
        """Counted on models of one and two layers, however many there are."""
        one, two = (
            super(LayeredArchitecture, replace(self, layers=n)).parameters(vocabulary_size, context) for n in (1, 2)
        )
        return one + (self.layers - 1) * (two - one)

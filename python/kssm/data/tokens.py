"""Tokens: the vocabularies of characters and bytes, and what a count of each token says of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kssm.options import UsageError

__all__ = ["Tokens", "Vocabulary", "bigram_entropy", "bits_per_byte", "unigram_entropy"]

CODE_POINTS = 0x110000

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Vocabulary:
    """The kinds of token: the sorted characters of a text, or the 256 bytes.

    >>> Vocabulary("char", "abc").encode("cab").tolist(), Vocabulary("char", "abc").decode([2, 0])
    ([2, 0, 1], 'ca')
    >>> Vocabulary("byte").encode("é").tolist()
    [195, 169]
    """

    kind: Literal["char", "byte"]
    characters: str = ""

    def __len__(self) -> int:
        return len(self.characters) if self.kind == "char" else 256

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if len(self) <= 256 else np.uint16)

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each token, ``[V]``."""
        lengths = [len(c.encode()) for c in self.characters] if self.kind == "char" else [1] * 256
        return np.array(lengths, dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        """Token numbers of a text. Raises UsageError for a character outside the vocabulary."""
        if self.kind == "byte":
            return np.frombuffer(text.encode(), dtype=np.uint8)
        number_of = np.full(CODE_POINTS, -1, dtype=np.int32)
        number_of[_code_points(self.characters)] = np.arange(len(self))
        numbers = number_of[_code_points(text)]
        if (numbers < 0).any():
            unknown = text[int(np.argmax(numbers < 0))]
            raise UsageError(f"the character {unknown!r} is not in the vocabulary of this run's text")
        return numbers.astype(self.dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token numbers; bytes that are not UTF-8 become U+FFFD."""
        if self.kind == "byte":
            return bytes(tokens).decode(errors="replace")
        return "".join(self.characters[t] for t in tokens)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats per token of the distribution ``counts / sum(counts)``: the best loss that ignores context.

    >>> unigram_entropy(np.array([5, 5, 0])) == math.log(2)
    True
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def bigram_entropy(pairs: NDArray[np.int64]) -> float:
    """Entropy in nats of a token given the one before it, from ``pairs [P, 2]`` of (before, token) themselves.

    The best mean loss over these pairs of a model that sees one token at a time.

    >>> bigram_entropy(np.array([[0, 1], [0, 2], [1, 3], [1, 3]])) == math.log(2) / 2
    True
    """
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    _, first = np.unique(pairs[:, 0], return_counts=True)
    return (float((first * np.log(first)).sum()) - float((counts * np.log(counts)).sum())) / max(1, len(pairs))


def bits_per_byte(loss: float, counts: NDArray[np.int64], vocabulary: Vocabulary) -> float:
    """Bits per UTF-8 byte of a text with these token ``counts [V]`` and a mean ``loss`` in nats per token."""
    return loss * int(counts.sum()) / (int(counts @ vocabulary.byte_lengths) * math.log(2))

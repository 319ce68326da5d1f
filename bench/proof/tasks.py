"""Data and models: scikit-learn's digits with a small MLP, characters of a text with a block of attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 32
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
MISSING = "bench.proof needs scikit-learn for its digits: pip install 'kssm-kernels[proof]'"


class Part(NamedTuple):
    x: Tensor
    y: Tensor


class Parts(NamedTuple):
    train: Part
    validation: Part
    test: Part


def digits() -> Parts:
    """1797 images of 8 x 8: 1000 to train, 297 to tune on, 500 to test, the same for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(MISSING) from None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(1))
    x = torch.from_numpy(data.data).float()[order] / 16
    y = torch.from_numpy(data.target).long()[order]
    return Parts(*(Part(x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 1297), (1297, 1797))))


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(part: Part, seed: int, size: int = 64) -> Iterator[Part]:
    """Drawn with replacement, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(part.y), (size,), generator=generator)
        yield Part(part.x[rows], part.y[rows])


def text(path: Path | None) -> Tensor:
    """Codes of the characters of a file, or of Python's own help topics; what is not ASCII becomes a space."""
    if path is not None:
        written = path.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        written = "\n".join(topics[name] for name in sorted(topics))
    code = {c: i for i, c in enumerate(CHARACTERS)}
    return torch.tensor([code.get(c, 1) for c in written])


def _windows(codes: Tensor, starts: Tensor) -> Part:
    rows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return Part(rows[:, :-1], rows[:, 1:])


def characters(codes: Tensor) -> Parts:
    """80% to train, 10% to tune on, 10% to test; of the latter two 256 windows of 32 characters each, evenly spaced."""
    first, second = int(0.8 * len(codes)), int(0.9 * len(codes))
    held = (codes[first:second], codes[second:])
    spaced = [_windows(c, torch.linspace(0, len(c) - CONTEXT - 2, 256).long()) for c in held]
    return Parts(Part(codes[:first], codes[:first]), *spaced)


def character_batches(part: Part, seed: int, size: int = 16) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _windows(part.x, torch.randint(len(part.x) - CONTEXT - 1, (size,), generator=generator))


class CharacterLM(nn.Module):
    """Embedding, one block of causal attention and a feed-forward layer, read-out: 39,216 parameters at width 48."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.read = nn.Linear(width, len(CHARACTERS))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.place
        b, t, d = x.shape
        q, k, v = self.qkv(self.before(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        x = x + self.down(functional.gelu(self.up(self.between(x))))
        logits: Tensor = self.read(self.after(x))
        return logits


def language_model(seed: int) -> CharacterLM:
    torch.manual_seed(seed)
    return CharacterLM()

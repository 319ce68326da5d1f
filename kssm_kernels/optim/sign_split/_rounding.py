"""How the optimizer's numbers are stored: stochastic rounding to bfloat16, and 8 bits per non-negative number.

**Random words.** Element e of tensor t gets, in step k, one 32-bit word of Philox 4x32-10 with key = seed and counter =
(block, k, t mod 2^32, t div 2^32), laid out as in kssm_kernels/noise.py: word (e mod 32) div 8 of block
8 (e div 32) + e mod 8. Its upper 16 bits round the parameter, its lower 16 the mean P, and 16 bits of a multiplicative
hash the mean N.

**Stochastic rounding.** The random bits are added below the last bit kept, and what is below is cut off: up with the
probability of what is cut off, so the expectation is the number itself.

**8 bits.** Blocks of 256 elements in memory order, one float32 scale each, the block's largest number. A code stands
for a number y in [0, 1]: decade z = 0 .. 6 is (10^-(z+1), 10^-z] and holds 2^(7-z) codes, evenly spaced up to its top;
code 1 is 1e-7 and code 0 zero. Relative to the largest of a block, large numbers keep 1 %, small ones their size.
The idea of a map with fewer bits per decade: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kssm_kernels.noise import philox_4x32

BLOCK = 256
_MASK = 0xFFFFFFFF
_shift = torch.bitwise_right_shift


def random_words(n: int, *, seed: int, step: Tensor, index: int) -> Tensor:
    """int64 ``[n]`` that holds 32-bit words, on the device of the counter ``step`` (int64, 0-dim)."""
    groups = -(-n // 32)
    block = torch.arange(groups * 8, dtype=torch.int64, device=step.device)
    when = (step & _MASK).expand_as(block)
    low, high = torch.full_like(block, index & _MASK), torch.full_like(block, index >> 32)
    words = torch.stack(philox_4x32((block, when, low, high), seed))
    return words.reshape(4, groups, 8).transpose(0, 1).reshape(-1)[:n]


def bits_for_parameter(words: Tensor) -> Tensor:
    return _shift(words, 16)


def bits_for_positive(words: Tensor) -> Tensor:
    return words & 0xFFFF


def bits_for_negative(words: Tensor) -> Tensor:
    return _shift((words * 0x9E3779B1) & _MASK, 16)


def stochastic_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16; ``random``: 16 bits per element, int64. Infinity and NaN stay.

    >>> x = torch.full((4,), 1 + 2**-9)  # a quarter of the way from 1 to the next number, 1 + 2^-7
    >>> stochastic_bfloat16(x, torch.tensor([0, 0x8000, 0xBFFF, 0xC000])).tolist()
    [1.0, 1.0, 1.0, 1.0078125]
    """
    kept = (x.view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), kept.view(torch.float32), x).to(torch.bfloat16)


@functools.cache
def _values(device: torch.device) -> Tensor:
    numbers = [0.0]
    for z in range(7, -1, -1):
        levels, top = 1 << (7 - z), 1.0
        for _ in range(z):
            top /= 10.0
        numbers += [top * (0.1 + 0.9 * k / levels) for k in range(1, levels + 1)] if levels > 1 else [top]
    return torch.tensor(numbers, dtype=torch.float64).to(torch.float32).to(device)


def scale_count(n: int) -> int:
    return -(-n // BLOCK)


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """uint8 ``[n]`` and float32 ``[ceil(n / 256)]`` to float32 ``[n]``."""
    return _values(codes.device)[codes.int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]


def quantized(x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 ``[n]``, none negative, to codes and scales; ``random``: 16 bits per element, None: to nearest.

    >>> codes, scale = quantized(torch.tensor([2.0, 1.0, 0.02, 0.0]), None)
    >>> dequantized(codes, scale)
    tensor([2.0000, 1.0016, 0.0200, 0.0000])
    """
    blocks = scale_count(x.numel())
    padded = torch.nn.functional.pad(x, (0, blocks * BLOCK - x.numel()))
    scale = padded.view(blocks, BLOCK).amax(dim=1)
    y = x / torch.where(scale > 0, scale, 1.0).repeat_interleave(BLOCK)[: x.numel()]
    up, levels = torch.ones_like(y), torch.full_like(y, 128.0)
    for z in range(1, 8):
        below = y <= 10.0**-z
        up = torch.where(below, 10.0**z, up)
        levels = torch.where(below, float(1 << (7 - z)), levels)
    place = torch.where(levels == 1, y * up, (y * up - 0.1) * 1.1111111)
    offset = 0.5 if random is None else random.to(torch.float32) * 2.0**-16
    k = (place * levels + offset).floor().clamp_min(0.0)
    return (levels - 1 + torch.minimum(k, levels)).to(torch.uint8), scale

"""Standard normal noise that depends on a seed and on an element's place, and on nothing else.

Philox 4x32-10 with key = seed (64 bits) and counter = (block, step, row mod 2^32, row div 2^32). A block's four words
serve four oscillators: oscillator j of a row takes word (j mod 32) div 8 of block 8 (j div 32) + j mod 8, so that eight
consecutive blocks fill 32 consecutive oscillators and a vector unit stores without shuffling. Words 0 and 1, and words
2 and 3, make two normals each by the Box-Muller transform.

The transform uses float32 additions, multiplications and square roots only, each rounded once and in a fixed order
(no fused multiply-add), so every backend that does so gives the same bits.

Source: J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC11), for Philox.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

__all__ = ["philox_4x32", "philox_normal"]

_MASK = 0xFFFFFFFF
_shift = torch.bitwise_right_shift  # not >>, which torch 2.4 lacks on MPS (github.com/pytorch/pytorch/pull/131813)
# float32 numbers: ln 2, and pi/2 in steps of 2^-24. Made here by torch.tensor they would lie on torch's default device,
# and each call would wait for it.
LN_2, QUARTER_TURN = 0.6931471824645996, 9.362675967850009e-08
# ln(1+f) = f - f^2/2 + f^3 P(f) on [1/sqrt 2 - 1, sqrt 2 - 1], minimax, 6e-9 absolute
LOG_POLYNOMIAL = (
    0.333333167252, -0.250008089999, 0.200022862428, -0.166245962172,
    0.141812078497, -0.131283989162, 0.128814479574, -0.0786027368843,
)  # fmt: skip
# sin(x) = x + x z S(z), cos(x) = 1 - z/2 + z^2 C(z), z = x^2, |x| <= pi/4 + 0.01, minimax
SIN_POLYNOMIAL = (-0.16666654024093863352, 0.0083321185616159788903, -0.00019509068730541130098)
COS_POLYNOMIAL = (0.041666645312127270637, -0.0013887288990100313331, 0.000024429218880558318696)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32 on int64 tensors that hold 32-bit words; ``seed`` is the 64-bit key.

    >>> import torch
    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(word)) for word in philox_4x32((zero, zero, zero, zero), 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # the product's low 64 bits are right although int64 wraps; the masks undo the sign
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = _shift(p0, 32) & _MASK, _shift(p1, 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    # radius = sqrt(-2 ln u), u = v / 2^24 in (0, 1], v = mantissa * 2^exponent with mantissa in [1/sqrt 2, sqrt 2)
    v = (_shift(word0, 8) + 1).to(torch.float32)
    bits = v.view(torch.int32)
    shifted = bits - 0x3F3504F3  # the bits of 1/sqrt 2, rounded: the mantissa's lower end
    exponent = _shift(shifted, 23)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    z = f * f
    log_mantissa = f - 0.5 * z + (z * f) * _horner(LOG_POLYNOMIAL, f)
    minus_log = (24 - exponent).to(torch.float32) * LN_2 - log_mantissa
    # torch.sqrt goes through a vector library on x86 that misrounds one float32 in six (torch 2.13); by way of float64
    # all 2^24 values that can occur come out right (tests/ops/test_noise.py). MPS has no float64.
    squared = 2.0 * minus_log.clamp_min(0.0)
    wide = torch.float32 if squared.device.type == "mps" else torch.float64
    radius = torch.sqrt(squared.to(wide)).to(torch.float32)
    # angle = quadrant * pi/2 + x: two bits of quadrant, 24 bits of x in [-pi/4, pi/4)
    quadrant = _shift(word1, 30)
    x = ((_shift(word1, 6) & 0xFFFFFF) - 0x800000).to(torch.float32) * QUARTER_TURN
    z = x * x
    sin = x + (x * z) * _horner(SIN_POLYNOMIAL, z)
    cos = 1.0 - 0.5 * z + (z * z) * _horner(COS_POLYNOMIAL, z)
    odd = (quadrant & 1) == 1
    a, b = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    a = torch.where(((quadrant + 1) & 2) == 2, -a, a)
    b = torch.where((quadrant & 2) == 2, -b, b)
    return radius * a, radius * b


def philox_normal(rows: int, n: int, *, seed: int, step: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The noise xi of one step: float32 ``[rows, n]``, standard normal, dimensionless.

    Row r and oscillator j get a number that depends on ``seed``, ``step``, r and j alone.

    >>> a = philox_normal(4, 100, seed=7)
    >>> bool((a[2:3, :50] == philox_normal(4, 50, seed=7)[2:3]).all())
    True
    """
    rows, n, seed, step = (operator.index(v) for v in (rows, n, seed, step))  # NumPy's integers would overflow
    groups = (n + 31) // 32
    block = torch.arange(groups * 8, dtype=torch.int64, device=device).expand(rows, -1)
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None].expand_as(block)
    words = philox_4x32((block, torch.full_like(block, step & _MASK), row & _MASK, _shift(row, 32)), seed)
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=1)
    # [rows, word, group, lane] -> [rows, group, word, lane]
    return normals.reshape(rows, 4, groups, 8).transpose(1, 2).reshape(rows, groups * 32)[:, :n]

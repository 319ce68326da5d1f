"""How the GPU kernels cut long ensembles: one rule for Triton and CUDA, by sizes alone, and so do the bits depend."""

from __future__ import annotations

import torch

from kssm_kernels.ops._dtypes import DTYPES

SEGMENT_MULTIPLE = 256
SHORTEST_SEGMENT = 2048


def segment_length(n: int, harmonics: int, dtype: torch.dtype) -> int:
    """Oscillators that one team of threads adds up: all of a short ensemble, and of a long one a multiple of 256.

    Every segment leaves 2 H partial sums in the arithmetic dtype, written once and read once. With 64 H phases to a
    segment (128 H of 16 bits) that is 1/16 of the traffic for the phases, whatever H is, and an ensemble of a million
    fills a large device with 489 teams.
    """
    if n <= SHORTEST_SEGMENT:
        return n
    wanted = 64 * harmonics * DTYPES[dtype][1].itemsize // dtype.itemsize
    return min(n, max(SHORTEST_SEGMENT, -(-wanted // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE))


def segment_count(n: int, harmonics: int, dtype: torch.dtype) -> int:
    """
    >>> segment_count(192, 32, torch.float32), segment_count(1_000_000, 32, torch.float32)
    (1, 489)
    """
    return -(-n // segment_length(n, harmonics, dtype))

"""How the GPU kernels cut long ensembles: one rule for Triton and CUDA, by sizes alone, and so do the bits depend."""

from __future__ import annotations

import torch

from kssm_kernels.ops._dtypes import DTYPES

ROW_BLOCK_MULTIPLE = 256
SHORTEST_ROW_BLOCK = 2048


def row_block_length(n: int, harmonics: int, dtype: torch.dtype) -> int:
    """Oscillators that one team of threads adds up: all of a short ensemble, and of a long one a multiple of 256.

    Every row block leaves 2 H partial sums in the compute dtype, written once and read once. With 64 H phases to a
    row block (128 H of 16 bits) that is 1/16 of the traffic for the phases, whatever H is, and an ensemble of a million
    fills a large device with 489 teams.
    """
    if n <= SHORTEST_ROW_BLOCK:
        return n
    wanted = 64 * harmonics * DTYPES[dtype][1].itemsize // dtype.itemsize
    return min(n, max(SHORTEST_ROW_BLOCK, -(-wanted // ROW_BLOCK_MULTIPLE) * ROW_BLOCK_MULTIPLE))


def row_block_count(n: int, harmonics: int, dtype: torch.dtype) -> int:
    """
    >>> row_block_count(192, 32, torch.float32), row_block_count(1_000_000, 32, torch.float32)
    (1, 489)
    """
    return -(-n // row_block_length(n, harmonics, dtype))

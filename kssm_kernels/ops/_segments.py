"""How the GPU kernels cut long ensembles: one rule for Triton and CUDA, by sizes alone, and so do the bits depend."""

from __future__ import annotations

SEGMENT_MULTIPLE = 256
SHORTEST_SEGMENT = 2048


def segment_length(n: int, harmonics: int) -> int:
    """Oscillators that one team of threads adds up: all of a short ensemble, and of a long one a multiple of 256.

    Every segment leaves 2 H partial sums, written once and read once. At 64 H oscillators a segment that is 1/16 of the
    traffic for the phases, whatever H is, and an ensemble of a million fills a large device with 488 teams.
    """
    if n <= SHORTEST_SEGMENT:
        return n
    return min(n, max(SHORTEST_SEGMENT, -(-64 * harmonics // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE))


def segment_count(n: int, harmonics: int) -> int:
    """
    >>> segment_count(192, 32), segment_count(1_000_000, 32), segment_count(1_000_000, 256)
    (1, 489, 62)
    """
    return -(-n // segment_length(n, harmonics))

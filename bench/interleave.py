"""Timing several callables alternately in one process: A B C A B C ..., medians and quantiles.

A machine that others use, or that changes its clock, slows neighbouring turns alike: a ratio of medians taken in turn
survives that, a ratio of two separate runs does not.

A callable shorter than TURN_SECONDS is called several times a turn, each call timed by itself, after one untimed call:
its turn follows a callable that has just filled the caches with its own data, and what is asked is the cost of the op
on data that the step before has left in cache, as in a model. A long callable gets one call a turn.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import psutil
import torch

import kssm_kernels

SMOKE = os.environ.get("KSSM_BENCH_SMOKE", "") not in ("", "0")
THREADS = 2
# What a smoke run writes must not replace the published page and plot.
DOCS = Path(__file__).parents[1] / (".benchmarks" if SMOKE else "docs")
TURN_SECONDS = 0.02
MAX_CALLS = 10
# A case takes about this long, whatever its callables cost, within the bounds on its rounds.
CASE_SECONDS = 0.2 if SMOKE else 8.0
ROUNDS = (2, 2) if SMOKE else (5, 30)

Call = Callable[[], object]


@dataclass(frozen=True)
class Quantiles:
    """Median, first and ninth decile of one callable's samples, in the samples' unit."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> Quantiles:
        low, median, high = (float(q) for q in numpy.quantile(samples, (0.1, 0.5, 0.9)))
        return Quantiles(median, low, high, len(samples))


@dataclass
class Turns:
    """One callable and the seconds of each of its timed calls."""

    call: Call
    prepare: Call = lambda: None  # before each turn, untimed
    samples: list[float] = field(default_factory=list)
    calls: int = 1
    turn_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Two calls before any is timed: the first may compile or allocate, the second tells how long a turn is."""
        self.prepare()
        self.call()
        once = timed(self.call)
        self.calls = max(1, min(MAX_CALLS, math.ceil(TURN_SECONDS / once)))
        self.turn_seconds = once * (self.calls + int(self.calls > 1))

    def warm(self) -> None:
        if self.calls > 1:
            self.call()

    def turn(self) -> None:
        self.prepare()
        self.warm()
        for _ in range(self.calls):
            self.samples.append(timed(self.call))


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds_for(turns: Sequence[Turns], seconds: float = CASE_SECONDS) -> int:
    low, high = ROUNDS
    return max(low, min(high, int(seconds / sum(t.turn_seconds for t in turns))))


def take_turns(turns: Sequence[Turns], seconds: float = CASE_SECONDS) -> list[Quantiles]:
    """Quantiles of the seconds per call of each, timed in turn for about ``seconds`` in all."""
    for _ in range(rounds_for(turns, seconds)):
        for t in turns:
            t.turn()
    return [Quantiles.of(t.samples) for t in turns]


def interleave(calls: Mapping[str, Call], seconds: float = CASE_SECONDS) -> dict[str, Quantiles]:
    """:func:`take_turns` for callables by name."""
    return dict(zip(calls, take_turns([Turns(call) for call in calls.values()], seconds), strict=True))


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def others_share() -> float:
    """Part of the processors that other processes keep busy, over one idle second of ours.

    One busy neighbour on two cores is enough to spoil small cases: each OpenMP region then waits for a time slice of
    the scheduler (4 ms here: two matrix products of 16 rows took 40 ms instead of 0.2).
    """
    return psutil.cpu_percent(interval=1.0) / 100


def environment() -> dict[str, str]:
    """What a figure depends on besides the code: written beside every table and plot."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kssm_kernels": f"{kssm_kernels.__version__} ({kssm_kernels.build_info()})",
        "torch's vector set": torch.backends.cpu.get_cpu_capability(),
        "busy with other work at the start": f"{others_share():.0%} of the processors",
    }

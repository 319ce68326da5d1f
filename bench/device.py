"""Timing on a device: callables in turn, by the device's own events, beside the bandwidth of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.interleave import Call, Quantiles, environment
from bench.table import number

TURN_SECONDS = 0.002  # a turn repeats a short callable, so that the gaps between launches do not count
COPY = "copy"
PAGE_HEAD = """\
# Performance on a device

Made by `pytest tests bench -m gpu`. All callables of a case are timed in turn in one process, by the device's events,
behind a check of ours against the formula in float64; medians with first and ninth decile, in microseconds. Bandwidth
is the least traffic of the case (inputs read once, outputs written once) over our time, as part of what a copy reaches
in the same turns.
"""


@dataclass(frozen=True)
class Row:
    """One case in one dtype on one backend; ``least`` is its least traffic in bytes, ``copied`` the copy's."""

    case: str
    dtype: str
    backend: str
    times: Mapping[str, Quantiles]  # microseconds: "ours", COPY, and the baselines
    least: int
    copied: int

    @property
    def bandwidth_share(self) -> float:
        return (self.least / self.times["ours"].median) / (self.copied / self.times[COPY].median)

    def cells(self, baselines: Sequence[str]) -> list[str]:
        ours = self.times["ours"]
        spread = f"{number(ours.median)} [{number(ours.low)}, {number(ours.high)}]"
        ratios = [f"{self.times[b].median / ours.median:.1f}x" if b in self.times else "" for b in baselines]
        return [self.case, self.dtype, self.backend, spread, f"{self.bandwidth_share:.0%}", *ratios]


def _events(device: str) -> Callable[[Call, int], float]:
    """Seconds per call of ``count`` calls."""
    if device == "cpu":  # for a look at this file without a device

        def by_clock(call: Call, count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count

        return by_clock
    streams = torch.cuda if device == "cuda" else torch.xpu

    def by_events(call: Call, count: int) -> float:
        start, end = streams.Event(enable_timing=True), streams.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / count

    return by_events


def in_turn(
    calls: Mapping[str, Call], context: Callable[[str], AbstractContextManager[object]], device: str, rounds: int
) -> dict[str, Quantiles]:
    """Microseconds per call of each, timed alternately, each turn in the context of its name."""
    by_device = _events(device)

    def seconds(name: str, count: int) -> float:
        with context(name):
            return by_device(calls[name], count)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name in calls:
        seconds(name, 2)  # compiles, tunes, allocates
        counts[name] = max(1, min(100, int(TURN_SECONDS / max(1e-7, seconds(name, 2)))))
    for _ in range(rounds):
        for name in calls:
            samples[name].append(1e6 * seconds(name, counts[name]))
    return {name: Quantiles.of(values) for name, values in samples.items()}


def write_page(rows: Sequence[Row], device: str, page: Path) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    baselines = list(dict.fromkeys(b for row in rows for b in row.times if b not in ("ours", COPY)))
    table = [["case", "dtype", "backend", "time", "bandwidth", *(f"against {b}" for b in baselines)]]
    table += [["---"] * len(table[0]), *(row.cells(baselines) for row in rows)]
    facts = "\n".join(f"- {key}: {value}" for key, value in {"device": name, **environment()}.items())
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{PAGE_HEAD}\n{facts}\n\n{lines}\n", encoding="utf-8")

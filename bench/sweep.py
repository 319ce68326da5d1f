"""Cost against size: ``python -m bench.sweep`` writes docs/sweep.csv and draws docs/sweep.svg.

``order_parameters`` forward, and forward plus backward, from one oscillator, harmonic or row to many, the other two
sizes held at case M's; one thread and two, in turn. The upper row of the plot is nanoseconds per row, oscillator and
harmonic: flat where the cost is linear, falling where a fixed cost still shows. The lower row is the gain of the second
thread: threads pay where it leaves 1. Plotted are first deciles, which a neighbour on one core disturbs least; the
table has the medians too. ``--draw`` draws again from docs/sweep.csv.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from functools import partial

import torch

from bench.compare import check_op, forward_backward
from bench.interleave import DOCS, SMOKE, THREADS, Turns, take_turns
from bench.plotted import measure_and_draw
from kssm_kernels import order_parameters
from tests.support.naive import order_parameters as formula

ROWS, OSCILLATORS, HARMONICS = (64, 64, 8) if SMOKE else (4096, 192, 32)
SIZES = {
    "rows": [1, 8] if SMOKE else [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384, 65536],
    "oscillators": [1, 7] if SMOKE else [1, 2, 4, 8, 16, 32, 64, 100, 128, 192, 256, 512, 1000, 1024, 4096],
    "harmonics": [1, 5] if SMOKE else [1, 2, 3, 4, 8, 12, 16, 24, 32, 33, 48, 64, 96, 128, 129, 192, 256],
}
HELD = {"rows": ROWS, "oscillators": OSCILLATORS, "harmonics": HARMONICS}
DIRECTIONS = ("forward", "forward and backward")
SECONDS_PER_POINT = 0.02 if SMOKE else 1.5
PAYS = 1.1  # the second thread's gain from which it counts
COLUMNS = ("axis", "rows", "oscillators", "harmonics", "direction", "threads", "median_us", "low_us", "high_us")


def measure() -> Iterator[dict[str, str]]:
    for axis, sizes in SIZES.items():
        for size in sizes:
            at = HELD | {axis: size}
            theta = (torch.rand(at["rows"], at["oscillators"]) * 2 - 1) * math.pi
            grad = torch.randn(at["rows"], 3 * at["harmonics"])
            leaf = theta.clone().requires_grad_()

            ours = partial(order_parameters, harmonics=at["harmonics"])
            reference = partial(formula, harmonics=at["harmonics"])
            check_op(f"order_parameters at {at}", ours, reference, theta, grad)
            forward = partial(ours, theta)
            both = forward_backward(ours, (leaf,), grad)
            settings = [(d, c, n) for d, c in zip(DIRECTIONS, (forward, both), strict=True) for n in (1, THREADS)]
            turns = [Turns(call, prepare=partial(torch.set_num_threads, n)) for _, call, n in settings]
            for (direction, _, threads), q in zip(settings, take_turns(turns, SECONDS_PER_POINT), strict=True):
                times = (f"{1e6 * v:.2f}" for v in (q.median, q.low, q.high))
                values = (axis, *map(str, at.values()), direction, str(threads), *times)
                yield dict(zip(COLUMNS, values, strict=True))


def series(rows: list[dict[str, str]], axis: str, direction: str, threads: int) -> tuple[list[int], list[float]]:
    """Sizes along ``axis`` and microseconds per call."""
    picked = [r for r in rows if (r["axis"], r["direction"], r["threads"]) == (axis, direction, str(threads))]
    return [int(r[axis]) for r in picked], [float(r["low_us"]) for r in picked]


def terms(axis: str, size: int) -> int:
    return math.prod((HELD | {axis: size}).values())


def pays_from(sizes: list[int], gains: list[float]) -> int | None:
    """The smallest size from which the second thread counts at every larger size as well."""
    first = None
    for size, gain in zip(reversed(sizes), reversed(gains), strict=True):
        if gain < PAYS:
            break
        first = size
    return first


def draw(rows: list[dict[str, str]], caption: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kssm"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex="col", layout="constrained")
    for column, axis in enumerate(SIZES):
        cost, gain_axes = axes[0][column], axes[1][column]
        for direction, colour in zip(DIRECTIONS, ("tab:blue", "tab:red"), strict=True):
            sizes, alone = series(rows, axis, direction, 1)
            _, together = series(rows, axis, direction, THREADS)
            for micros, style, label in ((alone, "--", "1 thread"), (together, "-", f"{THREADS} threads")):
                per_term = [1e3 * m / terms(axis, s) for s, m in zip(sizes, micros, strict=True)]
                cost.plot(sizes, per_term, style, color=colour, marker=".", label=f"{direction}, {label}")
            gains = [a / b for a, b in zip(alone, together, strict=True)]
            start = pays_from(sizes, gains)
            label = direction if start is None else f"{direction}: pays from {start}"
            gain_axes.plot(sizes, gains, "-", color=colour, marker=".", label=label)
        cost.set(xscale="log", yscale="log")
        held = ", ".join(f"{size} {name}" for name, size in HELD.items() if name != axis)
        cost.set_title(f"{axis}  ({held})", fontsize=10)
        gain_axes.axhline(1, color="gray", linewidth=0.8)
        gain_axes.set(xscale="log", xlabel=axis, ylim=(0, THREADS + 0.3))
        gain_axes.legend(fontsize=8)
        for ax in (cost, gain_axes):
            ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("ns per row, oscillator and harmonic")
    axes[1][0].set_ylabel(f"time on 1 thread / on {THREADS}")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("order_parameters, float32, first deciles\n" + textwrap.fill(caption, 130), fontsize=9)
    figure.savefig(DOCS / "sweep.svg", metadata={"Date": None})


if __name__ == "__main__":
    measure_and_draw("sweep", __doc__, COLUMNS, measure, draw)

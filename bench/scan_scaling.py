"""Cost of the oscillator scan against its sizes: ``python -m bench.scan_scaling`` writes docs/scan_scaling.csv and
draws docs/scan_scaling.svg.

``oscillator_scan``, moebius, forward, and forward plus backward, over steps T, sequences B and oscillators D, the other
two sizes held; one thread and two, in turn. Nanoseconds per oscillator and step: flat where the cost is linear, falling
where a fixed cost still shows. Plotted are medians; the table has first and ninth deciles too. ``--draw`` draws again
from the table.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import partial

import torch

from bench.interleave import DOCS, SMOKE, THREADS, Turns, take_turns
from bench.plotted import measure_and_draw
from bench.scan import DIRECTIONS, HARMONICS, OSCILLATORS, Scan

KIND = "moebius"
HELD = {"B": 2, "T": 8, "D": 16} if SMOKE else {"B": 4, "T": 256, "D": 256}
SIZES = {
    "T": [1, 20] if SMOKE else [1, 4, 16, 64, 256, 1024, 4096, 16384],
    "B": [1, 3] if SMOKE else [1, 2, 4, 8, 16, 32, 64],
    "D": [8, 40] if SMOKE else [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
}
SECONDS_PER_POINT = 0.02 if SMOKE else 3.0
COLUMNS = ("axis", "B", "T", "D", "direction", "threads", "median_ns", "low_ns", "high_ns")


def measure() -> Iterator[dict[str, str]]:
    for axis, sizes in SIZES.items():
        for size in sizes:
            at = HELD | {axis: size}
            scan = Scan(KIND, (at["B"], at["T"], at["D"]))
            scan.check()
            settings = [(direction, threads) for direction in DIRECTIONS for threads in (1, THREADS)]
            turns = [Turns(scan.our_call(d), prepare=partial(torch.set_num_threads, n)) for d, n in settings]
            for (direction, threads), q in zip(settings, take_turns(turns, SECONDS_PER_POINT), strict=True):
                times = (f"{1e9 * v / scan.numbers:.3f}" for v in (q.median, q.low, q.high))
                values = (axis, *map(str, at.values()), direction, str(threads), *times)
                yield dict(zip(COLUMNS, values, strict=True))


def draw(rows: list[dict[str, str]], caption: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kssm"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, not as paths
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for ax, axis in zip(axes, SIZES, strict=True):
        for direction, colour in zip(DIRECTIONS, ("tab:blue", "tab:red"), strict=True):
            for threads, style in ((1, "--"), (THREADS, "-")):
                setting = (axis, direction, str(threads))
                picked = [r for r in rows if (r["axis"], r["direction"], r["threads"]) == setting]
                sizes, nanoseconds = [int(r[axis]) for r in picked], [float(r["median_ns"]) for r in picked]
                label = f"{direction}, {threads} thread{'s' * (threads > 1)}"
                ax.plot(sizes, nanoseconds, style, color=colour, marker=".", label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.set_xticks(SIZES[axis][::2], map(str, SIZES[axis][::2]))
        held = ", ".join(f"{name} = {size}" for name, size in HELD.items() if name != axis)
        ax.set(xlabel=axis, title=held)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ns per oscillator and step")
    axes[0].legend(fontsize=8)
    what = f"heads of {OSCILLATORS}, coupled, forget gate, {HARMONICS} harmonics, float32, medians"
    figure.suptitle(f"oscillator_scan, {KIND}, {what}\n{textwrap.fill(caption, 130)}", fontsize=9)
    path = DOCS / "scan_scaling.svg"
    figure.savefig(path, metadata={"Date": None})
    short = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path.read_text(encoding="utf-8"))
    path.write_text(short, encoding="utf-8")


if __name__ == "__main__":
    measure_and_draw("scan_scaling", __doc__, COLUMNS, measure, draw)

"""Long ensembles: ``python -m bench.long_rows`` writes docs/long_rows.csv and draws docs/long_rows.svg.

``kuramoto_update`` of one row, ten steps, float32, one thread, forward, and forward plus backward: nanoseconds per
oscillator and step from ten thousand oscillators to ten million, beside the formula under torch.compile. Flat is
linear. Both take turns in one process; plotted are medians, the table has first and ninth deciles too, and the page
faults of a call: memory mapped anew in every call shows there. ``--draw`` draws again from the table.
"""

from __future__ import annotations

import math
import resource
import textwrap
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.compare import check_op, forward_backward
from bench.interleave import DOCS, SMOKE, Call, interleave
from bench.plotted import measure_and_draw
from kssm_kernels import kuramoto_update
from tests.support import naive

STEPS, COUPLING, DT = 10, 1.5, 0.1
SIZES = [5000] if SMOKE else [10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 2 * 10**6, 4 * 10**6, 10**7]
SECONDS_PER_POINT = 0.1 if SMOKE else 8.0
COLUMNS = ("oscillators", "direction", "who", "median_ns", "low_ns", "high_ns", "page_faults")


def ours(theta: Tensor) -> Tensor:
    return kuramoto_update(theta, COUPLING, dt=DT, steps=STEPS)


def formula(theta: Tensor) -> Tensor:
    return naive.mean_field(theta, COUPLING, dt=DT, steps=STEPS)


def page_faults(call: Call) -> int:
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure() -> Iterator[dict[str, str]]:
    torch.set_num_threads(1)
    functions = {"ours": ours}
    if not SMOKE:
        functions["torch.compile"] = torch.compile(formula, dynamic=True)
    for n in SIZES:
        theta = (torch.rand(1, n) * 2 - 1) * math.pi
        grad = torch.randn(1, n)
        check_op(f"kuramoto_update of {n}", ours, formula, theta, grad)
        leaf = theta.clone().requires_grad_()
        directions: dict[str, dict[str, Call]] = {
            "forward": {who: partial(f, theta) for who, f in functions.items()},
            "forward and backward": {who: forward_backward(f, (leaf,), grad) for who, f in functions.items()},
        }
        for direction, calls in directions.items():
            faults = {who: page_faults(call) for who, call in calls.items()}
            for who, q in interleave(calls, SECONDS_PER_POINT).items():
                times = (f"{1e9 * v / (n * STEPS):.3f}" for v in (q.median, q.low, q.high))
                yield dict(zip(COLUMNS, (str(n), direction, who, *times, str(faults[who])), strict=True))


def draw(rows: list[dict[str, str]], caption: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kssm"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: 25 KB, not 94
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for ax, direction in zip(axes, ("forward", "forward and backward"), strict=True):
        for who, colour in (("ours", "tab:blue"), ("torch.compile", "tab:gray")):
            picked = [r for r in rows if (r["direction"], r["who"]) == (direction, who)]
            if picked:
                sizes, nanoseconds = zip(*((int(r["oscillators"]), float(r["median_ns"])) for r in picked), strict=True)
                ax.plot(sizes, nanoseconds, color=colour, marker=".", label=who)
        ax.set(xscale="log", xlabel="oscillators", title=direction)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("ns per oscillator and step")
    title = f"kuramoto_update, one row, {STEPS} steps, float32, one thread, medians"
    figure.suptitle(f"{title}\n{textwrap.fill(caption, 120)}", fontsize=9)
    figure.savefig(DOCS / "long_rows.svg", metadata={"Date": None})


if __name__ == "__main__":
    measure_and_draw("long_rows", __doc__, COLUMNS, measure, draw)

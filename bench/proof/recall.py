"""``python -m bench.proof.recall``: an OscillatorBank learns to remember a phase, in about ten seconds.

At step 0 of a sequence the input is (cos, sin, 1) of a random phase; at each later step it is (cos, sin, 0) of another
random phase, a distractor. At each later step the model must put out the first phase. The model is one bank of 64
oscillators in 8 heads with its own readout. The control is the same bank without memory: its state is reset at every
step. Its error stays near 90 degrees, that of a guess.

Prints the mean error in degrees against the updates of the weights, then against the delay, up to eight times the
longest delay in training, and draws both. Every batch is new: its error is one on sequences never seen. docs/recall.svg
is drawn by ``--seed 0 1 2 3 4 --plot docs/recall.svg``, a minute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.proof.__main__ import ROOT, machine
from kssm_kernels import OscillatorBank

PLOT = ROOT / "runs" / "recall.svg"
KINDS = "moebius", "stuart_landau"
BATCH, LENGTH, LR = 32, 64, 2e-2  # the longest delay in training is LENGTH - 1
DELAYS = (1, 2, 4, 8, 16, 32, 63, 90, 127, 180, 255, 360, 511)
EVERY = 20  # updates between two points of a learning curve
COLOURS = {"recall": "tab:blue", "without memory": "tab:gray"}


def sequences(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Inputs ``[count, length, 3]``: cosine and sine of a phase, and whether it is the one to remember."""
    phase = torch.rand(count, length, generator=generator) * (2 * math.pi)
    first = (torch.arange(length) == 0).float().expand(count, length)
    return torch.stack((phase.cos(), phase.sin(), first), -1)


def answers(model: OscillatorBank, x: Tensor, memory: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the error in phase after each step but the first, ``[count, length - 1]``."""
    reset = None if memory else torch.ones(x.shape[:-1], dtype=torch.bool)
    said = nn.functional.normalize(model(x, reset=reset)[0], dim=-1)[:, 1:]
    cos, sin, wanted = *said.unbind(-1), x[:, :1, :2]
    return cos * wanted[..., 0] + sin * wanted[..., 1], sin * wanted[..., 0] - cos * wanted[..., 1]


def degrees(cos: Tensor, sin: Tensor) -> Tensor:
    """Size of the error, 0 to 180."""
    return torch.rad2deg(torch.atan2(sin, cos).abs().detach())


@dataclass(frozen=True)
class Run:
    """A trained model's errors in degrees: (updates, error) while it learned, (delay, error) after."""

    who: str
    seed: int
    learning: list[tuple[int, float]]
    delays: list[tuple[int, float]]
    seconds: float

    @property
    def error(self) -> float:
        """Mean over the last tenth of the curve."""
        return statistics.fmean(e for _, e in self.learning[-max(1, len(self.learning) // 10) :])


def train(seed: int, updates: int, *, memory: bool = True, kind: str = "moebius", delays: Sequence[int] = ()) -> Run:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = OscillatorBank(3, 64, 8, kind=kind, out_dim=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    learning = []
    start = time.perf_counter()
    for update in range(updates):
        cos, sin = answers(model, sequences(BATCH, LENGTH, generator), memory)
        optimizer.zero_grad()
        (1 - cos).mean().backward()
        optimizer.step()
        schedule.step()
        if update % EVERY == 0 or update == updates - 1:
            learning.append((update, float(degrees(cos, sin).mean())))
    seconds = time.perf_counter() - start
    found = []
    if delays:
        with torch.no_grad():
            error = degrees(*answers(model, sequences(256, max(delays) + 1, generator), memory)).mean(0)
        found = [(delay, float(error[delay - 1])) for delay in delays]
    return Run("recall" if memory else "without memory", seed, learning, found, seconds)


def printed(runs: Sequence[Run]) -> None:
    """Two tables of the runs of one seed."""
    names = "".join(f"{run.who:>16}" for run in runs)
    for label, curves in (("updates", [r.learning for r in runs]), ("delay", [r.delays for r in runs])):
        print(f"{label:>8}{names}")
        for points in list(zip(*curves, strict=True))[:: 2 if label == "updates" else 1]:
            print(f"{points[0][0]:8d}" + "".join(f"{error:14.1f}°" for _, error in points))
    for run in runs:
        print(f"{run.who}, seed {run.seed}: {run.error:.1f}° in {run.seconds:.1f} s", flush=True)


def draw(runs: Sequence[Run], caption: str, target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kssm"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for run in runs:
        label = run.who if run.seed == runs[0].seed else None
        for ax, points in zip(axes, (run.learning, run.delays), strict=True):
            ax.plot(*zip(*points, strict=True), color=COLOURS[run.who], linewidth=1, label=label)
    axes[0].set(xlabel="updates of the weights", ylabel="mean error, degrees", title="while it learns", ylim=(0, 120))
    axes[1].set(xlabel="delay, steps", title="after training", xscale="log")
    axes[1].axvline(LENGTH - 1, color="black", linewidth=0.8, linestyle="--", label="longest delay in training")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="center")
    figure.suptitle("\n".join(textwrap.wrap(caption, 120)), fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof.recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=700, help="updates of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more; each is a run and its control")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="of oscillators (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 updates: a look at the program, nothing is learned")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the SVG goes (runs/recall.svg)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    updates, delays = (20, DELAYS[:4]) if args.quick else (args.steps, DELAYS)
    runs: list[Run] = []
    for seed in args.seed:
        both = [train(seed, updates, memory=memory, kind=args.kind, delays=delays) for memory in (True, False)]
        printed(both)
        runs += both
    seeds = f"seed{'s' * (len(args.seed) > 1)} {', '.join(map(str, args.seed))}"
    draw(runs, f"Recall of a phase, {args.kind}, {updates} updates, {seeds}; {machine()}", args.plot)
    print(f"drawn: {args.plot}")


if __name__ == "__main__":
    main()

"""``python -m bench.proof``: runs the experiments, about twenty minutes on one core, and writes
docs/optimizer.md from docs/optimizer_notes.md.

Results are kept as JSON, one file for each experiment: ``--only NAME ...`` runs these and takes the others from there,
``--only`` alone rebuilds the page. ``--quick`` is a look at the program, of seconds: its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from bench.proof import continual, freezing, page, single
from bench.proof.training import Effort

ROOT = Path(__file__).parents[2]
PAGE, NOTES = ROOT / "docs" / "optimizer.md", ROOT / "docs" / "optimizer_notes.md"
RESULTS = ROOT / "runs" / "proof"
EXPERIMENTS = {  # states and scale use what digits and lm have tuned
    "digits": single.digits,
    "scale": single.scale,
    "lm": single.lm,
    "states": single.states,
    "split": continual.split_digits,
    "split_heads": continual.split_digits_heads,
    "permuted": continual.permuted_digits,
    "noise": freezing.noise_floor,
    "freezing": freezing.freezing,
}


def machine() -> str:
    """Processor, threads, versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = lines[0] if lines else name
    threads = torch.get_num_threads()
    return (
        f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[*EXPERIMENTS], metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, help="seeds of every table, in place of each one's own number")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps, one point of each grid")
    parser.add_argument("--text", type=Path, help="a UTF-8 text for the character model (Python's help topics)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.quick and args.page == PAGE:
        parser.error("--quick needs a --page of its own")
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, experiment in EXPERIMENTS.items():
        kept = args.results / f"{name}.json"
        if args.only is None or name in args.only:
            start = time.perf_counter()
            result = experiment(Effort(args.seeds, args.quick), args.text, found)
            more = "".join(f" {flag}" for flag in _flags(args))
            result["command"] = f"python -m bench.proof --only {name}{more}"
            result["machine"], result["seconds"] = machine(), time.perf_counter() - start
            kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {result['seconds']:.0f} s", flush=True)
        if kept.exists():
            found[name] = json.loads(kept.read_text(encoding="utf-8"))
    args.page.write_text(page.written(NOTES.read_text(encoding="utf-8"), found), encoding="utf-8")


def _flags(args: argparse.Namespace) -> list[str]:
    return [f"--seeds {args.seeds}"] * bool(args.seeds) + ["--quick"] * args.quick + ["--text FILE"] * bool(args.text)


if __name__ == "__main__":
    main()

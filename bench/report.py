"""``python -m bench.report``: runs the bench and writes docs/performance.md and docs/performance.json.

The page is made anew each time from the figures and from docs/performance_notes.md, which is written by hand and never
touched here. ``--render`` makes the page again from docs/performance.json and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.compare import Figure
from bench.interleave import DOCS, SMOKE
from bench.table import markdown_table

ROOT = Path(__file__).parents[1]
DATA, PAGE, NOTES = DOCS / "performance.json", DOCS / "performance.md", ROOT / "docs" / "performance_notes.md"
TITLES = {
    "test_order_parameters.py": "Order parameters: theta [8, 512, 192], 32 harmonics, float32",
    "test_kuramoto_update.py": "Phase update: theta [8, 512, 192], float32",
    "test_long_calls.py": "Calls of many steps: theta [64, 192], float32, one thread",
    "test_oscillator_scan.py": "Oscillator scan: heads of 8 oscillators, forget gate, 4 harmonics, float32",
    "test_scan_loop.py": "Oscillator scan in a closed loop of 64 communities, and a training step of K-SSM v4",
    "test_bank.py": "FusedKuramoto: width 384, batch 4, length 512, 192 oscillators, 32 harmonics",
    "test_memory.py": "Peak extra memory",
    "test_train_step.py": "One training step of K-SSM v3: batch 4, length 512",
    "test_optimizer.py": "One step of SignSplitEMA: normalized, float32 parameters",
    "test_overhead.py": "Overhead of a call on tiny tensors, and of the import",
}
INTRODUCTION = """\
# Performance

Made by `python -m bench.report`; the figures are in `performance.json` beside it. All callables of a case are timed in
turn in one process, {threads} threads, behind a check of ours against the formula in float64. Times are medians with
first and ninth decile. A figure is: against a formula, its time over ours; against the arithmetic floor, the floor's
time over ours, where 100 % cannot be beaten; for memory, our share; for overhead, the excess.

The arithmetic floor is a loop over vectors in registers with two fused multiply-adds and two adds per harmonic and
vector for a forward pass (twice that for forward and backward), timed in turn with the kernel; that of the oscillator
scan is the arithmetic of its equations, counted in csrc/cpu/scan_floor.cpp.
Cost against size: [sweep.svg](sweep.svg), by `python -m bench.sweep`; of long ensembles
[long_rows.svg](long_rows.svg), by `python -m bench.long_rows`; of the oscillator scan
[scan_scaling.svg](scan_scaling.svg), by `python -m bench.scan_scaling`.
"""


def run_bench() -> dict[str, Any]:
    """Environment and figures of one run, by file."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "benchmark.json"
        arguments = ["bench", "--benchmark-only", f"--benchmark-json={raw}"]
        subprocess.run([sys.executable, "-m", "pytest", *arguments], check=True, cwd=ROOT)
        run = json.loads(raw.read_text())
    figures: dict[str, list[Any]] = {name: [] for name in TITLES}
    for benchmark in run["benchmarks"]:
        name = Path(benchmark["fullname"].split("::")[0]).name
        if name in TITLES:  # the benches for a device write a page of their own, and try that on the CPU
            figures[name] += benchmark["extra_info"].get("figures", [])
    return {"environment": run["machine_info"]["environment"], "figures": figures}


def render(run: dict[str, Any]) -> str:
    facts = run["environment"]
    parts = [INTRODUCTION.format(threads=facts["threads"])]
    if run["smoke"]:
        parts.append("**A smoke run on tiny sizes: the figures mean nothing.**\n")
    parts.append("\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())]) + "\n")
    for name, title in TITLES.items():
        rows = run["figures"].get(name, [])
        if rows:
            parts.append(f"## {title}\n\n{markdown_table([Figure.from_row(row) for row in rows])}\n")
    if NOTES.exists():
        parts.append(f"<!-- what follows is {NOTES.name}: edit it there -->\n\n{NOTES.read_text().strip()}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only make the page from docs/performance.json")
    if not parser.parse_args().render:
        run = run_bench() | {"smoke": SMOKE}
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps(run, indent=1) + "\n")
    PAGE.write_text(render(json.loads(DATA.read_text())))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

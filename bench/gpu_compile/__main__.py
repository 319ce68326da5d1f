"""``python -m bench.gpu_compile``: compiles the GPU kernels for devices that need not be here and writes
docs/gpu_compile.md: registers, spills, widths of loads and stores, bytes moved beside the least, bounds, predictions.

``--check`` writes nothing, and fails where a bar is not met. CUDA C++ is left out where nvcc is not found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_compile import compile as compiling
from bench.gpu_compile import listing
from bench.gpu_compile.cases import CASES, HARMONICS, Case, N
from bench.gpu_compile.listing import Code
from bench.gpu_compile.traffic import rows_of
from bench.table import number

ROOT = Path(__file__).parents[2]
PAGE, NOTES = ROOT / "docs" / "gpu_compile.md", ROOT / "docs" / "gpu_compile_notes.md"
SIZES = {"float32": 4, "bfloat16": 2}
MOST_TRAFFIC = 1.1
# Kernels that pass over whole rows of phases or elements, and those of them that write such rows.
READS_ROWS = ("order_parameters_forward", "order_parameters_backward", "kuramoto", "sign_split_step")
WRITES_ROWS = (
    "order_parameters_backward", "kuramoto_forward", "kuramoto_backward", "kuramoto_long", "kuramoto_step",
    "sign_split_step",
)  # fmt: skip
WRITES_SUMS = ("kuramoto_long_adjoint_sums", "kuramoto_sums", "kuramoto_long_sums")


@dataclass(frozen=True)
class Device:
    """Published figures: bytes and float32 operations (a fused multiply-add is one) per second."""

    name: str
    bandwidth: float
    operations: float


DEVICES = (
    Device("A100 80 GB", 2.04e12, 108 * 64 * 1.41e9),
    Device("H100 SXM", 3.35e12, 132 * 128 * 1.755e9),
    Device("B200", 8.0e12, 148 * 128 * 1.85e9),
)


def faults(codes: Sequence[Code], traffic: dict[str, dict[str, int]]) -> list[str]:
    """Where a bar is not met."""
    found = []
    for code in codes:
        where = f"{code.backend} {code.kernel} on {code.target}"
        if code.spills or code.stack:
            found.append(f"{where}: {code.spills} spills, {code.stack} bytes of stack")
        if code.scalar_spills:
            found.append(f"{where}: {code.scalar_spills} scalar registers spilled to lanes of vector registers")
        if code.kernel.startswith(READS_ROWS) and 128 not in code.loads:
            found.append(f"{where}: no 128-bit load (bits of a thread's load: {', '.join(map(str, code.loads))})")
        rows = code.kernel.startswith(WRITES_ROWS) and not code.kernel.startswith(WRITES_SUMS)
        if rows and 128 not in code.stores:
            found.append(f"{where}: no 128-bit store (bits of a thread's store: {', '.join(map(str, code.stores))})")
        if code.special:
            found.append(f"{where}: {code.special} approximate sines or cosines")
    for backend, moved in traffic.items():
        for case in (c for c in CASES if backend in c.backends):
            for dtype in SIZES:
                share = _share(case, dtype, moved)
                if share > MOST_TRAFFIC:
                    found.append(f"{backend} {case.name}, {dtype}: {share:.2f} times the least traffic")
    return found


# What is known, with its reason in docs/gpu_compile_notes.md: everything else is an error under --check.
KNOWN = ("scalar registers spilled to lanes", "triton kuramoto_backward, bfloat16")


def _share(case: Case, dtype: str, moved: dict[str, int]) -> float:
    return moved[f"{case.name}, {dtype}"] / case.least(rows_of(case), SIZES[dtype])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} x {width}" for width, count in counts.items()) or "none"


def _merged(codes: Sequence[Code]) -> list[Code]:
    """One row per kernel, dtype and target: of several specialisations the one with most registers."""
    most: dict[tuple[str, str, str], Code] = {}
    for code in codes:
        key = (code.backend, code.kernel, code.target)
        if key not in most or code.registers > most[key].registers:
            most[key] = code
    return list(most.values())


def _kernels(codes: Sequence[Code], targets: Sequence[str]) -> str:
    """Registers on every target; loads, stores and instructions on the one in the middle."""
    merged = {(c.backend, c.kernel, c.target): c for c in _merged(codes)}
    names = list(dict.fromkeys((c.backend, c.kernel) for c in codes))
    rows = []
    for backend, kernel in names:
        of = {t: merged[backend, kernel, t] for t in targets if (backend, kernel, t) in merged}
        shown = of.get("sm_90") or next(iter(of.values()))
        rows.append(
            [
                backend,
                kernel,
                " / ".join(str(c.registers) for c in of.values()),
                str(max(c.spills + c.stack for c in of.values())),
                str(shown.shared),
                _widths(shown.loads),
                _widths(shown.stores),
                str(shown.instructions),
            ]
        )
    header = ("backend", "kernel", f"registers {' / '.join(targets)}", "spills", "shared", "loads", "stores", "instr.")
    return _table(header, rows)


def _cases(traffic: dict[str, dict[str, int]]) -> str:
    rows = []
    for case in CASES:
        for dtype, size in SIZES.items():
            least, elements = case.least(case.rows, size), case.rows * case.n
            moved = [f"{_share(case, dtype, traffic[b]):.2f}" if b in case.backends else "" for b in ("cuda", "triton")]
            times = []
            for device in DEVICES:
                memory, arithmetic = least / device.bandwidth, elements * case.operations / device.operations
                bound = "memory" if memory > arithmetic else "arithmetic"
                times.append(f"{number(1e6 * max(memory, arithmetic))} us, {bound}")
            per_element = f"{least / elements:.2f}"
            rows.append([case.name, dtype, per_element, *moved, f"{case.operations:.0f}", *times])
    header = ("case", "dtype", "least bytes per oscillator", "CUDA moves", "Triton moves", "operations per oscillator")
    return _table((*header, *(f"{d.name}, predicted" for d in DEVICES)), rows)


def _shuffles(codes: Sequence[Code]) -> str:
    """Shuffles for the sums of one row of N oscillators, by backend: the evidence for the default."""
    groups = -(-HARMONICS // 5)
    found = {
        c.backend: c
        for c in codes
        if (c.kernel, c.target) == ("order_parameters_forward, float32", "sm_90") and c.looped_shuffles + c.shuffles
    }
    lines = []
    if "triton" in found:
        each = found["triton"].looped_shuffles * groups
        lines.append(f"- Triton: {found['triton'].looped_shuffles} in the loop over {groups} groups, {each} a row.")
    if "cuda" in found:
        each = found["cuda"].shuffles
        lines.append(f"- CUDA: {each} for the two rows that a warp holds, {each // 2} a row.")
    return "\n".join(lines)


def page(codes: Sequence[Code], traffic: dict[str, dict[str, int]], seconds: dict[str, float]) -> str:
    import triton

    nvcc = [c for c in codes if c.backend == "cuda"]
    version = listing.run("nvcc", "--version").splitlines()[-2].strip() if nvcc else "not found: CUDA left out"
    facts = {
        "date": datetime.date.today().isoformat(),
        "triton": triton.__version__,
        "nvcc": version,
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **{f"time for {name}": f"{value:.0f} s" for name, value in seconds.items()},
    }
    missed = faults(codes, traffic)
    devices = "; ".join(
        f"{d.name} {d.bandwidth / 1e12:.2f} TB/s and {d.operations / 1e12:.1f} T operations/s" for d in DEVICES
    )
    return NOTES.read_text(encoding="utf-8").format(
        facts="\n".join(f"- {k}: {v}" for k, v in facts.items()),
        compiled=len(codes),
        missed="\n".join(f"- {m}" for m in missed) or "- none",
        cases=_cases(traffic),
        devices=devices,
        nvidia=_kernels([c for c in codes if c.target.startswith("sm_")], ("sm_80", "sm_90", "sm_100")),
        amd=_kernels([c for c in codes if not c.target.startswith("sm_")], compiling.AMD),
        shuffles=_shuffles(codes),
        n=N,
        harmonics=HARMONICS,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a bar is not met")
    arguments = parser.parse_args()
    seconds, codes = {}, []
    for name, function in compiling.CODES.items():
        start = datetime.datetime.now()
        codes += function()
        seconds[f"compiling {name}"] = (datetime.datetime.now() - start).total_seconds()
    start = datetime.datetime.now()
    counted = subprocess.run(
        [sys.executable, "-m", "bench.gpu_compile.traffic"],
        check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    traffic = json.loads(counted.stdout)
    seconds["counting bytes"] = (datetime.datetime.now() - start).total_seconds()
    if arguments.check:
        new = [fault for fault in faults(codes, traffic) if not any(known in fault for known in KNOWN)]
        print(f"{len(codes)} compilations; " + "; ".join(f"{k} {v:.0f} s" for k, v in seconds.items()))
        print("\n".join(new) or "every bar is met")
        return 1 if new else 0
    PAGE.write_text(page(codes, traffic, seconds), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

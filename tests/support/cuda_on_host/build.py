"""Builds csrc/cuda for the CPU (cuda_host.h) with the C++ compiler, once for each state of the sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
CACHE = Path(os.environ.get("KSSM_TEST_CACHE", HERE.parents[2] / "build" / "cuda_on_host"))
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", *WARNINGS]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def _machine_flags() -> list[str]:
    """A fused multiply-add in hardware where there is one: a thousand times as quick as the library's."""
    cpu = Path("/proc/cpuinfo")
    return ["-mfma"] if cpu.exists() and " fma " in cpu.read_text() else []


def build(*sources: Path, headers: Path = CSRC, name: str = "kssm_cuda") -> Path:
    """The library of ``sources`` (all of csrc/cuda if none are given), from the cache if nothing has changed.

    ``headers`` holds the folders cuda and math that relative includes do not reach.
    """
    found = compiler()
    assert found is not None
    if not sources:
        sources = tuple(sorted((headers / "cuda").glob("*.cu")))
    flags = [
        *FLAGS,
        *_machine_flags(),
        "-DKSSM_ISA=cuda",
        f'-DKSSM_ABI="{hashlib.sha256((headers / "calls.h").read_bytes()).hexdigest()[:12]}"',
        "-I",
        str(headers / "cuda"),
        "-include",
        str(HERE / "cuda_host.h"),
    ]
    state = hashlib.sha256(" ".join([found, *flags]).encode())
    for path in sorted(
        {*sources, *HERE.glob("cuda_host.*"), *headers.glob("*.h"), *headers.glob("cuda/*"), *headers.glob("math/*")}
    ):
        state.update(path.name.encode() + path.read_bytes())
    target = CACHE / f"{name}-{state.hexdigest()[:16]}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(source: Path) -> str:
            out = Path(folder, f"{source.stem}.o")
            _run([found, *flags, "-x", "c++", "-c", str(source), "-o", str(out)])
            return str(out)

        objects = list(pool.map(compile_one, [*sources, HERE / "cuda_host.cpp"]))
        fresh = Path(folder, target.name)
        _run([found, "-shared", *objects, "-o", str(fresh)])
        shutil.copy(fresh, target.with_suffix(f".{os.getpid()}"))
    target.with_suffix(f".{os.getpid()}").rename(target)  # at once, beside other processes that build the same
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

"""Writes docs/accuracy.md: ``python -m tests.accuracy [path]`` from the repository's root.

With TRITON_INTERPRET=1 and KSSM_CUDA_ON_HOST=1 the GPU kernels are in it too, as they compute on CPU tensors.

The cases, the truth and the framework are those of the conformance tests.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kssm_kernels
from tests.support import devices
from tests.support.cases import DTYPES, Case, evaluate, threads
from tests.support.specs import CASES, arguments, by_equation, by_package, truth_of

HEAD = """# Accuracy

Made by `TRITON_INTERPRET=1 KSSM_CUDA_ON_HOST=1 python -m tests.accuracy`; do not edit. torch {torch}. Backends:

{build}

The GPU kernels ran on the CPU: the CUDA sources compiled for it, the Triton kernels interpreted. A device adds up in
another order and has an exponential of its own (in `bistable_coupling`); the rest is the same arithmetic.

Error of every op against its equation in float64 (`tests/support/naive.py`), evaluated on the very numbers the kernel
got, over the {count} cases of the conformance tests. *Kernel* is the backend named, *framework* the same equation
written in torch in the same dtype. Errors are divided by the largest true value of the tensor where that is above 1:
features and phases near the unit circle are absolute (phases in radians), gradients relative to their largest element.

*Phases*: **moderate** up to some multiples of pi; **any** of all sizes from 1e-4 to 1e30 (to 65,504 in float16; to 1e6
in float64, where H |theta| ulp of the error are the truth's own). 16-bit results are rounded once: half an ulp is
2.0e-03 below 1 and 3.9e-03 above in bfloat16, 2.4e-04 and 4.9e-04 in float16.
"""


@dataclass
class Entry:
    """Largest and root-mean-square error of one kind of result; where the largest was."""

    worst: float = -1.0
    where: str = ""
    squares: float = 0.0
    count: int = 0
    framework_worst: float = 0.0
    framework_squares: float = 0.0
    framework_count: int = 0

    def add(self, case: Case, key: str, got: Tensor, truth: Tensor, framework: Tensor, args: dict[str, object]) -> None:
        scale = max(1.0, float(truth.abs().max()))
        error = (got.double() - truth).abs() / scale
        self.squares += float(error.square().sum())
        self.count += error.numel()
        if not float(error.max()) <= self.worst:  # a NaN counts as the worst
            self.worst = float(error.max())
            index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
            self.where = describe(case, key, index, args)
        other = (framework.double() - truth).abs() / scale
        other = other[other.isfinite()]  # float16 loses 1e-8 under the square root and divides by zero
        if other.numel():
            self.framework_worst = max(self.framework_worst, float(other.max()))
            self.framework_squares += float(other.square().sum())
            self.framework_count += other.numel()

    def row(self, op: str, key: str, phases: str) -> str:
        rms = math.sqrt(self.squares / self.count)
        framework = math.sqrt(self.framework_squares / max(1, self.framework_count))
        name = key if not key.startswith("d ") else f"gradient of {key[2:]}"
        return (
            f"| {op} | {name} | {phases} | {self.worst:.1e} | {rms:.1e} | "
            f"{self.framework_worst:.1e} | {framework:.1e} | {self.where} |"
        )


def describe(case: Case, key: str, index: tuple[int, ...], args: dict[str, object]) -> str:
    """The worst input: the phase itself for single oscillators, else the case and the element."""
    theta = args.get("theta")
    if case.op == "order_parameters" and isinstance(theta, Tensor) and case.shape[-1] == 1:
        harmonic = (
            f", {'CSM'[index[-1] // case.harmonics]}_{index[-1] % case.harmonics + 1}" if key == "features" else ""
        )
        return f"theta = {theta[index[:-1]].item():.9g}{harmonic}, H = {case.harmonics}"
    rest = case.name.removeprefix(f"{case.op}-")
    return f"`{rest}` at {list(index)}"


def measure(backend: str, dtype: torch.dtype) -> dict[tuple[str, str, str], Entry]:
    found: dict[tuple[str, str, str], Entry] = {}
    for case in (c for c in CASES if devices.serves(backend, dtype, c.op)):
        truth, args = truth_of(case, dtype), arguments(case, dtype)
        with kssm_kernels.use_backend(backend), threads(1 if backend == "torch" else 2):
            got = evaluate(by_package, case, args, dtype)
        with threads(1):
            framework = evaluate(by_equation, case, args, dtype)
        phases = "" if "theta" not in args else "any" if case.phases in ("large", "any") else "moderate"
        for key, value in truth.items():
            if value.numel():
                entry = found.setdefault((case.op, key, phases), Entry())
                entry.add(case, key, got[key], value, framework[key], args)
    return found


def main(path: str = "docs/accuracy.md") -> None:
    build = "- " + kssm_kernels.build_info().replace("; ", "\n- ")
    lines = [HEAD.format(torch=torch.__version__, build=build, count=len(CASES))]
    for backend in devices.backends_of("cpu"):
        for dtype in (d for d in DTYPES if devices.serves(backend, d)):
            lines += [
                f"## Backend {backend}, {str(dtype).removeprefix('torch.')}\n",
                "| op | result | phases | kernel max | kernel rms | framework max | framework rms | worst input |",
                "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
                *(entry.row(*key) for key, entry in measure(backend, dtype).items()),
                "",
            ]
    Path(path).write_text("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Every op by its name, found in the files of this folder: a new op adds a file with SPECS of its own, and no more.

The conformance tests, docs/accuracy.md and the checks of the kernels without a device walk CASES.
"""

from __future__ import annotations

import functools
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor

from tests.support.cases import Args, Case, Result, Spec, evaluate, generator, threads, widened

SPECS: dict[str, Spec] = {}
for _module in iter_modules(__path__):
    SPECS |= import_module(f"{__name__}.{_module.name}").SPECS
CASES = [case for spec in SPECS.values() for case in spec.cases]


def arguments(case: Case, dtype: torch.dtype, device: str = "cpu") -> Args:
    """Tensor and number arguments of the call, rounded once from float64 to ``dtype``; the same on every call."""

    def ready(t: Tensor) -> Tensor:
        return t.to(dtype).to(device)

    return SPECS[case.op].draw(case, dtype, generator(case), ready)


def by_equation(case: Case, args: Args) -> Result:
    return SPECS[case.op].by_equation(case, args)


def by_package(case: Case, args: Args) -> Result:
    return SPECS[case.op].by_package(case, args)


@functools.lru_cache(maxsize=512)
def truth_of(case: Case, dtype: torch.dtype) -> Result:
    with threads(1):
        return evaluate(by_equation, case, widened(arguments(case, dtype), torch.float64), dtype)

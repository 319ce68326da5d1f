"""What a case of an op is, what must be known of an op to test it, and how outputs and gradients of a call are found.

The ops themselves, one file per family, are in tests/support/specs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PATHS = EAGER, DISPATCHER = ("eager", "dispatcher")
OPERANDS = ("coupling", "omega", "phase_lag", "noise_scale")
SEED = 20 * 2**32 + 7

Operand = tuple[int, ...] | float | None  # shape of a tensor operand, a number, or absent
Args = dict[str, Any]
Result = dict[str, Tensor]
Slack = dict[str, Tensor | float]


@dataclass(frozen=True)
class Case:
    """One call. Operands: a shape (a tensor with a gradient), a number, or None (absent)."""

    op: str
    shape: tuple[int, ...]
    harmonics: int = 0
    coupling: Operand = None
    omega: Operand = None
    phase_lag: Operand = None
    noise_scale: Operand = None
    dt: float = 1.0
    steps: int = 1
    layout: str = "contiguous"
    phases: str = "uniform"
    return_phases: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    options: tuple[tuple[str, Any], ...] = ()  # what one op alone has, by name
    name: str = field(init=False, default="")

    def __post_init__(self) -> None:
        parts = [self.op, "x".join(map(str, self.shape)) or "scalar"]
        if self.harmonics:
            parts.append(f"H{self.harmonics}")
        for operand in OPERANDS:
            spec = getattr(self, operand)
            if spec is not None and not (operand == "coupling" and spec == 1.0):
                parts.append(f"{operand}:{'x'.join(map(str, spec)) or '()' if isinstance(spec, tuple) else spec}")
        parts += [f"steps{self.steps}"] if self.steps != 1 else []
        parts += [v for v in (self.layout, self.phases) if v not in ("contiguous", "uniform")]
        parts += [] if self.return_phases else ["features-only"]
        parts += ["no-clamp"] if self.clamp is None else []
        parts += [str(v) if isinstance(v, str) else k if v is True else f"{k}{v}" for k, v in self.options]
        object.__setattr__(self, "name", "-".join(parts))

    @property
    def ensembles(self) -> torch.Size:
        shapes = [s[:-1] for s in (getattr(self, o) for o in OPERANDS) if isinstance(s, tuple)]
        return torch.broadcast_shapes(self.shape[:-1], *shapes)


@dataclass(frozen=True)
class Spec:
    """An op, as its tests know it.

    draw        the arguments of a case, drawn in float64 from the generator; ``ready`` rounds each, once
    by_equation outputs by name, by the equation in plain torch (naive.py)
    by_package  the same by the package
    slack       what each output and gradient may be off beside the framework's error (tolerance.py); its arguments
                are those of the case, widened to float64, and the truth
    """

    cases: Sequence[Case]
    draw: Callable[[Case, torch.dtype, torch.Generator, Callable[[Tensor], Tensor]], Args]
    by_equation: Callable[[Case, Args], Result]
    by_package: Callable[[Case, Args], Result]
    slack: Callable[[Case, torch.dtype, Args, Result], Slack]
    widens: tuple[str, ...] = ()  # outputs that come in the compute dtype inside
    beyond_framework: tuple[str, ...] = ()  # kinds of phases that torch's formula loses: held to the slack alone


def generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(case.name.encode()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def through(path: str) -> Iterator[None]:
    """Sends calls by the eager path (that of plain eager calls) or by the dispatcher path (any dispatch mode does)."""
    with _PassThrough() if path == DISPATCHER else nullcontext():
        yield


def cotangents(case: Case, outputs: Result, dtype: torch.dtype) -> Result:
    """dL/d(output): drawn in float64, rounded to ``dtype`` so that every evaluation gets the same numbers."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ 1)
    return {k: torch.randn(v.shape, generator=g, dtype=torch.float64).to(dtype) for k, v in outputs.items()}


def evaluate(function: Callable[[Case, Args], Result], case: Case, args: Args, dtype: torch.dtype) -> Result:
    """Outputs and gradients ("d theta", ...) of one call; ``dtype`` is the one the cotangents are rounded to.

    An argument that takes no part (steps = 0) has the gradient zero, whether autograd says so or says None.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if isinstance(v, Tensor)}
    outputs = function(case, {**args, **leaves})
    given = cotangents(case, outputs, dtype)
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [given[k].to(v) for k, v in outputs.items()], allow_unused=True
    )
    found = {k: v.detach() for k, v in outputs.items()}
    for (k, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d {k}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def widened(args: Args, dtype: torch.dtype) -> Args:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in args.items()}

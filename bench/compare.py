"""One case of the bench: our callable beside its baselines, behind a correctness gate, as figures with targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.interleave import CASE_SECONDS, Call, Quantiles, Turns, rounds_for
from kssm_kernels import backends

FLOOR = "arithmetic floor"
COPY = "copy of as many bytes"
# The gates below ask whether a result is right, and a wrong one is off by its own size; tests/ ask how accurate it is.
# Relative slack: the gradient of the magnitudes holds C / M, and among random phases M comes down to 1e-3 in some row
# and harmonic, which magnifies a float32 rounding of C to 1e-4.
SLACK = 1e-4
GATE_ROWS = 64  # what the formula in float64 can afford
# The bank's u is a quotient whose denominator comes near zero in some row of a batch. That magnifies the rounding of
# any formula, one more than another by luck: gradients off by up to 3e-4 in either, six layers deep.
BANK_SLACK = 1e-2


@dataclass(frozen=True)
class Figure:
    """One row of the table. ``ours`` and ``theirs`` are in ``unit``; ``value`` compares their medians as ``kind`` says.

    speedup: theirs / ours, at least the target. floor: the same, for a bound that cannot be beaten: a fraction of 1.
    share: ours / theirs, at most the target. excess: ours - theirs in the unit, at most the target. itself: ours in the
    unit, at most the target, theirs as context.
    """

    case: str
    against: str
    unit: str
    ours: Quantiles
    theirs: Quantiles
    kind: Literal["speedup", "floor", "share", "excess", "itself"]
    target: float | None

    @property
    def value(self) -> float:
        ours, theirs = self.ours.median, self.theirs.median
        if self.kind in ("excess", "itself"):
            return ours - theirs if self.kind == "excess" else ours
        return ours / theirs if self.kind == "share" else theirs / ours

    @property
    def at_least(self) -> bool:
        return self.kind in ("speedup", "floor")

    @property
    def reached(self) -> str:
        if self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "yes" if met else "no"

    def shown(self, value: float) -> str:
        """A value of this figure's kind, as text."""
        if self.kind in ("excess", "itself"):
            return f"{value:.1f} {self.unit}"
        return f"{value:.0%}" if self.kind in ("floor", "share") else f"{value:.1f}x"

    @property
    def wanted(self) -> str:
        if self.target is None:
            return ""
        return f"at {'least' if self.at_least else 'most'} {self.shown(self.target)}"

    def as_row(self) -> dict[str, object]:
        return asdict(self) | {"value": self.value, "reached": self.reached}

    @staticmethod
    def from_row(row: Mapping[str, object]) -> Figure:
        fields = {k: v for k, v in row.items() if k in Figure.__dataclass_fields__}
        quantiles = {k: Quantiles(**row[k]) for k in ("ours", "theirs")}  # type: ignore[arg-type]  # as_row's
        return Figure(**(fields | quantiles))  # type: ignore[arg-type]  # as_row's


def record(benchmark: BenchmarkFixture, figures: Sequence[Figure]) -> None:
    """Leaves the figures where the terminal summary (conftest.py) and ``bench.report`` find them."""
    benchmark.extra_info["figures"] = [figure.as_row() for figure in figures]


def compare(
    benchmark: BenchmarkFixture,
    case: str,
    ours: Call,
    baselines: Mapping[str, Call],
    targets: Mapping[str, float],
    seconds: float = CASE_SECONDS,
) -> None:
    """Times ``ours`` by the fixture and the baselines in turn with it, and records one figure per baseline.

    The fixture times one call a round; the set-up of the first round of each turn runs the baselines' turns.
    """
    mine = Turns(ours)
    others = {name: Turns(call) for name, call in baselines.items()}
    rounds = rounds_for([mine, *others.values()], seconds)
    count = itertools.count()

    def others_first() -> None:
        if next(count) % mine.calls == 0:
            for turns in others.values():
                turns.turn()
            mine.warm()

    benchmark.pedantic(ours, setup=others_first, rounds=rounds * mine.calls)
    if benchmark.stats is None:  # --benchmark-disable
        return
    measured = milliseconds(benchmark.stats.stats.data)
    record(
        benchmark,
        [
            Figure(
                case,
                name,
                "ms",
                measured,
                milliseconds(turns.samples),
                "floor" if name in (FLOOR, COPY) else "speedup",
                targets.get(name),
            )
            for name, turns in others.items()
        ],
    )


def milliseconds(seconds: Sequence[float]) -> Quantiles:
    return Quantiles.of([1e3 * s for s in seconds])


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Call:
    """``function(inputs[0])`` and the gradients of all of ``inputs`` for ``grad`` at its result."""
    return lambda: torch.autograd.grad(function(inputs[0]), inputs, grad)


def floor(elements: int, harmonics: int, passes: int, threads: int) -> dict[str, Call]:
    """The least arithmetic of the order parameters, run as a loop: nothing if the extension is not built.

    Per harmonic and vector of float32 two fused multiply-adds (the recurrences of cosine and sine) and two adds (their
    sums), with no memory traffic, no sine and no square root. A backward pass has as much again: ``passes`` is 1 for
    forward, 2 for forward and backward. Timed in turn with the kernel, so it runs at the same clock.
    """
    extension = backends.cpu_extension
    if not hasattr(extension, "arithmetic_floor"):
        return {}
    vectors = elements * 4 // extension.vector_bytes()

    def call() -> None:
        for _ in range(passes):
            extension.arithmetic_floor(vectors, harmonics, threads)

    return {FLOOR: call}


def copy_of(traffic: int, device: str = "cpu") -> Call:
    """A copy that reads and writes ``traffic`` bytes in all: the machine's bandwidth."""
    source = torch.ones(traffic // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written once: no page is touched for the first time in a timing
    return lambda: target.copy_(source)


def check(
    name: str,
    ours: Sequence[Tensor],
    framework: Sequence[Tensor],
    truth: Sequence[Tensor],
    slack: float = SLACK,
) -> None:
    """The gate before a timing: max |ours - truth| <= 2 max |framework - truth| + slack max |truth|, in float64."""
    for i, (a, b, t) in enumerate(zip(ours, framework, truth, strict=True)):
        assert t.dtype == torch.float64
        error = (a - t).abs().max().item()
        allowed = 2 * (b - t).abs().max().item() + slack * t.abs().max().item()
        assert error <= allowed, f"{name}, tensor {i}: error {error:.3e} against float64, allowed {allowed:.3e}"


def check_op(
    name: str,
    ours: Callable[[Tensor], Tensor],
    formula: Callable[[Tensor], Tensor],
    theta: Tensor,
    grad: Tensor,
) -> None:
    """:func:`check` of the result and gradient of the whole ``theta [..., N]`` on its first rows."""

    def both(function: Callable[[Tensor], Tensor], theta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.clone().requires_grad_()
        result = function(theta)
        return result.detach(), torch.autograd.grad(result, theta, grad)[0]

    def first_rows(t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1])[:GATE_ROWS]

    part, part_grad = first_rows(theta), first_rows(grad)
    check(
        name,
        [first_rows(t) for t in both(ours, theta, grad)],
        both(formula, part, part_grad),
        both(formula, part.double(), part_grad.double()),
    )

"""An oscillator scan as the benches time it: heads of eight oscillators with a forget gate, four harmonics, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.compare import check
from bench.interleave import Call
from kssm_kernels import oscillator_scan
from tests.support import naive
from tests.support.oscillator_scan import WEIGHTS, drawn, joined

OSCILLATORS, HARMONICS = 8, 4  # of a head
DIRECTIONS = ("forward", "forward and backward")
# Of the batch, which are independent, and of each, which know nothing of later ones: what the equation in float64 can
# afford. The gradients at later steps' order parameters are zero for the check.
GATE_ROWS, GATE_STEPS = 2, 512

Size = tuple[int, int, int]  # B, T, D
Function = Callable[[dict[str, Tensor]], Sequence[Tensor]]


class Scan:
    """Arguments of a scan and the gradients at its order parameters; functions of the arguments.

    ``communities``: how many close the loop; 0: it is open.
    """

    def __init__(self, kind: str, size: Size, coupled: bool = True, communities: int = 0) -> None:
        rows, steps, width = size
        self.kind, self.heads, self.numbers = kind, width // OSCILLATORS, rows * steps * width
        operands = {"coupling": coupled, "communities": communities, "dtype": torch.float32}
        self.args = drawn((rows,), steps, self.heads, OSCILLATORS, **operands)
        self.grads = tuple(torch.randn(rows, steps, self.heads, HARMONICS) for _ in range(2))
        self.case = f"oscillator_scan {kind}, B={rows} T={steps} D={width}, {'coupled' if coupled else 'not coupled'}"
        self.case += f", closed by {communities} communities" if communities else ""

    def ours(self, args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        re, im, _ = oscillator_scan(**joined(args), kind=self.kind, heads=self.heads, harmonics=HARMONICS)
        return re, im

    def loop(self, args: dict[str, Tensor]) -> tuple[Tensor]:
        """The order parameters as complex numbers."""
        return (naive.oscillator_scan(**joined(args), kind=self.kind, heads=self.heads, harmonics=HARMONICS)[0],)

    def parts_of_loop(self, args: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        (order,) = self.loop(args)
        return order.real, order.imag

    def check(self, found: Sequence[Tensor] | None = None) -> None:
        """The gate of a timing: :meth:`ours`, or what another has ``found`` for as few steps as the gate has."""
        part = gated(self.grads)
        if found is None:
            grads = [torch.zeros_like(g) for g in self.grads]
            for whole, some in zip(grads, part, strict=True):
                whole[:GATE_ROWS, :GATE_STEPS] = some
            found = results_of(self.ours, self.args, grads)
        args = {k: v if k in WEIGHTS else v[:GATE_ROWS, :GATE_STEPS] for k, v in self.args.items()}
        own = [t if n in WEIGHTS else t[:GATE_ROWS, :GATE_STEPS] for n, t in zip(("", "", *args), found, strict=True)]
        framework = results_of(self.parts_of_loop, args, part)
        truth = results_of(self.parts_of_loop, {k: v.double() for k, v in args.items()}, [g.double() for g in part])
        check(self.case, own, framework, truth)

    def call(self, function: Function, direction: str, grads: Sequence[Tensor]) -> Call:
        """Alone, the forward pass is that of inference."""
        if direction == "forward":
            return partial(function, self.args)
        leaves = leaves_of(self.args)
        return lambda: torch.autograd.grad(function(leaves), list(leaves.values()), grads)

    def our_call(self, direction: str) -> Call:
        return self.call(self.ours, direction, self.grads)


def name_of(case: str, threads: int) -> str:
    return f"{case}, {threads} thread{'s' * (threads > 1)}"


def gated(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t[:GATE_ROWS, :GATE_STEPS] for t in tensors]


def leaves_of(args: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in args.items()}


def results_of(function: Function, args: Mapping[str, Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Results, and gradients of all arguments."""
    leaves = leaves_of(args)
    results = function(leaves)
    return [*(r.detach() for r in results), *torch.autograd.grad(results, list(leaves.values()), grads)]

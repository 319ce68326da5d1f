"""The oscillator scan: heads of eight oscillators with a forget gate, four harmonics, float32.

Beside it the same equations as a vectorised loop of torch in complex numbers and as ``jax.lax.scan``, and the least
arithmetic of a step (csrc/cpu/scan_floor.cpp). Beside its bank a GRU of the same width, both with their projections.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.compare import FLOOR, Figure, check, compare, record
from bench.interleave import SMOKE, THREADS, Call, Quantiles, Turns, rounds_for
from bench.scan import DIRECTIONS, GATE_ROWS, HARMONICS, OSCILLATORS, Scan, Size, name_of
from kssm_kernels import OscillatorBank, backends
from tests.support import naive
from tests.support.oscillator_scan import KINDS

SIZES = [(2, 5, 16)] if SMOKE else [(12, 64, 256), (8, 512, 512)]
LOOP, JAX, GRU = "torch loop, complex", "jax.lax.scan, jitted", "torch.nn.GRU"
TARGETS = {LOOP: 35.0, JAX: 6.0, GRU: 1.0}
SECONDS = 0.1 if SMOKE else 3.0  # of a case

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "B={} T={} D={}".format(*size))
kinds = pytest.mark.parametrize("kind", KINDS)
couplings = pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "alone"])
directions = pytest.mark.parametrize("direction", DIRECTIONS)
numbers_of_threads = pytest.mark.parametrize("threads", [THREADS, 1])


@numbers_of_threads
@directions
@couplings
@kinds
@sizes
def test_against_the_loop(
    benchmark: BenchmarkFixture, size: Size, kind: str, coupled: bool, direction: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    scan = Scan(kind, size, coupled)
    scan.check()
    ours = scan.our_call(direction)
    loop = scan.call(scan.loop, direction, [torch.complex(*scan.grads)])
    compare(benchmark, name_of(f"{scan.case}, {direction}", threads), ours, {LOOP: loop}, TARGETS, SECONDS)


@directions
@couplings
@kinds
@sizes
def test_against_jax(benchmark: BenchmarkFixture, size: Size, kind: str, coupled: bool, direction: str) -> None:
    """JAX takes all processors, and cannot be told otherwise once it runs."""
    pytest.importorskip("jax", reason="JAX is not installed: no jax.lax.scan to compare with")
    from bench import jax_scan

    scan = Scan(kind, size, coupled)
    forward, both = jax_scan.calls(scan.args, scan.grads, kind, scan.heads, HARMONICS)
    scan.check()
    scan.check(jax_scan.results_of(forward, both, scan.args))
    ours = scan.our_call(direction)
    other = forward if direction == "forward" else both
    compare(benchmark, name_of(f"{scan.case}, {direction}", THREADS), ours, {JAX: other}, TARGETS, SECONDS)


@numbers_of_threads
@directions
@kinds
@sizes
def test_beside_the_floor(benchmark: BenchmarkFixture, size: Size, kind: str, direction: str, threads: int) -> None:
    extension: Any = backends.cpu_extension
    if not hasattr(extension, "scan_floor"):
        pytest.skip("the CPU extension is not built")
    torch.set_num_threads(threads)
    scan = Scan(kind, size, True)
    scan.check()
    vectors = scan.numbers * 4 // extension.vector_bytes()

    def floor() -> None:
        for backward in (False, True)[: 1 + DIRECTIONS.index(direction)]:
            extension.scan_floor(vectors, kind == "moebius", backward, threads)

    turns = [Turns(scan.our_call(direction)), Turns(floor)]

    def round_of_both() -> None:
        for t in turns:
            t.turn()

    benchmark.pedantic(round_of_both, rounds=rounds_for(turns, SECONDS))
    if benchmark.stats is None:  # --benchmark-disable
        return
    ours, least = (Quantiles.of([1e9 * s / scan.numbers for s in t.samples]) for t in turns)
    case = name_of(f"{scan.case}, {direction}", threads) + ", per oscillator and step"
    record(benchmark, [Figure(case, FLOOR, "ns", ours, least, "floor", None)])


# ---- the bank ----


def bank_by_equation(bank: OscillatorBank, x: Tensor) -> Tensor:
    p, q, gate, phase, coupling, forget = torch.split(bank.projection(x), bank.sizes, -1)
    options: dict[str, Any] = {"kind": bank.kind, "heads": bank.heads, "harmonics": bank.harmonics}
    order, _ = naive.oscillator_scan(p, q, gate, phase, coupling, forget, phase_lag=bank.phase_lag, **options)
    return bank.out(torch.cat((order.real.flatten(-2), order.imag.flatten(-2)), -1))


def gradients_of(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    out = function(x)
    return (out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad))


def check_bank(bank: OscillatorBank, x: Tensor, grad: Tensor) -> None:
    part, part_grad = x[:GATE_ROWS], grad[:GATE_ROWS]
    wide = OscillatorBank(bank.dim, bank.oscillators, bank.heads, kind=bank.kind).double()
    wide.load_state_dict(bank.state_dict())
    check(
        "OscillatorBank",
        gradients_of(lambda x: bank(x)[0], bank, part, part_grad),
        gradients_of(partial(bank_by_equation, bank), bank, part, part_grad),
        gradients_of(partial(bank_by_equation, wide), wide, part.double(), part_grad.double()),
    )


@numbers_of_threads
@directions
@kinds
@sizes
def test_bank_against_gru(benchmark: BenchmarkFixture, size: Size, kind: str, direction: str, threads: int) -> None:
    torch.set_num_threads(threads)
    rows, steps, width = size
    bank = OscillatorBank(width, width, width // OSCILLATORS, kind=kind)
    gru = nn.GRU(width, width, batch_first=True)
    x, grad = torch.randn(rows, steps, width), torch.randn(rows, steps, width)
    check_bank(bank, x, grad)
    calls: list[Call] = []
    for module in (bank, gru):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        if direction == "forward":
            calls.append(torch.no_grad()(partial(module, x)))
        else:
            calls.append(lambda module=module, inputs=inputs: torch.autograd.grad(module(inputs[0])[0], inputs, grad))
    case = f"OscillatorBank {kind}, B={rows} T={steps} width {width}"
    compare(benchmark, name_of(f"{case}, {direction}", threads), calls[0], {GRU: calls[1]}, TARGETS, SECONDS)

"""Peak extra memory of forward plus backward: of the bank at width 384, batch 4, length 512, in training mode, of the
order parameters of theta [8, 512, 192], 32 harmonics, on the pure-torch path, each beside the family's formula, and of
the oscillator scan by how many states it keeps.

Method, the same for all: a fresh process each; module, input and upstream gradient exist, and a call on two rows has
loaded what a first call loads; then the growth of the process's high-water mark of resident memory over its
resident memory before the call. That counts everything: outputs, gradients, saved tensors, the allocator's own waste,
and the scratch inside the kernels, which torch's profiler does not see. A mark that already stands above the resident
memory would hide a small call, and so would what the call on two rows has left in the allocator: both are brought down
first where the system can (Linux; glibc).
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.compare import Figure, forward_backward, record
from bench.interleave import SMOKE, THREADS, Quantiles
from bench.scan import HARMONICS as HARMONICS_OF_SCAN
from bench.scan import Scan, Size
from kssm_kernels import FusedKuramoto, kuramoto_update, order_parameters, oscillator_scan
from tests.support import naive

WIDTH, OSCILLATORS, HARMONICS = 384, 192, 32
BATCH, LENGTH = (1, 64) if SMOKE else (4, 512)
ROWS = 64 if SMOKE else 8 * 512
SCAN_SIZE = (3, 128, 64) if SMOKE else (8, 4096, 512)
LOOP_SIZE = (3, 128, 64) if SMOKE else (8, 512, 512)  # the loop would take gigabytes more, and minutes
LONG = 100_000 if SMOKE else 1_000_000


def bank(kind: type[nn.Module]) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor, Tensor]:
    module = kind(WIDTH, OSCILLATORS, n_harmonics=HARMONICS)
    x, grad = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(BATCH * LENGTH, WIDTH)
    return lambda x: module(x)[0], list(module.parameters()), x, grad


def order_parameters_by(
    function: Callable[[Tensor, int], Tensor],
) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor, Tensor]:
    theta, grad = torch.randn(ROWS, OSCILLATORS), torch.randn(ROWS, 3 * HARMONICS)
    return lambda theta: function(theta, HARMONICS), [], theta, grad


def long_ensemble() -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor, Tensor]:
    return lambda theta: kuramoto_update(theta, 1.5, dt=0.1, steps=10), [], torch.randn(1, LONG), torch.randn(1, LONG)


def scan_by(
    function: Callable[..., Sequence[Tensor]], size: Size, **options: str | int
) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor, Tensor]:
    """All gradients, by way of the real parts of the order parameters."""
    scan = Scan("moebius", size)
    first, *rest = (t.requires_grad_(k != "p") for k, t in scan.args.items())

    def real_part(p: Tensor) -> Tensor:
        own = rest if len(p) == len(first) else [t[: len(p)] for t in rest]
        order = function(p, *own, kind=scan.kind, heads=scan.heads, harmonics=HARMONICS_OF_SCAN, **options)[0]
        return order.real if order.is_complex() else order

    return real_part, rest, first, scan.grads[0]


def scan_case(size: Size) -> str:
    return "oscillator_scan moebius, B={} T={} D={}, save=64, the same".format(*size)


# function, its parameters, the tensor it gets, the gradient at its result
CASES = {
    "fused bank": lambda: bank(FusedKuramoto),
    "original bank": lambda: bank(naive.OriginalBank),
    "order parameters": lambda: order_parameters_by(order_parameters),
    "long ensemble": long_ensemble,
    "long scan, save=64": lambda: scan_by(oscillator_scan, SCAN_SIZE, save=64),
    "the same, save='all'": lambda: scan_by(oscillator_scan, SCAN_SIZE),
    "scan, save=64": lambda: scan_by(oscillator_scan, LOOP_SIZE, save=64),
    "torch loop, complex": lambda: scan_by(naive.oscillator_scan, LOOP_SIZE),
    "formula": lambda: order_parameters_by(naive.order_parameters),
}


def high_water() -> int:
    """Bytes: the mark since it was last brought down on Linux, since the start elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bring_down_high_water() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_extra_bytes(name: str) -> int:
    """What one forward and backward adds to this process; call it once per process."""
    torch.set_num_threads(THREADS)
    function, parameters, x, grad = CASES[name]()
    part = (slice(2), slice(None)) if len(x) > 2 else (slice(None), slice(5000))
    small = x[part].clone().requires_grad_()
    forward_backward(function, [small, *parameters], grad[part])()
    x.requires_grad_()
    bring_down_high_water()
    before = psutil.Process().memory_info().rss
    results = forward_backward(function, [x, *parameters], grad)()
    peak = high_water()
    del results  # alive until here: the gradients belong to the peak
    return peak - before


def measured_apart(name: str, backend: str) -> int:
    program = f"from bench.ops.test_memory import peak_extra_bytes; print(peak_extra_bytes({name!r}))"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "KSSM_BACKEND": backend},
    ).stdout
    return int(shown)


@pytest.mark.parametrize(
    ("case", "ours", "theirs", "backend", "largest_share"),
    [
        ("FusedKuramoto forward and backward, peak extra memory", "fused bank", "original bank", "", 0.1),
        ("order_parameters on the pure-torch path, the same", "order parameters", "formula", "torch", 1 / 3),
        (scan_case(SCAN_SIZE), "long scan, save=64", "the same, save='all'", "", 0.75),
        (scan_case(LOOP_SIZE), "scan, save=64", "torch loop, complex", "", 0.1),
    ],
    ids=["bank", "pure torch", "scan of few states", "scan beside the loop"],
)
def test_peak_memory(
    benchmark: BenchmarkFixture, case: str, ours: str, theirs: str, backend: str, largest_share: float
) -> None:
    """The fixture's time is that of the whole process, imports and all: only the bytes are of interest."""
    megabytes: dict[str, list[float]] = {ours: [], theirs: []}

    def both() -> None:
        for name, found in megabytes.items():
            found.append(measured_apart(name, backend) / 1e6)

    benchmark.pedantic(both, rounds=1 if SMOKE else 3)
    quantiles = [Quantiles.of(found) for found in megabytes.values()]
    record(benchmark, [Figure(case, theirs, "MB", *quantiles, "share", largest_share)])


def test_peak_memory_of_a_long_ensemble(benchmark: BenchmarkFixture) -> None:
    """Ten steps of a million oscillators and back: the phases, their gradient and four states are six copies."""
    found: list[float] = []
    benchmark.pedantic(lambda: found.append(measured_apart("long ensemble", "") / 1e6), rounds=1 if SMOKE else 3)
    six = Quantiles.of([6 * 4 * LONG / 1e6])
    case = f"kuramoto_update of {LONG} oscillators, 10 steps, forward and backward, peak extra memory"
    record(benchmark, [Figure(case, "six copies of the state", "MB", Quantiles.of(found), six, "share", 1.05)])

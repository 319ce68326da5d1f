"""Peak extra memory of the bank's forward plus backward at width 384, batch 4, length 512, in training mode.

Method, the same for both banks: a fresh process each; module, input and upstream gradient exist, and a call on two rows
has loaded what a first call loads; then the growth of the process's high-water mark of resident memory over its
resident memory before the call. That counts everything: outputs, gradients, saved tensors, the allocator's own waste,
and the scratch inside the kernels, which torch's profiler does not see. A mark that already stands above the resident
memory would hide a small call: it is brought down first where the system can (Linux).
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import OriginalBank
from bench.compare import Figure, forward_backward, record
from bench.interleave import SMOKE, THREADS, Quantiles
from kssm_kernels import FusedKuramoto

WIDTH, OSCILLATORS, HARMONICS = 384, 192, 32
BATCH, LENGTH = (1, 64) if SMOKE else (4, 512)
BANKS = {"fused": FusedKuramoto, "original": OriginalBank}
LARGEST_SHARE = 0.1


def high_water() -> int:
    """Bytes: the mark since it was last brought down on Linux, since the start elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bring_down_high_water() -> None:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_extra_bytes(name: str) -> int:
    """What one forward and backward adds to this process; call it once per process."""
    torch.set_num_threads(THREADS)
    bank = BANKS[name](WIDTH, OSCILLATORS, n_harmonics=HARMONICS)
    x, grad = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True), torch.randn(BATCH, LENGTH, WIDTH)
    small = x[:1, :2].detach().requires_grad_()
    forward_backward(lambda x: bank(x)[0], [small, *bank.parameters()], grad[:1, :2])()
    bring_down_high_water()
    before = psutil.Process().memory_info().rss
    results = forward_backward(lambda x: bank(x)[0], [x, *bank.parameters()], grad)()
    peak = high_water()
    del results  # alive until here: the gradients belong to the peak
    return peak - before


def measured_apart(name: str) -> int:
    program = f"from bench.test_memory import peak_extra_bytes; print(peak_extra_bytes({name!r}))"
    root = Path(__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, cwd=root
    ).stdout
    return int(shown)


def test_peak_memory_of_the_bank(benchmark: BenchmarkFixture) -> None:
    """The fixture's time is that of the whole process, imports and all: only the bytes are of interest."""
    megabytes: dict[str, list[float]] = {name: [] for name in BANKS}

    def both() -> None:
        for name in BANKS:
            megabytes[name].append(measured_apart(name) / 1e6)

    benchmark.pedantic(both, rounds=1 if SMOKE else 3)
    ours, theirs = Quantiles.of(megabytes["fused"]), Quantiles.of(megabytes["original"])
    case = "FusedKuramoto forward and backward, peak extra memory"
    record(benchmark, [Figure(case, "original bank", "MB", ours, theirs, "share", LARGEST_SHARE)])

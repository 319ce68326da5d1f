"""Same inputs, same bits: for any number of threads, on every run, after a fork and in a data loader's worker."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kssm_kernels
from tests.support.cases import Case, evaluate, threads
from tests.support.specs import arguments, by_package

# A kernel splits rows among threads, and one row of more than 4096 oscillators into blocks: both kinds are here.
CASES = [
    Case("order_parameters", (257, 33), 9),
    Case("order_parameters", (2, 10001), 33),
    Case("order_parameters", (1, 70001), 5, layout="every-second"),
    Case("kuramoto_update", (1, 20001), coupling=(1,), omega=(20001,), phase_lag=(), noise_scale=(), steps=3, dt=0.1),
    Case("kuramoto_update", (300, 40), coupling=(), omega=(40,), noise_scale=(1,), phase_lag=(300, 1), steps=3, dt=0.1),
    Case("kuramoto_features", (50,), 8, coupling=(300, 1), omega=(300, 1), noise_scale=(1,)),
    Case("kuramoto_features", (3, 9001), 4, coupling=(9001,), omega=(1,), steps=2, dt=0.1, return_phases=False),
    Case("bistable_coupling", (3001, 10)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype, backend: str) -> None:
    args = arguments(case, dtype)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(evaluate(by_package, case, args, dtype))
    if backend == "torch":  # torch promises this of itself only for the same number of threads
        results = [results[1], results[3]]
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("n", [1, 37, 256, 257])
def test_an_ensemble_does_not_depend_on_its_neighbours(n: int, backend: str) -> None:
    """The kernels take short rows several at a time: whichever others those are, or none, its bits are the same."""
    theta = torch.randn(65, n)

    def results(rows: list[int]) -> list[Tensor]:
        part = theta[rows].clone().requires_grad_()
        both = kssm_kernels.kuramoto_features(part, 0.8, 7, steps=2, dt=0.1, return_phases=True)
        outputs = [*both, kssm_kernels.order_parameters(part, 7)]
        grads = torch.autograd.grad(outputs, part, [torch.ones_like(v) for v in outputs])
        return [*outputs, *grads]

    whole = results(list(range(65)))
    for rows in ([5, 64], [64], list(range(31, 64))):
        for all_rows, some in zip(whole, results(rows), strict=True):
            torch.testing.assert_close(all_rows[rows], some, rtol=0, atol=0 if backend != "torch" else 1e-5)


CHILD = """
import os, sys, torch
import kssm_kernels as kk
import tests  # opens the CUDA kernels built for the CPU, where asked for
theta = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)).requires_grad_()

def work(threads):
    torch.set_num_threads(threads)
    out = kk.kuramoto_features(theta, 0.5, 6, steps=2, dt=0.1)
    (grad,) = torch.autograd.grad(out, theta, torch.ones_like(out))
    torch.set_num_threads(1)  # the sums are torch's, and torch's threads do hang after a fork
    return float(out.double().sum()), float(grad.double().abs().sum())

count = int(sys.argv[3])
with kk.use_backend(sys.argv[1]):
    before = work(count) if sys.argv[2] == "used" else None
    pid = os.fork()
    if pid == 0:
        result = work(count)
        os._exit(0 if before in (None, result) else 3)
    _, status = os.waitpid(pid, 0)
    assert before is None or work(count) == before
    sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("before", ["used", "unused"])
def test_fork(before: str, backend: str) -> None:
    """In a process of its own with a time limit: a worker that hangs is a failure here and not a hung suite.

    Torch's own operators hang in a child that runs them on several threads after a fork, so the pure-torch backend
    gets one thread, as in a DataLoader worker; a compiled backend gets two and must not hang.
    """
    if backend == "cuda":
        pytest.skip("CUDA itself does not work in a child of a process that has used it")
    count = "1" if backend == "torch" else "2"
    root = Path(kssm_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, backend, before, count],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, f"child ended with {done.returncode}\n{done.stderr}"


class _Features(Dataset[Tensor]):
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.theta = torch.randn(8, 3000)

    def __len__(self) -> int:
        return len(self.theta)

    def __getitem__(self, index: int) -> Tensor:
        with kssm_kernels.use_backend(self.backend):
            return kssm_kernels.order_parameters(self.theta[index], 4)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str, backend: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no start method {start}")
    data = _Features(backend)
    here = torch.stack([data[i] for i in range(len(data))])  # the threads have been used before the fork
    loader: Any = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=start, timeout=120)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, here, rtol=0, atol=0 if backend != "torch" else 1e-6)


def test_the_answer_does_not_depend_on_what_ran_before(backend: str) -> None:
    """Scratch memory kept between calls must not leak from one call into another."""
    small = torch.randn(3, 7)
    first = kssm_kernels.kuramoto_features(small, 0.5, 5, omega=0.1)
    kssm_kernels.kuramoto_features(torch.full((4, 9000), torch.nan), 0.5, 200, omega=torch.randn(9000), steps=3)
    assert torch.equal(kssm_kernels.kuramoto_features(small, 0.5, 5, omega=0.1), first)

"""Two threads for every case, and one table of all figures at the end of the run. Nothing here asserts a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.compare import Figure
from bench.device import Row, write_page
from bench.interleave import DOCS, SMOKE, THREADS, environment
from bench.table import text_table
from tests.support import devices


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Before every case: one that sets a number of threads of its own must not leave it to the next."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device_rows() -> Iterator[list[Row]]:
    """Rows of docs/gpu_performance.md, written when the last case on the device is done."""
    found: list[Row] = []
    yield found
    if found:
        page = DOCS / "gpu_performance.md"
        write_page(found, devices.device() or "cpu", page)
        print(page.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["environment"] = environment()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [row for b in getattr(session, "benchmarks", []) for row in b.extra_info.get("figures", [])]
    if not rows:
        return
    terminalreporter.section("ours against the baselines, medians, in turn in one process")
    terminalreporter.write_line(text_table([Figure.from_row(row) for row in rows]))
    if SMOKE:
        terminalreporter.write_line("KSSM_BENCH_SMOKE: tiny sizes, torch.compile left out; these figures mean nothing.")

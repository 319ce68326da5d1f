"""Two threads for every case, and one table of all figures at the end of the run. Nothing here asserts a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.compare import Figure
from bench.interleave import SMOKE, THREADS, environment
from bench.table import text_table


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


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

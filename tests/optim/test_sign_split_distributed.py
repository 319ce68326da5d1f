"""SignSplitEMA on DTensors and under FSDP2, in two gloo processes with a time limit; what they do: see their module."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.sign_split_distributed import CASES, WORLD

LIMIT = 120  # seconds; either takes 5, and one that waits for the other would wait for ever

if not dist.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)


def fully_shard_is_public() -> bool:
    if importlib.util.find_spec("torch.distributed.fsdp") is None:
        return False
    return hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard")


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, tmp_path: Path) -> None:
    if case == "fsdp" and not fully_shard_is_public():
        pytest.skip("torch before 2.6 has no public fully_shard")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.sign_split_distributed", case, str(rank), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        shown = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, text in zip(processes, shown, strict=True):
        assert process.returncode == 0, text

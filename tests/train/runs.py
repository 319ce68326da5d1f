"""Short runs of the trainer through its command line, for the tests of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kssm.__main__ import main

TINY = (
    "--dim 16 --layers 1 --oscillators 8 --harmonics 3 --context 16 --batch-size 4 --eval-tokens 64 "
    "--sample-tokens 20 --warmup-steps 2 --log-every 1 --eval-every 4 --device cpu"
)


def kssm(*args: object) -> int:
    return main([str(arg) for arg in args])


def train(text: Path, out: Path, *args: object) -> int:
    return kssm("train", "--data", text, "--out", out, *TINY.split(), *args)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]

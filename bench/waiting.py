"""``python -m bench.waiting``: how long OpenMP's threads should spin while they wait. Writes docs/waiting.md.

One process per setting loads torch and the run that ``kssm train`` makes by default, then takes steps when it is its
turn, alone and beside processes that compute. All settings take turns under one load, all loads in every round. Five
minutes; ``KSSM_BENCH_SMOKE=1`` for a quick look.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kssm.cli import WAITING, WAITING_VARIABLES
from kssm.cli import main as kssm

from bench.interleave import DOCS, SMOKE, THREADS, Quantiles, environment

ROOT = Path(__file__).parents[1]
SPIN_COUNTS = (3000,) if SMOKE else (1000, 3000, 10000, 30000)
SETTINGS = ("", "OMP_WAIT_POLICY=passive", *(f"GOMP_SPINCOUNT={count}" for count in SPIN_COUNTS))
LOADS = {"alone": 0, "beside one": 1, "beside two": 2}
ROUNDS, SECONDS = (1, 0.1) if SMOKE else (15, 1.0)
HEAD = """\
# How threads wait

Made by `python -m bench.waiting`: tokens per second of `kssm train` with its default options, alone and beside
processes that compute without pause. One process for each setting, {rounds} rounds of turns of {seconds:g} s; all
settings take turns under one load, all loads in every round. Medians with first and ninth decile.

Threads that wait for the others at the end of a parallel region spin, then sleep. A spinning thread is at once where it
is needed, and takes the processor from one that would let it go on. `kssm` sets
`{chosen}`, and the gate, whose parts run beside each other, `OMP_WAIT_POLICY=passive`, unless the user has set one of
{variables};
`import kssm` and `import kssm_kernels` set nothing.
"""


def worker(run: Path) -> None:
    """Reads the seconds of a turn, answers with tokens per second."""
    import torch
    from kssm.data import Dataset
    from kssm.train.checkpoint import build_model, load_config
    from kssm.train.trainer import Trainer

    config, dataset = load_config(run), Dataset(run)
    trainer = Trainer(config, dataset, build_model(config, len(dataset.vocabulary)), torch.device("cpu"))
    trainer.train_step()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        start, seconds, steps = time.perf_counter(), 0.0, 0
        while seconds < float(line):
            trainer.train_step()
            steps, seconds = steps + 1, time.perf_counter() - start
        print(steps * config.batch_size * config.accumulate * config.context / seconds, flush=True)


@contextmanager
def workers(run: Path) -> Iterator[Mapping[str, subprocess.Popen[str]]]:
    """A process per setting, each ready."""
    found: dict[str, subprocess.Popen[str]] = {}
    try:
        for setting in SETTINGS:
            variables = {k: v for k, v in os.environ.items() if k not in WAITING_VARIABLES}
            variables |= {"OMP_NUM_THREADS": str(THREADS)} | dict([setting.split("=")] if setting else [])
            command = [sys.executable, "-m", "bench.waiting", str(run)]
            found[setting] = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert answer(found[setting]) == str(THREADS), f"want {THREADS} threads"
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    print(SECONDS, file=process.stdin, flush=True)
    return float(answer(process))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.1)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(run: Path) -> dict[tuple[str, str], Quantiles]:
    samples: dict[tuple[str, str], list[float]] = {(s, load): [] for s in SETTINGS for load in LOADS}
    with workers(run) as processes:
        for _ in range(ROUNDS):
            for load, count in LOADS.items():
                with neighbours(count):
                    for setting, process in processes.items():
                        samples[setting, load].append(turn(process))
    return {key: Quantiles.of(values) for key, values in samples.items()}


def page(found: Mapping[tuple[str, str], Quantiles], facts: Mapping[str, str]) -> str:
    chosen, variables = "=".join(WAITING), ", ".join(f"`{name}`" for name in WAITING_VARIABLES)
    rows = [["tokens per second", *LOADS], ["---", *("---:" for _ in LOADS)]]
    for setting in SETTINGS:
        cells = (f"{q.median:,.0f} [{q.low:,.0f}, {q.high:,.0f}]" for q in (found[setting, load] for load in LOADS))
        name = f"`{setting}`" if setting else "OpenMP's default"
        rows.append([f"**{name}**" if setting == chosen else name, *cells])
    head = HEAD.format(rounds=ROUNDS, seconds=SECONDS, chosen=chosen, variables=variables)
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{head}\n" + "\n".join(f"- {name}: {fact}" for name, fact in facts.items()) + f"\n\n{lines}\n"


def main() -> None:
    facts = environment() | {"threads": str(THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if kssm(["train", "--out", str(run), "--max-steps", "1", "--eval-tokens", "128", "--sample-tokens", "0"]):
            raise SystemExit(1)
        text = page(measure(run), facts)
    DOCS.mkdir(exist_ok=True)
    (DOCS / "waiting.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:]:
        worker(Path(sys.argv[1]))
    else:
        main()

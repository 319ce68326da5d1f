"""Every command of README.md and CONTRIBUTING.md, each in an environment that holds what its line installs and no more.

    python .ci/commands.py WHEEL SCRATCH        runs them, and the Python examples
    python .ci/commands.py --examples PYTHON    the examples alone, by that interpreter

tests/test_commands.py finds the commands in the pages and holds them to COMMANDS: one without an entry fails there.
An environment shares torch and numpy, which every line installs, with the others; the package comes from a wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")
WITH_EXAMPLES = ("README.md", "docs/oscillator_scan.md")  # whose Python examples run
TOOLS = "pip|pytest|python|kssm|bash|ruff|mypy"
COMMAND = re.compile(rf"([A-Z_]+=\S+ )*(LD_PRELOAD=.*|({TOOLS})( .*|$))")


@dataclass(frozen=True)
class Run:
    """Shell commands, run for the written one in an environment with these extras; ``because``: why not as written."""

    commands: tuple[str, ...]
    extras: str
    because: str = ""
    folder: str = "clone"  # or "empty", as a user's folder is, or "copy": of the clone, for what writes into it


@dataclass(frozen=True)
class Part:
    """Parts of .ci/run that run the command; ``because``: what they run in place of it."""

    names: tuple[str, ...]
    because: str = ""


TESTS_OF_EXTRAS = "tests/train/test_command_line.py tests/optim/test_proof.py tests/gpu/test_triton_compile.py"
SANITIZERS = ("sanitizers",)
EDITABLE = "train,test,bench,lint,gpu,proof"

COMMANDS: dict[str, dict[str, Run | Part]] = {
    "README.md": {
        'pip install ".[train]" && kssm train': Run(
            ("kssm train --max-steps 20",), "train", "20 of its 300 steps", folder="empty"
        ),
        "kssm train": Run(
            ("python -m kssm train --max-steps 2 --out again",), "train", "2 of its 300 steps", folder="empty"
        ),
        "kssm train --help": Run(("kssm train --help",), "train", folder="empty"),
        "kssm sample DIR --prompt TEXT": Run(
            ("kssm sample runs/demo --prompt import",), "train", "the first run's folder", folder="empty"
        ),
        'pip install ".[train,test]" && pytest': Run(
            ("pytest -q --collect-only", f"pytest -q {TESTS_OF_EXTRAS} python/kssm"),
            "train,test",
            "collects all tests, runs those that depend on what is installed; the gate's part tests runs all of them",
        ),
        'pip install ".[train,bench]" && pytest bench/ --benchmark-only': Run(
            ("KSSM_BENCH_SMOKE=1 pytest -q bench/ --benchmark-only",), "train,bench", "tiny sizes"
        ),
        'pip install ".[test,bench,gpu]" && pytest tests bench -m gpu': Run(
            ("pytest tests bench -m gpu -q -rs",), "test,bench,gpu", "without a device all are collected and skipped"
        ),
        "python -m kssm_kernels": Run(("python -m kssm_kernels",), "", folder="empty"),
    },
    "CONTRIBUTING.md": {
        "bash .ci/run": Part((), "is what runs this"),
        f'pip install -e ".[{EDITABLE}]"': Run(
            (
                "KSSM_REQUIRE_EXTENSION=0 KSSM_REQUIRE_CUDA=0 CXX=/nonexistent KSSM_CUDA=0 "
                'python -m pip install -q -e ".[train]"',
                'cd / && python -c "import kssm, kssm_kernels as k; print(k.build_info(), k.__file__)"',
            ),
            "",
            "one extra and no compiler: the gate's own package has them all",
            folder="copy",
        ),
        "pytest": Part(("tests", "worked_example", "cuda_on_host", "gpu_compile")),
        "ruff check . && ruff format --check . && mypy": Part(("lint", "types")),
        "TRITON_INTERPRET=1 KSSM_CUDA_ON_HOST=1 python -m tests.accuracy": Run(
            ('python -m tests.accuracy "$EMPTY/accuracy.md"',), "test", "the two fast backends, not to docs/"
        ),
        "pytest bench/ --benchmark-only": Part((), "README's, above, runs it"),
        "python -m bench.report; python -m bench.sweep": Run(
            ("KSSM_BENCH_SMOKE=1 python -m bench.report", "KSSM_BENCH_SMOKE=1 python -m bench.sweep"),
            "train,bench",
            "tiny sizes, to .benchmarks/",
        ),
        "python -m bench.long_rows": Run(
            ("KSSM_BENCH_SMOKE=1 python -m bench.long_rows",), "train,bench", "one small size, to .benchmarks/"
        ),
        "python -m bench.scan_scaling": Run(
            ("KSSM_BENCH_SMOKE=1 python -m bench.scan_scaling",), "train,bench", "tiny sizes, to .benchmarks/"
        ),
        "python -m bench.waiting": Run(
            ("KSSM_BENCH_SMOKE=1 python -m bench.waiting",), "train,bench", "a turn each, to .benchmarks/"
        ),
        "TRITON_INTERPRET=1 pytest -k triton tests/ops/test_conformance.py": Part(("triton_interpreted",)),
        "KSSM_CUDA_ON_HOST=1 pytest -k cuda tests": Part(("cuda_on_host",)),
        "python -m bench.gpu_compile": Part(("gpu_compile",), "with --check, which writes no page"),
        "python -m bench.proof": Part(("tests",), "tests/optim/test_proof.py runs it with --quick"),
        "python -m bench.proof.recall --seed 0 1 2 3 4 --plot docs/recall.svg": Run(
            ('python -m bench.proof.recall --quick --plot "$EMPTY/recall.svg"',), "train,bench", "--quick, not to docs/"
        ),
        "pytest tests bench -m gpu": Part((), "README's, above, runs it"),
        'pip install "setuptools>=77" pybind11 cmake ninja': Run(
            ('python -m pip install "setuptools>=77" pybind11 cmake ninja',), "", folder="copy"
        ),
        "python setup.py build_ext --inplace": Run(
            (
                "KSSM_CUDA=0 KSSM_REQUIRE_CUDA=0 KSSM_REQUIRE_EXTENSION=1 python setup.py build_ext --inplace",
                'python -c "from kssm_kernels.backends import cpu_extension; print(cpu_extension.__file__)"',
            ),
            "",
            "without the CUDA kernels, which the part cuda_library compiles",
            folder="copy",
        ),
        "KSSM_SANITIZE=1 pip install --no-deps --target build/sanitized .": Part(SANITIZERS, "to a scratch folder"),
        'LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so)" '
        "ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized "
        "pytest -p no:cacheprovider tests/ops/test_conformance.py": Part(
            SANITIZERS, "more files, without the backend torch"
        ),
    },
}


def commands_of(text: str) -> list[str]:
    """The commands of a page: lines of its code blocks without their comments, and spans of its prose."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", prose, re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "\n".join([*fenced, *indented])).splitlines()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*", "", prose, flags=re.M))]
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines] + spans
    return [command for command in dict.fromkeys(found) if COMMAND.fullmatch(command)]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def shell(command: str, folder: Path, **environment: str) -> None:
    """Runs a command; shows its last lines, or all of them and ends the gate where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    print(f"$ {command}", *(lines if done.returncode else lines[-4:]), sep="\n")
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {command}")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def run_examples(python: str) -> None:
    """Each example in a process of its own, in a folder where only installed packages are found."""
    with tempfile.TemporaryDirectory() as folder:
        for page in WITH_EXAMPLES:
            for number, example in enumerate(examples(page), 1):
                subprocess.run([python, "-c", example], cwd=folder, check=True)
                print(f"{page}, Python example {number}: runs", flush=True)


class Environments:
    """One for each set of extras, made when first asked for, and an empty folder beside it."""

    def __init__(self, wheel: Path, scratch: Path) -> None:
        self.wheel, self.scratch = wheel, scratch
        self.base = self._venv("base")
        torch = os.environ.get("KSSM_CI_TORCH") or "torch==2.13.0"
        shell(f"python -m pip install -q '{torch}' numpy", scratch, PATH=self._path(self.base))
        self.copy = scratch / "copy"
        self.copy.mkdir()
        shell(f"git ls-files -z | xargs -0 cp --parents -t {self.copy}", ROOT)

    def _venv(self, name: str, *options: str) -> Path:
        folder = self.scratch / name
        subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
        return folder

    @staticmethod
    def _path(environment: Path) -> str:
        return f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def of(self, extras: str, editable: bool) -> Path:
        """With pip, torch and numpy from the base; ``editable``: without the package."""
        name = "editable" if editable else f"with-{extras}"
        if (self.scratch / name).exists():
            return self.scratch / name
        environment = self._venv(name, "--without-pip")
        (environment / "empty").mkdir()
        ours, bases = (next(e.glob("lib/python3*/site-packages")) for e in (environment, self.base))
        (ours / "base.pth").write_text(f"{bases}\n")
        if not editable:
            package = f"{self.wheel}[{extras}]" if extras else str(self.wheel)
            shell(f"python -m pip install -q '{package}'", self.scratch, PATH=self._path(environment))
        return environment

    def run(self, entry: Run) -> None:
        environment = self.of(entry.extras, entry.folder == "copy")
        empty = environment / "empty"
        folder = {"clone": ROOT, "empty": empty, "copy": self.copy}[entry.folder]
        for command in entry.commands:
            shell(command, folder, PATH=self._path(environment), EMPTY=str(empty))


def main(arguments: list[str]) -> None:
    if arguments[0] == "--examples":
        run_examples(arguments[1])
        return
    environments = Environments(Path(arguments[0]).resolve(), Path(arguments[1]).resolve())
    for page in PAGES:
        for command, entry in COMMANDS[page].items():
            print(f"--- {page}: {command}" + (f"   ({entry.because})" if entry.because else ""), flush=True)
            if isinstance(entry, Run):
                environments.run(entry)
    run_examples(str(environments.of("", False) / "bin" / "python"))


if __name__ == "__main__":
    main(sys.argv[1:])

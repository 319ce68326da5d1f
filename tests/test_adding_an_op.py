"""docs/adding_an_op.md holds: its op takes as few files and edits as it says, builds, and passes what every op does."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.support.adding_an_op import PAGE, Edit, apply, copy_repository, edits_of, files_of
from tests.support.cases import DTYPES

MOST_FILES, MOST_EDITS = 10, 6
TEXT = PAGE.read_text(encoding="utf-8")
FILES, EDITS = files_of(TEXT), edits_of(TEXT)
NAME = "squared_sine"

# Run where the copy is what is imported. A call by each path, against the equation; explain; both modes of gradcheck.
USE = """
import torch

from kssm_kernels import explain, squared_sine, use_backend
from kssm_kernels.backends import cpu_extension

print(cpu_extension.__file__)
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
for backend in ("cpu", "torch"):
    with use_backend(backend):
        y = squared_sine(x)
        (g,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, x.sin() ** 2)
        torch.testing.assert_close(g, (2 * x).sin())
        torch.testing.assert_close(torch.compile(squared_sine, fullgraph=True)(x), y, rtol=0, atol=0)
        torch.testing.assert_close(torch.vmap(squared_sine, in_dims=1, out_dims=1)(x.detach()), y, rtol=0, atol=0)
        torch.testing.assert_close(torch.func.grad(lambda t: squared_sine(t).sum())(x.detach()), g)
        assert torch.autograd.gradcheck(squared_sine, x, check_forward_ad=True, check_batched_grad=True)
        try:
            torch.autograd.grad(torch.autograd.grad(squared_sine(x).sum(), x, create_graph=True)[0].sum(), x)
        except RuntimeError as error:
            assert str(error).startswith("squared_sine: double backward is not supported")
        else:
            raise AssertionError("a second derivative was not refused")
assert explain(squared_sine, x).startswith("squared_sine on cpu, float64: cpu, the best")
"""


def lacking() -> str:
    """What a build needs and is not here; empty if nothing."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]
    missing += [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    missing += [] if any(shutil.which(name) for name in compilers if name) else ["a C++ compiler"]
    return ", ".join(missing)


def run(copy: Path, *command: str, **environment: str) -> tuple[int, str]:
    """In the copy, which comes before all that is installed; nothing of how these tests run is passed on."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("KSSM_", "TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**outer, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "python")]), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def passed(copy: Path, *command: str, **environment: str) -> str:
    code, output = run(copy, *command, **environment)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the example in it, built."""
    if lacking():
        pytest.skip(f"the example is compiled, and there is no {lacking()} here")
    folder = tmp_path_factory.mktemp("repository")
    copy_repository(folder)
    apply(FILES, EDITS, folder)
    _, output = run(folder, "-m", "pytest", "-q", "tests/ops/test_calls.py", "-k", "number")
    asked = re.search(r'wants ABI = "(\w{12})"', output)
    assert asked, output
    calls = folder / "kssm_kernels" / "backends" / "calls.py"
    calls.write_text(calls.read_text(encoding="utf-8").replace("<the number>", asked[1]), encoding="utf-8")
    passed(folder, "setup.py", "build_ext", "--inplace", KSSM_CUDA="0", KSSM_REQUIRE_EXTENSION="1")
    return folder


def test_every_block_of_the_page_is_a_file_or_an_edit_and_they_are_few() -> None:
    assert len(FILES) + len(EDITS) == TEXT.count("\n```") / 2
    assert 0 < len(FILES) <= MOST_FILES
    assert 0 < len(EDITS) <= MOST_EDITS
    assert [edit.line for edit in EDITS if edit.line.count("\n") != 1] == []


def test_the_page_and_contributing_say_what_the_op_costs() -> None:
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    cost = f"costs {words[len(FILES)]} files and {words[len(EDITS)]} one-line edits"
    contributing = (PAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert cost in TEXT
    assert cost in " ".join(contributing.split())


def test_an_edit_goes_to_the_one_line_that_holds_its_text() -> None:
    assert Edit("f", "before", "b", "x\n").applied("a\nb\n") == "a\nx\nb\n"
    assert Edit("f", "after", "a", "x\n").applied("a\nb\n") == "a\nx\nb\n"
    assert Edit("f", "in place of", "a", "x\n").applied("a\nb\n") == "x\nb\n"
    for text in ("c", "a"):
        with pytest.raises(AssertionError, match=r"lines hold .*, want one"):
            Edit("f", "after", text, "x\n").applied("a\na\n")


@pytest.mark.slow
def test_the_example_passes_the_tests_that_every_op_has(copy: Path) -> None:
    """Its doctest, the layout of its call, and conformance in every dtype by both backends, on all paths."""
    where = [f"kssm_kernels/ops/{NAME}", "tests/ops/test_calls.py", "tests/ops/test_conformance.py"]
    # interpreted, Triton takes part, for which the op has no kernels: no test may ask it for them
    output = passed(copy, "-m", "pytest", "-v", *where, "-k", f"{NAME} or test_calls", TRITON_INTERPRET="1")
    ran = re.findall(r"^(\S+) PASSED", output, re.MULTILINE)
    conformance = [name for name in ran if f"test_outputs_and_gradients[{NAME}" in name]
    for dtype, backend in product(DTYPES, ("cpu", "torch")):
        ending = f"-{str(dtype).removeprefix('torch.')}-{backend}]"
        assert [name for name in conformance if name.endswith(ending)], f"{ending}: {output}"
    assert [name for name in ran if name.startswith(f"kssm_kernels/ops/{NAME}/__init__.py::")], output
    assert [name for name in ran if name.startswith("tests/ops/test_calls.py::")], output


@pytest.mark.slow
def test_the_example_runs_by_every_path(copy: Path) -> None:
    output = passed(copy, "-c", USE)
    assert output.startswith(str(copy)), output


@pytest.mark.slow
def test_the_example_is_formatted_and_typed_as_the_rest(copy: Path) -> None:
    missing = [tool for tool in ("ruff", "mypy") if importlib.util.find_spec(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed here")
    touched = [path for path in {*FILES, *(edit.path for edit in EDITS)} if path.endswith(".py")]
    passed(copy, "-m", "ruff", "check", *touched)
    passed(copy, "-m", "ruff", "format", "--check", *touched)
    passed(copy, "-m", "mypy")

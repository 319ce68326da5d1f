"""The program behind docs/optimizer.md runs, and its page has a row for every optimizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.proof import optimizers
from bench.proof.__main__ import EXPERIMENTS

ROOT = Path(__file__).parents[2]


def _program(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.proof", *args]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_quick_run_and_rebuilt_page(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'kssm-kernels[proof]'")
    text = tmp_path / "text"
    text.write_text("A man, a plan, a canal: Panama.\n" * 200)
    page, again = tmp_path / "page.md", tmp_path / "again.md"
    where = ("--results", str(tmp_path / "results"))
    done = _program("--quick", "--text", str(text), *where, "--page", str(page))
    assert done.returncode == 0, done.stderr
    written = page.read_text()
    lines = written.splitlines()
    for recipe in optimizers.SINGLE:
        assert sum(line.startswith(f"| {recipe.name} |") for line in lines) >= 3, recipe.name
    for recipe in optimizers.CONTINUAL:
        assert sum(line.startswith(f"| {recipe.name} |") for line in lines) >= 2, recipe.name
    for name in EXPERIMENTS:
        assert f"--only {name} --quick" in written
    assert str(tmp_path) not in written

    assert _program("--only", *where, "--page", str(again)).returncode == 0
    assert again.read_text() == written


def test_without_scikit_learn_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    where = ("--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md"))
    done = _program("--quick", "--only", "digits", *where, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.strip() == "bench.proof needs scikit-learn for its digits: pip install 'kssm-kernels[proof]'"


def test_the_control_resists_whatever_the_sign() -> None:
    """Under gradients of one sign consolidate is SGD, its control is not; under alternating ones both resist."""
    for signs, free in (((1.0, 1.0, 1.0), True), ((1.0, -1.0, 1.0), False)):
        moved = {}
        for recipe in optimizers.CONTINUAL:
            if recipe.name in ("SGD", "SignSplitEMA consolidate", "symmetric control"):
                p = torch.zeros(4)
                optimizer = recipe.make([p], lr=1.0, **({} if recipe.name == "SGD" else {"kappa": 30.0}))
                for sign in signs:
                    before = p.clone()
                    p.grad = torch.full_like(p, sign)
                    optimizer.step()
                moved[recipe.name] = float((p - before)[0].abs())
        assert moved["SGD"] == 1
        assert (moved["SignSplitEMA consolidate"] == 1) == free
        assert moved["symmetric control"] < 0.05


def test_lion_moves_by_its_learning_rate() -> None:
    p = torch.zeros(3)
    optimizer = optimizers.Lion([p], lr=0.5)
    p.grad = torch.tensor([3.0, -0.1, 0.0])
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0]


def test_ewc_pulls_towards_the_anchor_by_the_fisher_information() -> None:
    p = torch.tensor([1.0, 1.0])
    optimizer = optimizers.OnlineEWC([p], lr=0.5, strength=2.0, decay=0.5)
    optimizer.end_task([torch.tensor([1.0, 0.0])])
    p += 1
    p.grad = torch.zeros(2)
    optimizer.step()
    assert p.tolist() == [1.5, 2.0]  # p = 2 - 0.5 * 2 * F * (p - 1)

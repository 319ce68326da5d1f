"""The gate runs every command of README.md and CONTRIBUTING.md: .ci/commands.py has an entry for each, and no other."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _commands() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kssm_ci_commands", ROOT / ".ci" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


commands = _commands()
ENTRIES = [(page, command) for page in commands.PAGES for command in commands.COMMANDS[page]]


@pytest.mark.parametrize("page", commands.PAGES)
def test_every_command_of_the_page_has_an_entry_and_the_other_way_round(page: str) -> None:
    found = commands.commands_of((ROOT / page).read_text(encoding="utf-8"))
    assert sorted(found) == sorted(commands.COMMANDS[page])


@pytest.mark.parametrize(("page", "command"), ENTRIES)
def test_what_the_gate_runs_is_the_command_or_says_why_not(page: str, command: str) -> None:
    entry = commands.COMMANDS[page][command]
    if isinstance(entry, commands.Part):
        gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        parts = re.search(r'^PARTS="([^"]*)"', gate, re.MULTILINE)
        assert parts is not None
        assert set(entry.names) <= set(parts[1].replace("\\\n", "").split())
        assert entry.names or entry.because
        return
    installs = re.fullmatch(r'pip install "\.\[(.*)\]" && (.*)', command)
    if installs:
        assert entry.extras == installs[1]
    assert entry.because or entry.commands == ((installs[2] if installs else command).replace("pip", "python -m pip"),)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "Runs `pytest\n-q` and `A=1 python x`, not `kssm_kernels/` nor `kssm-kernels`.\n",
            ["pytest -q", "A=1 python x"],
        ),
        ("```sh\nkssm train   # why\n```\n", ["kssm train"]),
        ("Text:\n\n    bash a \\\n      b    # both\n    csrc/math   a folder\n", ["bash a b"]),
        ("```python\npython = 1\n```\n", []),
    ],
    ids=["prose", "fenced", "indented", "an example in Python"],
)
def test_commands_are_found_in(text: str, found: list[str]) -> None:
    assert commands.commands_of(text) == found

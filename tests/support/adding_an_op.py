"""The example of docs/adding_an_op.md: its files and one-line edits, and their way into a copy of the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_an_op.md"
BLOCK = r"\n\n```\w+\n(.*?)^```$"
PLACES = {"before": 0, "after": 1, "in place of": 0}


@dataclass(frozen=True)
class Edit:
    """A line put ``where`` ("before", "after", "in place of") the only line of the file that holds ``text``."""

    path: str
    where: str
    text: str
    line: str

    def applied(self, content: str) -> str:
        lines = content.splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if self.text in line]
        assert len(found) == 1, f"{self.path}: {len(found)} lines hold {self.text!r}, want one"
        at = found[0] + PLACES[self.where]
        lines[at : at + (self.where == "in place of")] = [self.line]
        return "".join(lines)


def files_of(page: str) -> dict[str, str]:
    """Content by path: of every block that a path alone introduces."""
    return dict(re.findall(rf"^`([^`\n]+)`:{BLOCK}", page, re.MULTILINE | re.DOTALL))


def edits_of(page: str) -> list[Edit]:
    where = "|".join(PLACES)
    found = re.findall(rf"^`([^`\n]+)`, ({where}) `([^`\n]+)`:{BLOCK}", page, re.MULTILINE | re.DOTALL)
    return [Edit(*parts) for parts in found]


def copy_repository(target: Path) -> None:
    """What git tracks, or all but what is built where there is no git."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # else deleted, and not committed yet
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
        return
    built = ("build", "dist", "runs", "*.so", "*.egg-info", "_kssm_kernels_*.py")
    ignored = shutil.ignore_patterns(".*", "__pycache__", *built)
    shutil.copytree(ROOT, target, ignore=ignored, dirs_exist_ok=True)


def apply(files: dict[str, str], edits: list[Edit], target: Path) -> None:
    for path, content in files.items():
        assert not (target / path).exists(), f"{path} is not a new file"
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(content, encoding="utf-8")
    for edit in edits:
        file = target / edit.path
        file.write_text(edit.applied(file.read_text(encoding="utf-8")), encoding="utf-8")

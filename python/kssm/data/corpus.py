"""Text to tokens: which files, the memory-mapped token file, batches and held-out windows.

A run's folder holds ``tokens.bin`` (uint8, or uint16 for more than 256 kinds of token) and ``tokens.json`` (what is in
it). The last tenth of the text is held out.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kssm.data.tokens import Tokens, Vocabulary
from kssm.options import UsageError

__all__ = [
    "Corpus",
    "Dataset",
    "even_starts",
    "find_files",
    "held_out",
    "random_starts",
    "read_corpus",
    "standard_library_files",
    "windows",
    "write_corpus",
]

TOKENS, META = "tokens.bin", "tokens.json"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
HELD_OUT = 10  # the last 1/10 of the tokens

STANDARD_LIBRARY_BYTES = 4_000_000
# Tests and installed packages are not the library; encodings and pydoc_data are generated tables.
NOT_STANDARD_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def _walk(folder: Path, skip: set[str]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files to read: a file as it is, a folder's text files (TEXT_SUFFIXES) in sorted order.

    Hidden files and folders, Python caches and empty files of a folder are skipped.
    Raises UsageError for a path that does not exist, a file that is empty and a folder without text.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                inside = [f for f in _walk(path, {"__pycache__"}) if f.suffix in TEXT_SUFFIXES and f.stat().st_size]
                if not inside:
                    raise UsageError(f"--data: folder {path} holds no non-empty {', '.join(TEXT_SUFFIXES)} file")
                found += inside
            elif not path.exists():
                raise UsageError(f"--data: {path} does not exist")
            elif not path.is_file():
                raise UsageError(f"--data: {path} is neither a file nor a folder")
            elif path.stat().st_size == 0:
                raise UsageError(f"--data: {path} is empty")
            else:
                found.append(path)
        except OSError as error:
            raise UsageError(f"--data: {path} cannot be read: {error.strerror}") from error
    return found


def standard_library_files(limit: int = STANDARD_LIBRARY_BYTES) -> list[Path]:
    """The standard library's own sources in sorted order, ASCII only, up to ``limit`` bytes: text that is always there.

    Raises UsageError where the interpreter carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    total = 0
    for path in _walk(root, NOT_STANDARD_LIBRARY | {"__pycache__"}):
        if path.suffix != ".py":
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if content and content.isascii():
            total += len(content)
            if total > limit:
                break
            files.append(path)
    if not files:
        raise UsageError(f"no --data, and this Python carries no sources in {root}")
    return files


def _read(path: Path, kind: str) -> str | bytes:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig") if kind == "char" else content
    except OSError as error:
        raise UsageError(f"--data: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data: {path} is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); "
            "--tokens byte reads any file"
        ) from error


@dataclass(frozen=True)
class Corpus:
    """Files that have been read once: their vocabulary and their length in tokens."""

    files: tuple[Path, ...]
    vocabulary: Vocabulary
    length: int


def read_corpus(paths: Sequence[Path], kind: Literal["char", "byte"]) -> Corpus:
    """Read every file (the standard library's without paths) one at a time; writes nothing.

    Raises UsageError for a path that cannot be used, text that is not UTF-8 (char) and more than 65,536 characters.
    """
    files = find_files(paths) if paths else standard_library_files()
    length, characters = 0, set[str]()
    for path in files:
        content = _read(path, kind)
        length += len(content)
        if isinstance(content, str):
            characters |= set(content)
    if len(characters) > 65536:
        raise UsageError(f"--tokens char: at most 65536 different characters, got {len(characters)}; use --tokens byte")
    return Corpus(tuple(files), Vocabulary(kind, "".join(sorted(characters))), length)


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Write ``tokens.bin``, one file of the corpus after the other, then ``tokens.json``."""
    vocabulary = corpus.vocabulary
    with open(folder / TOKENS, "wb") as out:
        for path in corpus.files:
            content = _read(path, vocabulary.kind)
            out.write(vocabulary.encode(content).tobytes() if isinstance(content, str) else content)
    meta = {
        "kind": vocabulary.kind,
        "characters": vocabulary.characters,
        "dtype": vocabulary.dtype.name,
        "length": corpus.length,
        "files": [str(path) for path in corpus.files],
    }
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


class Dataset:
    """A run's memory-mapped tokens: ``train`` and ``validation`` (the last tenth), each ``[length]``.

    Raises UsageError where the folder does not hold what ``tokens.json`` says.
    """

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            self.vocabulary = Vocabulary(meta["kind"], meta["characters"])
            tokens = np.memmap(folder / TOKENS, dtype=self.vocabulary.dtype, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"the token file of {folder} cannot be read: {error}") from error
        if len(tokens) != meta["length"]:
            raise UsageError(f"{folder / TOKENS} must hold {meta['length']} tokens, got {len(tokens)}")
        split = len(tokens) - held_out(len(tokens))
        self.train, self.validation = tokens[:split], tokens[split:]


def held_out(length: int) -> int:
    return length // HELD_OUT


def windows(tokens: Tokens, starts: NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the next tokens), each ``[len(starts), context]`` int64."""
    block = torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return block[:, :-1], block[:, 1:]


def random_starts(tokens: Tokens, context: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    """Where ``count`` random windows begin: a function of seed and step alone, so a resumed run draws the same ones."""
    return np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size=count)


def even_starts(tokens: Tokens, context: int, limit: int) -> NDArray[np.int64]:
    """Where the disjoint windows of at most ``limit`` tokens begin, evenly spread over the text."""
    available = (len(tokens) - 1) // context
    count = min(available, limit // context)
    numbers: NDArray[np.int64] = np.linspace(0, available - 1, count).round().astype(np.int64)
    return numbers * context

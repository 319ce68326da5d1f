"""Text to tokens: files, vocabularies, the memory-mapped file, windows, entropies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kssm import data
from kssm.data import Dataset, Vocabulary, find_files, read_corpus, standard_library_files, write_corpus
from kssm.options import UsageError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def stored(paths: list[Path], kind: str, folder: Path) -> Dataset:
    folder.mkdir()
    write_corpus(read_corpus(paths, kind), folder)
    return Dataset(folder)


def whole(dataset: Dataset) -> list[int]:
    return [*dataset.train.tolist(), *dataset.validation.tolist()]


class TestFiles:
    def test_folders_give_their_text_in_sorted_order(self, tmp_path: Path):
        for name in ("b.txt", "a/z.md", "a/c.py", "a/b/x.rst"):
            write(tmp_path / name, "text")
        for name in (".git/x.txt", "__pycache__/x.txt", "picture.png", ".hidden.txt"):
            write(tmp_path / name, "no text")
        write(tmp_path / "empty.txt", "")
        found = [str(p.relative_to(tmp_path)) for p in find_files([tmp_path])]
        assert found == ["b.txt", "a/c.py", "a/z.md", "a/b/x.rst"]

    def test_files_are_taken_as_given_whatever_their_name(self, tmp_path: Path):
        paths = [write(tmp_path / "z.log", "1"), write(tmp_path / "a.bin", "2")]
        assert find_files(paths) == paths

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [("missing.txt", None, "does not exist"), ("empty.txt", "", "is empty"), ("folder/x.png", "x", "holds no")],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path: Path, name: str, content: str | None, message: str):
        if content is not None:
            write(tmp_path / name, content)
        path = tmp_path / name.split("/")[0]
        with pytest.raises(UsageError, match=f"{path.name}.*{message}"):
            find_files([path])

    def test_the_standard_library_is_always_there(self):
        files = standard_library_files(300_000)
        assert files == standard_library_files(300_000)
        assert sum(f.stat().st_size for f in files) <= 300_000
        assert len(files) > 3
        assert all(f.suffix == ".py" and f.read_bytes().isascii() for f in files)
        assert not any({"test", "site-packages"} & set(f.parts) for f in files)


class TestVocabulary:
    @given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1))
    def test_round_trip(self, text: str):
        characters = Vocabulary("char", "".join(sorted(set(text))))
        assert characters.decode(characters.encode(text).tolist()) == text
        assert Vocabulary("byte").decode(Vocabulary("byte").encode(text).tolist()) == text
        for vocabulary in (characters, Vocabulary("byte")):
            counts = np.bincount(vocabulary.encode(text), minlength=len(vocabulary))
            assert counts @ vocabulary.byte_lengths == len(text.encode())

    def test_unknown_characters_are_named(self):
        with pytest.raises(UsageError, match="'z' is not in the vocabulary"):
            Vocabulary("char", "abc").encode("abz")

    def test_bytes_that_are_no_text_are_replaced(self):
        assert Vocabulary("byte").decode([0x61, 0xFF]) == "a\N{REPLACEMENT CHARACTER}"


class TestTokenFile:
    def test_characters(self, tmp_path: Path):
        text = "The café opens at nine. " * 5
        paths = [write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", "\N{BYTE ORDER MARK}Zz")]
        dataset = stored(paths, "char", tmp_path / "run")
        assert isinstance(dataset.train, np.memmap)
        assert dataset.train.dtype == np.uint8
        assert (tmp_path / "run" / "tokens.bin").stat().st_size == len(text) + 2
        assert dataset.vocabulary.decode(whole(dataset)) == text + "Zz"
        assert len(dataset.validation) == (len(text) + 2) // 10

    def test_bytes(self, tmp_path: Path):
        content = bytes(range(256)) * 2
        dataset = stored([write(tmp_path / "a.bin", content)], "byte", tmp_path / "run")
        assert bytes(whole(dataset)) == content
        assert len(dataset.vocabulary) == 256

    def test_many_characters_take_two_bytes_each(self, tmp_path: Path):
        text = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
        dataset = stored([write(tmp_path / "a.txt", text)], "char", tmp_path / "run")
        assert dataset.train.dtype == np.uint16
        assert dataset.vocabulary.decode(whole(dataset)) == text

    def test_text_that_is_not_utf8(self, tmp_path: Path):
        path = write(tmp_path / "a.txt", b"ab\xff")
        with pytest.raises(UsageError, match=r"a\.txt is not UTF-8 text \(byte 0xff at 2\); --tokens byte"):
            read_corpus([path], "char")
        assert read_corpus([path], "byte").length == 3

    def test_a_damaged_folder_is_refused(self, tmp_path: Path):
        stored([write(tmp_path / "a.txt", "abc" * 20)], "char", tmp_path / "run")
        (tmp_path / "run" / "tokens.bin").write_bytes(b"\0" * 59)
        with pytest.raises(UsageError, match="must hold 60 tokens, got 59"):
            Dataset(tmp_path / "run")
        (tmp_path / "run" / "tokens.json").write_text("{}")
        with pytest.raises(UsageError, match="cannot be read"):
            Dataset(tmp_path / "run")


class TestWindows:
    tokens = np.arange(100, dtype=np.uint8)

    def test_targets_are_the_next_tokens(self):
        inputs, targets = data.windows(self.tokens, np.array([0, 89]), 10)
        assert inputs.dtype == torch.int64
        assert inputs.tolist() == [list(range(10)), list(range(89, 99))]
        assert torch.equal(targets, inputs + 1)

    def test_random_starts_depend_on_seed_and_step_alone_and_reach_both_ends(self):
        def draw(seed: int, step: int) -> list[int]:
            return data.random_starts(self.tokens, 10, 2000, seed, step).tolist()

        assert draw(1, 2) == draw(1, 2)
        assert draw(1, 2) != draw(1, 3)
        assert draw(1, 2) != draw(2, 2)
        assert (min(draw(0, 0)), max(draw(0, 0))) == (0, 89)

    @given(length=st.integers(12, 300), limit=st.integers(10, 400))
    def test_even_starts_are_disjoint_and_inside(self, length: int, limit: int):
        starts = data.even_starts(np.zeros(length, dtype=np.uint8), 10, limit)
        assert 1 <= len(starts) <= limit // 10
        assert (np.diff(starts) >= 10).all()
        assert starts[0] == 0
        assert starts[-1] + 10 < length


def test_unigram_entropy_and_bits_per_byte():
    assert data.unigram_entropy(np.array([4, 4, 4, 4, 0])) == pytest.approx(math.log(4))
    assert data.unigram_entropy(np.array([7, 0])) == 0
    assert data.bigram_entropy(np.zeros((0, 2), dtype=np.int64)) == 0
    alone = np.stack([np.zeros(8, dtype=np.int64), np.array([0, 0, 1, 1, 2, 2, 3, 3])], 1)
    assert data.bigram_entropy(alone) == pytest.approx(math.log(4))  # what stands before says nothing
    assert data.bigram_entropy(np.array([[0, 1], [1, 2], [2, 0]] * 5)) == pytest.approx(0, abs=1e-12)
    # two tokens of one byte and two of two bytes, at 3 bits each: 12 bits in 6 bytes
    vocabulary = Vocabulary("char", "aé")
    assert data.bits_per_byte(3 * math.log(2), np.array([2, 2]), vocabulary) == pytest.approx(2.0)

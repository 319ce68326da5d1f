"""Text and tokens: reading and splitting a corpus, its vocabulary, batches and held-out windows."""

from kssm.data.corpus import (
    Corpus,
    Dataset,
    even_starts,
    find_files,
    held_out,
    random_starts,
    read_corpus,
    standard_library_files,
    windows,
    write_corpus,
)
from kssm.data.tokens import Vocabulary, bigram_entropy, bits_per_byte, unigram_entropy

__all__ = [
    "Corpus",
    "Dataset",
    "Vocabulary",
    "bigram_entropy",
    "bits_per_byte",
    "even_starts",
    "find_files",
    "held_out",
    "random_starts",
    "read_corpus",
    "standard_library_files",
    "unigram_entropy",
    "windows",
    "write_corpus",
]

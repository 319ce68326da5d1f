"""How a call reaches native code: the fields of a struct of csrc/calls.h, packed in order, 8 bytes each.

An op's ``_calls.py`` declares a NamedTuple for each struct, with its name and its fields; a test holds the two to each
other. What is packed is a flat run of fields: those of a struct within a struct stand in its place.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any, NewType, get_args, get_type_hints

# The first twelve digits of csrc/calls.h's SHA-256. Both libraries carry those of the header that they were built from,
# so that a source checkout which shadows an older installed library says so instead of crashing.
ABI = "3e70e0f6a75f"

Word = NewType("Word", int)  # 64 bits without a sign

_LETTERS: dict[Any, str] = {int: "q", float: "d", Word: "Q"}


def letters_of(call: Any, *zero: str) -> str:
    """The letters of the struct module for a call's fields, from the NamedTuple that declares it."""
    if call in _LETTERS:
        return _LETTERS[call]
    letters = ""
    for name, part in get_type_hints(call).items() if not get_args(call) else enumerate(get_args(call)):
        own = letters_of(part, *zero)
        letters += f"{8 * len(own)}x" if name in zero else own
    return letters


def packer(call: Any, *zero: str) -> Callable[..., bytes]:
    """What packs the fields of such a call, given one by one and in order: 0.2 us for ten.

    ``zero``: names of fields that are not given and stay 0, which takes no time.

    Not struct.pack: torch.compile, where it traces an op's Python, follows that into a function of its own that calls
    it, and ends in a RecursionError (torch 2.13).
    """
    return _layout(letters_of(call, *zero)).pack


@functools.cache
def _layout(letters: str) -> struct.Struct:
    return struct.Struct(f"={letters}")


def address(tensor: Any) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

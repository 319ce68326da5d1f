"""What an option may be: bounds, which stand with the field that they hold for, and the error for the user."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "Bound",
    "Probability",
    "Size",
    "UsageError",
    "at_least",
    "between",
    "check_bounds",
    "flag",
    "metadata",
]


class UsageError(Exception):
    """One line for the user: what was got, what was wanted. The command line prints it and exits with code 2."""


@dataclass(frozen=True)
class Bound:
    """Which numbers a field may have, as metadata of its annotation; ``wanted`` completes "must be"."""

    wanted: str
    holds: Callable[[float], bool]


def at_least(low: int) -> Bound:
    return Bound(f"at least {low}", lambda value: value >= low)


def between(low: int, high: int) -> Bound:
    """Both ends included."""
    return Bound(f"from {low} to {high}", lambda value: low <= value <= high)


POSITIVE = Bound("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Bound("a number of at least 0", lambda value: 0 <= value < math.inf)

Size = Annotated[int, at_least(1)]
Probability = Annotated[float, Bound("at least 0 and below 1", lambda value: 0 <= value < 1)]


def flag(name: str) -> str:
    """An option's name on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def metadata(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """What the annotation of each field of a dataclass carries beside its type."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(kind)}


def check_bounds(options: Any) -> None:
    """Raise UsageError for the first field of a dataclass whose value is out of its bounds.

    >>> @dataclass
    ... class Sizes:
    ...     width: Size
    >>> check_bounds(Sizes(1))
    >>> check_bounds(Sizes(0))
    Traceback (most recent call last):
    kssm.options.UsageError: --width must be at least 1, got 0
    """
    for name, marks in metadata(type(options)).items():
        value = getattr(options, name)
        for bound in marks:
            if isinstance(bound, Bound) and not bound.holds(value):
                raise UsageError(f"{flag(name)} must be {bound.wanted}, got {value}")

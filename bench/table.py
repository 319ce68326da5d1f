"""The figures as a table, for the terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from bench.compare import Figure
from bench.interleave import Quantiles

HEADER = ("case", "against", "ours", "theirs", "figure", "target", "reached")


def number(value: float) -> str:
    """Three significant digits, without exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(q: Quantiles, unit: str) -> str:
    return f"{number(q.median)} {unit} [{number(q.low)}, {number(q.high)}]"


def cells(figure: Figure) -> tuple[str, ...]:
    ours, theirs = spread(figure.ours, figure.unit), spread(figure.theirs, figure.unit)
    return figure.case, figure.against, ours, theirs, figure.shown(figure.value), figure.wanted, figure.reached


def text_table(figures: Sequence[Figure]) -> str:
    rows = [HEADER, *map(cells, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(figures: Sequence[Figure]) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *map(cells, figures)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

"""A table of measurements in docs/ and the plot of it: what the benches that draw have in common."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence

from bench.interleave import DOCS, environment

Row = dict[str, str]


def measure_and_draw(
    name: str,
    description: str | None,
    columns: Sequence[str],
    measure: Callable[[], Iterator[Row]],
    draw: Callable[[list[Row], str], None],
) -> None:
    """A command: writes docs/NAME.csv row by row, then draws it; ``--draw`` draws the table that is there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--draw", action="store_true", help=f"draw docs/{name}.csv again, measure nothing")
    table = DOCS / f"{name}.csv"
    DOCS.mkdir(exist_ok=True)
    if not parser.parse_args().draw:
        facts = environment()
        caption = "; ".join(facts[k] for k in ("processor", "kssm_kernels", "torch", "date"))
        with table.open("w", newline="") as out:
            out.write(f"# {caption}\n")
            writer = csv.DictWriter(out, columns, lineterminator="\n")
            writer.writeheader()
            for row in measure():
                writer.writerow(row)
                print(*row.values(), flush=True)
    first, *lines = table.read_text().splitlines()
    draw(list(csv.DictReader(lines)), first.removeprefix("# "))

"""The results as tables, put into the places that docs/optimizer_notes.md leaves for them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]


def written(notes: str, results: dict[str, Result]) -> str:
    """``notes`` with ``{name}`` replaced by that experiment's table."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in results:
            return f"(not run: `python -m bench.proof --only {name}`)"
        return TABLES[name](results[name]) + "\n\n" + _caption(results[name])

    return re.sub(r"\{(" + "|".join(TABLES) + r")\}", table, notes)


def _caption(result: Result) -> str:
    return f"`{result['command']}`; {result['machine']}; {result['seconds']:.0f} s."


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if max(map(abs, values)) >= 1e6:
        return "diverged"
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _options(row: Result) -> str:
    shown = ", ".join(f"{name} {value:g}" for name, value in row["options"].items())
    return shown + (" (edge)" if row["at_edge"] else "")


def _grid(row: Result) -> str:
    names = row["grid"][0]
    return "; ".join(
        f"{name} " + " ".join(f"{value:g}" for value in dict.fromkeys(options[name] for options in row["grid"]))
        for name in names
    )


def _single(result: Result) -> str:
    seeds = len(result["rows"][0]["loss"])
    header = ("optimizer", f"test loss, {_seeds(seeds)}", "test accuracy, %", "chosen", "grid")
    rows = [
        (row["name"], _spread(row["loss"], 3), _spread(row["accuracy"], 1), _options(row), _grid(row))
        for row in result["rows"]
    ]
    return _markdown(header, rows)


def _continual(result: Result) -> str:
    sgd = next(row["final"] for row in result["rows"] if row["name"] == "SGD")
    header = (
        "optimizer",
        f"accuracy after the last task, %, {_seeds(len(sgd))}",
        "less SGD's, same seeds",
        "accuracy right after each task, %",
        "forgetting, points",
        "chosen",
        "grid",
    )
    rows = []
    for row in result["rows"]:
        above = [a - b for a, b in zip(row["final"], sgd, strict=True)]
        three = [_spread(row[key], 1) for key in ("learned", "forgetting")]
        difference = "" if row["name"] == "SGD" else _spread(above, 1)
        rows.append((row["name"], _spread(row["final"], 1), difference, *three, _options(row), _grid(row)))
    return _markdown(header, rows) + "\n\n" + _against_control(result)


def _against_control(result: Result) -> str:
    final = {row["name"]: row["final"] for row in result["rows"]}
    pairs = zip(final["SignSplitEMA consolidate"], final["symmetric control"], strict=True)
    above = [a - b for a, b in pairs]
    wins = sum(difference > 0 for difference in above)
    return (
        f"consolidate less its control, accuracy after the last task, same seeds: {_spread(above, 1)} points; "
        f"better on {wins} of {len(above)} seeds."
    )


def _states(result: Result) -> str:
    header = (
        "states",
        f"test loss, {_seeds(len(result['rows'][0]['loss']))}",
        "less float32's, same seeds",
        "bytes of state per parameter",
    )
    full = result["rows"][0]["loss"]
    rows = []
    for row in result["rows"]:
        above = [a - b for a, b in zip(row["loss"], full, strict=True)]
        difference = "" if row["loss"] is full else _spread(above, 4)
        rows.append((row["name"], _spread(row["loss"], 4), difference, f"{row['bytes']:.2f}"))
    return _markdown(header, rows)


def _scale(result: Result) -> str:
    seeds = len(result["rows"][0]["losses"][0])
    header = ("optimizer", *(f"gradients times {s:g}: test loss, {_seeds(seeds)}" for s in result["scales"]))
    return _markdown(header, [(r["name"], *(_spread(v, 4) for v in r["losses"])) for r in result["rows"]])


def _noise(result: Result) -> str:
    seeds = len(result["rows"][0]["r"])
    header = ("beta", f"mean T, {_seeds(seeds)}", "mean of abs(r)", "sqrt((1-b)/(1+b))", "share with KL below 0.02")
    return _markdown(
        header,
        [
            (
                f"{r['beta']:g}",
                _spread(r["temperature"], 4),
                _spread(r["r"], 4),
                f"{r['floor']:.4f}",
                _spread(r["balanced"], 3),
            )
            for r in result["rows"]
        ],
    )


def _freezing(result: Result) -> str:
    header = (
        "mode, schedule, test",
        "runs that froze",
        "step of the first freeze",
        "test loss at that step",
        "groups frozen at the end",
        "thaws",
        "test loss at the end",
        "test accuracy at the end, %",
    )
    rows = []
    for row in result["rows"]:
        runs = row["runs"]
        fired = [run["first"] for run in runs if run["first"]["step"] is not None]
        steps = [first["step"] for first in fired]
        rows.append(
            (
                f"{row['mode']}, {row['schedule']}, {row['test'] or 'none'}",
                f"{len(fired)} of {len(runs)}" if row["test"] else "",
                f"{min(steps)} to {max(steps)}" if fired else "",
                _spread([first["loss"] for first in fired], 3) if fired else "",
                f"{statistics.fmean(run['frozen'] for run in runs):.1f} of {result['petals']}" if row["test"] else "",
                f"{statistics.fmean(run['thaws'] for run in runs):.1f}" if row["test"] else "",
                _spread([run["loss"] for run in runs], 4),
                _spread([run["accuracy"] for run in runs], 1),
            )
        )
    share = statistics.fmean(run["untouched"] for row in result["rows"] for run in row["runs"])
    untouched = f"Weights that have had no gradient by the end (both means 0): {100 * share:.1f}% on average."
    return _markdown(header, rows) + "\n\n" + untouched


TABLES: dict[str, Callable[[Result], str]] = {
    "digits": _single,
    "lm": _single,
    "states": _states,
    "scale": _scale,
    "split": _continual,
    "split_heads": _continual,
    "permuted": _continual,
    "noise": _noise,
    "freezing": _freezing,
}

"""Holds a case of an op to the tolerance rule (tolerance.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tests.support.cases import EAGER, PATHS, Case, Result, Slack, evaluate, threads, through, widened
from tests.support.specs import SPECS, arguments, by_equation, by_package, truth_of
from tests.support.tolerance import assert_within, inside, largest


def check(case: Case, dtype: torch.dtype, device: str = "cpu", paths: Sequence[str] = PATHS) -> None:
    """Holds outputs and gradients of the eager path, on the backend in force, to the rule; other paths to its bits."""
    truth = truth_of(case, dtype)
    framework, slack = _bounds(case, dtype)
    args = arguments(case, dtype, device)
    got = evaluate(by_package, case, args, dtype)
    assert got.keys() == truth.keys()
    for k, v in truth.items():
        wanted = inside(dtype) if k in SPECS[case.op].widens else dtype
        assert got[k].dtype == wanted, f"{k}: {got[k].dtype}, want {wanted}"
        assert_within(f"{case.name} {dtype} {k}", got[k], v, framework[k], slack[k])
    for path in [path for path in paths if path != EAGER]:
        with through(path):
            assert_same_bits(path, evaluate(by_package, case, args, dtype), got)


def assert_same_bits(path: str, results: Result, eager: Result) -> None:
    assert results.keys() == eager.keys()
    for k, v in eager.items():
        assert results[k].dtype == v.dtype, f"{k}: {results[k].dtype} by the {path} path, {v.dtype} by the eager one"
        assert torch.equal(results[k], v), f"{k}: other bits by the {path} path than by the eager one"


def framework_errors(case: Case, dtype: torch.dtype, truth: Result) -> dict[str, float]:
    """max|framework - truth| of each result, the better of the ways torch has; a way that yields NaN does not count."""
    args = arguments(case, dtype)
    ways = [evaluate(by_equation, case, args, dtype)]
    if torch.finfo(dtype).bits == 16:
        ways.append(evaluate(by_equation, case, widened(args, torch.float32), dtype))
    if case.phases in SPECS[case.op].beyond_framework:
        return dict.fromkeys(truth, 0.0)
    best: dict[str, float] = {}
    for k, v in truth.items():
        stored = inside(dtype) if k in SPECS[case.op].widens else dtype
        errors = [largest(way[k].to(stored).double() - v) for way in ways]
        best[k] = min((x for x in errors if math.isfinite(x)), default=0.0)
    return best


_known: dict[tuple[Case, torch.dtype], tuple[dict[str, float], Slack]] = {}


def _bounds(case: Case, dtype: torch.dtype) -> tuple[dict[str, float], Slack]:
    if (case, dtype) not in _known:
        truth, args = truth_of(case, dtype), widened(arguments(case, dtype), torch.float64)
        with threads(1):
            _known[case, dtype] = framework_errors(case, dtype, truth), SPECS[case.op].slack(case, dtype, args, truth)
    return _known[case, dtype]

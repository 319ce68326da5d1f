"""What the ops on phases share: how phases are drawn, and the slack of what is computed from them (tolerance.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.support.cases import Args, Case, Result, Slack, cotangents
from tests.support.layouts import laid_out
from tests.support.tolerance import harmonic_slack, inside, largest, stored_slack


def draw_theta(case: Case, dtype: torch.dtype, g: torch.Generator, ready: Callable[[Tensor], Tensor]) -> Tensor:
    # A view of a larger tensor becomes one on the device: moved there it would be contiguous.
    return laid_out(lambda shape: ready(_drawn(case, shape, dtype, g)), case.shape, case.layout)


def _drawn(case: Case, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    x = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    if case.phases == "uniform":
        return x * math.pi
    if case.phases == "locked":  # one cluster: every M_n near 1, and the recurrences add up the same error N times
        return 0.3 + 1e-2 * x
    if case.phases == "axes":  # next to multiples of pi/2, where a plain recurrence is at its worst
        return (x * 6).round() * (math.pi / 2) + 1e-3 * x
    if case.phases == "large":
        return x * min(1e6, torch.finfo(dtype).max / 8)
    if case.phases == "any":  # log-uniform over all sizes; in float64 truth itself rounds n theta, so small ones only
        top = min(math.log10(torch.finfo(dtype).max) - 0.01, 30.0) if dtype != torch.float64 else 0.5
        return x.sign() * 10 ** (x.abs() * (top + 4) - 4)
    raise ValueError(case.phases)


def _feature_weights(case: Case, given: Result, truth: Result) -> tuple[float, float]:
    """(W, W (1 + 2 / min M)) of tolerance.py; zero without features."""
    if "features" not in given or given["features"].numel() == 0:
        return 0.0, 0.0
    gc, gs, gm = given["features"].double().abs().unflatten(-1, (3, case.harmonics)).unbind(-2)
    n = torch.arange(1, case.harmonics + 1, dtype=torch.float64)
    m = truth["features"].unflatten(-1, (3, case.harmonics))[..., 2, :]
    size = case.shape[-1]
    return largest((n * (gc + gs + gm)).sum(-1)) / size, largest((n * (gc + gs + gm * (1 + 2 / m))).sum(-1)) / size


def phase_slack(
    case: Case, dtype: torch.dtype, args: Args, truth: Result, steps: int, sensitivity: Mapping[str, float]
) -> Slack:
    """Of an op on phases that takes ``steps`` steps; ``sensitivity``: the largest change of each result per radian."""
    given = cotangents(case, {k: v for k, v in truth.items() if not k.startswith("d ")}, dtype)
    e = torch.finfo(inside(dtype)).eps
    size = {k: largest(v) for k, v in args.items()}
    pull = abs(case.dt) * size.get("coupling", 0.0)
    reach = max(size["theta"], largest(truth.get("phases")))
    drift = abs(case.dt) * (size.get("omega", 0.0) + 2 * size.get("coupling", 0.0))
    r = e * steps * ((1 + pull) * (reach + size.get("phase_lag", 0.0)) + 4 * drift + 12 * size.get("noise_scale", 0.0))
    f = harmonic_slack(case.harmonics, dtype) if case.harmonics else 0.0
    if dtype == torch.float64:
        f += case.harmonics * reach * e
    weight, weight_m = _feature_weights(case, given, truth)
    stored = torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 and not steps else 0.0
    backward = f * weight_m + stored * weight
    g = largest(given.get("phases")) + weight + largest(truth.get("d theta"))
    adjoint = backward + 4 * math.sqrt(steps) * e * g * (1 + pull)
    factor = {"theta": 1.0, "coupling": abs(case.dt), "omega": abs(case.dt), "phase_lag": pull, "noise_scale": 6.0}
    slack: Slack = {}
    for k, v in truth.items():
        if k == "features":
            direct = f
        elif k == "phases":
            direct = 0.0
        else:
            name = k.removeprefix("d ")
            summed = max(1, math.prod(case.ensembles) * case.shape[-1] // max(1, v.numel()))
            shared = 2 * math.sqrt(summed) if summed > 1 else 1.0
            direct = shared * adjoint * (1.0 if name == "theta" else factor[name] * max(1, steps))
        extra = r if k == "phases" else 0.0
        slack[k] = direct + extra + 4 * r * sensitivity[k] + stored_slack(dtype, v)
    return slack

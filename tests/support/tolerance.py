"""The tolerance rule, and every slack with its reason.

    |kernel - truth| <= 2 max|framework - truth| + slack

truth: the equations in float64 (naive.py) on the very numbers the kernel got. framework: the same equations in
the kernel's dtype by torch; for 16-bit dtypes also widened to float32 and rounded once: the better of the two counts.

Slack, with e = eps of the arithmetic inside (float32 or float64) and o = eps of the dtype stored:

    harmonics       f = (4 + m + L^2) e, L = ceil(H / m), m = 4, 8, 16 for H up to 32, 128, 256: 4 e for sincos (2 ulp),
                    mean and magnitude; m e for cos(m theta) out of products (an error of e per factor); L^2 e for a
                    recurrence of length L (an error made in one step grows linearly, and L of them add up; its
                    coefficient must be good to e for that). C, S and M are at most 1.
    phases          r = steps ((1 + |dt K|) (|theta| + |alpha|) + 4 |dt| (|omega| + 2 |K|) + 12 |delta|) e: a step has
                    one rounding of theta and of theta + alpha, a few of the velocity, two of the noise (|xi| < 6).
    sensitivity     r moves everything computed from the phases: 4 r times the largest change of that result per radian,
                    measured on the truth itself with two random displacements of theta by 1e-6.
    harmonic sums   of the gradient: f times W = (1/N) sum_n n (|gC| + |gS| + |gM| (1 + 2 / M_n)), for C / M with C
                    wrong by f.
    adjoint         4 sqrt(steps) e max|g| (1 + |dt K|) per element: independent roundings of g add up as a random walk;
                    for an operand times its factor (dt, dt, |dt K|, 6) and the number of steps, and for one shared by q
                    elements times 2 sqrt(q), again a random walk.
    16 bits         o |truth| for the one rounding at the end (half of it would do) and the spacing of the subnormals;
                    o W more for order_parameters, whose gradient reads the saved features, which were rounded.
    float64         truth itself rounds n theta: H |theta| e.
    bistable        8 e times the magnitudes of the terms: (|d g| + |c h|) / |den| + |u| (|a g| + |c e|) / |den| for u,
                    |b g| + |c f| for Delta; the gradient is that times the largest parameter over |den|.

Order parameters of phases of any size are held to the slack alone: there torch's n theta is rounded by whole turns.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from tests.support.cases import (
    Case,
    Result,
    arguments,
    by_equation,
    by_package,
    cotangents,
    evaluate,
    threads,
    through,
    truth_of,
    widened,
)

Slack = dict[str, Tensor | float]
DISPLACEMENT = 1e-6


def inside(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def harmonic_slack(harmonics: int, dtype: torch.dtype) -> float:
    m = min(4 if harmonics <= 32 else 8 if harmonics <= 128 else 16, harmonics)
    return (4 + m + math.ceil(harmonics / m) ** 2) * torch.finfo(inside(dtype)).eps


def _largest(value: Tensor | float | None) -> float:
    if value is None or (isinstance(value, Tensor) and value.numel() == 0):
        return 0.0
    return float(value.abs().max()) if isinstance(value, Tensor) else abs(value)


def _stored(dtype: torch.dtype, truth: Tensor) -> Tensor | float:
    info = torch.finfo(dtype)
    return info.eps * (truth.abs() + info.tiny) if info.bits == 16 else 0.0


def _feature_weights(case: Case, given: Result, truth: Result) -> tuple[float, float]:
    """(W, W (1 + 2 / min M)) of the docstring; zero without features."""
    if "features" not in given or given["features"].numel() == 0:
        return 0.0, 0.0
    gc, gs, gm = given["features"].double().abs().unflatten(-1, (3, case.harmonics)).unbind(-2)
    n = torch.arange(1, case.harmonics + 1, dtype=torch.float64)
    m = truth["features"].unflatten(-1, (3, case.harmonics))[..., 2, :]
    size = case.shape[-1]
    return _largest((n * (gc + gs + gm)).sum(-1)) / size, _largest((n * (gc + gs + gm * (1 + 2 / m))).sum(-1)) / size


@functools.lru_cache(maxsize=512)
def _sensitivity(case: Case) -> dict[str, float]:
    """Largest change of each result per radian of displacement of every phase."""
    args = arguments(case, torch.float64)
    still = truth_of(case, torch.float64)
    g = torch.Generator().manual_seed(1)
    most = dict.fromkeys(still, 0.0)
    for _ in range(2):
        sign = torch.randint(0, 2, args["theta"].shape, generator=g) * 2 - 1
        moved = evaluate(by_equation, case, {**args, "theta": args["theta"] + DISPLACEMENT * sign}, torch.float64)
        for k, v in still.items():
            most[k] = max(most[k], _largest(moved[k] - v) / DISPLACEMENT)
    return most


def _phase_slack(case: Case, dtype: torch.dtype, truth: Result) -> Slack:
    args = widened(arguments(case, dtype), torch.float64)
    given = cotangents(case, {k: v for k, v in truth.items() if not k.startswith("d ")}, dtype)
    e = torch.finfo(inside(dtype)).eps
    size = {k: _largest(v) for k, v in args.items()}
    pull = abs(case.dt) * size.get("coupling", 0.0)
    reach = max(size["theta"], _largest(truth.get("phases")))
    steps = 0 if case.op == "order_parameters" else case.steps
    drift = abs(case.dt) * (size.get("omega", 0.0) + 2 * size.get("coupling", 0.0))
    r = e * steps * ((1 + pull) * (reach + size.get("phase_lag", 0.0)) + 4 * drift + 12 * size.get("noise_scale", 0.0))
    f = harmonic_slack(case.harmonics, dtype) if case.harmonics else 0.0
    if dtype == torch.float64:
        f += case.harmonics * reach * e
    weight, weight_m = _feature_weights(case, given, truth)
    moved = _sensitivity(case) if steps else dict.fromkeys(truth, 0.0)
    stored = torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 and not steps else 0.0
    backward = f * weight_m + stored * weight
    g = _largest(given.get("phases")) + weight + _largest(truth.get("d theta"))
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
        slack[k] = direct + extra + 4 * r * moved[k] + _stored(dtype, v)
    return slack


def _bistable_slack(case: Case, dtype: torch.dtype, truth: Result) -> Slack:
    params = arguments(case, dtype)["params"].double()
    given = cotangents(case, {k: v for k, v in truth.items() if not k.startswith("d ")}, dtype)
    a, b, c, d, e, f, g, h = params.abs()[..., :8].unbind(-1)
    exact = params[..., :8].unbind(-1)
    den = (exact[0] * exact[6] - exact[2] * exact[4] + 1e-6).abs()
    raw = (exact[3] * exact[6] - exact[2] * exact[7]).abs() / den
    unit = 8 * torch.finfo(inside(dtype)).eps
    terms = (d * g + c * h) / den + raw * (a * g + c * e) / den
    pull = (given["u"].double().abs() + given["K"].double().abs()) * (1 + raw) / den
    most = params.abs().amax(-1)
    gradient = unit * (pull * (1 + terms) * (1 + (a * g + c * e) / den) + given["Delta"].double().abs()) * most
    return {
        "K": unit * (1 + terms),
        "u": unit * (raw + terms),
        "Delta": unit * (b * g + c * f),
        "d params": gradient.unsqueeze(-1) + _stored(dtype, truth["d params"]),
    }


def slack_of(case: Case, dtype: torch.dtype, truth: Result) -> Slack:
    return _bistable_slack(case, dtype, truth) if case.op == "bistable_coupling" else _phase_slack(case, dtype, truth)


def framework_errors(case: Case, dtype: torch.dtype, truth: Result) -> dict[str, float]:
    """max|framework - truth| of each result, the better of the ways torch has; a way that yields NaN does not count."""
    args = arguments(case, dtype)
    ways = [evaluate(by_equation, case, args, dtype)]
    if torch.finfo(dtype).bits == 16:
        ways.append(evaluate(by_equation, case, widened(args, torch.float32), dtype))
    if case.op == "order_parameters" and case.phases in ("large", "any"):
        return dict.fromkeys(truth, 0.0)
    best: dict[str, float] = {}
    for k, v in truth.items():
        errors = [_largest(way[k].to(dtype).double() - v) for way in ways]
        best[k] = min((x for x in errors if math.isfinite(x)), default=0.0)
    return best


def assert_within(label: str, kernel: Tensor, truth: Tensor, framework: float, slack: Tensor | float) -> None:
    """The rule, element by element; says where it fails first and with which three values. A NaN fails."""
    assert kernel.shape == truth.shape, f"{label}: shape {tuple(kernel.shape)}, want {tuple(truth.shape)}"
    got = kernel.detach().cpu().double()
    bound = (2 * framework + torch.as_tensor(slack, dtype=torch.float64)).expand(truth.shape)
    error = (got - truth).abs()
    bad = ~(error <= bound)
    if bad.any():
        worst = int(torch.where(bad, (error / bound.clamp_min(1e-300)).nan_to_num(math.inf), -1.0).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.dim() else ()
        raise AssertionError(
            f"{label}: {int(bad.sum())} of {bad.numel()} outside the tolerance; the worst at {index}: "
            f"kernel {got[index].item()!r}, truth {truth[index].item()!r}, bound {bound[index].item():.3e} = "
            f"2 x framework error {framework:.3e} + slack {(bound[index] - 2 * framework).item():.3e}"
        )


def check(case: Case, dtype: torch.dtype, door: str = "direct", device: str = "cpu") -> None:
    """Runs the case on the backend in force and holds outputs and gradients to the rule."""
    truth = truth_of(case, dtype)
    framework, slack = _bounds(case, dtype)
    args = arguments(case, dtype, device)
    with through(door):
        got = evaluate(by_package, case, args, dtype)
    assert got.keys() == truth.keys()
    for k, v in truth.items():
        wanted = inside(dtype) if case.op == "bistable_coupling" and not k.startswith("d ") else dtype
        assert got[k].dtype == wanted, f"{k}: {got[k].dtype}, want {wanted}"
        assert_within(f"{case.name} {dtype} {k}", got[k], v, framework[k], slack[k])


_known: dict[tuple[Case, torch.dtype], tuple[dict[str, float], Slack]] = {}


def _bounds(case: Case, dtype: torch.dtype) -> tuple[dict[str, float], Slack]:
    if (case, dtype) not in _known:
        truth = truth_of(case, dtype)
        with threads(1):
            _known[case, dtype] = framework_errors(case, dtype, truth), slack_of(case, dtype, truth)
    return _known[case, dtype]

"""The mean-field step, alone and with the order parameters of where it ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kssm_kernels
from tests.support import naive
from tests.support.cases import OPERANDS, SEED, Args, Case, Operand, Result, Slack, Spec, evaluate, generator
from tests.support.phases import draw_theta, phase_slack
from tests.support.tolerance import largest

DISPLACEMENT = 1e-6
# Middle and spread of the operands that are tensors.
CENTRE = {"coupling": (1.0, 0.5), "omega": (0.0, 0.5), "phase_lag": (0.0, 0.3), "noise_scale": (0.1, 0.02)}


def _draw(case: Case, dtype: torch.dtype, g: torch.Generator, ready: Callable[[Tensor], Tensor]) -> Args:
    found: Args = {"theta": draw_theta(case, dtype, g, ready)}
    for name in OPERANDS:
        operand = getattr(case, name)
        if isinstance(operand, tuple):
            middle, spread = CENTRE[name]
            found[name] = ready(middle + spread * torch.randn(operand, generator=g, dtype=torch.float64))
        elif operand is not None:
            found[name] = operand
    return found


@functools.lru_cache(maxsize=64)
def _noise(case: Case, device: str = "cpu") -> Tensor | None:
    """The promised noise [steps, ..., N] of a call with SEED (tests/ops/test_noise.py holds it to its definition)."""
    if case.noise_scale is None:
        return None
    rows = math.prod(case.ensembles)
    xi = [kssm_kernels.philox_normal(rows, case.shape[-1], seed=SEED, step=k, device=device) for k in range(case.steps)]
    return torch.cat([x.reshape(1, *case.ensembles, case.shape[-1]) for x in xi]) if xi else None


def _phases_by_equation(case: Case, args: Args) -> Tensor:
    xi = _noise(case, str(args["theta"].device))
    return naive.kuramoto_update(**args, dt=case.dt, steps=case.steps, xi=xi)


def _update_by_equation(case: Case, args: Args) -> Result:
    return {"phases": _phases_by_equation(case, args)}


def _features_by_equation(case: Case, args: Args) -> Result:
    phases = _phases_by_equation(case, args)
    features = {"features": naive.order_parameters(phases, case.harmonics)}
    return {**features, "phases": phases} if case.return_phases else features


def _rest(case: Case, args: Args) -> Args:
    return {**args, "dt": case.dt, "steps": case.steps, "seed": SEED if "noise_scale" in args else None}


def _update_by_package(case: Case, args: Args) -> Result:
    return {"phases": kssm_kernels.kuramoto_update(**_rest(case, args))}


def _features_by_package(case: Case, args: Args) -> Result:
    rest = _rest(case, args)
    out = kssm_kernels.kuramoto_features(harmonics=case.harmonics, return_phases=case.return_phases, **rest)
    return dict(zip(("features", "phases"), out, strict=True)) if isinstance(out, tuple) else {"features": out}


@functools.lru_cache(maxsize=512)
def _sensitivity(case: Case) -> dict[str, float]:
    """Largest change of each result per radian of displacement of every phase."""
    args = _draw(case, torch.float64, generator(case), lambda t: t)
    still = evaluate(SPECS[case.op].by_equation, case, args, torch.float64)
    g = torch.Generator().manual_seed(1)
    most = dict.fromkeys(still, 0.0)
    for _ in range(2):
        sign = torch.randint(0, 2, args["theta"].shape, generator=g) * 2 - 1
        moved = evaluate(
            SPECS[case.op].by_equation, case, {**args, "theta": args["theta"] + DISPLACEMENT * sign}, torch.float64
        )
        for k, v in still.items():
            most[k] = max(most[k], largest(moved[k] - v) / DISPLACEMENT)
    return most


def _slack(case: Case, dtype: torch.dtype, args: Args, truth: Result) -> Slack:
    sensitivity = _sensitivity(case) if case.steps else dict.fromkeys(truth, 0.0)
    return phase_slack(case, dtype, args, truth, case.steps, sensitivity)


def _updates() -> list[Case]:
    def case(shape: tuple[int, ...], coupling: Operand = 1.0, **rest: Any) -> Case:
        return Case("kuramoto_update", shape, coupling=coupling, **rest)

    kinds: list[Operand] = [(), (1,), (9,), (4, 1), (4, 9), (1, 9), (1, 1)]
    everything: dict[str, Any] = {"omega": (33,), "phase_lag": (3, 1), "noise_scale": (1,)}
    return [
        *(case((2, n)) for n in (1, 2, 31, 32, 33, 4095, 4096, 4097)),
        case((1, 10001), (1,), omega=(10001,), phase_lag=0.3, noise_scale=0.1, dt=0.1, steps=2),
        *(case((4, 9), k) for k in kinds),
        *(case((4, 9), 0.8, **{name: k}) for name in OPERANDS[1:] for k in kinds),
        case((9,), (4, 1), noise_scale=(4, 1)),
        case((9,), (1, 1)),
        case((1, 9), (1, 9)),
        case((1, 9), (4, 9), omega=(9,)),
        case((2, 1, 9), (2, 3, 1), omega=(1, 3, 9)),
        case((5,), (), omega=(5,), phase_lag=(), noise_scale=()),
        case((0, 6), (1,), omega=(0, 6), noise_scale=0.1),
        case((6,), (0, 1), omega=(6,)),
        case((3, 33), (3, 1), **everything, dt=0.1, steps=7),
        case((3, 33), (3, 33), **everything, dt=0.02, steps=64),
        case((3, 33), (3, 1), **everything, dt=0.02, steps=65),
        case((2, 5), (1,), omega=(2, 5), dt=0.01, steps=200),
        case((3, 8), (1,), omega=(8,), noise_scale=(), steps=0),
        *(case((4, 24), (4, 1), layout=v) for v in ("transposed", "every-second", "columns", "rows", "expanded")),
        case((4, 24), (24,), layout="one-phase"),
        *(case((3, 17), (3, 1), phases=v, phase_lag=0.2, dt=0.1, steps=3) for v in ("locked", "axes")),
        case((3, 17), (3, 17), phases="large"),
    ]


def _features() -> list[Case]:
    def case(shape: tuple[int, ...], harmonics: int, coupling: Operand = 1.0, **rest: Any) -> Case:
        return Case("kuramoto_features", shape, harmonics, coupling=coupling, **rest)

    everything: dict[str, Any] = {"omega": (17,), "phase_lag": (1,), "noise_scale": (2, 3, 1)}
    return [
        *(case((3, n), 4, (3, 1), return_phases=w) for n in (1, 31, 32, 33) for w in (True, False)),
        *(case((2, 13), h, (13,), return_phases=h % 2 == 0) for h in (1, 2, 31, 32, 33, 128, 129, 256)),
        *(case((2, n), 3, (2, 1), omega=(n,), return_phases=False) for n in (4096, 4097)),
        case((17,), 8, (2, 3, 1), omega=(2, 3, 1), noise_scale=(1,)),  # the bank's call: shared phases
        case((17,), 8, (2, 3, 1), omega=(2, 3, 1), noise_scale=(1,), return_phases=False),
        *(case((2, 3, 17), 5, (2, 3, 1), **everything, dt=0.1, steps=k, return_phases=w)
          for k in (1, 5) for w in (True, False)),
        case((2, 9), 4, (2, 1), omega=(9,), noise_scale=0.05, dt=0.02, steps=73, return_phases=False),
        case((2, 9), 4, (2, 1), omega=(9,), dt=0.02, steps=132),
        case((2, 9), 4, (2, 1), steps=0),
        case((2, 9), 4, (2, 1), steps=0, return_phases=False),
        case((0, 9), 4, (1,)),
        *(case((4, 24), 6, (4, 1), layout=v, return_phases=False) for v in ("transposed", "every-second", "expanded")),
        *(case((4, 24), 32, (4, 1), phases=v) for v in ("locked", "axes")),
    ]  # fmt: skip


SPECS = {
    "kuramoto_update": Spec(_updates(), _draw, _update_by_equation, _update_by_package, _slack),
    "kuramoto_features": Spec(_features(), _draw, _features_by_equation, _features_by_package, _slack),
}

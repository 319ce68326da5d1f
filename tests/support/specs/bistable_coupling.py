"""Coupling strength, latent and determinant from ten algebraic parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import kssm_kernels
from tests.support import naive
from tests.support.cases import Args, Case, Result, Slack, Spec, cotangents
from tests.support.tolerance import inside, stored_slack

OUTPUTS = ("K", "u", "Delta")


def _safe_params(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Ten parameters whose denominator is not near zero and whose u is not near the clamp: elsewhere u jumps."""
    wanted = math.prod(shape[:-1])
    p = torch.rand((8 * wanted + 64, 10), generator=g, dtype=torch.float64) * 4 - 2
    a, _, c, d, e, _, gg, h = p[:, :8].unbind(-1)
    den = a * gg - c * e
    u = (d * gg - c * h) / den
    keep = (den.abs() > 0.5) & ((u - 0.1).abs() > 0.05) & ((u - 10).abs() > 0.5)
    return p[keep][:wanted].reshape(shape)


def _draw(case: Case, dtype: torch.dtype, g: torch.Generator, ready: Callable[[Tensor], Tensor]) -> Args:
    return {"params": ready(_safe_params(case.shape, g))}


def _by_equation(case: Case, args: Args) -> Result:
    return dict(zip(OUTPUTS, naive.bistable_coupling(args["params"], case.clamp), strict=True))


def _by_package(case: Case, args: Args) -> Result:
    return dict(zip(OUTPUTS, kssm_kernels.bistable_coupling(args["params"], case.clamp), strict=True))


def _slack(case: Case, dtype: torch.dtype, args: Args, truth: Result) -> Slack:
    params = args["params"]
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
        "d params": gradient.unsqueeze(-1) + stored_slack(dtype, truth["d params"]),
    }


def _cases() -> list[Case]:
    shapes = [(10,), (1, 10), (0, 10), (7, 10), (8, 10), (9, 10), (3, 5, 10), (300, 10)]
    return [Case("bistable_coupling", s, clamp=c) for s in shapes for c in ((0.1, 10.0), None)]


SPECS = {"bistable_coupling": Spec(_cases(), _draw, _by_equation, _by_package, _slack, widens=OUTPUTS)}

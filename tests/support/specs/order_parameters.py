"""The order parameters C_n, S_n and M_n of phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kssm_kernels
from tests.support import naive
from tests.support.cases import Args, Case, Result, Slack, Spec
from tests.support.phases import draw_theta, phase_slack


def _draw(case: Case, dtype: torch.dtype, g: torch.Generator, ready: Callable[[Tensor], Tensor]) -> Args:
    return {"theta": draw_theta(case, dtype, g, ready)}


def _by_equation(case: Case, args: Args) -> Result:
    return {"features": naive.order_parameters(args["theta"], case.harmonics)}


def _by_package(case: Case, args: Args) -> Result:
    return {"features": kssm_kernels.order_parameters(args["theta"], case.harmonics)}


def _slack(case: Case, dtype: torch.dtype, args: Args, truth: Result) -> Slack:
    return phase_slack(case, dtype, args, truth, 0, dict.fromkeys(truth, 0.0))


def _cases() -> list[Case]:
    def case(shape: tuple[int, ...], harmonics: int, **rest: Any) -> Case:
        return Case("order_parameters", shape, harmonics, **rest)

    sizes = [(1,), (2,), (5,), (3, 1), (4, 7), (2, 31), (2, 32), (2, 33), (2, 3, 16), (129, 17), (3, 4095), (2, 4097)]
    harmonics = (1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 255, 256)
    return [
        *(case(s, 3) for s in sizes),
        *(case((3, 21), h) for h in harmonics),
        case((1, 10001), 16),
        case((0, 8), 4),
        case((2, 0, 7), 1),
        *(
            case((4, 24), 32, layout=v)
            for v in ("transposed", "every-second", "columns", "rows", "expanded", "one-phase")
        ),
        *(case((4, 33), h, phases=v) for v in ("locked", "axes", "large") for h in (8, 32, 256)),
        *(case((400, 1), h, phases="any") for h in (8, 32, 256)),
    ]


SPECS = {
    "order_parameters": Spec(_cases(), _draw, _by_equation, _by_package, _slack, beyond_framework=("large", "any"))
}

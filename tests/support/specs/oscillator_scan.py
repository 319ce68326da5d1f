"""The scan of coupled oscillators over a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support import oscillator_scan
from tests.support.cases import Args, Case, Operand, Result, Slack, Spec, evaluate, generator
from tests.support.layouts import laid_out
from tests.support.tolerance import inside, largest, stored_slack

WIDENED = ("last_re", "last_im", "states_re", "states_im")
DISPLACEMENT = 1e-6
DRAWN = ("coupling", "forget", "initial", "reset", "communities", "listen")  # options that say which operands there are


def _draw(case: Case, dtype: torch.dtype, g: torch.Generator, ready: Callable[[Tensor], Tensor]) -> Args:
    options, (*batch, steps, width) = dict(case.options), case.shape
    heads = options["heads"]
    initial = {"shared": (), "each": tuple(batch), None: None}[options.get("initial")]
    given = {k: options.get(k, True) for k in ("coupling", "forget", "listen")} | {
        "communities": options.get("communities", 0)
    }
    args = oscillator_scan.drawn(
        tuple(batch), steps, heads, width // heads, phase_lag=case.phase_lag, initial=initial, generator=g, **given
    )
    args = {k: ready(v) if isinstance(v, Tensor) else v for k, v in args.items()}
    wide = ("p", "q", "gate", "phase")
    if case.layout == "projection":  # all four are parts of what one linear map returns
        parts = torch.cat([args[k] for k in wide], -1).split(width, -1)
        return {**args, **dict(zip(wide, parts, strict=True))}
    if case.layout != "contiguous":
        for k in wide:
            args[k] = laid_out(lambda shape: ready(torch.randn(shape, generator=g).double()), case.shape, case.layout)
    return args


@functools.lru_cache(maxsize=256)
def _reset(case: Case, device: str = "cpu") -> Tensor | None:
    if not dict(case.options).get("reset"):
        return None
    marks = torch.rand(case.shape[:-1], generator=generator(case), dtype=torch.float64) < 0.3
    return marks.to(device)


def _rest(case: Case, args: Args) -> dict[str, Any]:
    rest = {k: v for k, v in case.options if k not in DRAWN}
    return rest | {"harmonics": case.harmonics, "reset": _reset(case, str(args["p"].device))}


def _by_equation(case: Case, args: Args) -> Result:
    return oscillator_scan.by_equation(args, **_rest(case, args))


def _by_package(case: Case, args: Args) -> Result:
    return oscillator_scan.by_package(args, **_rest(case, args))


@functools.lru_cache(maxsize=512)
def _sensitivity(case: Case) -> dict[str, float]:
    """Largest change of each result per relative displacement of all inputs."""
    args = _draw(case, torch.float64, generator(case), lambda t: t)
    still = evaluate(_by_equation, case, args, torch.float64)
    g = torch.Generator().manual_seed(1)

    def displaced(v: Tensor) -> Tensor:
        sign = torch.randint(0, 2, v.shape, generator=g) * 2 - 1
        return v + DISPLACEMENT * sign * (1 + v.abs())

    most = dict.fromkeys(still, 0.0)
    for _ in range(2):
        there = {k: displaced(v) if isinstance(v, Tensor) else v for k, v in args.items()}
        moved = evaluate(_by_equation, case, there, torch.float64)
        for k, v in still.items():
            most[k] = max(most[k], largest(moved[k] - v) / DISPLACEMENT)
    return most


def _slack(case: Case, dtype: torch.dtype, args: Args, truth: Result) -> Slack:
    e, sensitivity = torch.finfo(inside(dtype)).eps, _sensitivity(case)
    return {
        k: 4 * e * (sensitivity[k] + largest(v)) + (0.0 if k in WIDENED else stored_slack(dtype, v))
        for k, v in truth.items()
    }


def _cases() -> list[Case]:
    def case(
        batch: tuple[int, ...], steps: int, heads: int, size: int, harmonics: int = 4, layout: str = "contiguous",
        phase_lag: Operand = None, *, mb: bool = False, **options: Any,
    ) -> Case:  # fmt: skip
        every = {"kind": "moebius" if mb else "stuart_landau", "heads": heads, **options}
        shape = (*batch, steps, heads * size)
        return Case(
            "oscillator_scan", shape, harmonics, phase_lag=phase_lag, layout=layout, options=tuple(every.items())
        )

    none: dict[str, Any] = {"coupling": False, "forget": False}
    free: dict[str, Any] = {"coupling": False}
    faithful: dict[str, Any] = {"forget": False}
    each: dict[str, Any] = {"initial": "each", "reset": True}
    shared: dict[str, Any] = {"initial": "shared", "reset": True}
    tied: dict[str, Any] = {"tied_leak": True, "forget": False}
    kept: dict[str, Any] = {"return_states": True}
    return [
        # numbers of oscillators in a head, of heads and of steps
        *(case((2,), 7, 2, n, mb=n % 2 == 0, **each) for n in (1, 2, 3, 5, 7, 8, 16, 17, 33)),
        *(case((2,), 7, 2, n, 1, phase_lag=0.4, mb=n % 2 == 1) for n in (1, 2, 3, 5, 7, 8, 16, 17, 33)),
        *(case((), 3, 1, n, 2, mb=m, initial="each") for n in (100, 1024) for m in (False, True)),
        *(case((2,), 2, g, 8, mb=g % 2 == 0, **shared) for g in (1, 2, 3, 5, 32)),
        *(case((3,), 2, g, 3, mb=g % 2 == 1, **free) for g in (1, 2, 3, 5, 32)),
        *(case((2,), t, 2, 4, mb=m, phase_lag=(2,), **each) for t in (0, 1, 2) for m in (False, True)),
        *(case((2,), 65, 2, 3, 2, mb=m, save=64, **shared) for m in (False, True)),
        case((), 200, 1, 5, 1, phase_lag=(1,), save=64, **each),
        case((), 200, 1, 3, 1, mb=True, save=3, **faithful),
        # leading axes
        *(case((), 7, 3, 5, mb=m, phase_lag=(3,), **shared) for m in (False, True)),
        *(case((2, 3), 2, 2, 3, mb=m, phase_lag=(2, 3, 2), **each) for m in (False, True)),
        case((2, 3), 2, 2, 9, phase_lag=(3, 1), **shared),
        *(case((0,), 7, 2, 3, mb=m, phase_lag=(2,), **shared) for m in (False, True)),
        # which operands there are
        *(case((2,), 7, 2, 5, mb=m, **none, **each) for m in (False, True)),
        *(case((2,), 7, 2, 5, mb=m, **free, **shared) for m in (False, True)),
        *(case((2,), 7, 2, 5, mb=m, phase_lag=(2, 2), **faithful, **each) for m in (False, True)),
        *(case((2,), 7, 2, n, phase_lag=a, **tied, **shared) for n, a in ((5, None), (8, 0.7), (17, (2,)))),
        # harmonics
        *(case((2,), 4, 2, 6, h, mb=m, **each) for h in (0, 1, 32) for m in (False, True)),
        # what is kept, and what comes back
        *(case((2,), 7, 2, 5, mb=m, save=3, phase_lag=(2,), **each) for m in (False, True)),
        *(case((2,), 6, 2, 8, mb=m, save=3, **tied_or_not)
          for m, tied_or_not in ((False, tied), (True, faithful))),
        *(case((2,), 7, 2, n, h, mb=m, **kept, **each)
          for n, h, m in ((5, 4, False), (8, 4, True), (3, 0, False), (17, 0, True))),
        *(case((2,), 2, 1, 3, mb=m, **kept, **none) for m in (False, True)),
        # closed loops
        *(case((3,), 7, 2, n, 2, mb=m, communities=c, **free, **each)
          for n, c in ((5, 1), (8, 3), (16, 17)) for m in (False, True)),
        *(case((2,), 5, 3, 3, mb=m, communities=4, phase_lag=(2, 3), **shared) for m in (False, True)),
        *(case((9,), 3, 1, 33, 1, mb=m, communities=2, listen=False, **none) for m in (False, True)),
        *(case((), 20, 2, 4, mb=m, communities=5, listen=False, save=3, **free) for m in (False, True)),
        *(case((2, 3), 4, 2, 4, 0, mb=m, communities=2, **kept, **faithful) for m in (False, True)),
        *(case((2,), t, 2, 3, mb=t == 1, communities=3, **each) for t in (0, 1)),
        case((2,), 4, 2, 7, communities=3, save=64, **tied, **shared),
        case((0,), 3, 2, 4, communities=3),
        # memory
        *(case((4,), 5, 2, 6, layout=v, mb=m)
          for v in ("projection", "transposed", "every-second", "expanded") for m in (False, True)),
    ]  # fmt: skip


SPECS = {"oscillator_scan": Spec(_cases(), _draw, _by_equation, _by_package, _slack, widens=WIDENED)}

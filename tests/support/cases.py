"""The cases that every backend is held to: shapes, layouts and values of each op's arguments, and how to evaluate them.

tests/ops/test_conformance.py, the benchmarks and docs/accuracy.md all take their cases from here.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kssm_kernels
from tests.support import naive

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DOORS = ("direct", "registered")
OPERANDS = ("coupling", "omega", "phase_lag", "noise_scale")
SEED = 20 * 2**32 + 7

Spec = tuple[int, ...] | float | None  # shape of a tensor operand, a number, or absent
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call. Operands: a shape (a tensor with a gradient), a number, or None (absent)."""

    op: str
    shape: tuple[int, ...]
    harmonics: int = 0
    coupling: Spec = None
    omega: Spec = None
    phase_lag: Spec = None
    noise_scale: Spec = None
    dt: float = 1.0
    steps: int = 1
    layout: str = "contiguous"
    phases: str = "uniform"
    return_phases: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    name: str = field(init=False, default="")

    def __post_init__(self) -> None:
        parts = [self.op, "x".join(map(str, self.shape)) or "scalar"]
        if self.harmonics:
            parts.append(f"H{self.harmonics}")
        for operand in OPERANDS:
            spec = getattr(self, operand)
            if spec is not None and not (operand == "coupling" and spec == 1.0):
                parts.append(f"{operand}:{'x'.join(map(str, spec)) or '()' if isinstance(spec, tuple) else spec}")
        parts += [f"steps{self.steps}"] if self.steps != 1 else []
        parts += [v for v in (self.layout, self.phases) if v not in ("contiguous", "uniform")]
        parts += [] if self.return_phases else ["features-only"]
        parts += ["no-clamp"] if self.clamp is None else []
        object.__setattr__(self, "name", "-".join(parts))

    @property
    def ensembles(self) -> torch.Size:
        shapes = [s[:-1] for s in (getattr(self, o) for o in OPERANDS) if isinstance(s, tuple)]
        return torch.broadcast_shapes(self.shape[:-1], *shapes)


# ---- values ----


def _draw_phases(case: Case, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
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


def _layout(values: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], layout: str) -> Tensor:
    """A tensor of ``shape`` whose memory is laid out as named; every layout but the first is a view of a larger one."""
    if layout == "contiguous":
        return values(shape)
    if layout == "transposed":
        return values((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "every-second":
        return values((*shape[:-1], 2 * shape[-1] + 1))[..., 1::2]
    if layout == "columns":
        return values((*shape[:-1], shape[-1] + 5))[..., 2:-3]
    if layout == "rows":
        return values((shape[0] + 2, *shape[1:]))[1:-1]
    if layout == "expanded":
        return values((1, *shape[1:])).expand(shape)
    if layout == "one-phase":  # stride 0 along the oscillators
        return values((*shape[:-1], 1)).expand(shape)
    raise ValueError(layout)


def _safe_params(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Ten parameters whose denominator is not near zero and whose u is not near the clamp: elsewhere u jumps."""
    wanted = math.prod(shape[:-1])
    p = torch.rand((8 * wanted + 64, 10), generator=g, dtype=torch.float64) * 4 - 2
    a, _, c, d, e, _, gg, h = p[:, :8].unbind(-1)
    den = a * gg - c * e
    u = (d * gg - c * h) / den
    keep = (den.abs() > 0.5) & ((u - 0.1).abs() > 0.05) & ((u - 10).abs() > 0.5)
    return p[keep][:wanted].reshape(shape)


def arguments(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Tensor and number arguments of the call, rounded once from float64 to ``dtype``; the same on every call."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def ready(t: Tensor) -> Tensor:
        return t.to(dtype).to(device)

    if case.op == "bistable_coupling":
        return {"params": ready(_safe_params(case.shape, g))}
    # a view of a larger tensor becomes one on the device: moved there it would be contiguous
    found: dict[str, Any] = {
        "theta": _layout(lambda s: ready(_draw_phases(case, s, dtype, g)), case.shape, case.layout)
    }
    centre = {"coupling": (1.0, 0.5), "omega": (0.0, 0.5), "phase_lag": (0.0, 0.3), "noise_scale": (0.1, 0.02)}
    for operand in OPERANDS:
        spec = getattr(case, operand)
        if isinstance(spec, tuple):
            middle, spread = centre[operand]
            found[operand] = ready(middle + spread * torch.randn(spec, generator=g, dtype=torch.float64))
        elif spec is not None:
            found[operand] = spec
    return found


@functools.lru_cache(maxsize=64)
def noise(case: Case, device: str = "cpu") -> Tensor | None:
    """The promised noise [steps, ..., N] of a call with SEED (tests/ops/test_noise.py holds it to its definition)."""
    if case.noise_scale is None:
        return None
    rows = math.prod(case.ensembles)
    xi = [kssm_kernels.philox_normal(rows, case.shape[-1], seed=SEED, step=k, device=device) for k in range(case.steps)]
    return torch.cat([x.reshape(1, *case.ensembles, case.shape[-1]) for x in xi]) if xi else None


# ---- the two ways to evaluate a call ----


def by_equation(case: Case, args: dict[str, Any]) -> Result:
    if case.op == "bistable_coupling":
        return dict(zip(("K", "u", "Delta"), naive.bistable_coupling(args["params"], case.clamp), strict=True))
    if case.op == "order_parameters":
        return {"features": naive.order_parameters(args["theta"], case.harmonics)}
    phases = naive.kuramoto_update(**args, dt=case.dt, steps=case.steps, xi=noise(case, str(args["theta"].device)))
    if case.op == "kuramoto_update":
        return {"phases": phases}
    features = {"features": naive.order_parameters(phases, case.harmonics)}
    return {**features, "phases": phases} if case.return_phases else features


def by_package(case: Case, args: dict[str, Any]) -> Result:
    if case.op == "bistable_coupling":
        return dict(zip(("K", "u", "Delta"), kssm_kernels.bistable_coupling(args["params"], case.clamp), strict=True))
    if case.op == "order_parameters":
        return {"features": kssm_kernels.order_parameters(args["theta"], case.harmonics)}
    rest: dict[str, Any] = {**args, "dt": case.dt, "steps": case.steps, "seed": SEED if "noise_scale" in args else None}
    if case.op == "kuramoto_update":
        return {"phases": kssm_kernels.kuramoto_update(**rest)}
    out = kssm_kernels.kuramoto_features(harmonics=case.harmonics, return_phases=case.return_phases, **rest)
    return dict(zip(("features", "phases"), out, strict=True)) if isinstance(out, tuple) else {"features": out}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def through(door: str) -> Iterator[None]:
    """Sends eager calls through the direct door (plain eager) or the registered one (any dispatch mode does)."""
    with _PassThrough() if door == "registered" else nullcontext():
        yield


def cotangents(case: Case, outputs: Result, dtype: torch.dtype) -> Result:
    """dL/d(output): drawn in float64, rounded to ``dtype`` so that every evaluation gets the same numbers."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ 1)
    return {k: torch.randn(v.shape, generator=g, dtype=torch.float64).to(dtype) for k, v in outputs.items()}


def evaluate(
    function: Callable[[Case, dict[str, Any]], Result], case: Case, args: dict[str, Any], dtype: torch.dtype
) -> Result:
    """Outputs and gradients ("d theta", ...) of one call; ``dtype`` is the one the cotangents are rounded to.

    An argument that takes no part (steps = 0) has the gradient zero, whether autograd says so or says None.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if isinstance(v, Tensor)}
    outputs = function(case, {**args, **leaves})
    given = cotangents(case, outputs, dtype)
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [given[k].to(v) for k, v in outputs.items()], allow_unused=True
    )
    found = {k: v.detach() for k, v in outputs.items()}
    for (k, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d {k}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def widened(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in args.items()}


@functools.lru_cache(maxsize=512)
def truth_of(case: Case, dtype: torch.dtype) -> Result:
    with threads(1):
        return evaluate(by_equation, case, widened(arguments(case, dtype), torch.float64), dtype)


# ---- the list ----


def _order_parameters() -> list[Case]:
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


def _kuramoto_update() -> list[Case]:
    def case(shape: tuple[int, ...], coupling: Spec = 1.0, **rest: Any) -> Case:
        return Case("kuramoto_update", shape, coupling=coupling, **rest)

    kinds: list[Spec] = [(), (1,), (9,), (4, 1), (4, 9), (1, 9), (1, 1)]
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


def _kuramoto_features() -> list[Case]:
    def case(shape: tuple[int, ...], harmonics: int, coupling: Spec = 1.0, **rest: Any) -> Case:
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


def _bistable_coupling() -> list[Case]:
    shapes = [(10,), (1, 10), (0, 10), (7, 10), (8, 10), (9, 10), (3, 5, 10), (300, 10)]
    return [Case("bistable_coupling", s, clamp=c) for s in shapes for c in ((0.1, 10.0), None)]


CASES = [*_order_parameters(), *_kuramoto_update(), *_kuramoto_features(), *_bistable_coupling()]

"""What the tests of the sign-split EMA optimizer share: implementations, cases of tensors, and runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import kssm_kernels
from kssm_kernels.optim import SignSplitEMA
from tests.support import devices

# name -> (backend, arguments); "triton" only under TRITON_INTERPRET=1, "cuda" under KSSM_CUDA_ON_HOST=1
IMPLEMENTATIONS: dict[str, tuple[str, dict[str, bool]]] = {
    "single": ("torch", {"fused": False, "foreach": False}),
    "foreach": ("torch", {"fused": False, "foreach": True}),
}
IMPLEMENTATIONS |= {name: (name, {"fused": True}) for name in devices.backends_of("cpu") if name != "torch"}

MODES = ("paper", "normalized", "consolidate")
# Ties, odd sizes, a scalar, nothing, more than one block of 256, and one large enough for 8-bit means.
SHAPES: tuple[tuple[int, ...], ...] = ((5,), (3, 7), (0,), (), (1,), (2, 0, 3), (300,), (64, 65))


@contextmanager
def running(name: str) -> Iterator[dict[str, bool]]:
    """Inside, the optimizer's arguments that choose an implementation; one not listed is a backend of a device."""
    backend, arguments = IMPLEMENTATIONS.get(name, (name, {"fused": True}))
    with kssm_kernels.use_backend(backend):
        yield arguments


def gradient(shape: Sequence[int], g: torch.Generator) -> Tensor:
    """Normal numbers with exact zeros of both signs, repeated values and, rarely, NaN and infinities."""
    x = torch.randn(shape, generator=g)
    which = torch.randint(0, 40, tuple(shape), generator=g)
    for number, value in ((0, 0.0), (1, -0.0), (2, 0.5), (3, -0.5), (4, 0.0)):
        x = torch.where(which == number, value, x)
    rare = torch.randint(0, 200, tuple(shape), generator=g)
    for number, value in ((0, torch.nan), (1, torch.inf), (2, -torch.inf)):
        x = torch.where(rare == number, value, x)
    return x


def run(
    name: str,
    steps: int = 6,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    between: Callable[[int, SignSplitEMA], None] = lambda k, o: None,
    scale: float = 1.0,
    device: str = "cpu",
    offset: int = 0,
    **arguments: Any,
) -> tuple[list[nn.Parameter], SignSplitEMA]:
    """A few steps on random gradients, the same for every implementation.

    offset: elements between the beginnings of memory and of parameters and gradients, in whose way 128-bit loads are.
    """
    g = torch.Generator().manual_seed(3)

    def placed(t: Tensor) -> Tensor:
        if not offset:
            return t.to(device, dtype)
        memory = torch.zeros(t.numel() + offset, dtype=dtype, device=device)
        return memory[offset:].view(t.shape).copy_(t)

    params = [nn.Parameter(placed(torch.randn(s, generator=g))) for s in shapes]
    with running(name) as chosen:
        optimizer = SignSplitEMA(params, **{"lr": 0.05, **chosen, **arguments})
        for k in range(steps):
            for p in params:
                p.grad = placed(scale * gradient(p.shape, g))
            optimizer.step()
            between(k, optimizer)
    return params, optimizer


def everything(params: Sequence[Tensor], optimizer: SignSplitEMA) -> list[tuple[str, Tensor]]:
    """Parameters and all their state, by name."""
    found = []
    for i, p in enumerate(params):
        found.append((f"p{i}", p.detach()))
        found += [(f"{name} of p{i}", t) for name, t in sorted(optimizer.state[p].items())]
    return found


def assert_same(
    a: tuple[Sequence[Tensor], SignSplitEMA], b: tuple[Sequence[Tensor], SignSplitEMA], rtol: float = 0.0
) -> None:
    mine, theirs = everything(*a), everything(*b)
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    for (name, x), (_, y) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            x, y.to(x.device), rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- one parameter, and states that it does not want ----

EVERYTHING: dict[str, Any] = {
    "mode": "consolidate",
    "temperature": True,
    "param_rounding": "kahan",
    "state_rounding": "stochastic",
    "state_dtype": torch.uint8,
}


NAMED = torch.__version__ >= "2.6"  # whose optimizers take named tensors; torch compares the numbers
WEIGHT = "parameter 0 'weight'" if NAMED else "parameter 0"


def made(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, steps: int = 1, **options: Any
) -> tuple[nn.Parameter, SignSplitEMA]:
    """A parameter of random numbers after some steps; inside ``running`` of an implementation."""
    g = torch.Generator().manual_seed(5)
    p = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
    parameters: list[Any] = [("weight", p)] if NAMED else [p]
    optimizer = SignSplitEMA(parameters, **{"lr": 0.05, **options})
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=g).to(dtype)
        optimizer.step()
    return p, optimizer


# state, what is made of it, and the words that follow "state" in the error
WRONG_STATES: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("positive", lambda t: t[:-1], rf"'positive' of {WEIGHT}, of shape \(80, 64\), .*got .*\(79, 64\)"),
    ("positive", lambda t: t.reshape(-1), r"'positive'.*got .*\(5120,\)"),
    ("positive", lambda t: t.to(torch.int32), r"'positive'.*float32 or .*uint8 \(80, 64\).*got torch.int32"),
    ("negative", lambda t: t.reshape(64, 80), r"'negative'.*\(80, 64\).*got .*\(64, 80\)"),
    ("negative", lambda t: t.float(), r"'negative'.*must be torch.uint8.*got torch.float32"),
    ("negative", lambda t: None, r"'negative'.*must be a tensor, got NoneType"),
    ("temperature", lambda t: t[:, :3], r"'temperature'.*got .*\(80, 3\)"),
    ("temperature", lambda t: t.double(), r"'temperature'.*must be torch.float32.*got torch.float64"),
    ("compensation", lambda t: t.float(), r"'compensation'.*must be torch.bfloat16.*got torch.float32"),
    ("compensation", lambda t: t[0], r"'compensation'.*got .*\(64,\)"),
    ("positive_scale", lambda t: t[:-1], r"'positive_scale'.*must be torch.float32 \(20,\).*got .*\(19,\)"),
    ("negative_scale", lambda t: t.double(), r"'negative_scale'.*got torch.float64"),
    ("cryo", lambda t: torch.ones(81), r"'cryo'.*must be torch.float32 \(80,\).*got .*\(81,\)"),
    ("cryo", lambda t: torch.ones(80, dtype=torch.float64), r"'cryo'.*got torch.float64"),
    ("rms", lambda t: t.reshape(1), r"'rms'.*must be torch.float32 \(\).*got .*\(1,\)"),
    ("rms", lambda t: t.double(), r"'rms'.*got torch.float64"),
    ("step", lambda t: t.expand(2), r"'step'.*must be torch.int64 \(\).*got .*\(2,\)"),
    ("step", lambda t: t.to(torch.int32), r"'step'.*got torch.int32"),
    ("rms", lambda t: t.to("meta"), r"'rms'.*on cpu, got .*on meta"),
    ("positive", lambda t: t.to("meta"), r"'positive'.*on cpu, got .*on meta"),
    ("step", lambda t: 3, r"'step'.*must be a tensor, got int"),
]  # fmt: skip

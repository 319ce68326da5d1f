"""Arguments of an oscillator scan drawn at random, and its call, by the package and by the equation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels import oscillator_scan
from tests.support import naive
from tests.support.cases import Args, Result

KINDS = ("stuart_landau", "moebius")
SEQUENCES = ("p", "q", "gate", "phase", "coupling", "forget")
WEIGHTS = ("communities", "feedback")
LOOP = (*WEIGHTS, "listen")
MOVING = (*SEQUENCES, "phase_lag", "initial_re", "initial_im", *LOOP)  # those that have a gradient


def drawn(
    batch: tuple[int, ...],
    steps: int,
    heads: int,
    oscillators: int,
    *,
    coupling: bool = True,
    forget: bool = True,
    phase_lag: tuple[int, ...] | float | None = None,
    initial: tuple[int, ...] | None = None,
    communities: int = 0,
    listen: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Args:
    """Tensors by name.

    ``initial``: the leading axes of the initial state, which lies inside the unit disc. ``communities``: how many close
    the loop; ``listen``: whether steps listen to them by strengths of their own.
    """

    def normal(*shape: int, middle: float = 0.0, spread: float = 1.0) -> Tensor:
        return (middle + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    width = heads * oscillators
    found: Args = {name: normal(*batch, steps, width) for name in ("p", "q", "gate", "phase")}
    if coupling:
        found["coupling"] = normal(*batch, steps, heads)
    if forget:
        found["forget"] = normal(*batch, steps, heads, middle=-2.0)
    if isinstance(phase_lag, tuple):
        found["phase_lag"] = normal(*phase_lag, spread=0.5)
    elif phase_lag is not None:
        found["phase_lag"] = phase_lag
    if initial is not None:
        for part in ("initial_re", "initial_im"):
            inside = torch.rand((*initial, width), generator=generator, dtype=torch.float64)
            found[part] = (1.3 * inside - 0.65).to(dtype)
    if communities:
        found["communities"] = normal(communities, width, spread=width**-0.5)
        rows = 4 * width + (heads if forget else 0)
        found["feedback"] = normal(rows, 2 * communities, spread=0.5 * communities**-0.5)
        if listen:
            found["listen"] = normal(*batch, steps, communities)
    return found


def joined(args: Args) -> Args:
    """The initial state as a pair, and what closes the loop as three."""
    rest = {k: v for k, v in args.items() if not k.startswith("initial_") and k not in LOOP}
    if "communities" in args:
        rest["feedback"] = args["communities"], args["feedback"], args.get("listen")
    if "initial_re" in args:
        rest["initial_state"] = args["initial_re"], args["initial_im"]
    return rest


def by_package(args: Args, **options: Any) -> Result:
    order_re, order_im, last, *states = oscillator_scan(**joined(args), **options)
    found = {"order_re": order_re, "order_im": order_im, "last_re": last[0], "last_im": last[1]}
    return found | dict(zip(("states_re", "states_im"), states[0], strict=True)) if states else found


def by_equation(args: Args, *, save: Any = None, return_states: bool = False, **options: Any) -> Result:
    """Of 16-bit arguments in float32: torch has no complex numbers made of bfloat16."""

    def ready(v: Any) -> Any:
        return v.float() if isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) else v

    wide = {k: ready(v) for k, v in args.items()}
    orders, states = naive.oscillator_scan(**joined(wide), **options)
    found = {"order_re": orders.real, "order_im": orders.imag}
    for part, of_states in (("re", states.real), ("im", states.imag)):
        if states.shape[-2]:
            last = of_states[..., -1, :]
        else:
            start = wide.get(f"initial_{part}", torch.zeros((), dtype=of_states.dtype, device=of_states.device))
            last = start.expand((*states.shape[:-2], states.shape[-1])) + 0 * wide["p"].sum()
        found[f"last_{part}"] = last
    return found | {"states_re": states.real, "states_im": states.imag} if return_states else found


def gradients(outputs: Result, args: Args, seed: int = 1, **rest: Any) -> Result:
    """Of every tensor in ``args`` that wants one, for cotangents drawn from ``seed``."""
    g = torch.Generator().manual_seed(seed)
    leaves = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.requires_grad}
    given = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype) for v in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given, **rest)
    return dict(zip(leaves, found, strict=True))


def leaves(args: Args) -> Args:
    return {k: v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in args.items()}


def both(args: Args, **options: Any) -> Result:
    """Outputs and, as ``d p`` and so on, gradients of a call."""
    own = leaves(args)
    outputs = by_package(own, **options)
    found = gradients(outputs, own)
    return {k: v.detach() for k, v in outputs.items()} | {f"d {k}": v for k, v in found.items()}


def assert_same_bits(got: Result, want: Result) -> None:
    assert got.keys() == want.keys()
    for k, v in want.items():
        assert torch.equal(got[k], v), f"{k}: up to {float((got[k] - v).abs().max())} apart"

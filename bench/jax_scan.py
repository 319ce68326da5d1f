"""The oscillator scan in JAX: ``jax.lax.scan`` over the steps, compiled for the CPU, value and gradient.

As its user would write it: what needs no state is computed for all steps before the loop, and the order parameters of
all states after it. JAX is no dependency of the project; the benches leave this baseline out where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from bench.interleave import Call

try:
    import jax
    from jax import lax
    from jax import numpy as jnp
except ImportError:  # pytest looks for doctests here with JAX or without
    pass


def from_torch(x: Tensor) -> Any:
    return jnp.asarray(x.detach().numpy())


def to_torch(x: Any) -> Tensor:
    return torch.from_numpy(numpy.array(x))


def oscillator_scan(args: dict[str, Any], kind: str, heads: int, harmonics: int) -> Any:
    """Order parameters [..., T, G, H], complex. Names and shapes: tests/support/naive.py."""
    g = jax.nn.sigmoid(args["gate"])
    keep = jnp.sqrt(1 - (1 - 1e-6) * g * g) if kind == "stuart_landau" else 1 - g
    shape = (*g.shape[:-1], heads, g.shape[-1] // heads)
    write = lax.complex(g * args["p"], g * args["q"]).reshape(shape)
    turn = lax.complex(keep * jnp.cos(args["phase"]), keep * jnp.sin(args["phase"])).reshape(shape)
    turn = turn * (1 - jax.nn.sigmoid(args["forget"]))[..., None]
    strength = None
    if "coupling" in args:
        strength = (jax.nn.sigmoid if kind == "stuart_landau" else jax.nn.softplus)(args["coupling"])[..., None]

    def step(z: Any, inputs: Any) -> Any:
        force, turn, *strength = inputs
        if strength:
            force = force + strength[0] * seen_state(kind, z).mean(-1, keepdims=True)
        z = turn * z
        if kind == "stuart_landau":
            z = z + force
        else:
            w = force * lax.rsqrt(1 + force.real**2 + force.imag**2)
            z = (z + w) / (1 + w.conj() * z)
        return z, z

    by_time = [jnp.moveaxis(x, -3, 0) for x in (write, turn)]
    if strength is not None:
        by_time.append(jnp.moveaxis(strength, -3, 0))
    _, states = lax.scan(step, jnp.zeros_like(by_time[0][0]), tuple(by_time))
    power = v = seen_state(kind, jnp.moveaxis(states, 0, -3))
    found = []
    for _ in range(harmonics):
        found.append(power.mean(-1))
        power = power * v
    return jnp.stack(found, -1)


def seen_state(kind: str, z: Any) -> Any:
    return z * lax.rsqrt(1 + z.real**2 + z.imag**2) if kind == "stuart_landau" else z


def calls(
    args: dict[str, Tensor], grads: tuple[Tensor, Tensor], kind: str, heads: int, harmonics: int
) -> tuple[Any, Any]:
    """Functions without arguments: the order parameters, and the value of a loss with these gradients and its gradient.

    The loss is the sum of the order parameters times what their gradients are to be.
    """
    own = {k: from_torch(v) for k, v in args.items()}
    re, im = map(from_torch, grads)

    def forward(args: dict[str, Any]) -> Any:
        return oscillator_scan(args, kind, heads, harmonics)

    def loss(args: dict[str, Any]) -> Any:
        z = forward(args)
        return jnp.sum(re * z.real) + jnp.sum(im * z.imag)

    return ready(jax.jit(forward), own), ready(jax.jit(jax.value_and_grad(loss)), own)


def ready(function: Any, args: dict[str, Any]) -> Call:
    return lambda: jax.block_until_ready(function(args))


def results_of(forward: Call, both: Call, args: Mapping[str, Tensor]) -> list[Tensor]:
    """The real and imaginary order parameters, and the gradients of ``args``."""
    order: Any = forward()
    _, grads = both()  # type: ignore[misc]  # value and gradient
    return [to_torch(x) for x in (order.real, order.imag, *(grads[k] for k in args))]

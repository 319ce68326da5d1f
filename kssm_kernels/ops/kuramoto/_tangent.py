"""Forward mode of the Kuramoto update, in torch operators that autograd and vmap know, none of them in place.

With Z = C + iS, p_j, q_j as in __init__.py and d for a tangent, one step takes

    dC = -(1/N) sum_j sin(theta_j) dtheta_j,   dS = (1/N) sum_j cos(theta_j) dtheta_j
    dp_j = dS cos(theta_j + alpha_j) - dC sin(theta_j + alpha_j) - q_j (dtheta_j + dalpha_j)
    dtheta_j <- dtheta_j + dt (domega_j + dK_j p_j + K_j dp_j) - ddelta_j xi_j

The phases go along, as in _torch.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.noise import philox_normal
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.kuramoto._torch import State, folded, reduced
from kssm_kernels.ops.kuramoto._update import FOLD, OPERANDS, batch_shape_of, wraps
from kssm_kernels.ops.order_parameters._torch import features_tangent


def tangents(arguments: tuple[Any, ...], given: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tangents of (features, phases) for the registered op's arguments and theirs (None where there is none)."""
    theta, seed, dt, steps, harmonics, return_phases = arguments[0], *arguments[5:]
    compute, n = DTYPES[theta.dtype][1], theta.shape[-1]
    batch_shape = batch_shape_of(theta, arguments[1 : 1 + OPERANDS])
    start = theta.to(compute).expand(*batch_shape, n)
    wrap = wraps(steps, compute)
    state = State(reduced(start) if wrap else start)
    operands: list[Any] = [None if v is None else v.to(compute) for v in arguments[1 : 1 + OPERANDS]]
    coupling, omega, phase_lag, noise_scale = operands
    d_theta, d_coupling, d_omega, d_lag, d_noise = (None if v is None else v.to(compute) for v in given[: 1 + OPERANDS])
    zero = torch.zeros((), dtype=compute, device=theta.device)
    moved = (zero if d_theta is None else d_theta).expand(*batch_shape, n)
    dt = dt.to(compute).to(theta.device)
    seed = 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF
    for index in range(steps):
        x = state.phases
        cos, sin = torch.cos(x), torch.sin(x)
        mean_cos, mean_sin = cos.mean(-1, keepdim=True), sin.mean(-1, keepdim=True)
        d_cos, d_sin = -(sin * moved).mean(-1, keepdim=True), (cos * moved).mean(-1, keepdim=True)
        if phase_lag is not None:
            cos, sin = torch.cos(x + phase_lag), torch.sin(x + phase_lag)
        p, q = mean_sin * cos - mean_cos * sin, mean_sin * sin + mean_cos * cos
        turned = moved if d_lag is None else moved + d_lag
        velocity, d_velocity = coupling * p, coupling * (d_sin * cos - d_cos * sin - q * turned)
        if d_coupling is not None:
            d_velocity = d_velocity + d_coupling * p
        if omega is not None:
            velocity = velocity + omega
        if d_omega is not None:
            d_velocity = d_velocity + d_omega
        step, moved = dt * velocity, moved + dt * d_velocity
        if noise_scale is not None:
            xi = philox_normal(math.prod(batch_shape), n, seed=seed, step=index, device=theta.device)
            xi = xi.to(compute).reshape(*batch_shape, n)
            step = step - noise_scale * xi
            if d_noise is not None:
                moved = moved - d_noise * xi
        state = State(state.base, step if state.moved is None else state.moved + step)
        if (index + 1) % FOLD == 0 or index + 1 == steps:
            state = folded(state, wrap)
    features, phases = outputs
    d_features = features_tangent(state.phases, moved, features) if harmonics else torch.zeros_like(features)
    return d_features, moved if return_phases else torch.zeros_like(phases)

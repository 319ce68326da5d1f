"""Order parameters of ensembles of phase oscillators.

    Z_n = (1/N) sum_j exp(i n theta_j),   C_n = Re Z_n,  S_n = Im Z_n,  M_n = sqrt(C_n^2 + S_n^2 + 1e-8),   n = 1..H

    dL/dtheta_j = (1/N) sum_n n (gS_n cos(n theta_j) - gC_n sin(n theta_j)),
    with gC_n += gM_n C_n / M_n and gS_n += gM_n S_n / M_n.

One sine and one cosine per oscillator; the harmonics follow from a recurrence, so nothing of size [..., N, H] exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._entry import (
    EAGER,
    MAX_HARMONICS,
    as_integer,
    backward_path_of,
    check_phases,
    path_of,
    refuse_second_derivative,
)
from kssm_kernels.ops._memory import strided, whole
from kssm_kernels.ops._registered import registered
from kssm_kernels.ops.order_parameters._torch import features_tangent

OP = "order_parameters"


# ---- the eager path ----


class _OrderParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, harmonics: int) -> Tensor:
        kernel = ctx.kernel = backends.kernel(OP, theta)
        features = kernel.forward(strided("theta", theta), harmonics)
        ctx.save_for_backward(theta, features)
        return features  # type: ignore[no-any-return]  # a tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = (*ctx.saved_tensors, *grads)
        with torch.no_grad():
            eager = backward_path_of(given) is EAGER
            gradient = _gradient(ctx.kernel, *given) if eager else _adjoint(*given)
        return *refuse_second_derivative(OP, (gradient,), (given[0], *grads)), None


def _eager(theta: Tensor, harmonics: int) -> Tensor:
    if theta.requires_grad and torch.is_grad_enabled():
        return _OrderParameters.apply(theta, harmonics)  # type: ignore[no-any-return,no-untyped-call]  # no stub
    features = backends.kernel(OP, theta).forward(strided("theta", theta), harmonics)
    return features  # type: ignore[no-any-return]  # a tensor


def _gradient(kernel: Any, theta: Tensor, features: Tensor, g_features: Tensor) -> Tensor:
    shape = (*theta.shape[:-1], 3 * (features.shape[-1] // 3))
    given = whole("features", features, shape, theta), whole("their gradient", g_features, shape, theta)
    gradient: Tensor = kernel.backward(strided("theta", theta), *given)
    return gradient


# ---- the dispatcher path; torch.ops hands in what nobody has checked ----


def _forward(theta: Tensor, harmonics: int) -> Tensor:
    check_phases(OP, theta)
    as_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS)
    features: Tensor = backends.kernel(OP, theta).forward(strided("theta", theta), harmonics)
    return features


def _backward(theta: Tensor, features: Tensor, g_features: Tensor) -> Tensor:
    check_phases(OP, theta)
    if features.dim() == 0 or features.shape[-1] not in range(3, 3 * MAX_HARMONICS + 1, 3):
        raise ValueError(f"{OP}: features must have shape [..., 3H], H from 1 to 256, got {tuple(features.shape)}")
    return _gradient(backends.kernel(OP, theta), theta, features, g_features)


_evaluate, _adjoint = registered(
    OP,
    "(Tensor theta, SymInt harmonics) -> Tensor",
    _forward,
    "(Tensor theta, Tensor features, Tensor g_features) -> Tensor",
    _backward,
    outputs=["features"],
    fake=lambda theta, harmonics: theta.new_empty((*theta.shape[:-1], 3 * harmonics)),
    tangents=lambda arguments, given, results: (features_tangent(arguments[0], given[0], results[0]),),
    eager=_eager,
)


# ---- the public op ----


def order_parameters(theta: Tensor, harmonics: int) -> Tensor:
    """Real and imaginary parts and magnitudes of the first H order parameters of each ensemble.

    Equation: ``Z_n = (1/N) sum_j exp(i n theta_j)``, ``C_n = Re Z_n``, ``S_n = Im Z_n``,
    ``M_n = sqrt(C_n^2 + S_n^2 + 1e-8)`` for ``n = 1..H``. ``M_1`` is the Kuramoto order parameter R.

    Args:
        theta: phases in radians, ``[..., N]``, N >= 1, any strides; float32, float64, bfloat16 or float16 (the last
            two are widened to float32 inside). Any finite phase gives a right answer.
        harmonics: H, 1 to 256.

    Returns:
        ``[..., 3H]`` laid out ``[C_1..C_H | S_1..S_H | M_1..M_H]``, dimensionless, theta's dtype and device.
        ``sqrt(C_n^2 + S_n^2)`` is at most 1 + 4 ulp, also where all phases are equal.

    Raises:
        TypeError: theta is not a tensor of one of the four dtypes, or harmonics not an int.
        ValueError: theta has no axis or an empty last one, or harmonics is out of range.
        RuntimeError: a backend was asked for that cannot run here; or, in backward, a second derivative was; or theta's
            storage was freed under it.

    Same inputs give the same bits for any number of threads on the CPU.

    Source: Y. Kuramoto, Chemical Oscillations, Waves, and Turbulence (1984); H. Daido, Physica D 91 (1996), for n > 1.

    >>> import torch
    >>> from kssm_kernels import order_parameters
    >>> theta = torch.tensor([0.0, torch.pi])             # two oscillators in antiphase
    >>> order_parameters(theta, 2).round(decimals=3).abs()  # C_1 C_2 S_1 S_2 M_1 M_2
    tensor([0., 1., 0., 0., 0., 1.])
    """
    check_phases(OP, theta)
    harmonics = as_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS)
    if path_of((theta,)) is EAGER:
        return _eager(theta, harmonics)
    features: Tensor = _evaluate(theta, harmonics)
    return features

"""Coupling strength from the ten algebraic parameters of the bistable bank.

    a, b, c, d, e, f, g, h, i, j = params                 (i and j take no part)
    Delta = b g - c f,   u_raw = (d g - c h) / (a g - c e + 1e-6),   u = clamp(u_raw, low, high),   K = 2 sigmoid(u)

With num = d g - c h, den = a g - c e + 1e-6 and r the gradient at u_raw (zero outside the clamp):

    r = [low <= u_raw <= high] (gu + 2 gK sigmoid(u) (1 - sigmoid(u))),   gnum = r / den,   gden = -r u_raw / den
    ga = gden g,  gb = gD g,  gc = -gD f - gnum h - gden e,  gd = gnum g,
    ge = -gden c, gf = -gD c, gg = gD b + gnum d + gden a,   gh = -gnum c
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._entry import (
    EAGER,
    backward_path_of,
    check_dense,
    number_tensor,
    path_of,
    refuse_second_derivative,
)
from kssm_kernels.ops._memory import strided, whole
from kssm_kernels.ops._registered import registered
from kssm_kernels.ops.bistable_coupling._torch import tangents_of

OP = "bistable_coupling"


# ---- the eager path ----


class _BistableCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, params: Tensor, low: float, high: float) -> Any:
        kernel = backends.kernel(OP, params)
        ctx.save_for_backward(params)
        ctx.context = kernel, low, high  # one attribute: each takes 0.1 us
        return kernel.forward(strided("params", params), low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (params,), (kernel, *clamp) = ctx.saved_tensors, ctx.context
        with torch.no_grad():
            if backward_path_of((params, *grads)) is EAGER:
                gradient = _gradient(kernel, params, *clamp, *grads)
            else:
                gradient = _adjoint(params, *_tensors(*clamp), *grads)
        return *refuse_second_derivative(OP, (gradient,), (params, *grads)), None, None


def _eager(params: Tensor, low: Any, high: Any) -> Any:
    """``low`` and ``high`` are numbers, or what the registered op has made of them."""
    low, high = float(low), float(high)
    if params.requires_grad and torch.is_grad_enabled():
        return _BistableCoupling.apply(params, low, high)  # type: ignore[no-untyped-call]  # torch has no stub
    return backends.kernel(OP, params).forward(strided("params", params), low, high)


def _gradient(kernel: Any, params: Tensor, low: float, high: float, *grads: Tensor) -> Tensor:
    shape, compute = params.shape[:-1], DTYPES[params.dtype][1]
    given = [whole("a gradient", g, shape, params, compute) for g in grads]
    gradient: Tensor = kernel.backward(strided("params", params).contiguous(), low, high, *given)
    return gradient


# ---- the dispatcher path; the clamp in float64 tensors, for a float in a schema is a graph of its own ----


def _forward(params: Tensor, low: Tensor, high: Tensor) -> Any:
    _check_params(params)
    return backends.kernel(OP, params).forward(strided("params", params), float(low), float(high))


def _backward(params: Tensor, low: Tensor, high: Tensor, g_k: Tensor, g_u: Tensor, g_delta: Tensor) -> Tensor:
    _check_params(params)
    return _gradient(backends.kernel(OP, params), params, float(low), float(high), g_k, g_u, g_delta)


def _fake(params: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    return tuple(params.new_empty(params.shape[:-1], dtype=DTYPES[params.dtype][1]) for _ in range(3))


def _tensors(*clamp: float) -> tuple[Tensor, ...]:
    return tuple(number_tensor(bound, torch.float64, "cpu") for bound in clamp)


_evaluate, _adjoint = registered(
    OP,
    "(Tensor params, Tensor low, Tensor high) -> (Tensor, Tensor, Tensor)",
    _forward,
    "(Tensor params, Tensor low, Tensor high, Tensor g_k, Tensor g_u, Tensor g_delta) -> Tensor",
    _backward,
    outputs=["k", "u", "delta"],
    fake=_fake,
    tangents=tangents_of,
    eager=_eager,
)


# ---- the public op ----


def bistable_coupling(params: Tensor, clamp: tuple[float, float] | None = (0.1, 10.0)) -> tuple[Tensor, Tensor, Tensor]:
    """Coupling strength K, latent u and determinant Delta of the bistable bank from its ten algebraic parameters.

    Equation: with ``a..j = params``, ``Delta = b g - c f``, ``u = clamp((d g - c h) / (a g - c e + 1e-6), low, high)``,
    ``K = 2 sigmoid(u)``.

    Args:
        params: ``[..., 10]``, dimensionless; float32, float64, bfloat16 or float16.
        clamp: ``(low, high)``, or None for the monostable bank (no clamp).

    Returns:
        ``(K, u, Delta)``, each ``[...]``, in float32 (float64 for float64 params): K feeds a kernel that works in it.

    Raises:
        TypeError: params is not a floating tensor. ValueError: its last axis is not 10, or ``low > high``.
        RuntimeError: a backend that cannot run here was asked for; a second derivative was asked for.

    Source: K-SSM v3, the bank with the bistability constraint.

    >>> import torch
    >>> from kssm_kernels import bistable_coupling
    >>> K, u, Delta = bistable_coupling(torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    >>> round(K.item(), 3), round(u.item(), 3), Delta.item()
    (1.462, 1.0, 2.0)
    """
    _check_params(params)
    low, high = (-math.inf, math.inf) if clamp is None else clamp
    if type(low) is not float or type(high) is not float:
        low, high = _bound(low), _bound(high)
    if not low <= high:
        raise ValueError(f"{OP}: clamp must be (low, high) with low <= high, got {clamp}")
    if path_of((params,)) is EAGER:
        return _eager(params, low, high)  # type: ignore[no-any-return]  # three tensors
    return _evaluate(params, *_tensors(low, high))  # type: ignore[no-any-return]  # likewise


def _check_params(params: Any) -> None:
    """At the public op's entry, and again where torch.ops hands tensors in that nobody has seen."""
    if not isinstance(params, Tensor) or params.dtype not in DTYPES:
        got = params.dtype if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"{OP}: params must be a float32, float64, bfloat16 or float16 tensor, got {got}")
    check_dense(OP, "params", params)
    if params.dim() == 0 or params.shape[-1] != 10:
        raise ValueError(f"{OP}: params must have shape [..., 10], got {tuple(params.shape)}")


def _bound(value: Any) -> float:
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]  # symbolic numbers stand for Python's
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{OP}: clamp must be two numbers, got {type(value).__name__}")
    return float(value)

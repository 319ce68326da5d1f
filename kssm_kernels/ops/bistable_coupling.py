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
from kssm_kernels.ops._door import (
    DIRECT,
    DTYPES,
    DUAL,
    TRANSFORMED,
    alive,
    backward_door,
    check_dense,
    door,
    forward_mode,
    move_batch,
    number_tensor,
    refuse_second_derivative,
    register,
    register_vmap,
    second_derivative_message,
)
from kssm_kernels.ops._memory import on_one_device, strided, whole

OP = "bistable_coupling"
EPSILON = 1e-6  # in the denominator of u_raw


# ---- pure torch ----


def _forward_torch(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c, d, e, f, g, h, _, _ = params.to(DTYPES[params.dtype][1]).unbind(-1)
    u = ((d * g - c * h) / (a * g - c * e + EPSILON)).clamp(low, high)
    return 2 * torch.sigmoid(u), u, b * g - c * f


def _backward_torch(params: Tensor, low: float, high: float, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h, _, _ = params.to(DTYPES[params.dtype][1]).unbind(-1)
    den = a * g - c * e + EPSILON
    raw = (d * g - c * h) / den
    s = torch.sigmoid(raw.clamp(low, high))
    r = torch.where((raw >= low) & (raw <= high), gu + 2 * gk * s * (1 - s), 0.0)
    num, den = r / den, -r * raw / den
    zero = torch.zeros_like(r)
    columns = (den * g, gd * g, -gd * f - num * h - den * e, num * g, -den * c, -gd * c, gd * b + num * d + den * a)
    return torch.stack([*columns, -num * c, zero, zero], dim=-1)


# ---- every backend ----


def _forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    backend = backends.select(OP, params)
    if backend == "torch":
        return _forward_torch(params, low, high)
    params = strided("params", params)
    if backend != "cpu":
        result: tuple[Tensor, Tensor, Tensor] = backends.kernels(backend, OP)[0].forward(params, low, high)
        return result
    code, compute = DTYPES[params.dtype]
    if not params.is_contiguous():
        params = params.contiguous()
    lead = params.shape[:-1]
    # twice as fast as torch.empty with a shape, a dtype and a device
    k = params.new_empty(*lead) if lead and params.dtype == compute else params.new_empty(lead, dtype=compute)
    u, delta = torch.empty_like(k), torch.empty_like(k)
    backends.cpu_extension.bistable_coupling_forward(
        params.data_ptr(), k.numel(), code, low, high, k.data_ptr(), u.data_ptr(), delta.data_ptr()
    )
    return k, u, delta


def _backward(params: Tensor, low: float, high: float, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
    backend = backends.select(OP, params)
    if backend == "torch":
        return _backward_torch(params, low, high, gk, gu, gd).to(params.dtype)
    shape, compute = params.shape[:-1], DTYPES[params.dtype][1]
    params = strided("params", params).contiguous()
    gk, gu, gd = (whole("a gradient", g, shape, params, compute) for g in (gk, gu, gd))
    if backend != "cpu":
        result: Tensor = backends.kernels(backend, OP)[0].backward(params, low, high, gk, gu, gd)
        return result
    code = DTYPES[params.dtype][0]
    out = torch.empty_like(params)
    backends.cpu_extension.bistable_coupling_backward(
        params.data_ptr(), gk.numel(), code, low, high, gk.data_ptr(), gu.data_ptr(), gd.data_ptr(), out.data_ptr()
    )
    return out


# ---- the direct door ----


class _BistableCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(params)
        ctx.clamp = low, high
        return _forward(params, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (params,) = ctx.saved_tensors
        with torch.no_grad():
            gradient = adjoint(params, *ctx.clamp, *grads)
        return *refuse_second_derivative(OP, (gradient,), (params, *grads)), None, None


# ---- the registered door; the clamp in float64 tensors, for a float in a schema is a graph of its own ----


@register("bistable_coupling", "(Tensor params, Tensor low, Tensor high) -> (Tensor, Tensor, Tensor)")
def _registered(params: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_params(params)
    return _forward(params, float(low), float(high))


@register(
    "bistable_coupling_backward",
    "(Tensor params, Tensor low, Tensor high, Tensor gk, Tensor gu, Tensor gd) -> Tensor",
)
def _registered_backward(params: Tensor, low: Tensor, high: Tensor, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
    _check_params(params)
    return _backward(params, float(low), float(high), gk, gu, gd)


@_registered.register_fake
def _(params: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def empty() -> Tensor:
        return params.new_empty(params.shape[:-1], dtype=DTYPES[params.dtype][1])

    return empty(), empty(), empty()


@_registered_backward.register_fake
def _(params: Tensor, low: Tensor, high: Tensor, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
    on_one_device(params, gk, gu, gd)
    return torch.empty(params.shape, dtype=params.dtype, device=params.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _registered_gradient(ctx: Any, *grads: Tensor) -> Any:
    return _registered_backward(*ctx.saved_tensors, *grads), None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(second_derivative_message(OP))


_registered.register_autograd(_registered_gradient, setup_context=_setup_context)
_registered_backward.register_autograd(_no_second_derivative)


def _vmap(info: Any, dims: tuple[Any, ...], params: Tensor, low: Any, high: Any) -> Any:
    return evaluate(move_batch(params, dims[0], info.batch_size), low, high), (0, 0, 0)


def _vmap_backward(info: Any, dims: tuple[Any, ...], params: Tensor, low: Any, high: Any, *grads: Tensor) -> Any:
    moved = [move_batch(g, d, info.batch_size) for g, d in zip(grads, dims[3:], strict=True)]
    return adjoint(move_batch(params, dims[0], info.batch_size), low, high, *moved), 0


register_vmap(_registered, _vmap)
register_vmap(_registered_backward, _vmap_backward)


# ---- torch.func.grad and its like, and forward mode ----


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(params: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        return evaluate(params, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0], *output)
        ctx.clamp = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        params, *given = alive((*ctx.saved_tensors, *grads))
        return adjoint(params, *ctx.clamp, *given), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        params, *outputs = ctx.saved_tensors
        return _tangents((params, *ctx.clamp), tangents, tuple(outputs))

    vmap = staticmethod(_vmap)


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(params: Tensor, low: float, high: float, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
        return adjoint(params, low, high, gk, gu, gd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = jvp = staticmethod(_no_second_derivative)
    vmap = staticmethod(_vmap_backward)


def _tangents(arguments: tuple[Any, ...], tangents: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    params, low, high = arguments
    compute = DTYPES[params.dtype][1]
    a, b, c, d, e, f, g, h, _, _ = params.to(compute).unbind(-1)
    da, db, dc, dd, de, df, dg, dh, _, _ = tangents[0].to(compute).unbind(-1)
    den = a * g - c * e + EPSILON
    raw = (d * g - c * h) / den
    d_raw = (dd * g + d * dg - dc * h - c * dh - raw * (da * g + a * dg - dc * e - c * de)) / den
    du = torch.where((raw >= low) & (raw <= high), d_raw, 0.0)
    s = torch.sigmoid(outputs[1])
    return 2 * s * (1 - s) * du, du, db * g + b * dg - dc * f - c * df


# ---- every door; the clamp is two numbers, or what the registered op has made of them ----


def evaluate(params: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op through the door that fits; arguments checked."""
    way = door((params,))
    result: Any
    if way is DIRECT:
        apply: Any = _BistableCoupling.apply if params.requires_grad and torch.is_grad_enabled() else _forward
        result = apply(params, float(low), float(high))
    elif way is DUAL:
        result = forward_mode(evaluate, _tangents, (params, low, high))
    elif way is TRANSFORMED:
        result = _Transformed.apply(params, low, high)  # type: ignore[no-untyped-call]  # torch has no stub
    else:
        result = _registered(params, *_clamp_tensors(low, high))
    return result  # type: ignore[no-any-return]  # torch has no stub for apply


def adjoint(params: Tensor, low: Any, high: Any, gk: Tensor, gu: Tensor, gd: Tensor) -> Tensor:
    """dL/dparams through the door that fits."""
    way = backward_door((params, gk, gu, gd))
    gradient: Any
    if way is DIRECT:
        gradient = _backward(params, float(low), float(high), gk, gu, gd)
    elif way is DUAL:
        raise RuntimeError(second_derivative_message(OP))
    elif way is TRANSFORMED:
        gradient = _TransformedBackward.apply(params, low, high, gk, gu, gd)  # type: ignore[no-untyped-call]  # no stub
    else:
        gradient = _registered_backward(params, *_clamp_tensors(low, high), gk, gu, gd)
    return gradient  # type: ignore[no-any-return]  # torch has no stub for apply


def _clamp_tensors(low: Any, high: Any) -> tuple[Tensor, ...]:
    return tuple(v if isinstance(v, Tensor) else number_tensor(v, torch.float64, "cpu") for v in (low, high))


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
    return evaluate(params, low, high)


def _check_params(params: Any) -> None:
    """At the public op's door, and again where torch.ops hands tensors in that nobody has seen."""
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

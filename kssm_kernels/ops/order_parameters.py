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
from kssm_kernels.ops._door import (
    DIRECT,
    DTYPES,
    DUAL,
    MAX_HARMONICS,
    TRANSFORMED,
    alive,
    as_integer,
    backward_door,
    check_phases,
    door,
    forward_mode,
    move_batch,
    refuse_second_derivative,
    register,
    register_vmap,
    second_derivative_message,
)
from kssm_kernels.ops._memory import on_one_device, strided, whole
from kssm_kernels.ops._order_parameters_torch import features_backward_torch, features_tangent, features_torch

OP = "order_parameters"


# ---- the compiled kernels ----


def rows_of(theta: Tensor) -> tuple[Tensor, int, int, int]:
    """[..., N] as a matrix, copied only if it must be: (owner of the memory, rows, row stride, column stride)."""
    n = theta.shape[-1]
    if theta.is_contiguous():
        return theta, theta.numel() // n, n, 1
    flat = theta.reshape(-1, n)
    row_stride, column_stride = flat.stride()
    return flat, flat.shape[0], row_stride, column_stride


def _forward(theta: Tensor, harmonics: int) -> Tensor:
    backend = backends.select(OP, theta)
    if backend == "torch":
        return features_torch(theta, harmonics).to(theta.dtype)
    theta = strided("theta", theta)
    if backend != "cpu":
        result: Tensor = backends.kernels(backend, OP)[0].forward(theta, harmonics)
        return result
    out = theta.new_empty(*theta.shape[:-1], 3 * harmonics)
    data, rows, row_stride, column_stride = rows_of(theta)
    backends.cpu_extension.order_parameters_forward(
        data.data_ptr(),
        rows,
        theta.shape[-1],
        row_stride,
        column_stride,
        DTYPES[theta.dtype][0],
        harmonics,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _backward(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    backend = backends.select(OP, theta)
    if backend == "torch":
        return features_backward_torch(theta, features, grad).to(theta.dtype)
    theta = strided("theta", theta)
    shape = (*theta.shape[:-1], 3 * (features.shape[-1] // 3))
    features, grad = whole("features", features, shape, theta), whole("their gradient", grad, shape, theta)
    if backend != "cpu":
        result: Tensor = backends.kernels(backend, OP)[0].backward(theta, features, grad)
        return result
    out = theta.new_empty(*theta.shape)
    data, rows, row_stride, column_stride = rows_of(theta)
    backends.cpu_extension.order_parameters_backward(
        data.data_ptr(),
        rows,
        theta.shape[-1],
        row_stride,
        column_stride,
        DTYPES[theta.dtype][0],
        features.shape[-1] // 3,
        features.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# ---- the direct door ----


class _OrderParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, harmonics: int) -> Tensor:
        features = _forward(theta, harmonics)
        ctx.save_for_backward(theta, features)
        return features

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        theta, features = ctx.saved_tensors
        with torch.no_grad():
            gradient = adjoint(theta, features, grads[0])
        return *refuse_second_derivative(OP, (gradient,), (theta, *grads)), None


# ---- the registered door; torch.ops hands in what nobody has checked ----


@register("order_parameters", "(Tensor theta, SymInt harmonics) -> Tensor")
def _registered(theta: Tensor, harmonics: int) -> Tensor:
    check_phases(OP, theta)
    as_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS)
    return _forward(theta, harmonics)


@register("order_parameters_backward", "(Tensor theta, Tensor features, Tensor grad) -> Tensor")
def _registered_backward(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    check_phases(OP, theta)
    if features.dim() == 0 or features.shape[-1] not in range(3, 3 * MAX_HARMONICS + 1, 3):
        raise ValueError(f"{OP}: features must have shape [..., 3H], H from 1 to 256, got {tuple(features.shape)}")
    return _backward(theta, features, grad)


@_registered.register_fake
def _(theta: Tensor, harmonics: int) -> Tensor:
    return theta.new_empty((*theta.shape[:-1], 3 * harmonics))


@_registered_backward.register_fake
def _(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    on_one_device(theta, features, grad)
    return torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _registered_gradient(ctx: Any, grad: Tensor) -> Any:
    theta, features = ctx.saved_tensors
    return _registered_backward(theta, features, grad), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(second_derivative_message(OP))


_registered.register_autograd(_registered_gradient, setup_context=_setup_context)
_registered_backward.register_autograd(_no_second_derivative)


def _vmap(info: Any, dims: tuple[Any, ...], theta: Tensor, harmonics: int) -> Any:
    return evaluate(move_batch(theta, dims[0], info.batch_size), harmonics), 0


def _vmap_backward(info: Any, dims: tuple[Any, ...], *tensors: Tensor) -> Any:
    moved = [move_batch(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)]
    return adjoint(*moved), 0


register_vmap(_registered, _vmap)
register_vmap(_registered_backward, _vmap_backward)


# ---- torch.func.grad and its like, and forward mode ----


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(theta: Tensor, harmonics: int) -> Tensor:
        return evaluate(theta, harmonics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        theta, features, grad = alive((*ctx.saved_tensors, *grads))
        return adjoint(theta, features, grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        theta, features = ctx.saved_tensors
        return features_tangent(theta, tangent, features).to(features.dtype)

    vmap = staticmethod(_vmap)


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return adjoint(theta, features, grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = jvp = staticmethod(_no_second_derivative)
    vmap = staticmethod(_vmap_backward)


def _tangents(arguments: tuple[Any, ...], tangents: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (features_tangent(arguments[0], tangents[0], outputs[0]),)


# ---- every door ----


def evaluate(theta: Tensor, harmonics: int) -> Tensor:
    """The op through the door that fits; arguments checked."""
    way = door((theta,))
    features: Tensor
    if way is DIRECT:
        if theta.requires_grad and torch.is_grad_enabled():
            features = _OrderParameters.apply(theta, harmonics)  # type: ignore[no-untyped-call]  # torch has no stub
        else:
            features = _forward(theta, harmonics)
    elif way is DUAL:
        (features,) = forward_mode(lambda t, h: (evaluate(t, h),), _tangents, (theta, harmonics))
    elif way is TRANSFORMED:
        features = _Transformed.apply(theta, harmonics)  # type: ignore[no-untyped-call]  # torch has no stub
    else:
        features = _registered(theta, harmonics)
    return features


def adjoint(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """dL/dtheta through the door that fits."""
    way = backward_door((theta, features, grad))
    gradient: Tensor
    if way is DIRECT:
        gradient = _backward(theta, features, grad)
    elif way is DUAL:
        raise RuntimeError(second_derivative_message(OP))
    elif way is TRANSFORMED:
        gradient = _TransformedBackward.apply(theta, features, grad)  # type: ignore[no-untyped-call]  # no stub
    else:
        gradient = _registered_backward(theta, features, grad)
    return gradient


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
    return evaluate(theta, as_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS))

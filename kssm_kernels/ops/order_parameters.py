"""Order parameters of ensembles of phase oscillators.

    Z_n = (1/N) sum_j exp(i n theta_j),   C_n = Re Z_n,  S_n = Im Z_n,  M_n = sqrt(C_n^2 + S_n^2 + 1e-8),   n = 1..H

    dL/dtheta_j = (1/N) sum_n n (gS_n cos(n theta_j) - gC_n sin(n theta_j)),
    with gC_n += gM_n C_n / M_n and gS_n += gM_n S_n / M_n.

One sine and one cosine per oscillator; the harmonics follow from a recurrence, so nothing of size [..., N, H] exists.

The plain Chebyshev recurrence x_{n+1} = 2 cos(theta) x_n - x_{n-1} loses n^2 ulp where theta is near a multiple of pi.
In torch the first ``m`` harmonics come from products, and the rest from m chains of stride m,
x_{n+m} = 2 cos(m theta) x_n - x_{n-m}, which loses (H/m)^2 ulp at the same cost (docs/accuracy.md). The compiled kernel
sums products of a few cosines and sines instead (csrc/math/harmonics.h).
"""

from __future__ import annotations

from collections.abc import Iterator
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

OP = "order_parameters"
EPSILON = 1e-8  # under the square root of M_n


# ---- pure torch: the reference, and what runs on every device without a kernel ----


def chain_stride(harmonics: int) -> int:
    """Number m of interleaved recurrences for 1..H."""
    return 4 if harmonics <= 32 else 8 if harmonics <= 128 else 16


def harmonics_of(theta: Tensor, harmonics: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (n, sign, pair) for n = 1..H, in the order of the chains; read each before the next.

    ``sign * pair`` is cos(n theta) and sin(n theta), ``[2, *theta.shape]``: with the signs + + - - along a chain its
    recurrence adds to the value before the last in place, in one operation. Holds about 2 m + 6 tensors of theta's
    size, whatever H is.
    """
    m = min(chain_stride(harmonics), harmonics)
    one = torch.stack([torch.cos(theta), torch.sin(theta)])
    pairs = [torch.stack([torch.ones_like(theta), torch.zeros_like(theta)]), one]
    for n in range(2, m + 1):
        (ca, sa), (cb, sb) = pairs[n // 2], pairs[n - n // 2]
        pairs.append(torch.stack([torch.addcmul(ca * cb, sa, sb, value=-1), torch.addcmul(sa * cb, ca, sb)]))
    for n in range(1, m + 1):
        yield n, 1, pairs[n]
    if m == harmonics:
        return
    # 2 cos(m theta) from half the angle: the products leave cos[m] + i sin[m] some ulp off the unit circle, which the
    # recurrence would amplify (H/m)^2 times
    c, s = pairs[m // 2]
    twice = torch.where(s.abs() < c.abs(), 2 - 4 * s * s, 4 * c * c - 2)
    for r in range(1, m + 1):
        before, last, sign, step = pairs[m - r].clone(), pairs[r].clone(), 1, -1
        before[1].neg_()  # the sine at r - m
        for n in range(r + m, harmonics + 1, m):
            before, last = last, before.addcmul_(twice, last, value=step)
            sign *= step
            yield n, sign, last
            step = -step


def _row_chunks(theta: Tensor) -> Iterator[slice]:
    """Rows per pass: on the CPU enough for torch to use its threads and few enough for the last-level cache (2^15
    phases take 51 ms, 2^17 33, 2^18 30 and twice the memory); many elsewhere, where launches dominate."""
    rows, n = theta.shape
    step = max(1, (1 << 17 if theta.device.type == "cpu" else 1 << 22) // n)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def into_unit_disk(c: Tensor, s: Tensor) -> Tensor:
    """Puts C + iS, which rounding may have left outside, back on the unit disk in place; returns M.

    The disk holds the true value: the step cannot lead away from it.
    """
    scale = (c * c + s * s).clamp_min_(1.0).rsqrt_()
    c *= scale
    s *= scale
    return torch.sqrt(c * c + s * s + EPSILON)


def features_torch(theta: Tensor, harmonics: int) -> Tensor:
    """[..., N] -> [..., 3H] in theta's arithmetic dtype (no gradient of its own)."""
    n = theta.shape[-1]
    flat = theta.reshape(-1, n)
    compute = DTYPES[theta.dtype][1]
    out = torch.empty(3, harmonics, flat.shape[0], dtype=compute, device=theta.device)
    for rows in _row_chunks(flat):
        for k, sign, pair in harmonics_of(flat[rows].to(compute), harmonics):
            torch.mul(pair.sum(-1), sign, out=out[:2, k - 1, rows])
    out[:2] /= n
    out[2] = into_unit_disk(out[0], out[1])
    return out.permute(2, 0, 1).reshape(*theta.shape[:-1], 3 * harmonics).contiguous()


def features_backward_torch(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """dL/dtheta [..., N], in theta's arithmetic dtype, from dL/dfeatures [..., 3H]."""
    n, harmonics = theta.shape[-1], features.shape[-1] // 3
    compute = DTYPES[theta.dtype][1]
    c, s, m = features.reshape(-1, 3, harmonics).to(compute).unbind(1)
    gc, gs, gm = grad.reshape(-1, 3, harmonics).to(compute).unbind(1)
    weight = torch.arange(1, harmonics + 1, device=theta.device, dtype=compute) / n
    on_cos = weight * (gs + gm * s / m)
    on_sin = -weight * (gc + gm * c / m)
    flat = theta.reshape(-1, n)
    out = torch.empty(flat.shape, dtype=compute, device=theta.device)
    for rows in _row_chunks(flat):
        total = out[rows].zero_()
        for k, sign, (cos, sin) in harmonics_of(flat[rows].to(compute), harmonics):
            total.addcmul_(cos, on_cos[rows, k - 1, None], value=sign)
            total.addcmul_(sin, on_sin[rows, k - 1, None], value=sign)
    return out.reshape(theta.shape)


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


def features_tangent(theta: Tensor, tangent: Tensor, features: Tensor) -> Tensor:
    """The directional derivative of the features, from operators that autograd and vmap know, none of them in place:

    dC_n = -(n/N) sum_j sin(n theta_j) dtheta_j,  dS_n = (n/N) sum_j cos(n theta_j) dtheta_j,
    dM_n = (C_n dC_n + S_n dS_n) / M_n
    """
    compute = DTYPES[theta.dtype][1]
    harmonics = features.shape[-1] // 3
    moved = tangent.to(compute) / theta.shape[-1]
    one_c, one_s = torch.cos(theta.to(compute)), torch.sin(theta.to(compute))
    c, s = one_c, one_s
    dc, ds = [], []
    for n in range(1, harmonics + 1):
        dc.append(-n * (s * moved).sum(-1))
        ds.append(n * (c * moved).sum(-1))
        c, s = c * one_c - s * one_s, s * one_c + c * one_s
    d_c, d_s = torch.stack(dc, -1), torch.stack(ds, -1)
    f_c, f_s, f_m = features.to(compute).reshape(*features.shape[:-1], 3, harmonics).unbind(-2)
    return torch.cat([d_c, d_s, (f_c * d_c + f_s * d_s) / f_m], -1)


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

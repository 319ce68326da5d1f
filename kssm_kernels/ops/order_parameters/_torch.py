"""Order parameters, their adjoint and their tangent in pure torch. Equations: __init__.py.

The reference, and what runs on every device without a kernel.

The plain Chebyshev recurrence x_{n+1} = 2 cos(theta) x_n - x_{n-1} loses n^2 ulp where theta is near a multiple of pi.
Here the first ``m`` harmonics come from products, and the rest from m chains of stride m,
x_{n+m} = 2 cos(m theta) x_n - x_{n-m}, which loses (H/m)^2 ulp at the same cost (docs/accuracy.md). The compiled kernel
sums products of a few cosines and sines instead (csrc/math/harmonics.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kssm_kernels.ops._dtypes import DTYPES

EPSILON = 1e-8  # under the square root of M_n


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
    """[..., N] -> [..., 3H] in theta's compute dtype (no gradient of its own)."""
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
    """dL/dtheta [..., N], in theta's compute dtype, from dL/dfeatures [..., 3H]."""
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


def forward(theta: Tensor, harmonics: int) -> Tensor:
    return features_torch(theta, harmonics).to(theta.dtype)


def backward(theta: Tensor, features: Tensor, g_features: Tensor) -> Tensor:
    return features_backward_torch(theta, features, g_features).to(theta.dtype)

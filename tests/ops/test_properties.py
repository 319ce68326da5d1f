"""Any shape, any strides: what comes out depends on the values of the arguments alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kssm_kernels
from tests.support import naive

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33])
LEADS = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=3).map(tuple)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A float64 tensor of ``shape`` that is a view: slices with steps, permuted axes, expanded axes, in any mixture."""
    order = draw(st.permutations(range(len(shape))))
    base, picks, expanded = [], [], []
    for axis in order:
        size = shape[axis]
        start, step, after = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
        if size and draw(st.integers(0, 4)) == 0:
            base.append(1)
            picks.append(slice(None))
            expanded.append(size)
        else:
            span = start + size * step + after
            base.append(span)
            picks.append(slice(start, start + size * step, step))
            expanded.append(size)
    seed = draw(st.integers(0, 2**31))
    values = torch.randn(base, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    view = values[tuple(picks)].expand(expanded)
    result = view.permute([order.index(k) for k in range(len(shape))])
    assert result.shape == shape
    return result


@st.composite
def phases(draw: st.DrawFn) -> Tensor:
    return draw(strided((*draw(LEADS), draw(SIZES))))


@st.composite
def operand(draw: st.DrawFn, theta: Tensor) -> Tensor | float:
    """A number, or a tensor that broadcasts against theta: last axis 1 or N, leading axes dropped, 1 or theta's."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([0.0, 0.3, 1, -0.7]))
    rank = draw(st.integers(0, theta.dim()))
    if rank == 0:
        return draw(strided(()))
    batch_shape = [draw(st.sampled_from([1, s])) for s in theta.shape[:-1][theta.dim() - rank :]]
    return draw(strided((*batch_shape, draw(st.sampled_from([1, theta.shape[-1]])))))


def _compare(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@given(theta=phases(), harmonics=st.integers(1, 40))
def test_order_parameters(backend: str, theta: Tensor, harmonics: int) -> None:
    leaf = theta.detach().requires_grad_()
    got, want = kssm_kernels.order_parameters(leaf, harmonics), naive.order_parameters(leaf, harmonics)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _compare([got], [want])
    grads = [torch.autograd.grad(v, leaf, weight)[0] for v in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-7)


@given(data=st.data(), theta=phases(), harmonics=st.integers(0, 9), steps=st.integers(1, 3), phases_too=st.booleans())
@settings(max_examples=80)
def test_update_and_features(
    backend: str, data: st.DataObject, theta: Tensor, harmonics: int, steps: int, phases_too: bool
) -> None:
    names = ["coupling", *data.draw(st.lists(st.sampled_from(["omega", "phase_lag", "noise_scale"]), unique=True))]
    found: dict[str, Any] = {name: data.draw(operand(theta)) for name in names}
    leaves = [v.detach().requires_grad_() for v in (theta, *found.values()) if isinstance(v, Tensor)]
    rest = iter(leaves[1:])
    args: dict[str, Any] = {k: next(rest) if isinstance(v, Tensor) else v for k, v in found.items()}
    shapes = (v.shape[:-1] for v in args.values() if isinstance(v, Tensor))
    batch_shape = torch.broadcast_shapes(theta.shape[:-1], *shapes)
    n, rows = theta.shape[-1], math.prod(batch_shape)
    xi = torch.stack([kssm_kernels.philox_normal(rows, n, seed=5, step=k) for k in range(steps)]).reshape(
        steps, *batch_shape, n
    )
    common: dict[str, Any] = {"dt": 0.2, "steps": steps}
    moved = naive.kuramoto_update(leaves[0], **args, **common, xi=xi)
    if harmonics:
        out = kssm_kernels.kuramoto_features(
            leaves[0], harmonics=harmonics, seed=5, return_phases=phases_too, **args, **common
        )
        got = list(out) if isinstance(out, tuple) else [out]
        want = [naive.order_parameters(moved, harmonics), moved][: len(got)]
    else:
        got, want = [kssm_kernels.kuramoto_update(leaves[0], seed=5, **args, **common)], [moved]
    _compare(got, want)
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(v.shape, dtype=torch.float64, generator=g) for v in want]
    grads = [torch.autograd.grad(v, leaves, weights) for v in (got, want)]
    for leaf, a, b in zip(leaves, *grads, strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@given(data=st.data(), batch_shape=LEADS)
def test_bistable_coupling(backend: str, data: st.DataObject, batch_shape: tuple[int, ...]) -> None:
    params = data.draw(strided((*batch_shape, 10))).detach().requires_grad_()
    got, want = kssm_kernels.bistable_coupling(params), naive.bistable_coupling(params, (0.1, 10.0))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@given(theta=phases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_strides_do_not_change_a_bit(backend: str, theta: Tensor, dtype: torch.dtype) -> None:
    """A view and its contiguous copy: same values, same bits, in every dtype, forward and backward.

    Torch's own sums add in an order that depends on the strides, so the pure-torch backend is near, not equal.
    """
    low = theta.clone().to(dtype)
    view = torch.empty_strided(low.shape, [2 * s + (s == 0) for s in low.stride()], dtype=dtype).copy_(low)
    results = []
    for start in (low.contiguous(), view):
        leaf = start.detach().requires_grad_()
        a = kssm_kernels.order_parameters(leaf, 5)
        b, c = kssm_kernels.kuramoto_features(leaf, 0.4, 3, omega=0.1, return_phases=True)
        grad = torch.autograd.grad([a, b, c], leaf, [torch.ones_like(v) for v in (a, b, c)])[0]
        results.append([a, b, c, grad])
    close = 0.0 if backend != "torch" else 8 * torch.finfo(dtype).eps
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=close, atol=32 * close)

"""Tensors whose memory does not hold their values, or not all of it, are resolved or refused; none is read as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kssm_kernels import (
    FusedKuramoto,
    FusedKuramotoV1,
    FusedKuramotoV2,
    bistable_coupling,
    kuramoto_features,
    kuramoto_update,
    order_parameters,
    philox_normal,
)
from kssm_kernels.ops._memory import whole

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "order_parameters": lambda t: order_parameters(t, 2),
    "kuramoto_update": lambda t: kuramoto_update(t, 0.5),
    "operands": lambda t: kuramoto_update(torch.ones(t.shape), t, omega=t, phase_lag=t, noise_scale=t, seed=1, steps=2),
    "kuramoto_features": lambda t: kuramoto_features(t, 0.5, 3),
    "bistable_coupling": lambda t: torch.stack(bistable_coupling(t)),
}
every = pytest.mark.parametrize("name", CALLS)


def _negated() -> Tensor:
    view = torch.randn(3, 10, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


@every
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t[:2], lambda t: t.t().contiguous().t()], ids="abc")
def test_the_negative_bit_of_a_lazy_view(name: str, layout: Callable[[Tensor], Tensor], backend: str) -> None:
    view = layout(_negated())
    assert torch.equal(CALLS[name](view), CALLS[name](view.resolve_neg().clone()))


@every
def test_the_negative_bit_of_a_gradient(name: str, backend: str) -> None:
    leaf = torch.rand(3, 10).add(0.2).requires_grad_()
    out = CALLS[name](leaf)
    weight = torch.randn(out.shape, dtype=torch.complex64).conj().imag
    got, want = (
        torch.autograd.grad(out, leaf, w, retain_graph=True)[0] for w in (weight, weight.resolve_neg().clone())
    )
    assert torch.equal(got, want)


@every
@pytest.mark.parametrize("size", [0, 16])
def test_a_storage_freed_under_a_tensor_is_refused(name: str, size: int, backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's own operators read the memory")
    theta = torch.rand(3, 10)
    theta.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=r"needs a storage of 120 bytes, has"):
        CALLS[name](theta)


@every
@pytest.mark.parametrize("layout", ["offset", "rows", "columns"])
def test_a_storage_too_short_by_one_element_is_refused(name: str, layout: str, backend: str) -> None:
    """The offset counts, and the last element of a view counts whole."""
    if backend == "torch":
        pytest.skip("torch's own operators read the memory")
    view = {
        "offset": lambda: torch.rand(31)[1:].view(3, 10),
        "rows": lambda: torch.rand(3, 12)[:, :10],
        "columns": lambda: torch.rand(3, 20)[:, ::2],
    }[layout]()
    last = view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    CALLS[name](view)
    view.untyped_storage().resize_(4 * (last + 1))
    CALLS[name](view)
    view.untyped_storage().resize_(4 * last)
    with pytest.raises(RuntimeError, match=rf"needs a storage of {4 * (last + 1)} bytes, has {4 * last}"):
        CALLS[name](view)


@every
def test_zeros_that_have_no_memory(name: str, backend: str) -> None:
    zeros = torch._efficientzerotensor(3, 10)
    assert torch.equal(CALLS[name](zeros), CALLS[name](torch.zeros(3, 10)))


def test_what_is_on_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"must have shape .* on cpu, got .* on meta"):
        whole("features", torch.ones(3, 6, device="meta"), (3, 6), torch.ones(3, 10))
    # with one tensor on the meta device torch asks for shapes alone: what it would make of them holds no values
    ops: Any = torch.ops.kssm_kernels
    theta, meta, dt = torch.ones(3, 10), torch.ones(3, 6, device="meta"), torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="on one device, got cpu, meta"):
        ops.kuramoto(theta, torch.tensor(1.0, device="meta"), None, None, None, None, dt, 1, 2, True)
    with pytest.raises(RuntimeError, match="on one device, got cpu, meta"):
        ops.order_parameters_backward(theta, torch.ones(3, 6), meta)
    with pytest.raises(RuntimeError, match="on one device, got cpu, meta"):
        ops.bistable_coupling_backward(theta, dt, dt, meta[:, 0], torch.ones(3), torch.ones(3))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() > 1 else torch.stack([t, t], -1)[:, 0],
    "every second": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "one row for all": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_and_cotangents_of_any_layout(layout: str, backend: str) -> None:
    """A kernel reads them as contiguous memory: what is not must have been copied."""
    ops: Any = torch.ops.kssm_kernels
    theta, dt = torch.randn(3, 10), torch.tensor(0.1, dtype=torch.float64)
    low, high, one = 2 * dt, 100 * dt, torch.tensor(1.0)
    needed = [True, False, False, False, False]
    features, g_features, phases, g_phases, *grads = (
        LAYOUTS[layout](t) for t in (*torch.rand(2, 3, 6).add(0.1), *torch.rand(2, 3, 10), *torch.rand(3, 3))
    )

    def kuramoto(*saved: Tensor) -> Tensor:
        found: Tensor = ops.kuramoto_backward(theta, one, None, None, None, None, dt, 2, 2, *saved, needed)[0]
        return found

    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda *t: ops.order_parameters_backward(theta, *t), [features, g_features]),
        (kuramoto, [features, phases, g_features, g_phases]),
        (lambda *t: ops.bistable_coupling_backward(theta, low, high, *t), grads),
    ]
    for call, given in calls:
        copies = [t.clone(memory_format=torch.contiguous_format) for t in given]
        assert torch.equal(call(*given), call(*copies))


@every
def test_sparse_tensors_are_refused(name: str, backend: str) -> None:
    with pytest.raises(TypeError, match=r"must be a dense tensor, got layout torch\.sparse_coo"):
        CALLS[name](torch.eye(10).to_sparse())


def test_saved_tensors_of_another_shape_are_refused(backend: str) -> None:
    """The dispatcher's backward ops take what they are given: it must fit the phases."""
    if backend == "torch":
        pytest.skip("torch's own operators check shapes")
    ops: Any = torch.ops.kssm_kernels
    theta, features = torch.randn(3, 10), torch.ones(3, 6)
    for bad in (torch.ones(2, 6), torch.ones(3, 9), torch.ones(18)):
        with pytest.raises(RuntimeError, match="must have shape"):
            ops.order_parameters_backward(theta, features, bad)
    dt, one = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.0)
    rest = (theta, one, None, None, None, None, dt, 1, 2)
    needed = [True, True, False, False, False]
    for saved in ((features[:2], None, features, None), (features, theta[:2], features, theta)):
        with pytest.raises(RuntimeError, match="must have shape"):
            ops.kuramoto_backward(*rest, *saved, needed)
    low, high = torch.tensor(0.1).double(), torch.tensor(10.0).double()
    with pytest.raises(RuntimeError, match="must have shape"):
        ops.bistable_coupling_backward(theta, low, high, torch.ones(3), torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("name", ["phases", "harmonics", "operand", "coupling", "steps", "params", "no axes", "dtype"])
def test_the_dispatcher_s_ops_check_what_the_public_ones_do(name: str, backend: str) -> None:
    """Through torch.ops a tensor comes to a kernel that no public op has looked at."""
    ops: Any = torch.ops.kssm_kernels
    theta, one, dt = torch.randn(3, 10), torch.tensor(1.0), torch.tensor(0.1, dtype=torch.float64)
    clamp = dt, 100 * dt
    needed = [True, True, False, False, False]

    def kuramoto(theta: Tensor, coupling: Tensor, steps: int = 1, harmonics: int = 2) -> Any:
        return ops.kuramoto(theta, coupling, None, None, None, None, dt, steps, harmonics, True)

    def backward(theta: Tensor, coupling: Tensor, steps: int = 1, harmonics: int = 2) -> Any:
        features = torch.ones(*theta.shape[:-1], 3 * harmonics)
        rest = (None, None, None, None, dt, steps, harmonics, features, None, features, theta, needed)
        return ops.kuramoto_backward(theta, coupling, *rest)

    def order(theta: Tensor, harmonics: int = 2) -> Any:
        features = torch.ones(*theta.shape[:-1], 3 * harmonics)
        return ops.order_parameters_backward(theta, features, features)

    many, none, bare, whole = 300, theta[:, :0], torch.tensor(1.0), torch.ones(3, 10, dtype=torch.int64)
    calls: dict[str, list[Callable[[], Any]]] = {
        "phases": [lambda: ops.order_parameters(none, 2), lambda: order(none), lambda: kuramoto(none, one)],
        "harmonics": [
            lambda: ops.order_parameters(theta, many),
            lambda: order(theta, many),
            lambda: order(theta, 0),
            lambda: ops.order_parameters_backward(theta, bare, bare),
            lambda: kuramoto(theta, one, harmonics=many),
            lambda: backward(theta, one, harmonics=many),
        ],
        "operand": [lambda: kuramoto(theta, torch.ones(3)), lambda: backward(theta, torch.ones(3, 4))],
        "coupling": [lambda: kuramoto(theta, torch.ones(2, 1)), lambda: backward(theta, torch.ones(2, 10))],
        "steps": [lambda: kuramoto(theta, one, -1), lambda: backward(theta, one, -1)],
        "params": [
            lambda: ops.bistable_coupling(torch.ones(3, 4), *clamp),
            lambda: ops.bistable_coupling_backward(torch.ones(3, 4), *clamp, *torch.ones(3, 3)),
        ],
        "no axes": [
            lambda: ops.order_parameters(bare, 2),
            lambda: kuramoto(bare, one),
            lambda: ops.bistable_coupling(bare, *clamp),
            lambda: ops.bistable_coupling_backward(bare, *clamp, one, one, one),
        ],
        "dtype": [
            lambda: ops.order_parameters(whole, 2),
            lambda: order(whole),
            lambda: kuramoto(whole, one),
            lambda: backward(whole, one),
            lambda: kuramoto(theta, one.long()),
            lambda: ops.bistable_coupling(whole, *clamp),
            lambda: ops.bistable_coupling_backward(whole, *clamp, *torch.ones(3, 3)),
        ],
    }
    for call in calls[name]:
        with pytest.raises((TypeError, ValueError), match=r"^(order_parameters|kuramoto_features|bistable_coupling): "):
            call()


# ---- NumPy's numbers ----


def test_numpy_numbers_are_numbers(backend: str) -> None:
    theta = torch.randn(3, 7)
    got = kuramoto_features(
        theta, np.float32(0.5), np.int64(3), omega=np.float64(0.25), dt=np.float32(0.125), phase_lag=np.float16(0.5),
        steps=np.int32(2), noise_scale=np.float32(0.5), seed=np.uint64(2**64 - 1),
    )  # fmt: skip
    want = kuramoto_features(
        theta, 0.5, 3, omega=0.25, dt=0.125, phase_lag=0.5, steps=2, noise_scale=0.5, seed=2**64 - 1
    )
    assert torch.equal(got, want)
    assert torch.equal(kuramoto_update(theta, np.int8(1), dt=np.int16(1)), kuramoto_update(theta, 1.0, dt=1.0))
    assert torch.equal(order_parameters(theta, np.uint8(4)), order_parameters(theta, 4))
    bank = FusedKuramoto(np.int64(8), np.int32(6), n_harmonics=np.int8(2))
    assert bank(torch.randn(2, 8))[2].shape == (2, 6)
    noise = philox_normal(np.int64(2), np.int32(5), seed=np.uint64(2**64 - 1), step=np.int64(3))
    assert torch.equal(noise, philox_normal(2, 5, seed=2**64 - 1, step=3))
    params = torch.rand(3, 10)
    assert torch.equal(
        bistable_coupling(params, (np.float32(0.5), np.int64(2)))[1], bistable_coupling(params, (0.5, 2.0))[1]
    )


@pytest.mark.parametrize("bad", [np.bool_(True), True, "2", 2.0, np.float64(2.0), None, np.array([1, 2])])
def test_what_is_no_integer_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="harmonics must be an int"):
        order_parameters(torch.zeros(3), bad)
    with pytest.raises(TypeError, match="steps must be an int"):
        kuramoto_update(torch.zeros(3), 0.5, steps=bad)


@pytest.mark.parametrize("bad", [np.bool_(True), "2", 2j, np.complex64(1), np.array([1.0, 2.0])])
def test_what_is_no_number_is_refused(bad: Any) -> None:
    for name in ("coupling", "omega", "phase_lag", "noise_scale", "dt"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            kuramoto_update(torch.zeros(3), **{"coupling": 0.5, name: bad})


def test_numpy_s_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match="coupling must be finite"):
        kuramoto_update(torch.zeros(3), np.float32("inf"))


# ---- meta initialisation ----


@pytest.mark.parametrize(
    "make",
    [lambda: FusedKuramoto(8, 6), lambda: FusedKuramotoV1(6), lambda: FusedKuramotoV2(8, 6)],
    ids=["v3", "v1", "v2"],
)
def test_reset_parameters_after_meta_initialisation(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        bank = make()
    bank = bank.to_empty(device="cpu")
    for parameter in bank.parameters():
        nn.init.constant_(parameter, 1e30)
    for module in bank.modules():
        module.reset_parameters()  # type: ignore[operator]  # every module here has one
    like = make()
    for (name, got), want in zip(bank.named_parameters(), like.parameters(), strict=True):
        if name in ("omega_0", "omega", "delta_param"):
            assert torch.equal(got, want), name
        assert got.abs().max() < 4, name
        assert got.requires_grad
    for module in (bank, *bank.children()):
        state = {k: v.clone() for k, v in module.state_dict().items()}
        module.reset_parameters()  # type: ignore[operator]  # every module here has one
        assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in state.items()}

"""The drop-in banks against the original classes, written from the equations in tests/support/naive.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kssm_kernels import FusedKuramoto, FusedKuramotoV1, FusedKuramotoV2, philox_normal
from tests.support import naive

D, N, H = 12, 10, 5
Make = Callable[[], nn.Module]
PAIRS: dict[str, tuple[Make, Make, int]] = {
    "v1": (lambda: naive.BankV1(N, 1.5), lambda: FusedKuramotoV1(N, 1.5), N),
    "v2": (lambda: naive.BankV2(D, N, 1.5), lambda: FusedKuramotoV2(D, N, 1.5), D),
    "v3": (lambda: naive.BankV3(D, N, 2.0, H), lambda: FusedKuramoto(D, N, 2.0, H, noise="off"), D),
    "v3 monostable": (
        lambda: naive.BankV3(D, N, n_harmonics=H, clamp=None),
        lambda: FusedKuramoto(D, N, n_harmonics=H, clamp=None, noise="off"),
        D,
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, int]:
    original, fused, width = PAIRS[name]
    a, b = original(), fused()
    b.load_state_dict(a.state_dict(), strict=True)
    return a, b, width


@pytest.mark.parametrize("name", PAIRS)
def test_same_parameters_loaded_strictly_both_ways(name: str) -> None:
    original, fused, _ = pair(name)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (original, fused)]
    assert list(shapes[0]) == list(shapes[1]) or shapes[0] == shapes[1]
    assert {k for k, _ in original.named_parameters()} == {k for k, _ in fused.named_parameters()}
    original.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("name", PAIRS)
def test_starts_where_the_original_starts(name: str) -> None:
    _, fused, _ = pair(name)
    fresh = PAIRS[name][1]()
    for key, value in fresh.state_dict().items():
        if key in ("omega", "omega_0"):
            torch.testing.assert_close(value, torch.linspace(-torch.pi, torch.pi, N))
        if key == "delta_param":
            assert torch.equal(value, torch.tensor([0.1]))
    assert len(fused.state_dict()) == len(fresh.state_dict())


@pytest.mark.parametrize("batch_shape", [(2, 3), (4,), (), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients(name: str, batch_shape: tuple[int, ...], backend: str) -> None:
    original, fused, width = pair(name)
    original.double(), fused.double()
    x = torch.randn(*batch_shape, width, dtype=torch.float64)
    results: list[dict[str, Tensor | None]] = []
    weights: list[Tensor] = []
    for bank in (original, fused):
        leaf = x.clone().requires_grad_()
        outputs = bank(leaf)
        weights = weights or [torch.randn_like(v) for v in outputs]
        loss = sum((v * w).sum() for v, w in zip(outputs, weights, strict=True))
        loss = loss if leaf.numel() == 0 or "v3" not in name else loss + bank.get_regularization_loss()  # type: ignore[operator]
        loss.backward()
        grads = {f"d {k}": p.grad for k, p in bank.named_parameters()}
        results.append({**{f"output {i}": v.detach() for i, v in enumerate(outputs)}, "d x": leaf.grad, **grads})
    for key, want in results[0].items():
        got = results[1][key]
        assert (got is None) == (want is None), key
        if got is not None and want is not None:
            assert got.shape == want.shape, key
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", PAIRS)
def test_single_precision_is_as_good_as_the_original(name: str, backend: str) -> None:
    original, fused, width = pair(name)
    x = torch.randn(3, 4, width)
    with torch.no_grad():
        exact = copy.deepcopy(original).double()(x.double())
        for want, mine, theirs in zip(exact, fused(x), original(x), strict=True):
            slack = 64 * torch.finfo(torch.float32).eps * (1 + want.abs().max())  # two matmuls and H harmonics
            assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max() + slack


def test_v1_outputs_are_named_right(backend: str) -> None:
    x, y, r, theta = FusedKuramotoV1(N)(torch.randn(2, 3, N))
    radius = (x * x + y * y).sqrt()
    assert radius.max() < 0.99
    torch.testing.assert_close(torch.atan2(y, x), torch.atan2(theta.sin(), theta.cos()))
    assert r.shape == (2, 3)


def test_diagnostics_and_regularization(backend: str) -> None:
    original, fused, _ = pair("v3")
    with pytest.raises(RuntimeError, match="get_regularization_loss needs a forward call first"):
        fused.get_regularization_loss()  # type: ignore[operator]
    x = torch.randn(2, 3, D)
    original(x), fused(x)
    for name in ("last_delta_val", "last_u_val"):
        got, want = getattr(fused, name), getattr(original, name)
        assert got.dim() == 0
        torch.testing.assert_close(got, want)
    for arguments in ({}, {"lambda1": 0.3, "lambda2": 0.2, "epsilon": 1e-3}, {"epsilon": 50.0}):
        losses = [m.get_regularization_loss(**arguments) for m in (original, fused)]  # type: ignore[operator]
        torch.testing.assert_close(losses[1], losses[0])
        grads = [
            torch.autograd.grad(v, m.to_params.weight, retain_graph=True)[0]  # type: ignore[union-attr,arg-type]
            for v, m in zip(losses, (original, fused), strict=True)
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_clamp_none_lets_u_leave_the_bounds(backend: str) -> None:
    x = torch.randn(50, D)
    _, bistable, _ = pair("v3")
    monostable = FusedKuramoto(D, N, n_harmonics=H, clamp=None, noise="off")
    monostable.load_state_dict(bistable.state_dict())
    bistable(x), monostable(x)
    assert 0.1 <= bistable.last_u_val.item() <= 10  # type: ignore[union-attr,operator]
    assert not torch.allclose(bistable.last_u_val, monostable.last_u_val)  # type: ignore[arg-type]


@pytest.mark.parametrize(("noise", "training", "noisy"), [
    ("train", True, True), ("train", False, False), ("always", True, True), ("always", False, True),
    ("off", True, False), ("off", False, False),
])  # fmt: skip
def test_noise_modes_and_seeds(noise: Any, training: bool, noisy: bool, backend: str) -> None:
    bank = FusedKuramoto(D, N, n_harmonics=H, noise=noise).train(training)
    x = torch.randn(4, D)
    torch.manual_seed(3)
    a, b = bank(x), bank(x)
    torch.manual_seed(3)
    c = bank(x)
    assert all(torch.equal(p, q) for p, q in zip(a, c, strict=True))
    assert torch.equal(a[2], b[2]) != noisy
    assert (torch.autograd.grad(a[0].sum(), bank.delta_param, allow_unused=True)[0] is not None) == noisy


def test_noise_is_the_originals_with_the_promised_numbers(backend: str) -> None:
    original = naive.BankV3(D, N, n_harmonics=H).double()
    fused = FusedKuramoto(D, N, n_harmonics=H, noise="always").double()
    fused.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, D, dtype=torch.float64)
    torch.manual_seed(11)
    got = fused(x)
    torch.manual_seed(11)
    seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
    want = original(x, philox_normal(6, N, seed=seed).double().reshape(2, 3, N))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for bank, out in ((fused, got), (original, want)):
        out[0].square().sum().backward()
        assert bank.delta_param.grad is not None
    torch.testing.assert_close(fused.delta_param.grad, original.delta_param.grad, rtol=1e-8, atol=1e-9)


def test_a_trained_bank_survives_state_dict_save_and_a_step_of_training(backend: str) -> None:
    bank = FusedKuramoto(D, N, n_harmonics=H, noise="off")
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.01)
    x, target = torch.randn(20, D), torch.randn(20, D)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (bank(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    buffer = io.BytesIO()
    torch.save(bank.state_dict(), buffer)
    buffer.seek(0)
    other = FusedKuramoto(D, N, n_harmonics=H, noise="off")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(bank(x)[0], other(x)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedKuramoto(0), "hidden_dim must be an int of at least 1, got 0"),
        (lambda: FusedKuramoto(4, n_oscillators=2.0), "n_oscillators must be an int.*got 2.0"),
        (lambda: FusedKuramoto(4, noise="never"), "noise must be .*got 'never'"),
        (lambda: FusedKuramotoV1(-1), "n_oscillators.*got -1"),
        (lambda: FusedKuramotoV2(4, 0), "n_oscillators.*got 0"),
        (lambda: FusedKuramoto(4)(torch.zeros(2, 3)), r"\[\.\.\., 4\], got \(2, 3\)"),
        (lambda: FusedKuramotoV1(4)(torch.zeros(3)), r"\[\.\.\., 4\], got \(3,\)"),
        (lambda: FusedKuramotoV2(4)(torch.zeros(())), r"\[\.\.\., 4\], got \(\)"),
    ],
)
def test_bad_sizes_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

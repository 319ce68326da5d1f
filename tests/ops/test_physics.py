"""What the equations say about oscillators, independent of any kernel's arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kssm_kernels import kuramoto_features, kuramoto_update, order_parameters
from tests.support.tolerance import harmonic_slack


def coherence(theta: Tensor) -> Tensor:
    return order_parameters(theta, 1)[..., 2]


def _rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 2 * math.pi - math.pi


def test_magnitudes_stay_between_zero_and_one(backend: str) -> None:
    for n in (1, 2, 3, 50, 1000):
        m = order_parameters(_rand(20, n).float(), 64)[..., 128:]
        assert m.min() >= 0
        assert m.max() <= 1 + harmonic_slack(64, torch.float32)
        assert m[..., 0].max() <= 1 + 4 * torch.finfo(torch.float32).eps
    assert torch.allclose(order_parameters(torch.full((2, 9), 0.7), 64)[..., 128:], torch.ones(64), atol=1e-4)
    n = 12  # evenly spread: every Z_n vanishes but those whose n is a multiple of N
    spread = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    m = order_parameters(spread, 24)[48:]
    want = torch.tensor([float(k % n == 0) for k in range(1, 25)], dtype=torch.float64)
    torch.testing.assert_close(m, want, rtol=0, atol=1.1e-4)  # sqrt(1e-8) where the sum vanishes


def test_phase_shift_turns_every_order_parameter(backend: str) -> None:
    theta, shift, h = _rand(4, 30), 0.7, 6
    z, turned = (torch.complex(*f.unflatten(-1, (3, h)).unbind(-2)[:2]) for f in
                 (order_parameters(theta, h), order_parameters(theta + shift, h)))  # fmt: skip
    n = torch.arange(1, h + 1, dtype=torch.float64)
    torch.testing.assert_close(turned, z * torch.exp(1j * n * shift))
    a, b = (
        kuramoto_update(theta, 0.8, phase_lag=0.2, steps=3),
        kuramoto_update(theta + shift, 0.8, phase_lag=0.2, steps=3),
    )
    torch.testing.assert_close(b, a + shift)
    whole_turns = kuramoto_update(theta + 2 * math.pi * 5, 0.8)
    torch.testing.assert_close(whole_turns, kuramoto_update(theta, 0.8) + 2 * math.pi * 5)


def test_permutation_of_the_oscillators(backend: str) -> None:
    theta, omega, order = _rand(3, 40), torch.randn(40, dtype=torch.float64), torch.randperm(40)
    torch.testing.assert_close(order_parameters(theta[:, order], 9), order_parameters(theta, 9))
    a = kuramoto_update(theta, 0.8, omega=omega, steps=4, dt=0.1)
    torch.testing.assert_close(kuramoto_update(theta[:, order], 0.8, omega=omega[order], steps=4, dt=0.1), a[:, order])


def test_mirror_image(backend: str) -> None:
    theta, omega = _rand(3, 20), torch.randn(20, dtype=torch.float64)
    a = kuramoto_update(theta, 0.8, omega=omega, phase_lag=0.3)
    torch.testing.assert_close(kuramoto_update(-theta, 0.8, omega=-omega, phase_lag=-0.3), -a)


def test_mean_field_form_is_the_sum_over_pairs(backend: str) -> None:
    theta, lag = _rand(2, 25), 0.4
    pairs = torch.sin(theta[:, None, :] - theta[:, :, None] - lag).mean(-1)  # [.., j, k]: pull of k on j
    torch.testing.assert_close(kuramoto_update(theta, 1.3, phase_lag=lag, dt=0.5), theta + 0.5 * 1.3 * pairs)


def test_mean_phase_moves_with_the_mean_frequency_alone(backend: str) -> None:
    theta, omega = _rand(3, 30), torch.randn(3, 30, dtype=torch.float64)
    moved = kuramoto_update(theta, 2.0, omega=omega, dt=0.1, steps=10)
    torch.testing.assert_close(moved.mean(-1), theta.mean(-1) + omega.mean(-1))


def test_update_and_features_agree(backend: str) -> None:
    theta = _rand(3, 30)
    features, phases = kuramoto_features(theta, 1.2, 7, phase_lag=0.1, steps=3, dt=0.2, return_phases=True)
    torch.testing.assert_close(phases, kuramoto_update(theta, 1.2, phase_lag=0.1, steps=3, dt=0.2))
    torch.testing.assert_close(features, order_parameters(phases, 7))
    torch.testing.assert_close(features, kuramoto_features(theta, 1.2, 7, phase_lag=0.1, steps=3, dt=0.2))


def test_many_steps_are_one_step_many_times(backend: str) -> None:
    theta, omega = _rand(2, 17), torch.randn(17, dtype=torch.float64)
    state = theta
    for _ in range(75):
        state = kuramoto_update(state, 0.9, omega=omega, dt=0.05)
    torch.testing.assert_close(kuramoto_update(theta, 0.9, omega=omega, dt=0.05, steps=75), state)


def test_two_oscillators_lock_at_the_exact_difference(backend: str) -> None:
    """d(phi)/dt = dw - K sin(phi), phi = theta_1 - theta_2: locked at asin(dw / K) if |dw| < K, running otherwise."""
    coupling = torch.tensor([[2.0], [1.0], [0.5]], dtype=torch.float64)
    omega = torch.tensor([0.3, -0.3], dtype=torch.float64)
    theta = torch.tensor([0.4, 0.1], dtype=torch.float64)
    end = kuramoto_update(theta, coupling, omega=omega, dt=0.05, steps=2000)
    phi = end[:, 0] - end[:, 1]
    torch.testing.assert_close(phi[:2], torch.asin(0.6 / coupling[:2, 0]), rtol=0, atol=1e-9)
    # unlocked: a turn takes 2 pi / sqrt(dw^2 - K^2), so in a time of 100 phi runs through 100 sqrt(0.11) radians
    assert abs(phi[2] - 100 * math.sqrt(0.6**2 - 0.5**2)) < 2 * math.pi


def test_sakaguchi_lag_shifts_the_locked_frequency(backend: str) -> None:
    """Identical oscillators in step run at omega - K sin(alpha); the lag beyond pi/2 drives them apart."""
    lag, k, time = 0.4, 1.5, 40.0
    theta = 0.5 * torch.randn(40, dtype=torch.float64)
    half, end = (kuramoto_update(theta, k, omega=0.2, phase_lag=lag, dt=0.02, steps=s) for s in (1000, 2000))
    assert coherence(end) > 1 - 1e-6
    speed = (end - half).mean() / (time / 2)
    torch.testing.assert_close(speed, torch.tensor(0.2 - k * math.sin(lag), dtype=torch.float64), rtol=0, atol=1e-6)
    apart = kuramoto_update(theta, k, phase_lag=2.0, dt=0.02, steps=2000)
    assert coherence(apart) < 0.2 < coherence(theta)


def test_lorentzian_frequencies_synchronise_above_the_critical_coupling_only(backend: str) -> None:
    """K_c = 2 gamma; above it R = sqrt(1 - K_c / K). Frequencies at the quantiles, so the sample adds no noise."""
    n, gamma = 2000, 0.5
    quantile = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    omega = gamma * torch.tan(math.pi * (quantile - 0.5))
    theta = _rand(n)
    coupling = torch.tensor([[0.4], [2.0], [4.0]], dtype=torch.float64) * gamma * 2
    state = kuramoto_update(theta, coupling, omega=omega, dt=0.05, steps=400)
    seen = []
    for _ in range(20):
        state = kuramoto_update(state, coupling, omega=omega, dt=0.05, steps=10)
        seen.append(coherence(state))
    r = torch.stack(seen).mean(0)
    assert r[0] < 4 / math.sqrt(n)
    for k in (1, 2):
        assert abs(r[k] - math.sqrt(1 - 2 * gamma / coupling[k, 0])) < 0.03


def test_sign_of_the_coupling(backend: str) -> None:
    theta = _rand(5, 50)
    before = coherence(theta)
    assert (coherence(kuramoto_update(theta, 1.0, dt=0.2, steps=20)) > before).all()
    assert (coherence(kuramoto_update(theta, -1.0, dt=0.2, steps=20)) < before).all()
    # without frequencies the flow climbs R^2: d(R^2)/dt = 2 K (R^2 / N) sum_j sin^2(psi - theta_j) >= 0
    state, last = theta, before
    for _ in range(30):
        state = kuramoto_update(state, 1.0, dt=0.05)
        assert (coherence(state) >= last - 1e-12).all()
        last = coherence(state)


def test_euler_is_of_first_order_in_dt(backend: str) -> None:
    theta, omega = _rand(11), torch.randn(11, dtype=torch.float64)

    def at(steps: int) -> Tensor:
        return kuramoto_update(theta, 1.5, omega=omega, phase_lag=0.1, dt=2.0 / steps, steps=steps)

    exact = 2 * at(8192) - at(4096)  # the first-order term removed
    errors = [(at(s) - exact).abs().max().item() for s in (64, 128, 256, 512)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(p - 1) < 0.05 for p in orders), orders


def test_noise_alone_diffuses(backend: str) -> None:
    """The mean square displacement after s steps is s delta^2, and R of a cluster decays as exp(-s delta^2 / 2)."""
    n, delta, steps = 20000, 0.1, 100
    end = kuramoto_update(torch.zeros(n, dtype=torch.float64), 0.0, noise_scale=delta, steps=steps, seed=1)
    variance = steps * delta**2
    assert abs(end.square().mean() - variance) < 5 * variance * math.sqrt(2 / n)
    assert abs(coherence(end) - math.exp(-variance / 2)) < 5 / math.sqrt(n)


@pytest.mark.parametrize("n", [1, 2])
def test_gradient_of_a_locked_state(n: int, backend: str) -> None:
    """In step, R is at its maximum: its gradient vanishes, and moving all phases together moves none of the R."""
    theta = torch.full((n,), 0.3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(coherence(theta), theta)
    assert g.abs().max() < 1e-12
    theta = _rand(30).requires_grad_()
    (g,) = torch.autograd.grad(order_parameters(theta, 5)[10:].sum(), theta)
    assert abs(g.sum()) < 1e-12

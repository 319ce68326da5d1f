"""Calls of many steps: the right frequency for any number of them, the same bits on any number of threads, Ctrl+C."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from kssm_kernels import kuramoto_features, kuramoto_update, order_parameters
from kssm_kernels.ops.kuramoto import _update
from tests.support import naive
from tests.support.cases import threads

# A step takes Triton's interpreter 20 ms, and a tenth of a second or more in a long row: it gets the same assertions,
# with fewer steps and sizes.
INTERPRETED = "triton"
SEAMS = [15, 16, 17, 24, 64, 65, 255, 256, 257, 264, 400]  # where a call begins to keep phases in two, and to wrap


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Radians between two phases, modulo 2 pi."""
    apart = a.double() - b.double()
    return (apart - math.tau * (apart / math.tau).round()).abs()


@pytest.mark.parametrize(("omega", "dt"), [(1.0, 0.01), (0.7, 0.01), (-2.0, 0.003), (3.0, 1.0), (40.0, 0.5)])
@pytest.mark.parametrize("n", [1, 5, 4096, 4097])
def test_frequency_of_free_oscillators(
    omega: float, dt: float, n: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without coupling theta = omega t; dt and omega are the float32 numbers that the kernels see."""
    steps = 100_000 if backend == "cpu" and n < 4096 else 3_000
    if backend == "cuda" and n >= 4096:
        steps = 300  # threads one after another: 4 ms a step
    if backend == INTERPRETED:
        steps = 24
        monkeypatch.setattr(_update, "UNWRAPPED", 20)  # the host decides when turns come off
        if n >= 4096:
            if (n, omega) not in ((4096, 0.7), (4097, 3.0)):
                pytest.skip("slow, and no other code than with these")
            n = 1025  # one row block, a launch for each step
    theta = torch.linspace(-3.0, 3.0, n)
    end = kuramoto_update(theta, 0.0, omega=omega, dt=dt, steps=steps)
    advance = torch.tensor(dt, dtype=torch.float32).double() * torch.tensor(omega, dtype=torch.float32).double()
    away = _distance(end, theta.double() + steps * advance).max()
    assert away <= 1e-6 * steps * abs(omega * dt) + 1e-6, away
    assert end.abs().max() < 2 * math.pi + 8 * abs(omega * dt)


@pytest.mark.parametrize("steps", [10_000_000])
def test_ten_million_steps_against_float64(steps: int) -> None:
    theta = torch.tensor([[0.3, -1.0, 2.0]])
    omega = torch.tensor([1.0, 0.7, -0.4])
    ends = [
        kuramoto_update(theta.to(dtype), 0.5, omega=omega.to(dtype), dt=0.01, steps=steps)
        for dtype in (torch.float32, torch.float64)
    ]
    # mean frequencies over the call; coupling makes the three drift against each other
    assert (_distance(*ends) / (steps * 0.01)).max() < 1e-6
    assert ends[0].abs().max() < 7
    free = kuramoto_update(theta, 0.0, omega=omega, dt=0.01, steps=steps)
    step = torch.tensor(0.01).double() * omega.double()
    assert (_distance(free, theta.double() + steps * step) / (steps * 0.01)).max() < 1e-6


@pytest.mark.parametrize("steps", SEAMS)
@pytest.mark.parametrize("n", [7, 4099])
def test_every_number_of_steps_agrees_with_float64(
    steps: int, n: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torch" and n > 4096 and steps > 65:
        pytest.skip("slow, and no other code than at n = 7")
    if backend == INTERPRETED:
        if steps not in ((17,) if n > 4096 else (16, 17, 65)):
            pytest.skip("slow, and no other code than at these")
        monkeypatch.setattr(_update, "UNWRAPPED", 50)
        n = min(n, 1025)
    theta, omega = 6 * torch.rand(2, n) - 3, torch.randn(n)
    given = {"omega": omega, "phase_lag": 0.1, "noise_scale": 0.05, "dt": 0.05, "steps": steps, "seed": 3}
    xi = torch.stack([_noise(2, n, k) for k in range(steps)])
    leaf, truth = theta.clone().requires_grad_(), theta.double().requires_grad_()
    features, phases = kuramoto_features(leaf, 0.8, 3, return_phases=True, **given)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items() if k != "seed"}
    want = naive.kuramoto_update(truth, 0.8, xi=xi, **wide)
    assert _distance(phases, want).max() < 2e-6 * math.sqrt(steps)
    # the gradient, of a function that does not see whole turns
    (got,) = torch.autograd.grad(phases.sin().sum() + features.sum(), leaf)
    (gradient,) = torch.autograd.grad(want.sin().sum() + naive.order_parameters(want, 3).sum(), truth)
    torch.testing.assert_close(got.double(), gradient, rtol=2e-4, atol=2e-4 * gradient.abs().max().item())


def _noise(rows: int, n: int, step: int) -> Tensor:
    import kssm_kernels

    return kssm_kernels.philox_normal(rows, n, seed=3, step=step).double()


@pytest.mark.parametrize("n", [9, 300, 5000])
def test_bits_do_not_depend_on_the_threads(n: int) -> None:
    theta = 6 * torch.rand(5, n) - 3
    found = []
    for count in (1, 2, 3):
        with threads(count):
            leaf = theta.clone().requires_grad_()
            end = kuramoto_update(leaf, 1.2, omega=0.3, noise_scale=0.1, seed=1, dt=0.02, steps=300)
            found.append((end.detach(), torch.autograd.grad(end.sin().sum(), leaf)[0]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 3e5, 1e9, 1e30])
def test_large_phases_at_the_start_of_a_long_call(
    size: float, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta, steps = (torch.tensor([0.3, -0.7, 0.9, 1.0]) * size).to(dtype), 300
    if backend == INTERPRETED:
        steps = 24
        monkeypatch.setattr(_update, "UNWRAPPED", 20)
    end = kuramoto_update(theta, 0.0, omega=0.5, dt=0.01, steps=steps)
    exact = torch.atan2(theta.double().sin(), theta.double().cos()) + 0.005 * steps
    if dtype == torch.float64 and size > 1e9:
        return  # float64 phases are not wrapped: what a step adds is below their last bit
    bound = 1e-5 if dtype != torch.bfloat16 else 0.03
    assert _distance(end, exact).max() < bound + (size * 1e-15 if dtype == torch.float64 else 0)


def test_nan_stays_where_it_is(backend: str) -> None:
    theta = torch.rand(3, 6)
    theta[1, 2] = math.nan
    end = kuramoto_update(theta, 1.0, omega=0.1, dt=0.01, steps=300)
    assert end[1].isnan().all()
    assert end[[0, 2]].isfinite().all()


# ---- full synchrony ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 192, 255, 256, 257, 1000, 4095, 4096, 4097, 10_000])
def test_r_is_at_most_one_in_full_synchrony(n: int, dtype: torch.dtype, backend: str) -> None:
    h = 33 if n < 1000 else 4
    if backend == INTERPRETED:
        h = min(h, 6)
        if n not in (1, 7, 257, 4097):
            pytest.skip("slow, and no other code than at these")
    phases = torch.tensor([2.6338346, 0.0, 1.0, -2.0, math.pi / 4, 3.1, 100.0], dtype=torch.float64).to(dtype)
    theta = phases[:, None].expand(-1, n)
    ulp = torch.finfo(dtype).eps
    for features in (order_parameters(theta, h), kuramoto_features(theta, 0.0, h), kuramoto_features(theta, 1.0, h)):
        c, s, m = features.double().unflatten(-1, (3, h)).unbind(-2)
        assert (c.square() + s.square()).sqrt().max() <= 1 + 4 * ulp
        assert m.max() <= math.sqrt(1 + 1e-8) * (1 + 4 * ulp)
        # below one, equal addends may cost what the sums' tolerance allows
        lowest = {torch.float32: 2e-5, torch.float64: 1e-12}.get(dtype, 64 * ulp)
        assert (c.square() + s.square()).sqrt().min() >= 1 - lowest


# ---- signals ----

LONG = {
    "one row": "kuramoto_update(torch.rand(1, 200), 1.0, dt=0.01, steps=2**31 - 1)",
    "more rows than threads": "kuramoto_update(torch.rand(3, 64), 1.0, dt=0.01, steps=2**31 - 1)",
    "a long row": "kuramoto_update(torch.rand(1, 100_000), 1.0, dt=0.01, steps=2**31 - 1)",
    "noise": "kuramoto_update(torch.rand(2, 300), 1.0, dt=0.01, noise_scale=0.1, steps=2**31 - 1)",
    "backward": "kuramoto_update(torch.rand(2, 20).requires_grad_(), 1.0, dt=0.01, steps=4_000_000).sum().backward()",
    "pure torch": "kuramoto_update(torch.rand(1, 200), 1.0, dt=0.01, steps=2**31 - 1)",
    "a scan": "x = torch.rand(1, 1, 8).expand(3, 10**10, 8); oscillator_scan(x, x, x, x, heads=2, harmonics=0)",
    "a closed loop": "x = torch.rand(1, 1, 8).expand(3, 10**10, 8); "
    "oscillator_scan(x, x, x, x, heads=2, harmonics=0, feedback=(torch.zeros(1, 8), torch.zeros(32, 2), None))",
}


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_ends_a_long_call(name: str) -> None:
    code = (
        "import signal, sys, threading, time, os, torch\n"
        "from kssm_kernels import kuramoto_update, oscillator_scan, use_backend\n"
        "torch.set_num_threads(2)\n"
        f"use_backend({'torch' if name == 'pure torch' else None!r})\n"
        "def interrupt():\n"
        "    time.sleep(0.5)\n"
        "    global sent\n"
        "    sent = time.monotonic()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        "try:\n"
        f"    {LONG[name]}\n"
        "except KeyboardInterrupt:\n"
        "    print('after', time.monotonic() - sent)\n"
        "    print(kuramoto_update(torch.zeros(3), 1.0).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("after"), done.stderr
    assert float(done.stdout.split()[1]) < 20.0  # seconds on a machine that may be busy; the call would take hours
    assert "[0.0, 0.0, 0.0]" in done.stdout  # the next call works


def test_a_handler_that_does_not_raise_lets_the_call_go_on() -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(time.monotonic()))
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        began = time.monotonic()
        end = kuramoto_update(torch.rand(1, 200), 1.0, omega=0.1, dt=0.01, steps=1_500_000)
        ended = time.monotonic()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert end.isfinite().all()
    if ended - began > 0.6:  # otherwise the machine was faster than the signal
        assert seen
        assert seen[0] < ended

"""The noise: Philox 4x32-10 and Box-Muller to the letter, standard normal and independent, the same bits everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kssm_kernels
from kssm_kernels import kuramoto_features, kuramoto_update, philox_normal
from kssm_kernels.noise import philox_4x32
from tests.support.cases import PATHS, through

# Random123's known answers for philox4x32 with 10 rounds: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]) -> None:
    words = philox_4x32(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)  # type: ignore[arg-type]
    assert tuple(int(w) for w in words) == want
    assert _philox(*counter, *key) == want


def _philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]:
    """Philox 4x32-10 in Python integers, from the paper."""
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & 0xFFFFFFFF, (low >> 32) ^ c3 ^ k1, low & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _by_definition(row: int, j: int, seed: int, step: int) -> float:
    """xi of row ``row`` and oscillator ``j``, in float64, as the docstring of the noise defines it."""
    seed &= 2**64 - 1
    block = 8 * (j // 32) + j % 8
    words = _philox(block, step, row & 0xFFFFFFFF, row >> 32, seed & 0xFFFFFFFF, seed >> 32)
    word = (j % 32) // 8
    first, second = words[word // 2 * 2], words[word // 2 * 2 + 1]
    radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
    angle = (second >> 30) * math.pi / 2 + (((second >> 6) & 0xFFFFFF) - 2**23) * (math.pi / 2) / 2**24
    return radius * (math.cos(angle) if word % 2 == 0 else math.sin(angle))


def xi_of(rows: int, n: int, seed: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise as an update shows it: theta = 0, K = 0, delta = 1 gives -xi."""
    return -kuramoto_update(torch.zeros(rows, n, dtype=dtype), 0.0, noise_scale=1.0, seed=seed)


SIZES = [(1, 1), (3, 31), (2, 32), (2, 33), (5, 100)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 5, 2**64 - 1, -(2**63), 0x0123456789ABCDEF])
def test_normals_are_the_definition(shape: tuple[int, int], seed: int) -> None:
    rows, n = shape
    got = philox_normal(rows, n, seed=seed & (2**64 - 1), step=3).double()
    want = torch.tensor([[_by_definition(r, j, seed, 3) for j in range(n)] for r in range(rows)], dtype=torch.float64)
    # radius and angle each carry a few float32 ulp; near u = 1 the radius is a square root of a rounding
    assert (got - want).abs().max() <= 2e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [*SIZES, (2, 4095), (2, 4096), (2, 4097), (1, 10001), (0, 7), (300, 3)])
def test_the_same_bits_on_every_backend(shape: tuple[int, int], backend: str, path: str) -> None:
    want = philox_normal(*shape, seed=99)
    with through(path):
        got = xi_of(*shape, 99)
        assert torch.equal(got, want)
        assert torch.equal(xi_of(*shape, 99, torch.float64), want.double())


@pytest.mark.parametrize("seed", [0, 5, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("path", PATHS)
def test_any_64_bit_seed_as_number_or_tensor(seed: int, backend: str, path: str) -> None:
    want = philox_normal(2, 40, seed=seed & (2**64 - 1))
    signed = seed - 2**64 if seed >= 2**63 else seed
    with through(path):
        for given in (seed, torch.tensor(signed), torch.tensor([signed])):
            assert torch.equal(xi_of(2, 40, given), want)


def test_steps_have_their_own_noise_and_add_up(backend: str) -> None:
    theta = torch.zeros(3, 50, dtype=torch.float64)
    got = -kuramoto_update(theta, 0.0, noise_scale=1.0, seed=4, steps=70)
    want = sum(philox_normal(3, 50, seed=4, step=k).double() for k in range(70))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_features_draw_the_same_noise_as_the_update(backend: str) -> None:
    rest: dict[str, Any] = {"noise_scale": 0.3, "seed": 8, "steps": 2, "dt": 0.1}
    theta = torch.randn(3, 40)
    _, phases = kuramoto_features(theta, 0.5, 3, return_phases=True, **rest)
    assert torch.equal(phases, kuramoto_update(theta, 0.5, **rest))


def test_rows_count_through_all_leading_axes_and_shared_phases(backend: str) -> None:
    flat = kuramoto_update(torch.zeros(6, 9), 0.0, noise_scale=1.0, seed=3)
    folded = kuramoto_update(torch.zeros(2, 3, 9), 0.0, noise_scale=1.0, seed=3)
    shared = kuramoto_update(torch.zeros(9), torch.zeros(2, 3, 1), noise_scale=1.0, seed=3)
    assert torch.equal(flat, folded.reshape(6, 9))
    assert torch.equal(folded, shared)


def test_no_seed_draws_from_torchs_generator(backend: str) -> None:
    def draw(seed: int | None = None) -> Tensor:
        return kuramoto_update(torch.zeros(2, 8), 0.0, noise_scale=1.0, seed=seed)

    torch.manual_seed(5)
    a, b = draw(), draw()
    torch.manual_seed(5)
    c = draw()
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    state = torch.get_rng_state()
    draw(7)
    kuramoto_update(torch.zeros(3), 1.0)
    assert torch.equal(torch.get_rng_state(), state), "a given seed, or no noise, must leave the generator alone"


def test_no_noise_scale_means_no_noise(backend: str) -> None:
    theta = torch.randn(2, 8)
    assert torch.equal(kuramoto_update(theta, 1.0, seed=3), kuramoto_update(theta, 1.0))
    assert torch.equal(kuramoto_update(theta, 0.0, noise_scale=0.0, seed=3), theta)


# ---- statistics, each within five standard errors of what independent standard normals give ----

ROWS, N = 32, 2048


@pytest.fixture(scope="module")
def sample() -> np.ndarray[Any, np.dtype[np.float64]]:
    return philox_normal(ROWS, N, seed=2024).double().numpy()


def test_moments(sample: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    count = sample.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((sample**power).mean() - mean) < 5 * math.sqrt(variance / count), power


def test_kolmogorov_smirnov(sample: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    x = np.sort(sample.ravel())
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())
    grid = np.arange(x.size + 1) / x.size
    distance = max((grid[1:] - cdf).max(), (cdf - grid[:-1]).max())
    assert distance < 1.95 / math.sqrt(x.size)  # exceeded by chance once in a thousand seeds


def test_the_tails_are_there(sample: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    for limit in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(limit / math.sqrt(2))
        assert abs((np.abs(sample) > limit).mean() - p) < 5 * math.sqrt(p / sample.size) + 1 / sample.size
    assert np.abs(sample).max() < 6.0


def test_independence(sample: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Of rows, neighbours, the members of a block, steps and seeds: correlations of values and of squares vanish."""
    other = {
        "step": philox_normal(ROWS, N, seed=2024, step=1).double().numpy(),
        "seed": philox_normal(ROWS, N, seed=2025).double().numpy(),
        "seed + 2^32": philox_normal(ROWS, N, seed=2024 + 2**32).double().numpy(),
        "row": np.roll(sample, 1, 0),
        **{f"oscillator + {k}": np.roll(sample, k, 1) for k in (1, 7, 8, 16, 24, 32)},
    }
    for name, b in other.items():
        for f, variance in ((lambda v: v, 1.0), (lambda v: v * v - 1, 4.0)):
            assert abs((f(sample) * f(b)).mean()) < 5 * math.sqrt(variance / sample.size), name


def test_a_row_does_not_depend_on_how_many_there_are_nor_on_n() -> None:
    large = philox_normal(9, 200, seed=1)
    assert torch.equal(philox_normal(4, 70, seed=1), large[:4, :70])
    assert kssm_kernels.philox_normal(0, 5, seed=1).shape == (0, 5)

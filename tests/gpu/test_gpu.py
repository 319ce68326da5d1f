"""On a device: every op on every backend that it has, against the equations in float64; streams, devices, same bits.

pytest tests bench -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kssm_kernels
from tests.support import devices
from tests.support.cases import DTYPES, SEED, Case, evaluate
from tests.support.conformance import check
from tests.support.specs import CASES, arguments, by_package

pytestmark = pytest.mark.gpu

DEVICE = devices.device()
# Without a device the tests are collected all the same, and skipped.
BACKENDS = ("cuda", "triton", "torch") if DEVICE is None else devices.backends_of(DEVICE)
ROWS = [(b, c, d) for b in BACKENDS for c in CASES for d in DTYPES if devices.serves(b, d, c.op)]
NAMES = [f"{c.name}-{str(d).removeprefix('torch.')}-{b}" for b, c, d in ROWS]


@pytest.fixture
def device() -> str:
    return devices.device_or_skip()


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    with kssm_kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("on", "case", "dtype"), ROWS, ids=NAMES, indirect=["on"])
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, on: str, device: str) -> None:
    check(case, dtype, device)


SAME = [
    Case("order_parameters", (257, 33), 9),
    Case("order_parameters", (2, 100_001), 33),
    Case("kuramoto_update", (1, 20_001), coupling=(1,), omega=(20_001,), noise_scale=(), steps=3, dt=0.1),
    Case("kuramoto_features", (50,), 8, coupling=(300, 1), omega=(300, 1), noise_scale=(1,)),
]


@pytest.mark.parametrize("case", SAME, ids=lambda c: c.name)
def test_two_runs_give_the_same_bits(case: Case, on: str, device: str) -> None:
    args = arguments(case, torch.float32, device)
    first, second = (evaluate(by_package, case, args, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_noise_has_the_bits_of_the_reference(on: str, device: str) -> None:
    theta = torch.zeros(5, 1000, device=device)
    moved = kssm_kernels.kuramoto_update(theta, 0.0, noise_scale=1.0, seed=SEED)
    assert torch.equal(-moved.cpu(), kssm_kernels.philox_normal(5, 1000, seed=SEED))


def test_the_current_stream_is_used(on: str, device: str) -> None:
    """Work queued on another stream is seen only by what is queued behind it on that stream."""
    streams = torch.cuda if device == "cuda" else torch.xpu
    theta = torch.rand(64, 4096, device=device)
    want = kssm_kernels.order_parameters(theta + 1, 8)
    streams.synchronize()
    side = streams.Stream()
    with streams.stream(side):
        late = torch.zeros_like(theta)
        for _ in range(200):  # keeps the stream busy while the host goes on
            late = late * 0.5
        late = late + theta + 1
        got = kssm_kernels.order_parameters(late, 8)
    side.synchronize()
    torch.testing.assert_close(got, want)


def test_the_tensors_own_device_is_used(on: str, device: str) -> None:
    count = torch.cuda.device_count() if device == "cuda" else torch.xpu.device_count()
    if count < 2:
        pytest.skip("one device only")
    theta = torch.rand(3, 500, device=f"{device}:1")
    got = kssm_kernels.kuramoto_features(theta, 0.5, 4)
    assert isinstance(got, Tensor)
    assert got.device == theta.device
    with kssm_kernels.use_backend("torch"):
        torch.testing.assert_close(got, kssm_kernels.kuramoto_features(theta, 0.5, 4), rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_ten_million(on: str, device: str) -> None:
    """Independent uniform phases: each C and S is about N^-1/2; a dropped row block would be off by its share."""
    theta = torch.rand(10_000_000, device=device) * 2 * torch.pi
    features = kssm_kernels.order_parameters(theta, 4)
    wide = theta.double()
    for n in range(1, 5):
        assert abs(float(features[n - 1]) - float((n * wide).cos().mean())) < 1e-5
        assert abs(float(features[n + 3]) - float((n * wide).sin().mean())) < 1e-5

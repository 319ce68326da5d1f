"""The CUDA kernels' own sources on the CPU (support/cuda_on_host): teams, thread orders, layouts, faults that must
show.

That they give right answers is for tests/ops/test_conformance.py, which runs every case on them too.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kssm_kernels
from kssm_kernels import bistable_coupling, kuramoto_features, kuramoto_update, order_parameters, use_backend
from kssm_kernels.backends import cuda as library
from kssm_kernels.ops.kuramoto import _gpu
from tests.support.cuda_on_host.build import CSRC, HERE, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here")

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
LANES = (8, 16, 32, 64, 128, 256)


@contextmanager
def on(path: Path) -> Iterator[ctypes.CDLL]:
    before = library.use(path)
    try:
        with use_backend("cuda"):
            yield library.library()
    finally:
        library.use(before)


@pytest.fixture(scope="module")
def built() -> Path:
    return build()


@pytest.fixture
def kernels(built: Path) -> Iterator[ctypes.CDLL]:
    torch.set_num_threads(1)
    with on(built) as found:
        yield found
        found.kssm_cuda_thread_order(0)
        found.kssm_cuda_force_lanes(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return (6.3 * torch.rand(shape, generator=g, dtype=torch.float64) - 3.15).to(dtype)


def features(theta: Tensor, harmonics: int) -> list[Tensor]:
    """Order parameters and their gradient."""
    x = theta.detach().requires_grad_()
    y = order_parameters(x, harmonics)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, x, weights)]


def update(theta: Tensor, steps: int = 3, harmonics: int = 7) -> list[Tensor]:
    """Features and phases of an update with every operand, each summed over another axis in the backward pass."""
    rows, n = theta.shape
    g = torch.Generator().manual_seed(n)

    def operand(*shape: int, middle: float) -> Tensor:
        return (middle + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(theta.dtype).requires_grad_()

    x = theta.detach().requires_grad_()
    coupling, omega = operand(rows, 1, middle=1.0), operand(n, middle=0.0)
    lag, noise = operand(rows, n, middle=0.2), operand(1, middle=0.3)
    out = kuramoto_features(
        x, coupling, harmonics, omega=omega, phase_lag=lag, noise_scale=noise, seed=7, dt=0.1, steps=steps,
        return_phases=True,
    )  # fmt: skip
    weights = [torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype) for y in out]
    grads = torch.autograd.grad(out, (x, coupling, omega, lag, noise), weights)
    return [*(y.detach() for y in out), *grads]


def bank(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = draw(rows, 10, dtype=dtype).requires_grad_()
    out = bistable_coupling(params)
    return [*(y.detach() for y in out), *torch.autograd.grad([y.sum() for y in out], params)]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# ---- teams, row blocks, thread orders, layouts ----


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("harmonics", [1, 5, 32, 36, 70, 256])
def test_every_team_gives_the_same_features(kernels: ctypes.CDLL, lanes: int, harmonics: int) -> None:
    theta = draw(3, 77, dtype=torch.float64)
    kernels.kssm_cuda_force_lanes(lanes)
    with use_backend("torch"):
        wanted = features(theta, harmonics)
    torch.testing.assert_close(features(theta, harmonics), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lanes", LANES)
def test_every_team_gives_the_same_update(kernels: ctypes.CDLL, lanes: int) -> None:
    theta = draw(5, 61, dtype=torch.float64)
    kernels.kssm_cuda_force_lanes(lanes)
    with use_backend("torch"):
        wanted = update(theta)
    torch.testing.assert_close(update(theta), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 96, 97, 255, 256, 257, 1024, 1025, 2047, 2048, 2049, 4097])
def test_lengths_around_every_boundary(kernels: ctypes.CDLL, n: int) -> None:
    theta = draw(2, n, dtype=torch.float64)
    with use_backend("torch"):
        wanted = [*features(theta, 3), *update(theta)]
    torch.testing.assert_close([*features(theta, 3), *update(theta)], wanted, rtol=0, atol=1e-10)


def test_sums_of_more_segments_than_are_added_at_once(kernels: ctypes.CDLL) -> None:
    theta = draw(1, 257 * 2048 + 5)
    with use_backend("torch"):
        wanted = order_parameters(theta.double(), 1)
    torch.testing.assert_close(order_parameters(theta, 1).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_does_not_matter(kernels: ctypes.CDLL, order: str) -> None:
    def everything() -> list[Tensor]:
        found = [*features(draw(5, 50), 40), *features(draw(1, 1500), 3), *bank(131)]
        for n in (50, 200, 500, 2100):
            found += update(draw(3, n))
        return found

    wanted = everything()
    kernels.kssm_cuda_thread_order(ORDERS[order])
    assert_same_bits(everything(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [16, 24, 33])
def test_misaligned_memory_gives_the_same_bits(kernels: ctypes.CDLL, dtype: torch.dtype, n: int) -> None:
    theta = draw(4, n, dtype=dtype)
    shifted = torch.empty(4 * n + 1, dtype=dtype)[1:].view(4, n).copy_(theta)
    strided = torch.empty(4, 2 * n, dtype=dtype)[:, ::2].copy_(theta)
    for other in (shifted, strided):
        assert_same_bits(features(other, 6), features(theta, 6))
        assert_same_bits(update(other), update(theta))


@pytest.mark.parametrize("n", [60, 3000])
def test_a_row_does_not_depend_on_the_others(kernels: ctypes.CDLL, n: int) -> None:
    theta = draw(19, n)
    for r in (0, 17, 18):
        assert torch.equal(order_parameters(theta, 9)[r], order_parameters(theta[r], 9))


@pytest.mark.parametrize("at_work", [1, 61, 3 * 61, 100 * 61])
@pytest.mark.parametrize("steps", [0, 1, 3, 70])
def test_sums_over_rows_in_runs(
    kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, at_work: int, steps: int
) -> None:
    monkeypatch.setattr(_gpu, "AT_WORK", at_work)
    theta = draw(8, 61, dtype=torch.float64)
    with use_backend("torch"):
        wanted = update(theta, steps)
    torch.testing.assert_close(update(theta, steps), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [100, 2100])
def test_the_noise_is_the_promised_one_bit_for_bit(kernels: ctypes.CDLL, n: int) -> None:
    phases = kuramoto_update(torch.zeros(3, n), 0.0, noise_scale=1.0, seed=2**40 + 3)
    assert torch.equal(phases, -kssm_kernels.philox_normal(3, n, seed=2**40 + 3))


def test_sixteen_bits_are_converted_as_torch_does(kernels: ctypes.CDLL) -> None:
    """Every float16 and bfloat16 that is finite, through the bank: Delta = b g - c f = b with g = 1 and c = 0."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        params = torch.zeros(len(every), 10, dtype=dtype)
        params[:, 1], params[:, 6], params[:, 0] = every, 1.0, 1.0
        delta = bistable_coupling(params)[2]
        finite = every.isfinite()
        assert torch.equal(delta[finite], every[finite].float())
        # and back, rounded: the gradient of b is g_delta g
        params = params[:1].expand(4096, 10).contiguous().requires_grad_()
        given = torch.cat([torch.randn(2048) * 10.0 ** torch.randint(-9, 6, (2048,)), every[:2048].float() * 1.0002])
        given = given.nan_to_num()
        (grad,) = torch.autograd.grad(bistable_coupling(params)[2], params, given)
        assert torch.equal(grad[:, 1], given.to(dtype))


def test_phases_are_read_once_and_features_written_once(kernels: ctypes.CDLL) -> None:
    moved = (ctypes.c_int64 * 2)()
    theta = draw(8, 192)
    kernels.kssm_cuda_bytes(moved)
    order_parameters(theta, 32)
    kernels.kssm_cuda_bytes(moved)
    assert list(moved) == [theta.numel() * 4, 8 * 96 * 4]


def test_a_failed_launch_says_what_failed(kernels: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="CUDA kernel order_parameters_forward: the library and its caller disagree"):
        library.call("order_parameters_forward", bytes(16), torch.zeros(1))


# ---- faults ----


@pytest.fixture(scope="module")
def small(built: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(build(HERE / "faults.cu", name="faults")))
    found.kssm_faults_error.restype = ctypes.c_char_p
    return found


def run_small(small: ctypes.CDLL, name: str, order: str) -> tuple[Tensor, Tensor, str]:
    x = draw(64)
    y = torch.full((64,), -1.0)
    small.kssm_cuda_thread_order(ORDERS[order])
    code = small.kssm_faults_run(name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    return x, y, small.kssm_faults_error().decode() if code else ""


@pytest.mark.parametrize("order", ORDERS)
def test_the_emulation_runs_what_is_right(small: ctypes.CDLL, order: str) -> None:
    x, y, error = run_small(small, "barrier", order)
    assert not error
    assert torch.equal(y, x.flip(0))
    x, y, error = run_small(small, "shuffle", order)
    assert not error
    assert torch.equal(y, x + x.view(-1, 2).flip(1).view(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_the_emulation_shows_a_removed_barrier(small: ctypes.CDLL, order: str) -> None:
    _, y, _ = run_small(small, "removed barrier", order)
    assert y.isnan().any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two barriers", r"thread 0 waits at the block's barrier in faults\.cu:\d+, thread 32 waits at the block's"),
        ("left early", r"thread 0 waits at the block's barrier in faults\.cu:\d+, thread 32 has left the kernel"),
        ("missing lane", r"thread 0 waits for its warp in faults\.cu:\d+, thread 5 has left the kernel"),
        ("lane outside", r"thread 0 waits for its warp in faults\.cu:\d+, it names a lane that is not there"),
        ("too far", r"block 0 wrote past its 256 bytes of shared memory"),
    ],
)
def test_the_emulation_reports_a_fault(small: ctypes.CDLL, name: str, message: str) -> None:
    _, _, error = run_small(small, name, "ascending")
    assert re.search(message, error), error
    x, y, error = run_small(small, "barrier", "ascending")  # and recovers from it
    assert not error
    assert torch.equal(y, x.flip(0))


def planted(folder: Path, file: str, change: Callable[[str], str]) -> Path:
    """The order parameters' kernels with a fault in one of their sources."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    source = copy / "cuda" / file
    text = source.read_text()
    assert change(text) != text
    source.write_text(change(text))
    return build(copy / "cuda/order_parameters.cu", copy / "cuda/library.cu", headers=copy, name="planted")


@pytest.mark.parametrize("n", [50, 1500])
def test_a_barrier_taken_from_the_kernels_shows(built: Path, tmp_path: Path, n: int) -> None:
    def without_barrier(text: str) -> str:
        return text.replace("warp_sums(team, x, sums);\n    team.sync();", "warp_sums(team, x, sums);")

    theta = draw(3, n)
    with on(built):
        wanted = order_parameters(theta, 8)
    with on(planted(tmp_path, "harmonic_team.h", without_barrier)):
        assert not torch.allclose(order_parameters(theta, 8), wanted, equal_nan=False)


def test_a_barrier_that_some_threads_miss_is_an_error(tmp_path: Path) -> None:
    def divergent(text: str) -> str:
        return text.replace("(lanes > kWarp) __syncthreads();", "(lanes > kWarp) { if (rank != 77) __syncthreads(); }")

    with on(planted(tmp_path, "team.h", divergent)):
        order_parameters(draw(2, 60), 8)  # a team within a warp has no such barrier
        with pytest.raises(
            RuntimeError, match=r"order_parameters_forward: divergent threads in block 0: .*team\.h:\d+"
        ):
            order_parameters(draw(2, 1500), 8)


def test_the_installed_build_is_back(built: Path) -> None:
    before = library.status()
    with on(built):
        assert "cuda" in kssm_kernels.available_backends()
    assert library.status() == before

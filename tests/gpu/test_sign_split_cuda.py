"""The CUDA kernel of the sign-split EMA step, its own source on the CPU (support/cuda_on_host), against the reference.

KSSM_CUDA_ON_HOST=1 puts it among the implementations of tests/optim/test_sign_split_*.py too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split import _cuda as sign_split
from kssm_kernels.optim.sign_split import _torch as reference
from kssm_kernels.optim.sign_split._hyper import MODES, Hyper, hyper_of
from kssm_kernels.optim.sign_split._table import Table
from kssm_kernels.optim.sign_split._tensors import Tensors
from tests.gpu.test_cuda_on_host import ORDERS, on
from tests.optim.test_sign_split_conformance import OPTIONS
from tests.support.cuda_on_host.build import build, compiler
from tests.support.sign_split import assert_same, everything, run, running

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here")

# Around a thread's run, a warp's, a warp's chunk, and a block's.
SIZES = [(n,) for n in (1, 3, 4, 7, 8, 9, 127, 128, 129, 255, 256, 257, 511, 512, 513, 0, 1024, 2049, 4099)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WITH_ROWS: dict[str, dict[str, Any]] = {**OPTIONS, "rows": {}, "rows of 8-bit means": {"state_dtype": torch.uint8}}


@pytest.fixture(scope="module")
def built() -> Path:
    return build()


@pytest.fixture
def kernels(built: Path) -> Iterator[ctypes.CDLL]:
    torch.set_num_threads(1)
    with on(built) as found:
        yield found
        found.kssm_cuda_thread_order(0)


def with_rows(k: int, optimizer: SignSplitEMA) -> None:
    """After the first step: a divisor for each row of every second parameter."""
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        if k == 0 and i % 2 and p.dim():
            optimizer.state[p]["cryo"] = 1.0 + torch.arange(p.shape[0], device=p.device) % 5


def stepped(name: str, options: str, **more: Any) -> tuple[list[nn.Parameter], SignSplitEMA]:
    extra = {"between": with_rows} if options.startswith("rows") else {}
    return run(name, **{**WITH_ROWS[options], **extra, **more})


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("options", WITH_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_sizes_and_alignments(mode: str, dtype: torch.dtype, options: str, offset: int, kernels: ctypes.CDLL) -> None:
    arguments = {"mode": mode, "dtype": dtype, "shapes": [*SIZES, (40, 3, 5), (70, 64)], "steps": 2}
    rounded = "8-bit" in options or torch.bfloat16 in (dtype, WITH_ROWS[options].get("state_dtype"))
    if mode == "consolidate" and rounded:
        pytest.skip("the order of the sum shows in the last bit of a rounding")
    mine = stepped("cuda", options, offset=offset, **arguments)
    assert_same(mine, stepped("single", options, **arguments), rtol=1e-6 if mode == "consolidate" else 0.0)


@pytest.mark.parametrize("options", ["all", "bfloat16 means, stochastic", "8-bit means, stochastic", "rows"])
def test_any_order_of_threads_gives_the_same_bits(kernels: ctypes.CDLL, options: str) -> None:
    results = []
    for order in ORDERS.values():
        kernels.kssm_cuda_thread_order(order)
        results.append(everything(*stepped("cuda", options, mode="consolidate", shapes=[(1000,), (70, 64), (3,)])))
    for (name, x), *rest in zip(*results, strict=True):
        assert all(torch.equal(x, other) for _, other in rest), name


@pytest.mark.parametrize("mode", MODES)
def test_many_small_tensors(kernels: ctypes.CDLL, mode: str) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(int(n),) for n in torch.randint(0, 700, (600,), generator=g)]  # more words than an upload's launch has
    arguments = {"mode": mode, "shapes": shapes, "steps": 2}
    assert_same(run("cuda", **arguments), run("foreach", **arguments), rtol=1e-6 if mode == "consolidate" else 0.0)


def test_a_sum_of_many_chunks(kernels: ctypes.CDLL) -> None:
    """More chunks than a block of the second stage reads at once."""
    arguments = {"mode": "consolidate", "shapes": [(600_001,), (513,)], "steps": 2}
    assert_same(run("cuda", **arguments), run("single", **arguments), rtol=1e-6)


def test_a_sum_of_more_chunks_than_a_block_adds_up_in_one_turn(kernels: ctypes.CDLL) -> None:
    """2^12 chunks of 512 elements and two more, which hold the largest numbers and nearly all of the rms."""
    n = (1 << 21) + 513
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.full((n,), 1.0)
    p.grad[1 << 21 :] = 1000.0
    with running("cuda"):
        optimizer = SignSplitEMA([p], mode="consolidate", beta=0.5)
        optimizer.step()
    want = (((1 << 21) + 513 * 1e6) / n) ** 0.5 / 2
    assert optimizer.state[p]["rms"].item() == pytest.approx(want, rel=1e-6)


# ---- numbers that lie in tensors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_lr_scale_and_found_inf_in_tensors(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    def result(name: str) -> tuple[list[nn.Parameter], SignSplitEMA]:
        def between(k: int, optimizer: SignSplitEMA) -> None:
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.grad_scale = torch.tensor(8.0)

        return run(name, lr=torch.tensor(0.25, dtype=dtype), between=between, maximize=True)

    assert_same(result("cuda"), result("single"))


@pytest.mark.parametrize("mode", MODES)
def test_found_inf_leaves_all_as_it_is(kernels: ctypes.CDLL, mode: str) -> None:
    """Asked of the kernel itself: on the CPU the optimizer would not call it."""
    p, g = torch.randn(700), torch.randn(700)
    rms = torch.tensor(3.0) if mode == "consolidate" else None
    t = Tensors(p, g, torch.rand(700), torch.rand(700), None, None, None, None, None, rms, None, 1, 0)
    before = [None if x is None else x.clone() for x in t[:10]]
    group = SignSplitEMA([nn.Parameter(p)], mode=mode).param_groups[0]
    sign_split.step(Table.of([t]), hyper_of(group, None, torch.tensor(1.0)))
    for x, y in zip(t[:10], before, strict=True):
        assert x is y is None or torch.equal(x, y)
    sign_split.step(Table.of([t]), hyper_of(group, None, torch.tensor(0.0)))
    assert not torch.equal(p, before[0])


# ---- what only a foreign checkpoint brings ----


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
def test_any_dtypes_together(
    kernels: ctypes.CDLL, dtype: torch.dtype, of_gradient: torch.dtype, state: torch.dtype
) -> None:
    group = SignSplitEMA([nn.Parameter(torch.ones(1))], mode="normalized").param_groups[0]
    hyper: Hyper = hyper_of(group, None, None)

    def tensors() -> Tensors:
        g = torch.Generator().manual_seed(2)
        p, gradient = (torch.randn(600, generator=g).to(d) for d in (dtype, of_gradient))
        means = [torch.rand(600, generator=g).to(state) for _ in range(2)]
        return Tensors(p, gradient, *means, None, None, None, None, None, None, None, 1, 0)

    mine, theirs = tensors(), tensors()
    sign_split.step(Table.of([mine]), hyper)
    reference.single_tensor([theirs], hyper)
    for x, y in zip(mine[:4], theirs[:4], strict=True):
        assert torch.equal(x, y)


# ---- traffic, and what the host sends ----


def _moved(kernels: ctypes.CDLL) -> int:
    both = np.zeros(2, dtype=np.int64)
    kernels.kssm_cuda_bytes(ctypes.c_void_p(both.ctypes.data))
    return int(both.sum())


@pytest.mark.parametrize(
    ("bytes_each", "options"),
    [
        (28, {}),
        (28, {"mode": "consolidate"}),
        (20, {"state_dtype": torch.bfloat16}),
        (16, {"state_dtype": torch.uint8}),
    ],
)
def test_bytes_per_element(kernels: ctypes.CDLL, bytes_each: int, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(100_000))
    p.grad = torch.randn(100_000)
    with running("cuda"):
        optimizer = SignSplitEMA([p], **options)
        optimizer.step()
        _moved(kernels)
        optimizer.step()
        assert bytes_each <= _moved(kernels) / p.numel() < 1.005 * bytes_each


def test_what_has_not_moved_is_not_sent_again(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    uploaded = sign_split._uploaded

    def counted(words: Any, p: Tensor) -> Tensor:
        sent.append(words.size)
        return uploaded(words, p)

    monkeypatch.setattr(sign_split, "_uploaded", counted)
    params = [nn.Parameter(torch.randn(10)) for _ in range(5)]
    gradients = [[torch.randn(10) for _ in params] for _ in range(2)]
    with running("cuda"):
        optimizer = SignSplitEMA(params)
        for which, expected in ((0, 2), (0, 0), (1, 1), (1, 0)):
            for p, g in zip(params, gradients[which], strict=True):
                p.grad = g
            sent.clear()
            optimizer.step()
            assert len(sent) == expected
            assert sum(sent) == {2: 5 * 14 + 6 + 5, 1: 5, 0: 0}[expected]

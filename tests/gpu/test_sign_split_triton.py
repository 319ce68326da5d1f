"""The Triton kernel of the sign-split EMA step: in the interpreter against the reference, and through the front end.

TRITON_INTERPRET=1 also puts it among the implementations of the other tests/optim/test_sign_split_*.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kssm_kernels import backends
from kssm_kernels.backends import triton

pytest.importorskip("triton", reason="Triton is not installed: pip install .[gpu]")

from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split import _torch as reference
from kssm_kernels.optim.sign_split import _triton as sign_split
from kssm_kernels.optim.sign_split._hyper import MODES, hyper_of
from kssm_kernels.optim.sign_split._table import Table
from kssm_kernels.optim.sign_split._tensors import Tensors
from tests.optim.test_sign_split_conformance import OPTIONS
from tests.support.sign_split import assert_same, gradient, run

interpreted = pytest.mark.skipif(not triton.interpreting(), reason="TRITON_INTERPRET is not 1")
compiled = pytest.mark.skipif(triton.interpreting(), reason="the interpreter stands in for the compiler")

# Around a run of eight, a block and a chunk; ends of whole runs and of single elements.
SHAPES = [(n,) for n in (1, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 1032, 0, 2049)]
HALVES = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}


def with_rows(k: int, optimizer: SignSplitEMA) -> None:
    """After the first step: a divisor for each row of every second parameter."""
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        if k == 0 and i % 2 and p.dim():
            optimizer.state[p]["cryo"] = 1.0 + torch.arange(p.shape[0]) % 5


# ---- in the interpreter ----


@interpreted
@pytest.mark.parametrize("options", [*OPTIONS, "rows"])
@pytest.mark.parametrize("mode", MODES)
def test_sizes(mode: str, options: str) -> None:
    halves = options in ("stochastic parameters", "Kahan", "bfloat16 means, stochastic")
    if mode == "consolidate" and (halves or "8-bit" in options or "bfloat16" in options):
        pytest.skip("the order of the sum shows in the last bit of a rounding")
    arguments = {"mode": mode, "shapes": [*SHAPES, (40, 3, 5), (65, 64)], "steps": 2, **(HALVES if halves else {})}
    arguments |= OPTIONS.get(options, {"between": with_rows})
    # consolidate: the rms is kept in float32 and read in the second step
    assert_same(run("triton", **arguments), run("single", **arguments), rtol=1e-6 if mode == "consolidate" else 0.0)


def _tensors(n: int, offset: int, dtypes: Sequence[torch.dtype], rms: Tensor | None = None) -> Tensors:
    """p, g, P and N of given dtypes, ``offset`` elements behind where their memory begins."""
    g = torch.Generator().manual_seed(2)
    numbers = [torch.randn(n, generator=g), gradient((n,), g), *(torch.rand(n, generator=g) for _ in range(2))]
    parts = []
    for x, dtype in zip(numbers, dtypes, strict=True):
        parts.append(torch.zeros(n + offset, dtype=dtype)[offset:])
        parts[-1].copy_(x)
    return Tensors(*parts, None, None, None, None, None, rms, None, 1, 0)


@interpreted
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("of_state", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_gradient", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtypes_and_alignments(
    dtype: torch.dtype, of_gradient: torch.dtype, of_state: torch.dtype, offset: int
) -> None:
    hyper = hyper_of(SignSplitEMA([nn.Parameter(torch.ones(1))], mode="normalized").param_groups[0], None, None)
    mine, theirs = (_tensors(1100, offset, (dtype, of_gradient, of_state, of_state)) for _ in range(2))
    sign_split.step(Table.of([mine]), hyper)
    reference.single_tensor([theirs], hyper)
    for x, y in zip(mine[:4], theirs[:4], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lr_and_scale_in_tensors(dtype: torch.dtype) -> None:
    def result(name: str) -> tuple[list[nn.Parameter], SignSplitEMA]:
        def between(k: int, optimizer: SignSplitEMA) -> None:
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.grad_scale = torch.tensor(3.0)

        return run(name, lr=torch.tensor(0.25, dtype=dtype), between=between, maximize=True)

    assert_same(result("triton"), result("single"))


@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_found_inf_leaves_all_as_it_is(mode: str) -> None:
    """Asked of the kernel itself: on the CPU the optimizer would not call it."""
    t = _tensors(700, 0, (torch.float32,) * 4, torch.tensor(3.0) if mode == "consolidate" else None)
    before = [None if x is None else x.clone() for x in t[:10]]
    group = SignSplitEMA([nn.Parameter(torch.ones(1))], mode=mode).param_groups[0]
    sign_split.step(Table.of([t]), hyper_of(group, None, torch.tensor(1.0)))
    for x, y in zip(t[:10], before, strict=True):
        assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())
    sign_split.step(Table.of([t]), hyper_of(group, None, torch.tensor(0.0)))
    assert not torch.equal(t.p, before[0])
    assert mode != "consolidate" or t.rms != 3.0


@interpreted
def test_a_sum_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than the rms adds at a time, and tensors of very different size."""
    monkeypatch.setattr(sign_split, "LANES", 16)
    arguments = {"mode": "consolidate", "shapes": [(300,), (40_001,), (3,)], "steps": 2}
    assert_same(run("triton", **arguments), run("single", **arguments), rtol=1e-6)


@interpreted
def test_what_has_not_moved_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    uploaded = sign_split._uploaded

    def counted(words: Any, p: Tensor, graph: bool) -> Tensor:
        sent.append(len(words))
        return uploaded(words, p, graph)

    monkeypatch.setattr(sign_split, "_uploaded", counted)
    tables = [Table.of([_tensors(n, 0, (torch.float32,) * 4) for n in (5, 1500)])]
    hyper = hyper_of(SignSplitEMA([nn.Parameter(torch.ones(1))]).param_groups[0], None, None)
    elsewhere = [torch.ones(5), torch.ones(1500)]
    here = [t.g for t in tables[0].tensors]
    for gradients, expected in ((here, [2 * 14 + 3 + 3, 2]), (here, []), (elsewhere, [2]), (elsewhere, [])):
        tables[0].point_at([g.data_ptr() for g in gradients])
        sent.clear()
        sign_split.step(tables[0], hyper)
        assert sent == expected


def test_words_by_way_of_launches_parameters() -> None:
    """What a graph does, on the CPU."""
    words = sign_split._fixed(Table.of([_tensors(n, 0, (torch.float32,) * 4) for n in (5, 1500)]))
    extremes = [0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1]
    p = torch.ones(1)
    assert sign_split._uploaded(words, p, True).tolist() == words.tolist()
    assert sign_split._uploaded(sign_split.np.array(extremes), p, True).tolist() == extremes


# ---- through the compiler ----


@compiled
@pytest.mark.parametrize("options", [*OPTIONS, "rows", "numbers in tensors"])
@pytest.mark.parametrize("mode", MODES)
def test_every_launch_compiles(mode: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu_compile.compile import recorded
    from tests.gpu.test_triton_compile import to_triton_ir

    monkeypatch.setattr(backends, "select", lambda op, tensor: "triton")
    numbers = options == "numbers in tensors"
    for dtype in (torch.float32, torch.bfloat16):
        params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((64, 65), (3,))]
        lr = torch.tensor(0.1) if numbers else 0.1
        optimizer = SignSplitEMA(params, lr=lr, mode=mode, **{**OPTIONS.get(options, {}), "seed": 1})
        if numbers:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
        for p in params:
            p.grad = torch.ones_like(p)
        with recorded(32) as launches:
            optimizer.step()
            if options == "rows":
                with_rows(0, optimizer)
                optimizer.step()
        assert launches
        for _, kernel, args, meta in launches:
            to_triton_ir(kernel, args, meta)

"""Every implementation of the sign-split EMA step against the reference: the same bits, and both near float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kssm_kernels
from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split import _rounding as rounding
from tests.support.cases import threads
from tests.support.sign_split import IMPLEMENTATIONS, MODES, assert_same, everything, run, running

OTHERS = [name for name in IMPLEMENTATIONS if name != "single"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "temperature": {"floor": 0.1},
        "lazy": False,
        "weight_decay": 0.1,
        "maximize": True,
        "eps": 0.0,
        "cryo": 3.0,
    },
    "bfloat16 means": {"state_dtype": torch.bfloat16, "temperature": True},
    "bfloat16 means, stochastic": {"state_dtype": torch.bfloat16, "state_rounding": "stochastic", "seed": 2**40 + 1},
    "8-bit means": {"state_dtype": torch.uint8},
    "8-bit means, stochastic": {"state_dtype": torch.uint8, "state_rounding": "stochastic"},
    "stochastic parameters": {"param_rounding": "stochastic", "seed": 7},
    "Kahan": {"param_rounding": "kahan", "weight_decay": 0.01},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["paper", "normalized"])
def test_the_same_bits(name: str, dtype: torch.dtype, options: str, mode: str) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    arguments = {"dtype": dtype, "mode": mode, **OPTIONS[options]}
    assert_same(run(name, **arguments), run("single", **arguments))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_consolidate_up_to_the_order_of_a_sum(name: str, dtype: torch.dtype, options: str) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    arguments = {"dtype": dtype, "mode": "consolidate", **OPTIONS[options]}
    # the rms is kept in float32 and read in every step: one ulp of it, six times
    assert_same(run(name, **arguments), run("single", **arguments), rtol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_near_truth(name: str, mode: str, options: str) -> None:
    params, _ = run(name, mode=mode, **OPTIONS[options])
    truth, _ = run("single", dtype=torch.float64, mode=mode, **OPTIONS[options])
    for p, t in zip(params, truth, strict=True):
        # six steps: each rounds p once, and a step of lr 0.05 of relative error 8 ulp or so
        torch.testing.assert_close(p.double(), t, rtol=6 * 2**-24, atol=1e-6, equal_nan=True)


def test_the_same_bits_for_any_number_of_threads() -> None:
    shapes = [(3, 7), (200, 300), (5,)] + [(1000,)] * 30
    for options in ({"mode": "consolidate"}, {"temperature": True}, OPTIONS["8-bit means, stochastic"]):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(
                    everything(*run("cpu" if "cpu" in IMPLEMENTATIONS else "single", shapes=shapes, **options))
                )
        for (name, x), *rest in zip(*results, strict=True):
            assert all(torch.equal(x.nan_to_num(), other.nan_to_num()) for _, other in rest), name


# ---- memory ----


def _copies() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Parameters that are not contiguous, and the same numbers contiguous."""
    base = torch.randn(12, 10)
    image = torch.randn(2, 3, 4, 5)
    views = {
        "transposed": base.t(),
        "columns": base[:, 2:7],
        "every second": base[::2],
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "no rows apart": torch.randn(1, 8).expand(1, 8),
    }
    return [(name, v, v.clone(memory_format=torch.contiguous_format)) for name, v in views.items()]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", range(5))
def test_layouts(name: str, case: int) -> None:
    _, view, copy = _copies()[case]
    p, q = nn.Parameter(view), nn.Parameter(copy)
    with running(name) as chosen:
        mine = SignSplitEMA([p], temperature=True, **chosen)
        theirs = SignSplitEMA([q], temperature=True, **chosen)
        for _ in range(3):
            g = torch.randn(p.shape)
            p.grad, q.grad = g, g.clone()
            mine.step()
            theirs.step()
            q.grad = None
            p.grad = torch.randn(p.shape[::-1]).permute(*range(p.dim() - 1, -1, -1))  # a gradient of other strides
            q.grad = p.grad.contiguous()
            mine.step()
            theirs.step()
    assert torch.equal(p, q)
    for key, t in mine.state[p].items():
        assert torch.equal(t, theirs.state[q][key]), key


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_tensor_has_the_same_bits_whichever_others_step_with_it(name: str) -> None:
    """Also with random rounding and a divisor for each row. A tensor's random stream is its place in the optimizer."""
    if name == "triton":
        shapes: tuple[tuple[int, ...], ...] = ((7,), (20, 30))
    else:
        shapes = ((7,), (64, 65))
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g) for s in shapes]
    gradients = [torch.randn(shapes[1], generator=g) for _ in range(3)]

    def stepped(with_others: bool, seed: int = 0) -> tuple[nn.Parameter, dict[str, Any]]:
        first, second, third = (nn.Parameter(t.clone()) for t in (*start, start[0]))
        with running(name) as chosen:
            optimizer = SignSplitEMA(
                [first, second, third],
                state_dtype=torch.bfloat16, state_rounding="stochastic", lr=0.1, seed=seed, **chosen,
            )  # fmt: skip
            for g in gradients:
                second.grad = g.clone()
                if with_others:
                    first.grad, third.grad = torch.ones_like(first), torch.ones_like(third)
                optimizer.step()
                optimizer.state[second]["cryo"] = torch.arange(1.0, 1 + shapes[1][0])
        return second, optimizer.state[second]

    (alone, mine), (among, theirs), (reseeded, _) = stepped(False), stepped(True), stepped(False, seed=1)
    assert torch.equal(alone, among)
    for key in mine:
        assert torch.equal(mine[key], theirs[key]), key
    assert not torch.equal(alone, reseeded)


def test_overlapping_memory_is_refused() -> None:
    base = torch.zeros(10)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3, 4\) has stride \(0, 1\).*clone"):
        SignSplitEMA([nn.Parameter(torch.zeros(1, 4).expand(3, 4))])
    with pytest.raises(ValueError, match=r"stride \(1, 1\)"):
        SignSplitEMA([nn.Parameter(base.as_strided((3, 4), (1, 1)))])
    with pytest.raises(ValueError, match=r"parameters 0 and 1 share memory"):
        SignSplitEMA([nn.Parameter(base[:6]), nn.Parameter(base[5:])])
    optimizer = SignSplitEMA([nn.Parameter(base[:5])])
    with pytest.raises(ValueError, match=r"parameters 0 and 1 share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(base[4:])]})
    assert len(optimizer.param_groups) == 1
    table = torch.zeros(4, 6)
    SignSplitEMA([nn.Parameter(table[:, :3]), nn.Parameter(table[:, 3:])])  # interleaved, and nothing shared
    with pytest.raises(ValueError, match=r"share memory"):
        SignSplitEMA([nn.Parameter(table[:, :4]), nn.Parameter(table[:, 3:])])


# ---- storage ----


def test_the_dynamic_map() -> None:
    values = rounding.dequantized(torch.arange(256, dtype=torch.uint8), torch.ones(1))
    assert values[0] == 0
    assert values[255] == 1
    assert (values.diff() > 0).all()
    codes, scale = rounding.quantized(values, None)
    assert scale.item() == 1
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    x = torch.rand(1000) ** 4
    codes, scale = rounding.quantized(x, None)
    nearest = (x[:, None] / scale.repeat_interleave(256)[:1000, None] - values).abs().argmin(1)
    assert ((codes.int() - nearest).abs() <= 1).all()  # in a tie of two roundings
    assert (codes != nearest).float().mean() < 0.01


def test_stochastic_rounding_is_unbiased() -> None:
    words = rounding.random_words(100_000, seed=1, step=torch.tensor(3), index=2)
    x = torch.full((100_000,), 1.3)
    for bits in (rounding.bits_for_parameter, rounding.bits_for_positive, rounding.bits_for_negative):
        mean = rounding.stochastic_bfloat16(x, bits(words)).double().mean().item()
        assert mean == pytest.approx(1.3, abs=5 * 2**-8 / 100_000**0.5)
        codes, scale = rounding.quantized(torch.cat([torch.ones(1), x[1:256] / 2]).repeat(390), bits(words)[:99840])
        values = rounding.dequantized(codes, scale).view(-1, 256)[:, 1:]
        assert values.double().mean().item() == pytest.approx(0.65, abs=5 * 0.007 / 99_450**0.5)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert rounding.stochastic_bfloat16(special, torch.full((4,), 0xFFFF)).isfinite().tolist() == [False] * 3 + [True]


def test_nearest_bfloat16_means_stall_and_stochastic_ones_do_not() -> None:
    def after(rounding_: str) -> float:
        p = nn.Parameter(torch.zeros(2000))
        optimizer = SignSplitEMA(
            [p], beta=0.999, lazy=False, state_dtype=torch.bfloat16, state_rounding=rounding_, lr=0.0
        )
        p.grad = torch.zeros(2000)
        optimizer.step()
        optimizer.state[p]["positive"].fill_(1)
        for _ in range(500):
            optimizer.step()
        return optimizer.state[p]["positive"].float().mean().item()

    assert after("nearest") == 1.0
    assert after("stochastic") == pytest.approx(0.999**500, rel=0.02)


def test_kahan_and_stochastic_parameters_take_small_steps() -> None:
    """Steps of 2^-12 from 1: to nearest, bfloat16 never moves."""

    def after(param_rounding: str) -> float:
        p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = SignSplitEMA([p], lr=2**-12, param_rounding=param_rounding)
        for _ in range(256):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.float().mean().item()

    assert after("nearest") == 1.0
    assert after("kahan") == pytest.approx(1 - 2**-4, abs=2**-8)
    assert after("stochastic") == pytest.approx(1 - 2**-4, abs=2**-9)


def test_a_chosen_backend_that_cannot_run() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with kssm_kernels.use_backend("torch"), pytest.raises(RuntimeError, match="fused=True was asked for"):
        SignSplitEMA([p], fused=True).step()
    with pytest.raises(ValueError, match="at most one of foreach and fused"):
        SignSplitEMA([p], fused=True, foreach=True)
    assert torch.equal(p.detach(), torch.ones(3))

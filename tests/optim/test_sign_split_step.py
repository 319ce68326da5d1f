"""The sign-split EMA step: a table of it in closed form, and its properties, on every implementation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from kssm_kernels.optim import SignSplitEMA
from tests.support.sign_split import IMPLEMENTATIONS, MODES, run, running

F = Fraction
# b = 1/2, lr = 1/4, kappa = 1, eps = 0, p0 = 1, gradients +1, -2, +1/2
MEANS = [(F(1, 2), F(0)), (F(1, 4), F(1)), (F(3, 8), F(1, 2))]
TEMPERATURE = {"cool": 0.75, "heat": 0.5, "floor": 0.0}
TABLE: dict[str, tuple[dict[str, Any], list[Fraction]]] = {
    "paper": ({"mode": "paper"}, [F(3, 4), F(23, 20), F(16, 15)]),
    "normalized": ({}, [F(3, 4), F(7, 8), F(79, 88)]),
    "decay": ({"weight_decay": 0.1}, [F(29, 40), F(1331, 1600), F(586999, 704000)]),
    "temperature": ({"temperature": TEMPERATURE}, [F(13, 16), F(571, 640), F(89063, 98560)]),
    "paper, temperature": (
        {"mode": "paper", "temperature": TEMPERATURE},
        [F(13, 16), F(427, 400), F(137827, 134400)],
    ),
}
T = [F(3, 4), F(51, 80), F(1129, 2240)]

implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", TABLE)
def test_closed_form(row: str, name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    options, want = TABLE[row]
    p = nn.Parameter(torch.ones(1, dtype=dtype))
    slack = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-15
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.25, **{"beta": 0.5, "kappa": 1.0, "eps": 0.0, **options}, **chosen)
        for k, g in enumerate((1.0, -2.0, 0.5)):
            p.grad = torch.full_like(p, g)
            optimizer.step()
            state = optimizer.state[p]
            assert (state["positive"].item(), state["negative"].item()) == MEANS[k]
            assert p.item() == pytest.approx(float(want[k]), rel=slack)
            if "temperature" in options:
                assert state["temperature"].item() == pytest.approx(float(T[k]), rel=slack)


@implementations
def test_the_means_are_adams_first_moment_and_that_of_the_magnitude(name: str) -> None:
    p = nn.Parameter(torch.zeros(500))
    first, size = torch.zeros(500, dtype=torch.float64), torch.zeros(500, dtype=torch.float64)
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], beta=0.9, **chosen)
        for _ in range(50):
            g = torch.randn(500)
            p.grad = g
            optimizer.step()
            first = 0.9 * first + 0.1 * g.double()
            size = 0.9 * size + 0.1 * g.double().abs()
    positive, negative = (optimizer.state[p][k].double() for k in ("positive", "negative"))
    # each step rounds a number of at most size three times
    torch.testing.assert_close(positive - negative, first, rtol=0, atol=30 * 2**-24 * size.max().item())
    torch.testing.assert_close(positive + negative, size, rtol=30 * 2**-24, atol=0)


@implementations
def test_a_normalized_step_is_at_most_lr(name: str) -> None:
    p = nn.Parameter(torch.zeros(3000))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=1.0, **chosen)
        for k in range(20):
            before = p.detach().clone()
            p.grad = torch.randn(3000) * 10.0 ** torch.randint(-30, 30, (3000,))
            optimizer.step()
            assert (p.detach() - before).abs().max() <= 1 + 2**-22 * (k + 1)  # the difference rounds with |p|


@implementations
@pytest.mark.parametrize("exponent", [-40, -3, 20])
def test_the_scale_of_the_gradient_does_not_matter(name: str, exponent: int) -> None:
    plain, _ = run(name, eps=0.0)
    scaled, _ = run(name, eps=0.0, scale=2.0**exponent)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a, b)


@implementations
def test_paper_without_resistance_is_sgd(name: str) -> None:
    p, q = nn.Parameter(torch.randn(1000)), nn.Parameter(torch.empty(1000))
    q.data.copy_(p.data)
    sgd = torch.optim.SGD([q], lr=0.1)
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.1, mode="paper", kappa=0.0, **chosen)
        for _ in range(5):
            p.grad = torch.randn(1000)
            q.grad = p.grad.clone()
            optimizer.step()
            sgd.step()
    torch.testing.assert_close(p, q, rtol=5 * 2**-23, atol=5 * 2**-23)  # SGD fuses its multiply and add


@implementations
@pytest.mark.parametrize("mode", MODES)
def test_maximize_is_minimize_of_the_negative(name: str, mode: str) -> None:
    up, _ = run(name, mode=mode, maximize=True)
    down, _ = run(name, mode=mode, scale=-1.0)
    for a, b in zip(up, down, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@implementations
@pytest.mark.parametrize("mode", ["normalized", "consolidate"])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_lazy_zeros_leave_an_element_alone(name: str, mode: str, eps: float) -> None:
    p = nn.Parameter(torch.randn(40))
    start = p.detach().clone()
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], mode=mode, eps=eps, weight_decay=0.1, temperature=True, **chosen)
        for k in range(3):  # elements 0 .. 19: always zero, of both signs; 20 .. 39: not in the first step
            g = torch.zeros(40)
            g[1:20:2] = -0.0
            if k:
                g[20:] = 1.0
            p.grad = g
            optimizer.step()
            if k == 0:
                assert torch.equal(p.detach(), start)
    state = optimizer.state[p]
    assert torch.equal(p.detach()[:20], start[:20])
    assert not state["positive"][:20].any()
    assert not state["negative"].any()
    assert torch.equal(state["temperature"][:20], torch.ones(20))
    assert (p.detach()[20:] != start[20:]).all()
    assert p.isfinite().all()


@implementations
@pytest.mark.parametrize("mode", MODES)
def test_zeros_that_count_make_no_nan(name: str, mode: str) -> None:
    """Not lazy (paper never is), eps 0: 0/0 on the first step."""
    p = nn.Parameter(torch.ones(7))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], mode=mode, eps=0.0, lazy=False, temperature=True, **chosen)
        p.grad = torch.zeros(7)
        optimizer.step()
        assert torch.equal(p.detach(), torch.ones(7))
        p.grad = torch.full((7,), 2.0)
        optimizer.step()
        p.grad = torch.zeros(7)
        optimizer.step()
    assert (optimizer.state[p]["positive"] < 2 * (1 - optimizer.param_groups[0]["beta"])).all()  # they do count
    assert p.isfinite().all()


@implementations
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_touches_its_own_element_only(name: str, mode: str, bad: float) -> None:
    def step(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = nn.Parameter(torch.ones(37))
        with running(name) as chosen:
            optimizer = SignSplitEMA([p], mode=mode, weight_decay=0.1, **chosen)
            for _ in range(2):
                p.grad = g.clone()
                optimizer.step()
        return p.detach(), optimizer.state[p]["positive"], optimizer.state[p]["negative"]

    g = torch.randn(37)
    spoilt = g.clone()
    spoilt[11] = bad
    good, results = step(g), step(spoilt)
    others = torch.arange(37) != 11
    assert [r[11].item() for r in results] == [1.0, 0.0, 0.0]
    for a, b in zip(good, results, strict=True):
        # in consolidate the element is missing from the rms, by which no step changes by more than the whole resistance
        slack = 1e-4 if mode == "consolidate" and a is good[0] else 0.0
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=slack)


@implementations
def test_lr_as_a_number_and_as_a_tensor(name: str) -> None:
    number, _ = run(name, lr=0.03)
    tensor, _ = run(name, lr=torch.tensor(0.03))
    for a, b in zip(number, tensor, strict=True):
        assert torch.equal(a, b)


@implementations
def test_temperature_settles_at_one_half_in_noise(name: str) -> None:
    p = nn.Parameter(torch.zeros(2000))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.0, temperature=True, **chosen)
        for _ in range(600):
            p.grad = torch.randn(2000)
            optimizer.step()
            t = optimizer.state[p]["temperature"]
        assert t.min() >= 0
        assert t.max() <= 1
        assert abs(t.mean().item() - 0.5) < 0.05


@implementations
def test_cryo_divides_the_step(name: str) -> None:
    def moved(rows: torch.Tensor | None, cryo: float) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(6, 50))
        with running(name) as chosen:
            optimizer = SignSplitEMA([p], lr=0.1, cryo=cryo, **chosen)
            if rows is not None:
                optimizer.state[p]["cryo"] = rows
            p.grad = torch.linspace(-1, 1, 300).reshape(6, 50)
            optimizer.step()
        return p.detach()

    free = moved(None, 1.0)
    assert torch.equal(moved(torch.ones(6), 1.0), free)
    torch.testing.assert_close(moved(None, 10.0), free / 10, rtol=2**-22, atol=0)
    rows = torch.tensor([1.0, 10.0, 1.0, 2.0, 1.0, 4.0])
    torch.testing.assert_close(moved(rows, 1.0), free / rows[:, None], rtol=2**-22, atol=0)


@implementations
def test_consolidate_takes_the_rms_of_the_step_before(name: str) -> None:
    p = nn.Parameter(torch.zeros(4))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=1.0, mode="consolidate", beta=0.5, kappa=3.0, **chosen)
        p.grad = torch.tensor([1.0, 2.0, 0.0, -2.0])
        optimizer.step()
        assert p.tolist() == [-1.0, -2.0, 0.0, 2.0]  # no opposite yet
        rms = math.sqrt((0.25 + 1 + 0 + 1) / 4)
        assert optimizer.state[p]["rms"].item() == pytest.approx(rms, rel=2**-23)
        p.grad = torch.tensor([-1.0, 0.0, 0.0, 0.0])
        optimizer.step()
    assert p[0].item() == pytest.approx(-1 + 1 / (1 + 3 * 0.25 / rms), rel=2**-21)


@implementations
@pytest.mark.parametrize("rows", [False, True])
def test_decay_is_divided_by_cryo_too(name: str, rows: bool) -> None:
    """One step of +1 from p = 1: r is 1, so p - lr (1 + decay p) / cryo = 1 - 0.25 * 1.1 / 10."""
    p = nn.Parameter(torch.ones(3, 4))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.25, weight_decay=0.1, cryo=1.0 if rows else 10.0, **chosen)
        if rows:
            optimizer.state[p]["cryo"] = torch.full((3,), 10.0)
        p.grad = torch.ones(3, 4)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 4), 0.9725), rtol=2**-22, atol=0)


@implementations
def test_cryo_replaced_between_steps_is_seen(name: str) -> None:
    """By a plan too, which a second step on the same tensors uses again."""
    p = nn.Parameter(torch.zeros(2, 3))
    moved = []
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.1, **chosen)
        optimizer.state[p]["cryo"] = torch.ones(2)
        for k in range(4):
            if k == 3:
                optimizer.state[p]["cryo"] = torch.full((2,), 10.0)
            before = p.detach().clone()
            p.grad = torch.ones(2, 3)
            optimizer.step()
            moved.append((before - p.detach()).mean().item())
    assert moved == pytest.approx([0.1, 0.1, 0.1, 0.01], rel=1e-5)


@implementations
def test_each_parameter_has_a_random_stream_of_its_own(name: str) -> None:
    """Numbered over all groups, with or without gradients before them."""
    start, g = torch.ones(500, dtype=torch.bfloat16), torch.full((500,), 1e-3, dtype=torch.bfloat16)
    params = [nn.Parameter(start.clone()) for _ in range(4)]
    with running(name) as chosen:
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = SignSplitEMA(groups, lr=0.001, param_rounding="stochastic", **chosen)
        for p in params:
            p.grad = g.clone()
        optimizer.step()
        for i in range(4):
            assert 0 < params[i].ne(1).sum() < 500
            for j in range(i):
                assert not torch.equal(params[i], params[j]), (i, j)
        alone = nn.Parameter(start.clone())
        alone.grad = g.clone()
        idle = [nn.Parameter(start.clone()) for _ in range(3)]
        last = SignSplitEMA([{"params": idle}, {"params": [alone]}], lr=0.001, param_rounding="stochastic", **chosen)
        last.step()
    assert torch.equal(alone, params[3])

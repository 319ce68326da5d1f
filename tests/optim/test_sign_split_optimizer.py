"""SignSplitEMA as a torch optimizer: hyper-parameters, state_dict, GradScaler, hooks, compile, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split import _table
from tests.support.sign_split import IMPLEMENTATIONS, MODES, SHAPES, assert_same, gradient, run, running

ALL: Any = SignSplitEMA  # without its types: the point is to break them
T = torch.zeros
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"lr must be in \[0.0, inf\), got -1.0"),
    ({"lr": "1"}, TypeError, r"lr must be a number, got str"),
    ({"lr": T(2)}, ValueError, r"tensor lr must hold one.*got torch.float32 \(2,\)"),
    ({"mode": "adam"}, ValueError, r"mode must be one of 'paper'.*got 'adam'"),
    ({"beta": 1.0}, ValueError, r"beta must be in \[0.0, 1.0\), got 1.0"),
    ({"kappa": -0.1}, ValueError, r"kappa.*got -0.1"),
    ({"eps": float("nan")}, ValueError, r"eps.*got nan"),
    ({"weight_decay": True}, TypeError, r"weight_decay must be a number, got bool"),
    ({"cryo": 0.5}, ValueError, r"cryo must be in \[1.0.*got 0.5"),
    ({"temperature": {"warm": 1.0}}, ValueError, r"floor, cool and heat, got 'warm'"),
    ({"temperature": {"cool": 2.0}}, ValueError, r"cool.*got 2.0"),
    ({"temperature": 3}, TypeError, r"None, True or a mapping, got int"),
    ({"state_dtype": torch.float16}, ValueError, r"state_dtype.*got torch.float16"),
    ({"param_rounding": "up"}, ValueError, r"param_rounding.*got 'up'"),
    ({"state_rounding": "kahan"}, ValueError, r"state_rounding.*got 'kahan'"),
    ({"seed": -1}, ValueError, r"seed must be an int from 0.*got -1"),
    ({"differentiable": True}, ValueError, r"differentiable=True is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD, ids=[next(iter(b[0])) + str(i) for i, b in enumerate(BAD)]
)
def test_bad_hyper_parameters(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ALL([nn.Parameter(T(3))], **arguments)


def test_refused_parameters_and_gradients() -> None:
    with pytest.raises(TypeError, match=r"complex.*got torch.complex64.*view_as_real"):
        SignSplitEMA([nn.Parameter(T(3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match=r"float32.*got torch.float8"):
        SignSplitEMA([nn.Parameter(torch.zeros(3, dtype=torch.uint8).view(torch.float8_e4m3fn), requires_grad=False)])
    with pytest.raises(TypeError, match=r"sparse parameters are not supported, got layout torch.sparse_coo"):
        SignSplitEMA([nn.Parameter(torch.ones(2, 2).to_sparse())])
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = SignSplitEMA(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_defaults_of_each_mode() -> None:
    groups = [{"params": [nn.Parameter(T(2))], "mode": mode} for mode in MODES]
    groups.append({"params": [nn.Parameter(T(2))], "beta": 0.5, "kappa": 2.0, "lr": 0.1})
    found = SignSplitEMA(groups).param_groups
    assert [(g["beta"], g["kappa"], g["lr"]) for g in found] == [
        (0.99, 1.0, 1e-3), (0.9, 1.0, 1e-3), (0.99, 30.0, 1e-3), (0.5, 2.0, 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_groups_may_differ_in_everything(name: str) -> None:
    options: list[dict[str, Any]] = [
        {"mode": "paper", "lr": 0.1},
        {"mode": "normalized", "temperature": True, "state_dtype": torch.bfloat16, "weight_decay": 0.1},
        {"mode": "consolidate", "maximize": True, "kappa": 3.0},
    ]
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(40, generator=g) for _ in options]
    grads = [[gradient((40,), g) for _ in options] for _ in range(3)]

    def after(groups: list[int]) -> list[torch.Tensor]:
        params = [nn.Parameter(start[i].clone()) for i in groups]
        with running(name) as chosen:
            arguments = [{"params": [p], **options[i]} for p, i in zip(params, groups, strict=True)]
            optimizer = SignSplitEMA(arguments, **chosen)
            for of_step in grads:
                for p, i in zip(params, groups, strict=True):
                    p.grad = of_step[i].clone()
                optimizer.step()
        return [p.detach() for p in params]

    together = after([0, 1, 2])
    for i in range(3):
        assert torch.equal(after([i])[0], together[i])


# ---- state_dict ----

ROUTES = [(a, b) for a in IMPLEMENTATIONS for b in IMPLEMENTATIONS if a != b] + [("single", "single")]
RANDOM: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "param_rounding": "stochastic",
    "state_rounding": "stochastic",
    "state_dtype": torch.bfloat16,
    "temperature": True,
}


@pytest.mark.parametrize(("first", "second"), ROUTES)
@pytest.mark.parametrize(
    "options",
    [{}, RANDOM, {"dtype": torch.bfloat16, "param_rounding": "kahan"}, {"state_dtype": torch.uint8}],
    ids=["float32", "random", "Kahan", "8 bit"],
)
def test_resumed_equals_uninterrupted(first: str, second: str, options: dict[str, Any]) -> None:
    """Through a file read with weights_only, into another implementation: bit for bit, dtypes included."""
    whole = run("single", steps=6, **options)
    g = torch.Generator().manual_seed(3)
    half, optimizer = run(first, steps=3, **options)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in half]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    arguments = {k: v for k, v in options.items() if k != "dtype"}
    with running(second) as chosen:
        resumed = SignSplitEMA(params, lr=0.05, **arguments)
        resumed.load_state_dict(saved["optimizer"])
        for group in resumed.param_groups:
            group.update({"fused": None, "foreach": None, **chosen})
        for s in SHAPES:
            torch.randn(s, generator=g)
        for k in range(6):
            for p in params:
                p.grad = gradient(p.shape, g).to(p.dtype)
            if k >= 3:
                resumed.step()
    assert_same((params, resumed), whole)


def test_consolidate_resumes_bit_for_bit() -> None:
    for name in IMPLEMENTATIONS:
        states: list[Any] = []

        def keep(k: int, optimizer: SignSplitEMA, states: list[Any] = states) -> None:
            states.append(copy.deepcopy(optimizer.state_dict()))

        params, _ = run(name, mode="consolidate", between=keep)

        def reload(k: int, optimizer: SignSplitEMA, states: list[Any] = states) -> None:
            optimizer.load_state_dict(copy.deepcopy(states[k]))

        again, _ = run(name, mode="consolidate", between=reload)
        for a, b in zip(params, again, strict=True):
            assert torch.equal(a, b)


def test_loaded_state_is_a_copy_in_its_own_dtype() -> None:
    params, optimizer = run("single", dtype=torch.bfloat16, state_rounding="stochastic", state_dtype=torch.uint8)
    saved = optimizer.state_dict()
    other = SignSplitEMA([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(saved)
    big = len(SHAPES) - 1
    state = other.state[other.param_groups[0]["params"][big]]
    assert state["positive"].dtype == torch.uint8
    assert state["positive_scale"].dtype == torch.float32
    assert state["step"].dtype == torch.int64
    assert other.param_groups[0]["state_dtype"] == torch.uint8
    assert state["positive"].data_ptr() != saved["state"][big]["positive"].data_ptr()


def test_hooks_of_load_state_dict() -> None:
    """The user's own see what they see in torch: before it, the dict, which they may replace; after it, the state."""
    p, optimizer = nn.Parameter(torch.ones(3)), None
    seen: list[Any] = []
    for _ in range(2):
        optimizer = SignSplitEMA([p], state_dtype=torch.bfloat16)
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer is not None
    saved = optimizer.state_dict()
    replaced = copy.deepcopy(saved)
    replaced["state"][0]["positive"].fill_(0.25)

    def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["state"] is saved["state"])
        return replaced

    other = SignSplitEMA([p])
    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["positive"].clone()))
    other.load_state_dict(saved)
    assert seen[0] is True
    assert seen[1].dtype == torch.bfloat16
    assert seen[1].eq(0.25).all()
    other.load_state_dict(saved)  # no hook of the first load is left
    assert len(seen) == 4


def test_a_plan_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step on the same tensors makes no table: that took 12 ms for 400 tensors."""
    if "cpu" not in IMPLEMENTATIONS:
        pytest.skip("no kernel here that takes tables")
    made: list[int] = []
    of = _table.Table.of
    monkeypatch.setattr(_table.Table, "of", lambda tensors: made.append(len(tensors)) or of(tensors))
    run("cpu", steps=3)
    assert len(made) == len(set(made)) > 0


def test_pickle_and_deepcopy() -> None:
    params, optimizer = run("single")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = other.param_groups[0]["params"]
        for p, q in zip(params, theirs, strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        other.step()
    optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p, q)


# ---- what an optimizer of torch does ----


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_grad_scaler(name: str) -> None:
    """Unscaling inside the step, and no step at all where a gradient is not finite."""
    p, q = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    x = torch.randn(8)
    with running(name) as chosen:
        scaled = SignSplitEMA([p], mode="paper", weight_decay=0.1, state_rounding="stochastic", **chosen)
        plain = SignSplitEMA([q], mode="paper", weight_decay=0.1, state_rounding="stochastic", **chosen)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for k in range(4):
            p.grad = q.grad = None
            scaler.scale((p * x).sum()).backward()
            (q * x).sum().backward()
            assert p.grad is not None
            if k == 2:
                p.grad[3] = torch.inf
                kept = [p.detach().clone(), *(t.clone() for t in scaled.state[p].values())]
            scaler.step(scaled)
            if k == 2:
                for old, new in zip(kept, [p.detach(), *scaled.state[p].values()], strict=True):
                    assert torch.equal(old, new)
            else:
                plain.step()
            scaler.update()
    assert scaler.get_scale() == 512.0
    assert torch.equal(p, q)


def test_unscaled_by_hand_is_not_unscaled_again() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    scaled, plain = SignSplitEMA([p], mode="paper"), SignSplitEMA([q], mode="paper")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    q.sum().backward()
    scaler.unscale_(scaled)
    scaler.step(scaled)
    plain.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_version_counters(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], **chosen)
        for _ in range(2):
            before = p._version
            optimizer.step()
            assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_and_hooks() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SignSplitEMA([p])
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))

    def closure() -> torch.Tensor:
        seen.append("closure")
        optimizer.zero_grad(set_to_none=True)
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "closure", "after"]
    assert (p < 1).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_parameters_without_gradient_and_late_groups(name: str) -> None:
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p, q], lr=0.5, **chosen)
        optimizer.step()
        assert not optimizer.state
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.add_param_group({"params": [r], "lr": 0.25})
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            p.grad, r.grad = torch.ones(3), torch.ones(3)
            optimizer.step()
        p.grad = None
        q.grad = torch.ones(3)
        optimizer.step()
    assert (p[0].item(), q[0].item(), r[0].item()) == (-0.5, 0.5, 0.25)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_moves_between_steps_is_found(name: str) -> None:
    """Addresses are kept from step to step: a parameter, gradient or state that lies elsewhere must be noticed."""
    p = nn.Parameter(torch.ones(300))
    with running(name) as chosen:
        optimizer = SignSplitEMA([p], lr=0.1, **chosen)
        p.grad = torch.ones(300)
        optimizer.step()
        p.data = torch.full((300,), 5.0)
        p.grad = torch.full((300,), -1.0)
        optimizer.step()
        assert p[0] > 5
        optimizer.state[p]["positive"] = torch.zeros(300)
        optimizer.state[p]["negative"] = torch.zeros(300)
        p.grad = torch.ones(300)
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1)
        optimizer.param_groups[0]["temperature"] = {"floor": 0.0, "cool": 0.0, "heat": 0.0}
        before = p.detach().clone()
        optimizer.step()  # T falls to 0, and with it the step
        assert torch.equal(p.detach(), before)


def test_schedulers_and_compile() -> None:
    """The step runs outside the compiled graph: a learning rate that changes compiles nothing anew."""
    model = nn.Linear(3, 2)
    optimizer = SignSplitEMA(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def train(x: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        optimizer.step()

    x = torch.randn(4, 3)
    for k in range(6):
        train(x)
        scheduler.step()
        if k == 2:
            compiled = counter.frame_count
    assert counter.frame_count == compiled > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)

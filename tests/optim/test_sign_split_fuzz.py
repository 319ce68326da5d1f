"""Random parameters, states, gradients and changes between steps, where native code begins.

Whatever disagrees, a step is refused by an error or gives what the torch operators give; it never crashes. The gate
runs this under AddressSanitizer, where a read behind an end is a crash. KSSM_FUZZ_EXAMPLES sets the number of examples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kssm_kernels.optim import SignSplitEMA
from tests.support.layouts import wide
from tests.support.sign_split import IMPLEMENTATIONS, MODES, running

EXAMPLES = int(os.environ.get("KSSM_FUZZ_EXAMPLES", "100"))
KERNELS = [name for name, (_, arguments) in IMPLEMENTATIONS.items() if arguments.get("fused")]
REFUSED = (ValueError, TypeError, RuntimeError, NotImplementedError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (5,), (3, 7), (7, 3), (21,), (2, 0), (300,), (16, 17), (2, 3, 4), (1, 9), (64, 65), (65, 64))
STATES = (
    "positive", "negative", "positive_scale", "negative_scale", "temperature", "compensation", "cryo", "rms", "step",
)  # fmt: skip


def _resized(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.element_size() * (t.numel() // 2))
    return t


def _apart(t: Tensor) -> Tensor:
    """From the second element on of something that ends where it does."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


# What becomes of a tensor. The values stay in those of the first line.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda t: t.clone(),
    "apart": _apart,
    "wide": wide,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t.clone(),
    "negative bit": lambda t: torch._neg_view(-t) if t.dtype != torch.uint8 else t.clone(),
    "parameter": lambda t: nn.Parameter(t.clone(), requires_grad=False),
    "expanded": lambda t: t.new_full((), 1).expand(t.shape),
    "transposed shape": lambda t: t.transpose(0, -1).clone() if t.dim() else t.reshape(1),
    "flat": lambda t: t.reshape(-1).clone(),
    "longer": lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
    "shorter": lambda t: t[: t.shape[0] // 2].clone() if t.dim() else t.clone(),
    "one row": lambda t: t[:1].clone() if t.dim() else t.clone(),
    "empty": lambda t: t.new_zeros(0),
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "meta": lambda t: t.to("meta"),
    "small storage": _resized,
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "number": lambda t: 3.0,
}  # fmt: skip
changes = st.sampled_from(sorted(CHANGES))
options = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODES),
        "temperature": st.sampled_from([None, True]),
        "state_dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
        "param_rounding": st.sampled_from(["nearest", "stochastic", "kahan"]),
        "state_rounding": st.sampled_from(["nearest", "stochastic"]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "lazy": st.booleans(),
    }
)
where = st.sampled_from(["p", "data", "grad", "in place", *STATES])
events = st.one_of(
    st.just(("none", 0, "", "")),
    st.tuples(st.just("change"), st.integers(0, 2), where, changes),
    st.tuples(st.just("load"), st.integers(0, 2), st.sampled_from(STATES), changes),
    st.tuples(st.just("option"), st.integers(0, 4), st.just(""), st.just("")),
)


def _option(group: dict[str, Any], which: int) -> None:
    group.update(
        [
            {"temperature": {"floor": 1.0, "cool": 0.9, "heat": 0.1}},
            {"temperature": None},
            {"mode": "consolidate"},
            {"param_rounding": "kahan"},
            {"state_rounding": "stochastic"},
        ][which]
    )


def _happen(event: tuple[str, int, str, str], params: list[nn.Parameter], optimizer: SignSplitEMA) -> None:
    """Something between two steps; what torch itself refuses does not happen."""
    kind, which, key, change = event
    if kind == "option":
        return _option(optimizer.param_groups[0], which)
    if kind == "none":
        return None
    p = params[which % len(params)]
    if kind == "load":
        saved = optimizer.state_dict()
        state = dict(saved["state"].get(which % len(params), {}))
        state[key] = CHANGES[change](state.get(key, torch.ones(p.shape[0] if p.dim() else 1)))
        saved["state"] = {**saved["state"], which % len(params): state}
        return optimizer.load_state_dict(saved)
    state = optimizer.state[p]
    if key == "grad":
        assert p.grad is not None
        p.grad = CHANGES[change](p.grad)
    elif key == "p":
        p.data = CHANGES[change](p.data)
    elif key == "data":  # a layer that grows or shrinks, gradient and all
        p.data = CHANGES[change](p.data)
        p.grad = torch.ones_like(p)
    elif key == "in place":
        t = state.get("positive", p.data)
        t.data = CHANGES[change](t)
    else:
        state[key] = CHANGES[change](state.get(key, torch.ones(p.shape[0] if p.dim() else 1)))
    return None


def _outcome(name: str, plan: dict[str, Any]) -> tuple[list[Tensor], bool]:
    """Parameters after all steps; whether a step was refused, which ends them."""
    g = torch.Generator().manual_seed(plan["seed"])
    params = [nn.Parameter(torch.randn(shape, generator=g).to(plan["dtype"])) for shape in plan["shapes"]]
    with running(name) as chosen:
        optimizer = SignSplitEMA(params, lr=0.01, beta=0.5, **plan["options"], **chosen)
        try:
            for event in plan["events"]:
                for p in params:
                    p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
                with contextlib.suppress(IndexError, AssertionError, *REFUSED):  # by torch, or by load_state_dict
                    _happen(event, params, optimizer)
                optimizer.step()
                optimizer.step()  # by the plan of the one before
        except REFUSED:
            return [p.detach() for p in params], True
    return [p.detach() for p in params], False


@pytest.mark.skipif(not KERNELS, reason="no kernel here")
@settings(max_examples=EXAMPLES)
@given(
    plan=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "dtype": st.sampled_from(DTYPES),
            "shapes": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
            "options": options,
            "events": st.lists(events, min_size=1, max_size=4),
        }
    )
)
@pytest.mark.parametrize("name", KERNELS)
def test_an_error_or_the_answer_of_torch(name: str, plan: dict[str, Any]) -> None:
    if name == "triton" and plan["dtype"] == torch.float64:
        return
    mine, refused = _outcome(name, plan)
    theirs, theirs_refused = _outcome("single", plan)
    if refused or theirs_refused:
        # torch's operators may do without memory (meta), never the other way round
        assert refused or not theirs_refused
        return
    exact = not any(e[0] == "option" or plan["options"]["mode"] == "consolidate" for e in plan["events"])
    low = plan["dtype"] in (torch.bfloat16, torch.float16)
    slack = 0.0 if exact else 0.05 if low else 1e-3  # consolidate: a sum's order, which a rounded mean may show
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=slack, atol=slack, equal_nan=True)

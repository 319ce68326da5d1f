"""Optimizer state and gradients that are not what a parameter wants: refused by name, or laid out anew; never read as
memory that they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from kssm_kernels.optim import SignSplitEMA
from kssm_kernels.optim.sign_split import _table, _tensors
from tests.support.sign_split import EVERYTHING, IMPLEMENTATIONS, WEIGHT, WRONG_STATES, assert_same, made, running

implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)
Z = torch.zeros
wrong = pytest.mark.parametrize(
    ("key", "change", "words"), WRONG_STATES, ids=[f"{case[0]} {i}" for i, case in enumerate(WRONG_STATES)]
)


# ---- between two steps ----


@implementations
@wrong
def test_a_state_of_another_kind_between_steps(name: str, key: str, change: Callable[[Any], Any], words: str) -> None:
    """Put in the place of what a plan may know; and nothing is stepped."""
    if key == "negative" and change(Z(80, 64)) is None:
        words = r"'negative'.*must be a tensor"
    with running(name) as chosen:
        p, optimizer = made((80, 64), torch.bfloat16, steps=2, **EVERYTHING, **chosen)
        optimizer.state[p][key] = change(optimizer.state[p].get(key))
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        with pytest.raises(ValueError, match="state " + words):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@implementations
def test_a_layer_that_grows_in_place(name: str) -> None:
    with running(name) as chosen:
        p, optimizer = made((64, 64), steps=2, **chosen)
        p.grad = None
        p.data = torch.cat([p.data, Z(6000, 64)])
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=rf"'positive' of {WEIGHT}, of shape \(6064, 64\),.*\(64, 64\)"):
            optimizer.step()
        for key in ("positive", "negative"):
            optimizer.state[p][key] = torch.cat([optimizer.state[p][key], Z(6000, 64)])
        optimizer.step()
        assert (p[64:] < 0).all()


def _grown(p: Tensor, state: dict[str, Any]) -> None:
    p.data = torch.cat([p.data, p.data])


def _shrunk_storage(p: Tensor, state: dict[str, Any]) -> None:
    for t in (p, state["positive"]):
        t.untyped_storage().resize_(64)


def _freed(p: Tensor, state: dict[str, Any]) -> None:
    state["negative"].untyped_storage().resize_(0)


def _freed_gradient(p: Tensor, state: dict[str, Any]) -> None:
    assert p.grad is not None
    p.grad.untyped_storage().resize_(0)


def _shrunk_gradient(p: Tensor, state: dict[str, Any]) -> None:
    assert p.grad is not None
    p.grad.untyped_storage().resize_(64)


def _resized_gradient(p: Tensor, state: dict[str, Any]) -> None:
    assert p.grad is not None
    p.grad.resize_(10, 300)


def _smaller_in_place(p: Tensor, state: dict[str, Any]) -> None:
    state["positive"].resize_(20, 20)


def _one_for_two(p: Tensor, state: dict[str, Any]) -> None:
    state["negative"] = state["positive"]


def _of_the_parameter(p: Tensor, state: dict[str, Any]) -> None:
    state["negative"] = p.data[:]


def _elsewhere(p: Tensor, state: dict[str, Any]) -> None:
    state["positive"] = state["positive"].to("meta")


@pytest.mark.parametrize(
    "change",
    [_grown, _shrunk_storage, _freed, _freed_gradient, _shrunk_gradient, _resized_gradient, _smaller_in_place,
     _one_for_two, _of_the_parameter, _elsewhere],
)  # fmt: skip
def test_memory_that_is_not_there_any_more(change: Callable[[Tensor, dict[str, Any]], None]) -> None:
    """For a kernel: torch's operators say so themselves, in their own words."""
    if "cpu" not in IMPLEMENTATIONS:
        pytest.skip("no kernel here")
    with running("cpu") as chosen:
        p, optimizer = made((30, 40), steps=2, **chosen)
        change(p, optimizer.state[p])
        with pytest.raises((ValueError, RuntimeError), match="SignSplitEMA: "):
            optimizer.step()


@implementations
def test_the_same_memory_read_otherwise(name: str) -> None:
    """What a plan must notice although no address has changed: a parameter's dtype, and that reading negates it."""

    def result(name: str, change: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], SignSplitEMA]:
        with running(name) as chosen:
            p, optimizer = made((300,), torch.bfloat16, steps=2, **chosen)
            address = p.data_ptr()
            p.data = change(p.data)
            assert p.data_ptr() == address
            optimizer.step()
        return [p], optimizer

    for change in (torch._neg_view, lambda t: t.view(torch.float16)):
        assert_same(result(name, change), result("single", change))


@implementations
def test_gradients_within_larger_memory(name: str) -> None:
    """With the strides of the last step's: one that has become smaller, and one that begins too near the end."""
    for shape, begin in (((200,), 0), ((300,), 4)):
        with running(name) as chosen:
            p, optimizer = made((300,), steps=2, **chosen)
            memory = Z(400)
            if begin:
                p.grad = memory[begin : begin + 300]
                memory.untyped_storage().resize_(4 * 300)
            else:
                p.grad = memory[:300]
                optimizer.step()
                p.grad.data = memory[: shape[0]]
            before = p.detach().clone()
            with pytest.raises(RuntimeError, match=rf"the gradient of {WEIGHT} "):
                optimizer.step()
            assert torch.equal(p.detach(), before)


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full((t.shape[0], 2 * t.shape[1]), 7)
    wide[:, ::2] = t
    return wide[:, ::2]


def _negated(t: Tensor) -> Tensor:
    found = torch._neg_view(-t)
    assert found.is_neg()
    return found


def _expanded(t: Tensor) -> Tensor:
    return t.new_full((), 0.25).expand(t.shape)


LAYOUTS = [_transposed, _sliced, _negated, _expanded, nn.Parameter]


@implementations
@pytest.mark.parametrize("key", ["p", "grad", "positive", "negative", "temperature", "cryo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_bits_of_a_dense_one(name: str, key: str, layout: Callable[[Tensor], Tensor]) -> None:
    """Transposed, with gaps, negated when read (as ``z.conj().imag`` is), one number for all."""
    if (key == "p" and layout in (_expanded, nn.Parameter)) or (key == "cryo" and layout in (_transposed, _sliced)):
        pytest.skip("refused, or one row has no such layout")

    def result(changed: bool) -> tuple[list[Tensor], SignSplitEMA]:
        p, optimizer = made((30, 40), steps=2, temperature=True, **chosen)
        optimizer.state[p]["cryo"] = torch.linspace(1, 3, 30)
        g = torch.Generator().manual_seed(9)
        for _ in range(3):
            p.grad = torch.randn(30, 40, generator=g)
            optimizer.step()
            where: Any = p if key in ("p", "grad") else optimizer.state[p]
            if key == "p":
                p.data = layout(p.data) if changed else p.data
            elif key == "grad":
                p.grad = layout(p.grad)
                p.grad = p.grad if changed else p.grad.detach().contiguous().resolve_neg()
                optimizer.step()
            else:
                where[key] = layout(where[key])
                where[key] = where[key] if changed else where[key].detach().contiguous().resolve_neg()
        optimizer.step()
        return [p], optimizer

    with running(name) as chosen:
        assert_same(result(True), result(False))


@implementations
def test_a_conjugated_spectrum_as_gradient_and_parameter(name: str) -> None:
    """z.conj().imag is a view that is negated when it is read."""
    z = torch.randn(20, dtype=torch.complex64)
    p, q = nn.Parameter(z.conj().imag), nn.Parameter(-z.imag)
    assert p.is_neg()
    with running(name) as chosen:
        both = SignSplitEMA([p], **chosen), SignSplitEMA([q], **chosen)
        for _ in range(3):
            p.grad, q.grad = z.conj().imag, -z.imag
            for optimizer in both:
                optimizer.step()
    assert torch.equal(p, q)


@implementations
def test_a_parameter_of_another_dtype_between_steps(name: str) -> None:
    """``module.bfloat16()`` and back: compensation of bfloat16 parameters is not written for others."""
    with running(name) as chosen:
        p, optimizer = made((300,), torch.bfloat16, steps=2, mode="paper", param_rounding="kahan", **chosen)
        before = optimizer.state[p]["compensation"].clone()
        for dtype in (torch.float32, torch.float16):
            p.data, p.grad = p.data.to(dtype), None
            p.grad = torch.ones_like(p)
            last = p.detach().clone()
            optimizer.step()
            assert (p < last).all()
            assert p.isfinite().all()
        assert torch.equal(optimizer.state[p]["compensation"], before)


# ---- gradients that are no memory ----


@implementations
def test_wrapped_and_fake_tensors_are_not_read_as_memory(name: str) -> None:
    with running(name) as chosen:
        p, optimizer = made((3,), steps=2, **chosen)
        if chosen.get("fused"):
            p.grad = TwoTensor(torch.ones(3), torch.ones(3))
            with pytest.raises(RuntimeError, match=r"g of shape \(3,\) on cpu has no memory that a kernel could read"):
                optimizer.step()

        def inside(g: Tensor) -> Tensor:
            p.grad = g
            with pytest.raises((RuntimeError, NotImplementedError)):
                optimizer.step()
            return g

        torch.vmap(inside)(torch.ones(2, 3))


def test_fake_and_meta_parameters_take_the_torch_path() -> None:
    """As torch's own optimizers do: shapes of a step without its numbers."""
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            p = nn.Parameter(torch.ones(3, 4))
            optimizer = SignSplitEMA([p], temperature=True)
            for _ in range(2):
                p.grad = torch.ones(3, 4)
                optimizer.step()
            assert optimizer.state[p]["positive"].shape == (3, 4)


def test_a_table_takes_no_tensor_of_another_kind() -> None:
    """The last check before native code, whoever asks for it."""
    n = 600
    good: dict[str, Any] = {"p": Z(n), "g": Z(n), "positive": Z(n), "negative": Z(n), "temperature": None}
    good |= {"compensation": None, "positive_scale": None, "negative_scale": None, "cryo": None, "rms": None}
    good |= {"step": None, "row": 1, "stream": 0}
    _table.Table.of([_tensors.Tensors(**good)])
    codes = {"positive": Z(n, dtype=torch.uint8), "negative": Z(n, dtype=torch.uint8)}
    bad: list[dict[str, Any]] = [
        {"g": Z(n - 1)}, {"negative": Z(n + 1)}, {"negative": Z(n).double()}, {"positive": Z(2 * n)[::2]},
        {"g": Z(()).expand(n)}, {"g": torch._neg_view(Z(n))}, {"g": Z(n, device="meta")}, {"temperature": Z(1)},
        {"temperature": Z(n).double()}, {"compensation": Z(n)}, {"cryo": Z(n - 1)}, {"cryo": Z(()).expand(n)},
        {"rms": Z(2)}, {"step": Z(())}, {"row": 7}, codes, {"positive_scale": Z(3), "negative_scale": Z(3)},
        {**codes, "positive_scale": Z(3)}, {**codes, "positive_scale": Z(3), "negative_scale": Z(2)},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(RuntimeError, match="SignSplitEMA: a kernel wants"):
            _table.Table.of([_tensors.Tensors(**{**good, **change})])
    freed = Z(n)
    freed.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=r"g of shape .* has no memory that a kernel could read"):
        _table.Table.of([_tensors.Tensors(**{**good, "g": freed})])

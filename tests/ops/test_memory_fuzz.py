"""Random phases, operands, saved tensors and cotangents where the native code of the ops begins.

Whatever disagrees, a call is refused by TypeError, ValueError or RuntimeError, or gives what pure torch gives on plain
copies; it never crashes. The gate runs this under AddressSanitizer, where a read behind an end is a crash.
KSSM_FUZZ_EXAMPLES sets the number of examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kssm_kernels
from kssm_kernels import bistable_coupling, kuramoto_features, kuramoto_update, order_parameters
from tests.support import devices
from tests.support.layouts import wide

EXAMPLES = int(os.environ.get("KSSM_FUZZ_EXAMPLES", "100"))
KERNELS = [name for name in devices.backends_of("cpu") if name != "torch"]
REFUSED = (TypeError, ValueError, RuntimeError, NotImplementedError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS: Any = torch.ops.kssm_kernels


# ---- what becomes of a tensor ----


def _apart(t: Tensor) -> Tensor:
    """From the second element on of something that ends where it does."""
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def _overlapping(t: Tensor) -> Tensor:
    """Rows that begin one element after each other."""
    if t.dim() < 2 or not t.numel():
        return t.clone()
    length = t.shape[-1] + t.shape[-2] - 1
    return torch.linspace(-1, 1, length).to(t.dtype).as_strided(t.shape, (*[0] * (t.dim() - 2), 1, 1))


def _freed(bytes_left: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.untyped_storage().resize_(bytes_left(t.untyped_storage().nbytes()))
        return t

    return change


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t.clone()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda t: t,
    "apart": _apart,
    "wide": wide,
    "transposed": _transposed,
    "transposed and wide": lambda t: wide(_transposed(t)),
    "overlapping": _overlapping,
    "expanded": lambda t: t.new_full((), 0.5).expand(t.shape),
    "one row for all": lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t.clone(),
    "negative bit": lambda t: torch._neg_view(-t),
    "negative bit, wide": lambda t: torch._neg_view(-wide(t)),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "transposed shape": lambda t: t.transpose(0, -1).clone() if t.dim() else t.reshape(1),
    "flat": lambda t: t.reshape(-1).clone(),
    "one more axis": lambda t: t[None].clone(),
    "longer": lambda t: torch.cat([t, t], -1) if t.dim() else torch.stack([t, t]),
    "more rows": lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
    "shorter": lambda t: t[..., : t.shape[-1] // 2].clone() if t.dim() else t.clone(),
    "fewer rows": lambda t: t[: t.shape[0] // 2].clone() if t.dim() else t.clone(),
    "a column": lambda t: t[..., :1].clone() if t.dim() else t.clone(),
    "one element": lambda t: t.new_full((1,), 0.5),
    "no axes": lambda t: t.new_full((), 0.5),
    "empty": lambda t: t.new_zeros(0),
    "no rows": lambda t: t.new_zeros((0, t.shape[-1])) if t.dim() else t.clone(),
    "many harmonics": lambda t: torch.zeros(*t.shape[:-1], 3 * 700).to(t.dtype) if t.dim() else t.clone(),
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "freed": _freed(lambda n: 0),
    "half freed": _freed(lambda n: n // 2),
}  # fmt: skip
changes = st.one_of(st.just("nothing"), st.just("nothing"), st.sampled_from(sorted(CHANGES)))

# ---- calls ----

# Around a vector, the longest row that is taken in lanes, and a block; few rows of the long ones.
SHAPES = (
    (1,), (5,), (16,), (17,), (3, 1), (3, 7), (7, 3), (2, 33), (4, 64), (5, 65), (2, 3, 9), (1, 1, 4), (0, 4),
    (2, 0, 3), (19, 10), (130, 10), (4097,), (2, 4100), (10,), (2, 10),
)  # fmt: skip
OPERANDS = ("number", "tensor", "row", "column", "full", "absent")


def _operand(kind: str, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Any:
    if kind in ("number", "absent"):
        return 0.4
    own = {"tensor": (), "row": (shape[-1],), "column": (*shape[:-1], 1), "full": shape}[kind]
    return torch.rand(own, generator=g).to(dtype)


def _arguments(plan: dict[str, Any]) -> dict[str, Any]:
    """The call's tensors and numbers by name, before anything becomes of them; as the plan says after that."""
    g = torch.Generator().manual_seed(plan["seed"])
    shape, dtype, h = plan["shape"], plan["dtype"], plan["harmonics"]
    if plan["op"].startswith("bistable"):
        found = {"theta": torch.rand(*shape[:-1], 10, generator=g).to(dtype) + 0.5}
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        found |= {k: torch.rand(shape[:-1], generator=g).to(compute) for k in ("gk", "gu", "gd")}
    else:
        found = {"theta": (6 * torch.rand(shape, generator=g) - 3).to(dtype)}
        for name, kind in zip(("coupling", "omega", "phase_lag", "noise_scale"), plan["operands"], strict=True):
            found[name] = _operand(kind, shape, dtype, g)
        angles = torch.rand(*shape[:-1], h, generator=g)
        parts = [0.5 * angles.cos(), 0.5 * angles.sin(), torch.full_like(angles, 0.5)]
        found["features"] = torch.cat(parts, -1).to(dtype)
        found["g_features"] = torch.rand(*shape[:-1], 3 * h, generator=g).to(dtype)
        found["g_phases"] = torch.rand(shape, generator=g).to(dtype)
    return found


def _call(plan: dict[str, Any], a: dict[str, Any]) -> tuple[Tensor, ...]:
    op, theta, h, steps = plan["op"], a["theta"], plan["harmonics"], plan["steps"]
    if op == "order_parameters":
        return (order_parameters(theta, h),)
    if op == "order_parameters_backward":
        return (OPS.order_parameters_backward(theta, a["features"], a["g_features"]),)
    low, high = torch.tensor(0.1, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64)
    if op == "bistable_coupling":
        return bistable_coupling(theta)
    if op == "bistable_dispatcher":
        return tuple(OPS.bistable_coupling(theta, low, high))
    if op == "bistable_coupling_backward":
        return (OPS.bistable_coupling_backward(theta, low, high, a["gk"], a["gu"], a["gd"]),)
    kinds = dict(zip(("coupling", "omega", "phase_lag", "noise_scale"), plan["operands"], strict=True))
    given = {k: None if kind == "absent" and k != "coupling" else a[k] for k, kind in kinds.items()}
    if op in ("kuramoto_update", "kuramoto_features"):
        rest = {**given, "dt": 0.1, "steps": steps, "seed": 3}
        rest["phase_lag"] = 0.0 if rest["phase_lag"] is None else rest["phase_lag"]
        if op == "kuramoto_update":
            return (kuramoto_update(theta, **rest),)
        out = kuramoto_features(theta, harmonics=h, return_phases=True, **rest)
        assert isinstance(out, tuple)
        return out
    compute = torch.float64 if theta.dtype == torch.float64 else torch.float32
    operands = [
        v if v is None or isinstance(v, Tensor) else torch.tensor(v, dtype=compute, device=theta.device)
        for v in given.values()
    ]
    numbers = (torch.tensor(3), torch.tensor(0.1, dtype=torch.float64), steps)
    if op == "kuramoto_dispatcher":
        return tuple(OPS.kuramoto(theta, *operands, *numbers, h, True))
    saved = [a["features"], None, a["g_features"], a["g_phases"]]
    if plan["which"] == "phases":
        saved, h = [None, None, None, a["g_phases"]], 0
    needed = [need and v is not None for need, v in zip(plan["needed"], (theta, *operands), strict=True)]
    return tuple(OPS.kuramoto_backward(theta, *operands, *numbers, h, *saved, needed))


def _sound(t: Any) -> bool:
    """Whether pure torch, too, may read it: its own operators do not look whether a storage has been freed."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_meta or t._is_zerotensor() or not t.numel():
        return True
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + reach) * t.element_size() <= t.untyped_storage().nbytes()


def _copied(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        return t
    return t.resolve_neg().clone(memory_format=torch.contiguous_format)


def _plain(a: dict[str, Any]) -> dict[str, Any]:
    """Copies whose memory is their own and contiguous."""
    return {k: _copied(v) for k, v in a.items()}


def _touched(plan: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The arguments as the changes leave them; whether the features are those of the other arguments, as a forward pass
    would have saved them (pure torch computes them again)."""
    found = _arguments(plan)
    wanted = [(sorted(found)[k % len(found)] if isinstance(k, int) else k, change) for k, change in plan["changes"]]
    for key, change in sorted(wanted, key=lambda c: c[0] == "features"):
        if key == "features" and plan["op"] == "kuramoto_backward":
            found["features"] = _true_features(plan, found)
        if isinstance(found[key], Tensor) and _sound(found[key]):  # torch itself would read what was freed
            try:
                found[key] = CHANGES[change](found[key])
            except (IndexError, *REFUSED):  # what torch itself refuses does not happen
                continue
    if plan["op"] != "kuramoto_backward":
        return found, True
    if not all(map(_sound, found.values())):
        return found, False
    truth = _true_features(plan, found)
    if not any(key == "features" for key, _ in wanted):
        found["features"] = truth
    try:
        return found, bool(torch.equal(found["features"].resolve_neg().clone().to(truth), truth))
    except REFUSED:
        return found, False


def _true_features(plan: dict[str, Any], found: dict[str, Any]) -> Tensor:
    if not all(map(_sound, found.values())):
        kept: Tensor = found["features"]
        return kept
    try:
        with kssm_kernels.use_backend("torch"):
            return _call({**plan, "op": "kuramoto_dispatcher"}, _plain(found))[0]
    except REFUSED:
        kept = found["features"]
        return kept


@pytest.mark.skipif(not KERNELS, reason="no kernel here")
@settings(max_examples=EXAMPLES)
@given(
    plan=st.fixed_dictionaries(
        {
            "op": st.sampled_from(
                [
                    "order_parameters",
                    "order_parameters_backward",
                    "kuramoto_update",
                    "kuramoto_features",
                    "kuramoto_dispatcher",
                    "kuramoto_backward",
                    "bistable_coupling",
                    "bistable_dispatcher",
                    "bistable_coupling_backward",
                ]
            ),
            "seed": st.integers(0, 3),
            "shape": st.sampled_from(SHAPES),
            "dtype": st.sampled_from(DTYPES),
            "harmonics": st.sampled_from([1, 2, 3, 8, 33, 256]),
            "steps": st.sampled_from([0, 1, 2, 3, 17, 66]),
            "operands": st.tuples(*[st.sampled_from(OPERANDS)] * 4),
            "needed": st.tuples(*[st.booleans()] * 5),
            "which": st.sampled_from(["features", "phases"]),
            "changes": st.lists(
                st.tuples(st.one_of(st.just("theta"), st.integers(0, 7)), changes), min_size=1, max_size=2
            ),
        }
    )
)
@pytest.mark.parametrize("name", KERNELS)
def test_an_error_or_the_answer_of_torch(name: str, plan: dict[str, Any]) -> None:
    if name == "triton" and plan["dtype"] == torch.float64:
        return
    if name != "cpu" and plan["shape"][-1] * (plan["steps"] + plan["harmonics"] // 8) > 300:  # emulated: slow
        return
    given, as_saved = _touched(plan)
    try:
        with kssm_kernels.use_backend(name):
            mine = _call(plan, given)
    except REFUSED:
        return
    if any(t.is_meta for t in mine):
        assert any(isinstance(v, Tensor) and v.is_meta for v in given.values())
        return
    if not as_saved or not all(map(_sound, given.values())):
        return
    with kssm_kernels.use_backend("torch"):
        theirs = _call(plan, _plain(given))
    assert len(mine) == len(theirs)
    slack = {torch.float64: 1e-9, torch.float32: 5e-4}.get(given["theta"].dtype, 0.05)
    for x, y in zip(mine, theirs, strict=True):
        assert x.shape == y.shape
        # a sum of many gradients is as near as its largest part is
        size = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        # features cut to integers have M = 0, which makes NaN of both
        torch.testing.assert_close(x, y, rtol=slack, atol=slack * size, equal_nan=True)

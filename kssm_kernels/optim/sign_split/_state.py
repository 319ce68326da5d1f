"""A parameter's state: made on its first step, kept in its own dtype through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from kssm_kernels.optim.sign_split import _tensors
from kssm_kernels.optim.sign_split._hyper import NAME, OWN
from kssm_kernels.optim.sign_split._rounding import scale_count
from kssm_kernels.optim.sign_split._tensors import Tensors

MEANS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
SHAPED = ("positive", "negative", "temperature", "compensation")  # like the parameter
NAMES = (*SHAPED, "positive_scale", "negative_scale", "cryo", "rms", "step")

SMALLEST_8_BIT = 4096  # elements; below, the scales and the small blocks' loss buy nothing


def _means_dtype(p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = group["state_dtype"]
    if dtype == torch.float32 and p.dtype == torch.float64:
        return torch.float64
    return torch.float32 if dtype == torch.uint8 and p.numel() < SMALLEST_8_BIT else dtype


def make_state(state: dict[str, Any], p: Tensor, group: Mapping[str, Any]) -> None:
    """What the group's options ask for and ``state`` lacks. Options may be switched on between steps."""
    if "positive" not in state:
        dtype = _means_dtype(p, group)
        if dtype == torch.uint8 and _tensors.is_dtensor(p):
            raise NotImplementedError(
                f"{NAME}: 8-bit states of a DTensor are not supported (blocks would straddle shards); "
                "want state_dtype torch.float32 or torch.bfloat16"
            )
        plain = _tensors.is_dtensor(p) or _tensors.is_dense(p)
        layout = torch.preserve_format if plain else torch.contiguous_format
        for name in ("positive", "negative"):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=layout, requires_grad=False)
            if dtype == torch.uint8:
                state[f"{name}_scale"] = torch.zeros(scale_count(p.numel()), dtype=torch.float32, device=p.device)
    if group["temperature"] is not None and "temperature" not in state:
        state["temperature"] = torch.ones_like(state["positive"], dtype=compute_dtype(p))
    if group["param_rounding"] == "kahan" and p.dtype == torch.bfloat16 and "compensation" not in state:
        state["compensation"] = torch.zeros_like(state["positive"], dtype=torch.bfloat16)
    if group["mode"] == "consolidate" and "rms" not in state:
        state["rms"] = torch.zeros((), dtype=torch.float32, device=p.device)
    if is_random(p, state, group) and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)


def is_random(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    low_param = p.dtype == torch.bfloat16 and group["param_rounding"] == "stochastic"
    low_means = state["positive"].dtype in (torch.bfloat16, torch.uint8)
    return low_param or (low_means and group["state_rounding"] == "stochastic")


# ---- what a state must be: it comes from files, from other options and from the user's hands ----


def compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _wanted(p: Tensor, means: torch.dtype) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Shape and dtypes of each state of a parameter whose means have a dtype."""
    here = _tensors.local(p)
    single, scales = (torch.float32,), (scale_count(p.numel()),)
    return {
        "positive": (tuple(p.shape), MEANS),
        "negative": (tuple(p.shape), (means,)),
        "temperature": (tuple(p.shape), (compute_dtype(p),)),
        "compensation": (tuple(p.shape), (torch.bfloat16,)),
        "positive_scale": (scales, single),
        "negative_scale": (scales, single),
        "cryo": ((here.shape[0] if here.dim() else 1,), single),  # one number per row
        "rms": ((), single),
        "step": ((), (torch.int64,)),
    }


def check(name: str, p: Tensor, state: Mapping[str, Any], *, saved: bool = False) -> None:
    """Raises ``ValueError`` for a state that a step of the parameter cannot take, ``RuntimeError`` for one whose memory
    was freed. saved: on any device that has memory.
    """
    which = f"{'the saved state' if saved else 'state'} %r of {name}, of shape {tuple(p.shape)},"
    for key in NAMES:
        if key in state and not isinstance(state[key], Tensor):
            raise ValueError(f"{NAME}: {which % key} must be a tensor, got {type(state[key]).__name__}")
    needed = [key for key in ("positive", "negative") if {"positive", "negative"} & set(state)]
    if needed and state.get("positive", state.get("negative")).dtype == torch.uint8:
        needed += ["positive_scale", "negative_scale"]
    for key in needed:
        if key not in state:
            raise ValueError(f"{NAME}: {which % key} is missing; want it beside {', '.join(map(repr, sorted(state)))}")
    wanted = _wanted(p, state["positive"].dtype if needed else torch.float32)
    for key, (shape, dtypes) in wanted.items():
        t = state.get(key)
        if t is None:
            continue
        good = tuple(t.shape) == shape and t.dtype in dtypes and t.layout == torch.strided
        if good and key in SHAPED:
            good = _tensors.local(t).shape == _tensors.local(p).shape
        lies_well = t.device == p.device or (saved and t.device.type != "meta")
        if not good or not lies_well:
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
            if tuple(t.shape) == shape and key in SHAPED:  # a tensor of each process, or of another kind
                got += f" ({t.layout}, {tuple(_tensors.local(t).shape)} in this process)"
            kinds = " or ".join(map(str, dtypes))
            raise ValueError(f"{NAME}: {which % key} must be {kinds} {shape} on {p.device}, got {got}")
        _tensors.check_storage(which % key, t)


def _settle(name: str, p: Tensor, state: dict[str, Any]) -> None:
    """Lays out anew what a kernel cannot step where it lies: slices, expanded or transposed views, negated ones.

    A step in a copy would be lost. The means lie dense, all else in their order.
    """
    order = state["positive"]
    if not _tensors.is_dtensor(order) and not (_tensors.is_dense(order) and _tensors.lies_like(order, order)):
        state["positive"] = order = order.detach().clone(memory_format=torch.contiguous_format).resolve_neg()
    for key in NAMES:
        t = state.get(key)
        if t is None:
            continue
        shaped = key in SHAPED
        here = _tensors.local(t)
        if _tensors.lies_like(here, _tensors.local(order)) if shaped else here.is_contiguous() and not here.is_neg():
            continue
        if _tensors.is_dtensor(t):
            raise ValueError(
                f"{NAME}: state {key!r} of {name} has stride {here.stride()} in this process; want that of 'positive', "
                f"{_tensors.local(order).stride()}"
            )
        anew = (
            torch.empty_like(order, dtype=t.dtype) if shaped else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        )
        state[key] = anew.copy_(t.detach())


def named(name: str, p: Tensor, state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """A parameter and its states, with what errors call them."""
    return [(name, p), *((f"state {key!r} of {name}", state[key]) for key in NAMES if key in state)]


def check_ours(saved: Any) -> None:
    """Raises ``ValueError`` for what is not a state_dict of this optimizer."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        got = f"{', '.join(map(repr, saved)) or 'nothing'}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"{NAME}: an optimizer's state_dict has 'state' and 'param_groups', got {got}")
    states = [state for state in saved["state"].values() if state]
    foreign = [state for state in states if "positive" not in state and set(state) - set(NAMES)]
    kept = any("positive" in state for state in states)
    few = [group for group in saved["param_groups"] if 2 * len(OWN & set(group)) < len(OWN)]
    if foreign or (few and not kept):
        options = sorted({name for group in few or saved["param_groups"] for name in group} - {"params", "param_names"})
        of_state = sorted({name for state in foreign for name in state})
        raise ValueError(
            f"{NAME}: this is the state_dict of another optimizer: its groups have "
            f"{', '.join(options) or 'no options'}, its state {', '.join(of_state) or 'nothing'}; want one that "
            f"{NAME}.state_dict() returned"
        )


def tensors_of(p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], index: int, name: str) -> Tensors:
    """Flat local tensors of a step; parameter and gradient are copies where they do not lie as the means do.

    Raises ``ValueError`` or ``RuntimeError`` for a gradient or a state, old or replaced, that no step can take.
    """
    _tensors.check_gradient(name, p, g)
    check(name, p, state)
    for label, t in ((name, p), (f"the gradient of {name}", g)):
        _tensors.check_storage(label, t)
    make_state(state, p, group)
    _settle(name, p, state)
    order = _tensors.local(state["positive"])
    here = _tensors.local(p).detach()

    def of(key: str, wanted: bool = True) -> Tensor | None:
        t = state.get(key) if wanted else None
        return None if t is None else _tensors.flat(_tensors.local(t))

    def whole(key: str, wanted: bool = True) -> Tensor | None:
        t: Tensor | None = state.get(key) if wanted else None
        return t

    positive, negative = of("positive"), of("negative")
    assert positive is not None
    assert negative is not None
    rows = here.shape[0] if here.dim() else 1
    scaled = positive.dtype == torch.uint8
    return Tensors(
        _tensors.flat(_tensors.like(here, order)),
        _tensors.flat(_tensors.like(_tensors.local(g).detach(), order)),
        positive,
        negative,
        of("temperature", group["temperature"] is not None),
        of("compensation", group["param_rounding"] == "kahan" and p.dtype == torch.bfloat16),
        whole("positive_scale", scaled),
        whole("negative_scale", scaled),
        whole("cryo"),
        whole("rms", group["mode"] == "consolidate"),
        whole("step", is_random(p, state, group)),
        max(1, here.numel() // max(1, rows)),
        index,
    )


def share_rms(p: Tensor, state: Mapping[str, Any]) -> None:
    """rms over a whole DTensor from those of its shards: one number per parameter to all processes."""
    module, shard = _tensors.distributed_tensors(), cast(Any, p)
    here = shard.to_local().numel()
    squares = state["rms"].double().square() * here
    parts = [module.Partial() if placement.is_shard() else module.Replicate() for placement in shard.placements]
    total: Any = module.DTensor.from_local(squares, shard.device_mesh, parts, run_check=False)
    state["rms"].copy_((total.full_tensor() / max(1, p.numel())).sqrt())


def restored(p: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A loaded state as it was saved, dtypes included, on the parameter's device and in its order of elements.

    torch casts floating-point and integer state alike to the parameter's dtype, which would spoil float32 means of
    bfloat16 parameters, 8-bit codes and counters.
    """
    found: dict[str, Any] = {}
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            found[name] = value
            continue
        target = value if _tensors.is_dtensor(value) else value.to(p.device)
        ordered = not _tensors.is_dtensor(p) and target.shape == p.shape and target.dim() > 0
        if ordered and _tensors.is_dense(p):
            found[name] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(target)
        elif ordered:
            found[name] = target.contiguous().resolve_neg()
        else:
            found[name] = target
        if found[name] is value:
            found[name] = value.clone()
    return found

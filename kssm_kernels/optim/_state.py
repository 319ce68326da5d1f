"""A parameter's state: made on its first step, kept in its own dtype through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from kssm_kernels.optim import _tensors
from kssm_kernels.optim._hyper import NAME
from kssm_kernels.optim._rounding import scale_count
from kssm_kernels.optim._tensors import Tensors

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
        compute = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["temperature"] = torch.ones_like(state["positive"], dtype=compute)
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


def tensors_of(p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], index: int) -> Tensors:
    """Flat local tensors of a step; parameter and gradient are copies where they do not lie as the means do."""
    _tensors.check_gradient(p, g)
    make_state(state, p, group)
    order = _tensors.local(state["positive"])
    here = _tensors.local(p).detach()

    def of(name: str, wanted: bool = True) -> Tensor | None:
        t = state.get(name) if wanted else None
        return None if t is None else _tensors.flat(_tensors.like(_tensors.local(t), order))

    def whole(name: str) -> Tensor | None:
        t: Tensor | None = state.get(name)
        return t

    cryo = whole("cryo")
    rows = here.shape[0] if here.dim() else 1
    if cryo is not None and (cryo.shape != (rows,) or cryo.dtype != torch.float32):
        raise ValueError(
            f"{NAME}: state 'cryo' must be float32 of one number per row, ({rows},), got {cryo.dtype} "
            f"{tuple(cryo.shape)}"
        )
    positive, negative = of("positive"), of("negative")
    assert positive is not None
    assert negative is not None
    return Tensors(
        _tensors.flat(_tensors.like(here, order)),
        _tensors.flat(_tensors.like(_tensors.local(g).detach(), order)),
        positive,
        negative,
        of("temperature", group["temperature"] is not None),
        of("compensation", group["param_rounding"] == "kahan"),
        whole("positive_scale"),
        whole("negative_scale"),
        cryo,
        whole("rms") if group["mode"] == "consolidate" else None,
        whole("step") if is_random(p, state, group) else None,
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
            found[name] = target.contiguous()
        else:
            found[name] = target
        if found[name] is value:
            found[name] = value.clone()
    return found

"""The tensors of one parameter in a step: local, dense, in one order of elements, flat."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.optim._hyper import NAME

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Tensors(NamedTuple):
    """Flat views ``[n]``, in memory order of the means; what a step does not have is None.

    p, g: the parameter (or a dense copy of it) and its gradient. positive, negative: the means P and N, or their 8-bit
    codes, with ``[ceil(n / 256)]`` scales. temperature: in the arithmetic dtype. compensation: bfloat16. cryo: float32
    ``[n / row]``. rms: float32, 0-dim, of P + N of the previous step; it makes the resistance kappa / rms. step: int64,
    0-dim, the counter of the random words. stream: the number of the parameter's random stream.
    """

    p: Tensor
    g: Tensor
    positive: Tensor
    negative: Tensor
    temperature: Tensor | None
    compensation: Tensor | None
    positive_scale: Tensor | None
    negative_scale: Tensor | None
    cryo: Tensor | None
    rms: Tensor | None
    step: Tensor | None
    row: int
    stream: int


def distributed_tensors() -> Any:
    """The module of DTensor and its placements, which was private until torch 2.5."""
    public = importlib.import_module("torch.distributed.tensor")
    return public if hasattr(public, "DTensor") else importlib.import_module("torch.distributed._tensor")


def is_dtensor(t: Tensor) -> bool:
    """Whether t is a DTensor; does not import torch.distributed for tensors that are not."""
    if type(t) in (Tensor, torch.nn.Parameter):
        return False
    return isinstance(t, distributed_tensors().DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that lies in this process; of any other tensor all of it."""
    if type(t) in (Tensor, torch.nn.Parameter):
        return t
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]  # DTensor's, not Tensor's


def is_dense(t: Tensor) -> bool:
    """No gap and no element twice in memory, and rows of the first axis outermost (if it has any)."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return t.shape[0] == 1 or t.stride(0) * t.shape[0] == t.numel()


def flat(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order they have in memory."""
    return t.detach().as_strided((t.numel(),), (1,), t.storage_offset())


def like(t: Tensor, order: Tensor) -> Tensor:
    """t itself if its elements lie in memory as those of the dense ``order`` do; otherwise a copy that does."""
    return t if t.stride() == order.stride() else torch.empty_like(order, dtype=t.dtype).copy_(t)


# ---- memory that no in-place step can work on ----


def _overlaps_itself(t: Tensor) -> bool:
    if t.is_contiguous() or t.numel() < 2:
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _elements(t: Tensor) -> Tensor:
    """Addresses of all elements; only asked for tensors with gaps whose ranges cross."""
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(t.stride(), t.shape, strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    return t.data_ptr() + places.flatten() * t.element_size()


def check_memory(params: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` where two elements of the parameters share memory: they would be stepped twice."""
    spans: list[tuple[str, int, int, int, Tensor]] = []
    for i, p in enumerate(params):
        t = local(p)
        if t.numel() == 0 or t.layout != torch.strided or t.device.type == "meta":
            continue
        if _overlaps_itself(t):
            raise ValueError(
                f"{NAME}: parameter {i} of shape {tuple(t.shape)} has stride {t.stride()}: elements that share memory "
                "(expanded?) cannot be stepped in place; want a parameter of its own memory (clone it)"
            )
        last = sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
        begin = t.data_ptr()
        spans.append((str(t.device), begin, begin + (last + 1) * t.element_size(), i, t))
    spans.sort(key=lambda span: span[:4])
    for (device, _, end, i, t), (next_device, begin, _, j, other) in itertools.pairwise(spans):
        if device != next_device or begin >= end:
            continue
        if (is_dense(t) and is_dense(other)) or bool(torch.isin(_elements(t), _elements(other)).any()):
            raise ValueError(f"{NAME}: parameters {i} and {j} share memory; want parameters that do not overlap")


def check_gradient(p: Tensor, g: Tensor) -> None:
    if g.layout != torch.strided:
        raise RuntimeError(f"{NAME}: sparse gradients are not supported, got layout {g.layout}; want a dense gradient")
    if g.device != p.device or g.shape != p.shape:
        got, want = f"{tuple(g.shape)} on {g.device}", f"{tuple(p.shape)} on {p.device}"
        raise RuntimeError(f"{NAME}: a gradient must have its parameter's shape and device, {want}, got {got}")


def check_param(p: Any) -> None:
    if not isinstance(p, Tensor):
        return  # torch says so
    if p.is_complex():
        raise TypeError(f"{NAME}: complex parameters are not supported, got {p.dtype}; want torch.view_as_real of it")
    if p.dtype not in PARAM_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in PARAM_DTYPES)
        raise TypeError(f"{NAME}: parameters must be one of {names}, got {p.dtype}")
    if p.layout != torch.strided:
        raise TypeError(f"{NAME}: sparse parameters are not supported, got layout {p.layout}; want a dense one")

"""The tensors of one parameter in a step: local, dense, in one order of elements, flat."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.optim.sign_split._hyper import NAME

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Tensors(NamedTuple):
    """Flat views ``[n]``, in memory order of the means; what a step does not have is None.

    p, g: the parameter (or a dense copy of it) and its gradient. positive, negative: the means P and N, or their 8-bit
    codes, with ``[ceil(n / 256)]`` scales. temperature: in the compute dtype. compensation: bfloat16. cryo: float32
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


def is_plain(t: Tensor) -> bool:
    """Whether t is of no subclass of tensors that may mean something of its own."""
    return type(t) in (Tensor, torch.nn.Parameter)


def is_dtensor(t: Tensor) -> bool:
    """Whether t is a DTensor; does not import torch.distributed for tensors that are not."""
    if is_plain(t):
        return False
    return isinstance(t, distributed_tensors().DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that lies in this process; of any other tensor all of it."""
    if is_plain(t):
        return t
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]  # DTensor's, not Tensor's


def _storage(t: Tensor) -> tuple[torch.UntypedStorage, bool] | None:
    """A tensor's storage and whether it is large enough for its shape; None without one: sparse, or a wrapper."""
    try:
        storage = t.untyped_storage()
        last = t.storage_offset() + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
        return storage, t.numel() == 0 or storage.nbytes() >= (last + 1) * t.element_size()
    except (RuntimeError, NotImplementedError):
        return None


def has_memory(t: Tensor) -> bool:
    """Whether a tensor's elements lie where its address says.

    Not on the meta device, in a fake tensor (its storage is there), in a wrapper (a subclass around other tensors, or
    functorch's under vmap and grad), or where the storage has been freed.
    """
    found = _storage(t)
    if found is None or not found[1]:
        return False
    return t.numel() == 0 or (found[0].device == t.device and t.device.type != "meta" and t.data_ptr() != 0)


def check_storage(name: str, t: Tensor) -> None:
    """Raises ``RuntimeError`` where a storage was resized below its tensor: torch's own operators would read on."""
    found = _storage(local(t))
    if found is not None and not found[1]:
        raise RuntimeError(
            f"{NAME}: {name} has {t.dtype} {tuple(t.shape)} in a storage of {found[0].nbytes()} bytes, which "
            "is too small for it (freed between steps?); want its memory back before the step"
        )


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


def lies_like(t: Tensor, order: Tensor) -> bool:
    """Whether memory holds t's elements in the places of ``order``'s, and their values as they are.

    The stride of an axis of one element says nothing. A view that is to be negated when it is read (torch's negative
    bit, as of ``z.conj().imag``) holds the opposite of its values.
    """
    strides = zip(t.stride(), order.stride(), t.shape, strict=True)
    return not t.is_neg() and (t.numel() == 0 or all(a == b for a, b, size in strides if size > 1))


def like(t: Tensor, order: Tensor) -> Tensor:
    """t itself if its elements lie in memory as those of the dense ``order`` do; otherwise a copy that does."""
    return t if lies_like(t, order) else torch.empty_like(order, dtype=t.dtype).copy_(t)


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


def check_memory(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ``ValueError`` where two elements of the named tensors share memory: they would be stepped twice."""
    spans: list[tuple[str, int, int, int]] = []
    for i, (name, given) in enumerate(tensors):
        t = local(given)
        if t.numel() == 0 or t.layout != torch.strided or not has_memory(t):
            continue
        if _overlaps_itself(t):
            raise ValueError(
                f"{NAME}: {name} of shape {tuple(t.shape)} has stride {t.stride()}: elements that share memory "
                "(expanded?) cannot be stepped in place; want a tensor of its own memory (clone it)"
            )
        last = sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
        begin = t.data_ptr()
        spans.append((str(t.device), begin, begin + (last + 1) * t.element_size(), i))
    spans.sort()
    for (device, _, end, i), (next_device, begin, _, j) in itertools.pairwise(spans):
        if device != next_device or begin >= end:
            continue
        t, other = local(tensors[i][1]), local(tensors[j][1])
        if (is_dense(t) and is_dense(other)) or bool(torch.isin(_elements(t), _elements(other)).any()):
            first, second = (tensors[k][0] for k in sorted((i, j)))
            word = "parameter "
            both = f"{first} and {second}"
            if first.startswith(word) and second.startswith(word):
                both = f"parameters {first.removeprefix(word)} and {second.removeprefix(word)}"
            raise ValueError(f"{NAME}: {both} share memory; want tensors that do not overlap")


def check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    if g.layout != torch.strided:
        raise RuntimeError(f"{NAME}: sparse gradients are not supported, got layout {g.layout}; want a dense gradient")
    if g.device != p.device or g.shape != p.shape or local(g).shape != local(p).shape:
        got, want = (f"{tuple(t.shape)} (here {tuple(local(t).shape)}) on {t.device}" for t in (g, p))
        raise RuntimeError(
            f"{NAME}: the gradient of {name} must have its parameter's shape and device, {want}, got {got}"
        )
    if g.dtype not in PARAM_DTYPES:
        raise RuntimeError(f"{NAME}: the gradient of {name} must be real and floating-point, got {g.dtype}")


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

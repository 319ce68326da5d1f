"""What stands behind every address that is handed to native code: the one place that checks it.

A kernel gets addresses, sizes and strides; whatever they promise must hold, or it reads and writes what is not ours.
Tensors are *strided* (read where they lie, with their own strides) or *whole* (contiguous, of one exact shape).
"""

from __future__ import annotations

import torch
from torch import Tensor


def strided(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose memory holds its values. Raises ``RuntimeError`` if there is no such memory.

    torch negates ``z.conj().imag`` lazily, by a bit, and gives zeros no memory at all where forward mode makes them; a
    storage may have been emptied under a tensor (``resize_(0)``, as sharded training does).
    """
    if tensor.is_neg() or tensor._is_zerotensor():
        tensor = tensor.resolve_neg().clone()
    # not tensor.nbytes, which torch.compile cannot trace where a size is symbolic
    reach = tensor.numel()
    if reach and not tensor.is_contiguous():
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    wanted, held = (tensor.storage_offset() + reach) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if wanted > held and reach:
        shape = tuple(tensor.shape)
        raise RuntimeError(f"kssm_kernels: {name} of shape {shape} needs a storage of {wanted} bytes, has {held}")
    return tensor


def rows_of(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """[..., N] as a matrix, copied only if it must be: (owner of the memory, rows, row stride, column stride)."""
    n = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor, tensor.numel() // n, n, 1
    flat = tensor.reshape(-1, n)
    row_stride, column_stride = flat.stride()
    return flat, flat.shape[0], row_stride, column_stride


def on_one_device(*tensors: Tensor | None) -> None:
    """For the shapes of a call: torch asks for them, too, where one tensor is on the meta device and others are not."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"kssm_kernels: tensors must be on one device, got {', '.join(sorted(devices))}")


def whole(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor as contiguous memory of ``shape``, of ``like``'s device and dtype (or ``dtype``)."""
    wanted = like.dtype if dtype is None else dtype
    if tensor.shape != shape or tensor.device != like.device:
        raise RuntimeError(
            f"kssm_kernels: {name} must have shape {tuple(shape)} on {like.device}, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    return strided(name, tensor).to(wanted).contiguous()

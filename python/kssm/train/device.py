"""Devices: which one a name means, their generators, and the memory that their caching allocators hold.

Every function takes any device. What a device or this torch does not have is left out, never an error: the CPU has no
caching allocator and its work is done when a call returns.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from kssm.options import UsageError

__all__ = [
    "memory_in_use",
    "release_memory",
    "resolve_device",
    "restore_generators",
    "save_generators",
    "synchronize",
    "total_memory",
]

ACCELERATORS = ("cuda", "mps", "xpu")  # ROCm's name is cuda too


def resolve_device(name: str) -> torch.device:
    """The device a name means, after one number went there and back; raises UsageError where that fails.

    ``auto`` is cuda if there is one, else cpu.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _backend(device: torch.device) -> ModuleType | None:
    """``torch.cuda``, ``torch.mps`` or ``torch.xpu``; None for any other device, or if this torch cannot run it."""
    if device.type not in ACCELERATORS:
        return None
    # torch.mps has an is_available of its own from 2.5 on
    asked = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    if asked is None or not asked.is_available():
        return None
    backend: ModuleType = getattr(torch, device.type)
    return backend


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was asked to do.

    >>> synchronize(torch.device("cpu"))
    """
    backend = _backend(device)
    if device.type == "mps" and backend is not None:
        backend.synchronize()  # there is one such device, and the function takes none
    elif backend is not None:
        backend.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Gives the device's memory that no tensor occupies back to the system.

    >>> release_memory(torch.device("cpu"))
    """
    backend = _backend(device)
    if backend is not None:
        backend.empty_cache()


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that tensors occupy on the device; None where torch does not count them.

    >>> memory_in_use(torch.device("cpu")) is None
    True
    """
    backend = _backend(device)
    if device.type == "mps" and backend is not None:
        return int(backend.current_allocated_memory())
    if backend is not None and hasattr(backend, "memory_allocated"):  # torch.xpu has it from 2.5 on
        return int(backend.memory_allocated(device))
    return None


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device: its own, or the machine's where it has none of its own.

    >>> total_memory(torch.device("cpu")) > 2**20
    True
    """
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def save_generators(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a run on the device draws from: the CPU's, and the device's own if it has one.

    >>> sorted(save_generators(torch.device("cpu")))
    ['cpu']
    """
    states = {"cpu": torch.get_rng_state()}
    backend = _backend(device)
    if backend is not None:
        states[device.type] = backend.get_rng_state(device)
    return states


def restore_generators(device: torch.device, states: dict[str, Tensor]) -> None:
    """Inverse of :func:`save_generators`; a generator without a state in ``states`` keeps its own.

    >>> states = save_generators(torch.device("cpu"))
    >>> a = torch.rand(3)
    >>> restore_generators(torch.device("cpu"), states)
    >>> torch.equal(torch.rand(3), a)
    True
    """
    torch.set_rng_state(states["cpu"])
    backend = _backend(device)
    if backend is not None and device.type in states:
        backend.set_rng_state(states[device.type], device)

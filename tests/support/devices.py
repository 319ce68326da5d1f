"""Which backends run on which device, for tests and benches; the device that ``-m gpu`` runs on."""

from __future__ import annotations

import torch

import kssm_kernels
from kssm_kernels import backends
from kssm_kernels.backends import cuda as library
from kssm_kernels.backends import triton


def backends_of(device: str) -> tuple[str, ...]:
    """Backends that can run on tensors of a device of type ``device`` here."""
    found = []
    for name in kssm_kernels.available_backends():
        on_cpu = {"cpu": True, "cuda": library.on_host(), "triton": triton.interpreting()}.get(name)
        if on_cpu is None or on_cpu == (device == "cpu"):
            found.append(name)
    return tuple(found)


def device() -> str | None:
    """``cuda`` (NVIDIA and ROCm) or ``xpu`` where there is one."""
    xpu = getattr(torch, "xpu", None)  # torch 2.4 has it, 2.3 had not; builds without it answer False
    return "cuda" if torch.cuda.is_available() else "xpu" if xpu is not None and xpu.is_available() else None


def device_or_skip() -> str:
    import pytest  # here: programs that measure import this file too, and run without pytest

    found = device()
    if found is None:
        pytest.skip("no CUDA, ROCm or XPU device")
    return found


def serves(backend: str, dtype: torch.dtype | None, op: str | None = None) -> bool:
    """Triton's kernels compute in float32: float64 goes to another backend, as does an op without kernels for one."""
    return (backend != "triton" or dtype != torch.float64) and (op is None or backends.no_kernels(op, backend) is None)

"""Triton, which is imported when a kernel is first asked for."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# What the kernels use and older releases lack; probed, for builds of one version number differ.
_LANGUAGE = ("fma", "sqrt_rn", "div_rn", "umulhi", "range", "philox")


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1: the kernels then run in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@functools.lru_cache(maxsize=2)
def _status(interpreted: bool) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    xpu = getattr(torch, "xpu", None)
    if not (interpreted or torch.cuda.is_available() or (xpu is not None and xpu.is_available())):
        return False, "no CUDA, ROCm or XPU device, and TRITON_INTERPRET is not 1"
    try:
        import triton
        import triton.language
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    missing = [name for name in _LANGUAGE if not hasattr(triton.language, name)]
    if missing:
        return False, f"Triton {triton.__version__} lacks {', '.join(missing)}"
    return True, f"Triton {triton.__version__}{', interpreted on the CPU' if interpreted else ''}"


def status() -> tuple[bool, str]:
    """Whether the kernels can run on this machine, and what runs them or why not."""
    return _status(interpreting())


def refuses(tensor: torch.Tensor) -> str | None:
    if tensor.device.type not in (("cpu",) if interpreting() else ("cuda", "xpu")):
        return f"the tensors are on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the Triton kernels compute in float32 and the tensors are float64"
    return None

"""The compiled SIMD extension, ``_kssm_kernels_cpu``: imported with the package."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import torch  # before the extension, which then shares torch's OpenMP runtime

from kssm_kernels.backends.calls import ABI


def _import() -> ModuleType:
    try:
        return importlib.import_module("_kssm_kernels_cpu")
    except ImportError as error:
        if "GOMP" not in str(error):
            raise
    # The extension leaves its OpenMP symbols to whatever runtime torch has loaded. A torch built without one
    # (or one that hides it) leaves them unresolved: then, and only then, the system's runtime serves.
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("_kssm_kernels_cpu")


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = _import()
    except (ImportError, OSError) as error:
        if str(error).startswith("KSSM_ISA"):  # asked for by name: no other set may stand in, nor pure torch
            raise
        return None, f"the compiled CPU extension cannot be loaded: {error}"
    if module.ABI != ABI:
        return None, (
            f"the compiled CPU extension has interface {module.ABI}, this source wants {ABI}: run pip install . again"
        )
    return module, f"compiled CPU extension, running {module.instruction_set()} ({module.BUILD})"


extension: Any  # the module or None; its functions have no stub
extension, _reason = _load()


def status() -> tuple[bool, str]:
    return extension is not None, _reason


def refuses(tensor: torch.Tensor) -> str | None:
    return None if tensor.is_cpu else f"the tensors are on {tensor.device}"

"""Which backend runs a call, and why.

The order is: an explicit :func:`use_backend`, then the environment variable ``KSSM_BACKEND``, then the
default of the tensor's device. ``cpu`` is the compiled SIMD extension, ``torch`` the pure-torch path that
runs on every device. An explicit request that cannot be served raises; it never falls through to another.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # before the extension, which then shares torch's OpenMP runtime

__all__ = ["available_backends", "build_info", "cpu_extension", "select", "use_backend"]

BACKENDS = ("cpu", "torch")

# Bumped with every change of a C++ signature. The extension carries the number it was built with, so that a
# source checkout that shadows an older installed extension says so instead of crashing.
ABI = 2

_explicit: list[str] = []


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got backend {name!r}, want one of {', '.join(map(repr, BACKENDS))}")
    return name


_environment = os.environ.get("KSSM_BACKEND", "")
if _environment:
    _checked(_environment, "environment variable KSSM_BACKEND")


def _import_extension() -> ModuleType:
    try:
        return importlib.import_module("_kssm_kernels_cpu")
    except ImportError as error:
        if "GOMP" not in str(error):
            raise
    # The extension leaves its OpenMP symbols to whatever runtime torch has loaded. A torch built without one
    # (or one that hides it) leaves them unresolved: then, and only then, the system's runtime serves.
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("_kssm_kernels_cpu")


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        module = _import_extension()
    except (ImportError, OSError) as error:
        if str(error).startswith("KSSM_ISA"):  # asked for by name: no other set may stand in, nor pure torch
            raise
        return None, f"the compiled CPU extension cannot be loaded: {error}"
    if module.ABI != ABI:
        return None, (
            f"the compiled CPU extension has interface {module.ABI}, this source wants {ABI}: run pip install . again"
        )
    return module, f"compiled CPU extension, running {module.instruction_set()} ({module.BUILD})"


cpu_extension: Any  # the module or None; its functions have no stub
cpu_extension, _cpu_reason = _load_cpu()
_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"kssm_kernels runs on the slower pure-torch path: {_cpu_reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here, fastest first."""
    return BACKENDS if cpu_extension is not None else ("torch",)


def build_info() -> str:
    """One line: what was built, what this process uses."""
    return f"cpu: {_cpu_reason}; torch: pure-torch path for every other device"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on one backend (process-wide, not per thread).

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` for a backend that cannot run here.

    >>> import torch, kssm_kernels
    >>> with kssm_kernels.use_backend("torch"):
    ...     kssm_kernels.order_parameters(torch.zeros(3), 1)
    tensor([1., 0., 1.])
    """
    _checked(name, "use_backend")
    if name == "cpu" and cpu_extension is None:
        raise RuntimeError(f"use_backend('cpu'): {_cpu_reason}")
    _explicit.append(name)
    try:
        yield
    finally:
        _explicit.pop()


def select(op: str, tensor: torch.Tensor) -> str:
    """The backend that runs ``op`` on ``tensor``'s device; raises if an explicit request cannot be served there."""
    wanted = _explicit[-1] if _explicit else _environment
    if not wanted:
        if not tensor.is_cpu:
            return "torch"
        if cpu_extension is None:
            _warn_once()
            return "torch"
        return "cpu"
    if wanted == "cpu":
        if not tensor.is_cpu:
            raise RuntimeError(f"{op}: backend 'cpu' was asked for, but the tensors are on {tensor.device}")
        if cpu_extension is None:
            raise RuntimeError(f"{op}: backend 'cpu' was asked for, but {_cpu_reason}")
    return wanted

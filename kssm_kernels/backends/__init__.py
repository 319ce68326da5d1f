"""Which backend runs a call, and why.

The order is: an explicit :func:`use_backend`, then the environment variable ``KSSM_BACKEND``, then the default of the
tensor's device. An explicit request that cannot be served raises; it never falls through to another.

    cuda     CUDA C++ kernels, a library of their own (csrc/cuda): NVIDIA devices
    triton   Triton kernels: NVIDIA, AMD (ROCm) and Intel (XPU) devices; CPU tensors under TRITON_INTERPRET=1
    cpu      the compiled SIMD extension: CPU tensors
    torch    the pure-torch path: every device

Each has a loader here. ``status()`` says whether it can run in this process, and what it is or why not;
``refuses(tensor)`` says why it cannot run on such a tensor, or None. An op's folder has its kernels, a module for each
backend that runs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch

from kssm_kernels.backends import cpu, cuda, pure_torch, triton

__all__ = ["available_backends", "build_info", "cpu_extension", "explain", "kernel", "select", "use_backend"]


class Loader(Protocol):
    def status(self) -> tuple[bool, str]: ...

    def refuses(self, tensor: torch.Tensor) -> str | None: ...


LOADERS: dict[str, Loader] = {"cuda": cuda, "triton": triton, "cpu": cpu, "torch": pure_torch}
BACKENDS = tuple(LOADERS)
# What a device runs unless told otherwise, best first. CUDA before Triton on NVIDIA devices: docs/gpu_compile.md.
DEFAULTS = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch"), "xpu": ("triton", "torch")}
# An op's folder has a module of kernels for each backend that runs it: _torch, and any of _cpu, _cuda and _triton.
OPS = {
    "order_parameters": "ops.order_parameters",
    "kuramoto_update": "ops.kuramoto",
    "kuramoto_features": "ops.kuramoto",
    "bistable_coupling": "ops.bistable_coupling",
    "oscillator_scan": "ops.oscillator_scan",
    "oscillator_step": "ops.oscillator_scan",
    "sign_split_ema": "optim.sign_split",
}

cpu_extension = cpu.extension

_explicit = ""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got backend {name!r}, want one of {', '.join(map(repr, BACKENDS))}")
    return name


_environment = os.environ.get("KSSM_BACKEND", "")
if _environment:
    _checked(_environment, "environment variable KSSM_BACKEND")


# ---- what can run ----


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(name for name in BACKENDS if LOADERS[name].status()[0])


def build_info() -> str:
    """One line: what was built, what can run here, and why not the rest."""
    return "; ".join(f"{name}: {LOADERS[name].status()[1]}" for name in BACKENDS)


@functools.cache
def no_kernels(op: str, backend: str) -> str | None:
    found = importlib.util.find_spec(f"kssm_kernels.{OPS[op]}._{backend}")
    return None if found else f"{op} has no kernels for it"


def _unservable(op: str, backend: str, tensor: torch.Tensor) -> str | None:
    """Why a backend cannot run ``op`` on such a tensor; None if it can."""
    usable, reason = LOADERS[backend].status()
    return (LOADERS[backend].refuses(tensor) or no_kernels(op, backend)) if usable else reason


# ---- the choice ----


class use_backend:  # noqa: N801  # read as a function: use_backend("torch")
    """Run every op on one backend from here on, or inside a ``with`` block (process-wide, not per thread).

    As a context manager it restores on leaving what was in force before. ``use_backend(None)`` returns to the default
    of each device.

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` for a backend that cannot run on this machine.

    >>> import torch, kssm_kernels
    >>> with kssm_kernels.use_backend("torch"):
    ...     kssm_kernels.order_parameters(torch.zeros(3), 1)
    tensor([1., 0., 1.])
    """

    def __init__(self, name: str | None) -> None:
        global _explicit
        if name is not None:
            _checked(name, "use_backend")
            usable, reason = LOADERS[name].status()
            if not usable:
                raise RuntimeError(f"use_backend({name!r}): {reason}")
        self._before, _explicit = _explicit, name or ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _explicit
        _explicit = self._before


_cpu_runs = cpu.status()[0]
_fallen_back: set[str] = set()
_automatic: dict[tuple[str, str, torch.dtype], str] = {}


def _default(op: str, tensor: torch.Tensor) -> str:
    """The best backend that serves such a tensor; says once where that is the slow path of a device that has better."""
    key = (op, tensor.device.type, tensor.dtype)
    if key not in _automatic:
        order = DEFAULTS.get(tensor.device.type, ("torch",))
        reasons = {name: _unservable(op, name, tensor) for name in order}
        _automatic[key] = next(name for name in order if reasons[name] is None)
        if _automatic[key] == "torch" and len(order) > 1 and tensor.device.type not in _fallen_back:
            _fallen_back.add(tensor.device.type)
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            warnings.warn(f"kssm_kernels runs on the slower pure-torch path: {why}", RuntimeWarning, stacklevel=4)
    return _automatic[key]


def select(op: str, tensor: torch.Tensor) -> str:
    """The backend that runs ``op`` on such a tensor; raises if an explicit request cannot be served."""
    wanted = _explicit or _environment
    if not wanted:
        return "cpu" if _cpu_runs and tensor.is_cpu and not no_kernels(op, "cpu") else _default(op, tensor)
    reason = _unservable(op, wanted, tensor)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {wanted!r} was asked for, but {reason}")
    return wanted


# import_module takes 0.6 us where a module is loaded, this 0.06
_kernels: dict[str, dict[str, Any]] = {backend: {} for backend in BACKENDS}
_of_cpu = _kernels["cpu"]


def kernel(op: str, tensor: torch.Tensor) -> Any:
    """The module of the kernels that run ``op`` on such a tensor; raises if an explicit request cannot be served."""
    if tensor.is_cpu and not _explicit and not _environment and op in _of_cpu:  # the commonest, kept cheap
        return _of_cpu[op]
    backend = select(op, tensor)
    return _kernels[backend].get(op) or _load(op, backend)


def _load(op: str, backend: str) -> ModuleType:
    """Imported on first use, so that importing the package costs no Triton and no driver."""
    module = _kernels[backend][op] = importlib.import_module(f"kssm_kernels.{OPS[op]}._{backend}")
    return module


def explain(op: str | Callable[..., Any], *tensors: torch.Tensor) -> str:
    """What would run ``op`` on these tensors, and why the others would not, one line per backend.

    Args:
        op: one of the ops, or its name.
        tensors: the call's tensors; the first one decides.

    Raises ``ValueError`` for an unknown op, ``TypeError`` without a tensor.

    >>> import torch, kssm_kernels
    >>> with kssm_kernels.use_backend("torch"):
    ...     print(kssm_kernels.explain("order_parameters", torch.zeros(3)).splitlines()[0])
    order_parameters on cpu, float32: torch, chosen by use_backend
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"explain: got op {name!r}, want one of {', '.join(map(repr, OPS))}")
    if not tensors or not isinstance(tensors[0], torch.Tensor):
        raise TypeError("explain: wants the tensors of the call, the phases (or params) first")
    first = tensors[0]
    order = DEFAULTS.get(first.device.type, ("torch",))
    reasons = {backend: _unservable(name, backend, first) for backend in BACKENDS}
    wanted = _explicit or _environment
    if wanted:
        origin = "use_backend" if _explicit else "the environment variable KSSM_BACKEND"
        chosen = wanted if reasons[wanted] is None else ""
        what = f"{wanted}, chosen by {origin}" if chosen else f"an error: {origin} asks for {wanted}, which cannot run"
    else:
        chosen = next(backend for backend in order if reasons[backend] is None)
        what = f"{chosen}, the best that can run of this device's {', '.join(order)}"
    lines = [f"{name} on {first.device}, {str(first.dtype).removeprefix('torch.')}: {what}"]
    for backend in BACKENDS:
        reason = reasons[backend]
        if reason is not None:
            lines.append(f"  {backend}: cannot run: {reason}")
        elif backend == chosen:
            lines.append(f"  {backend}: runs: {LOADERS[backend].status()[1]}")
        elif backend in order:
            lines.append(f"  {backend}: could run: {LOADERS[backend].status()[1]}; use_backend({backend!r}) chooses it")
        else:
            lines.append(f"  {backend}: could run; only use_backend({backend!r}) chooses it here")
    if name != "sign_split_ema":
        lines[-1] += "; forward mode (torch.func.jvp, jacfwd) computes its tangents here, whatever runs the call"
    return "\n".join(lines)

"""The library of CUDA C++ kernels, ``_kssm_kernels_cuda``: found and opened on first use, never at import.

It has a C interface (csrc/calls.h): a function takes the address of packed fields, how many bytes they are, a device
ordinal and a stream, and returns 0 or a code that ``kssm_cuda_error`` explains.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import runpy
from pathlib import Path

import torch
from torch import Tensor

from kssm_kernels.backends.calls import ABI

_opened: ctypes.CDLL | None = None
_asked_for: Path | None = None  # None: the installed build
_reason = ""  # why it cannot be opened; empty: not tried yet


def _find() -> Path:
    spec = importlib.util.find_spec("_kssm_kernels_cuda")
    if spec is None or spec.origin is None:
        raise RuntimeError("the CUDA library is not installed: run pip install . where nvcc is")
    if spec.origin.endswith(".py"):  # what the installation leaves in place of a library it could not build
        try:
            runpy.run_path(spec.origin)
        except ImportError as error:
            raise RuntimeError(f"the CUDA library is not installed: {error}") from error
    return Path(spec.origin)


def _open(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
        for name in ("build", "error", "abi"):
            getattr(found, f"kssm_cuda_{name}").restype = ctypes.c_char_p
        abi = found.kssm_cuda_abi().decode()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the CUDA library cannot be loaded: {error}") from error
    if abi != ABI:
        raise RuntimeError(f"the CUDA library has interface {abi}, this source wants {ABI}: run pip install . again")
    return found


def library() -> ctypes.CDLL:
    """The open library. Raises ``RuntimeError`` where there is none, always with the first attempt's reason."""
    global _opened, _reason
    if _opened is None:
        if not _reason:
            try:
                _opened = _open(_find())
            except RuntimeError as error:
                _reason = str(error)
        if _opened is None:
            raise RuntimeError(_reason)
    return _opened


def use(path: Path | None) -> Path | None:
    """Open another build from here on; None: the installed one. Returns what was asked for before. For tests."""
    global _opened, _reason, _asked_for
    before = _asked_for
    _opened, _reason, _asked_for = None if path is None else _open(path), "", path
    _function.cache_clear()
    _usable.cache_clear()
    return before


def on_host() -> bool:
    """Whether this is the build of tests/support/cuda_on_host, whose kernels run on CPU tensors."""
    return _opened is not None and bool(_opened.kssm_cuda_on_host())


@functools.lru_cache(maxsize=1)
def _usable() -> tuple[bool, str]:
    try:
        found = library()
    except RuntimeError as error:
        return False, str(error)
    built = found.kssm_cuda_build().decode()
    if found.kssm_cuda_device_count() == 0:
        return False, f"the CUDA library ({built}) finds no device, or a driver too old for it"
    if not on_host() and torch.version.cuda is None:
        return False, "this torch is built without CUDA"
    return True, f"CUDA C++ kernels ({built})"


def status() -> tuple[bool, str]:
    """Whether the kernels can run in this process, and why, or what they are, in a line."""
    return _usable()


@functools.cache
def _function(name: str) -> ctypes._CFuncPtr:  # type: ignore[name-defined]  # the stub has another private name
    function = getattr(library(), f"kssm_cuda_{name}")
    function.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
    return function


def call(name: str, packed: bytes, tensor: Tensor) -> None:
    """Runs a launcher on the device and current stream of ``tensor``; ``packed``: its fields (calls.py)."""
    if tensor.is_cuda:
        device, stream = tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    else:
        device, stream = -1, 0
    code = _function(name)(packed, len(packed), device, stream)
    if code:
        raise RuntimeError(f"CUDA kernel {name}: {library().kssm_cuda_error(code).decode()}")


def refuses(tensor: Tensor) -> str | None:
    served = "cpu" if on_host() else "cuda"
    return None if tensor.device.type == served else f"the tensors are on {tensor.device}"

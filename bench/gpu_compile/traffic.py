"""Bytes that each case's kernels load from and store to global memory, counted while they run on the CPU.

``TRITON_INTERPRET=1 python -m bench.gpu_compile.traffic`` prints them as JSON: the Triton kernels by their interpreter,
the CUDA kernels in the build of tests/support/cuda_on_host. Each byte counts once a launch: what is read again, or by
several threads, comes from a cache.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.gpu_compile.cases import CASES, Case
from kssm_kernels import backends
from kssm_kernels.backends import cuda as library
from tests.support.cuda_on_host.build import build

ROWS = 8  # per row, bytes do not depend on the number of rows


def _in_triton() -> Callable[[], int]:
    """Starts counting; the function it returns reads and clears the count."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    counted = 0
    touched: dict[tuple[str, int], list[Any]] = {}  # addresses by kind and size, of this launch

    def touch(kind: str, ptrs: Any, mask: Any) -> None:
        size = ptrs.dtype.scalar.element_ty.primitive_bitwidth // 8
        touched.setdefault((kind, size), []).append(ptrs.data[mask.data])

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        touch("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        result = run(self, *args, **kwargs)
        counted += sum(size * len(np.unique(np.concatenate(found))) for (_, size), found in touched.items())
        touched.clear()
        return result

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    interpreter.GridExecutor.__call__ = launch

    def read() -> int:
        nonlocal counted
        found, counted = counted, 0
        return found

    return read


def _in_cuda() -> Callable[[], int]:
    library.use(build())

    def read() -> int:
        both = (ctypes.c_int64 * 2)()
        library.library().kssm_cuda_bytes(both)
        return both[0] + both[1]

    return read


def _module(backend: str, op: str) -> Any:
    return importlib.import_module(f"kssm_kernels.{backends.OPS[op]}._{backend}")


def rows_of(case: Case) -> int:
    return min(ROWS, case.rows)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, int]] = {}
    for backend, start in (("triton", _in_triton), ("cuda", _in_cuda)):
        read = start()
        found[backend] = {}
        for case in (c for c in CASES if backend in c.backends):
            for dtype in (torch.float32, torch.bfloat16):
                read()
                modules = functools.partial(_module, backend)
                case.call(modules, rows_of(case), dtype)
                found[backend][f"{case.name}, {str(dtype).removeprefix('torch.')}"] = read()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

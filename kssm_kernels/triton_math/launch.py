"""How many phases a program takes, and the device it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from kssm_kernels.backends.triton import interpreting

PER_THREAD = 8  # phases: two loads of 128 bits in float32, one in 16 bits
# Left to itself the assembler stops at 128 and spills (8 bytes in the forward kernel for sm_100, 24 in the backward
# kernel for sm_80), for an occupancy that these kernels do not need: twelve warps have room all the same.
REGISTERS = 168


def lanes() -> int:
    """Threads of a warp: 32, and 64 on some AMD devices."""
    return 32 if interpreting() else int(triton.runtime.driver.active.get_current_target().warp_size)


def per_warp() -> int:
    """Phases that a warp holds."""
    return PER_THREAD * lanes()


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def tile_of(n: int, largest: int = 256) -> tuple[int, int]:
    """(rows, oscillators) of a program's tile for rows of n: what one warp holds; or one longer row, several warps'.

    Triton lays warps along a row before it lays them along rows, and a row shared by warps has its sums added through
    memory, behind barriers. So a program of short rows is one warp.
    """
    block = min(power_of_two(n, 16), largest)
    return max(1, per_warp() // block), block


def warps_of(rows: int, block: int, per_thread: int = PER_THREAD) -> int:
    return max(1, rows * block // (lanes() * per_thread))


Grid = int | Callable[[Mapping[str, Any]], tuple[int]]


def launch(kernel: Any, grid: Grid, on: Tensor, *args: Any, **meta: Any) -> None:
    """Runs a kernel on the device (and current stream) of ``on``.

    Fusing multiplications with additions is off: the noise must round as it does on every other backend, and where a
    fused one is meant the kernels say so.
    """
    sizes = (grid,) if isinstance(grid, int) else grid
    if on.is_cuda and torch.version.hip is None:
        meta["maxnreg"] = REGISTERS
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[sizes](*args, **meta, enable_fp_fusion=False)


def tuned(key: list[str]) -> Callable[[Any], Any]:
    """Autotunes WARPS, the warps of a program with their share of rows, of a kernel that may run twice without harm.

    Only for a kernel without sums: what a warp adds up must not depend on what was fastest. In the interpreter there is
    nothing to time, and one choice.
    """
    choices = (4,) if interpreting() else (4, 1, 2, 8)
    decorate: Callable[[Any], Any] = triton.autotune(
        [triton.Config({"WARPS": warps}, num_warps=warps) for warps in choices], key=key
    )
    return decorate

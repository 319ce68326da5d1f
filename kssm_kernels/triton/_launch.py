"""How many phases a program takes, and the device it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from kssm_kernels.triton import interpreting

PER_WARP = 256  # phases of one row that a warp holds: 8 per thread, two loads of 128 bits in float32
WARPS = 4
# Left to itself the assembler stops at 128 and spills (8 bytes in the forward kernel for sm_100, 24 in the backward
# kernel for sm_80), for an occupancy that these kernels do not need: three programs of four warps fit all the same.
REGISTERS = 168


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def tile_of(n: int, largest: int = PER_WARP, warps: int = WARPS) -> tuple[int, int]:
    """(rows, oscillators) of a program's tile for rows of n: 256 phases for each warp, eight per thread.

    No row of up to 256 oscillators is shared between warps: its sums cost shuffles and no barrier.
    """
    block = min(power_of_two(n, 16), largest)
    return max(1, warps * PER_WARP // block), block


def warps_of(rows: int, block: int, per_thread: int = 8) -> int:
    return max(1, rows * block // (32 * per_thread))


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
    """Autotunes the number of warps of a program, and with it of rows, of a kernel that may run twice without harm.

    Every choice gives the same bits: a warp's share of a row stays what it is. In the interpreter there is nothing to
    time, and one choice.
    """
    warps = (WARPS,) if interpreting() else (WARPS, 1, 2, 8)
    decorate: Callable[[Any], Any] = triton.autotune([triton.Config({"WARPS": w}, num_warps=w) for w in warps], key=key)
    return decorate

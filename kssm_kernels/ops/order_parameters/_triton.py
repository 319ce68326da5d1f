"""Order parameters in Triton. Equations: __init__.py; harmonics: triton_math/harmonics.py.

A program holds a tile of rows x oscillators. Rows longer than a row block are cut (_row_blocks.py): every row block
leaves its sums, and a second kernel adds those up in order, 64 at a time, as often as it takes. Bits depend on the
number of oscillators and harmonics alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kssm_kernels.ops._memory import rows_of
from kssm_kernels.ops.order_parameters._row_blocks import row_block_count, row_block_length
from kssm_kernels.triton_math import launch as launching
from kssm_kernels.triton_math.harmonics import add_harmonics, groups_of, harmonics_adjoint, put_features
from kssm_kernels.triton_math.launch import launch, power_of_two, tile_of, tuned

ADDED_AT_ONCE = 64  # row blocks whose sums one program adds


@triton.jit
def _forward_kernel(
    theta, features, rows, n, row_blocks, row_block, row_stride, column_stride, groups,
    HARMONICS: tl.constexpr, HP: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows are (ensemble, row block) pairs. FINAL: features; otherwise the sums, [rows, 2 HP] float32."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_row = index < rows
    ensemble = index // row_blocks
    begin = (index % row_blocks) * row_block
    end = tl.minimum(begin + row_block, n)
    sums_c = tl.zeros([ROWS, HP], tl.float32)
    sums_s = tl.zeros([ROWS, HP], tl.float32)
    for tile in range(0, row_block, BLOCK):
        j = begin[:, None] + (tile + tl.arange(0, BLOCK))[None, :]
        live = live_row[:, None] & (j < end[:, None])
        x = tl.load(theta + ensemble[:, None] * row_stride + j * column_stride, mask=live, other=0.0).to(tl.float32)
        sums_c, sums_s = add_harmonics(x, live, sums_c, sums_s, groups, HP)
    if FINAL:
        put_features(features, index, live_row, sums_c, sums_s, n, HARMONICS, HP)
    else:
        at = features + index[:, None] * (2 * HP) + tl.arange(0, HP)[None, :]
        tl.store(at, sums_c, mask=live_row[:, None])
        tl.store(at + HP, sums_s, mask=live_row[:, None])


@triton.jit
def _add_kernel(
    sums, out, n, row_blocks, remaining,
    HARMONICS: tl.constexpr, HP: tl.constexpr, FINAL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Adds COUNT of an ensemble's row blocks in order: ``sums`` [ensembles, row_blocks, 2 HP]."""
    index = tl.program_id(0).to(tl.int64)
    ensemble = index // remaining
    first = (index % remaining) * COUNT
    h = tl.arange(0, HP)[None, :]
    sums_c = tl.zeros([1, HP], tl.float32)
    sums_s = tl.zeros([1, HP], tl.float32)
    for k in range(first, tl.minimum(first + COUNT, row_blocks)):
        at = sums + (ensemble * row_blocks + k) * (2 * HP) + h
        sums_c += tl.load(at)
        sums_s += tl.load(at + HP)
    if FINAL:
        row = ensemble + tl.arange(0, 1)
        put_features(features=out, row=row, live_row=row >= 0, sums_c=sums_c, sums_s=sums_s, n=n,
                     HARMONICS=HARMONICS, HP=HP)  # fmt: skip
    else:
        at = out + index * (2 * HP) + h
        tl.store(at, sums_c)
        tl.store(at + HP, sums_s)


@tuned(["n", "HARMONICS"])
@triton.jit
def _backward_kernel(
    theta, features, g_features, out, rows, n, blocks, row_stride, column_stride, groups,
    HARMONICS: tl.constexpr, PER_WARP: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = WARPS * PER_WARP // BLOCK
    index = tl.program_id(0).to(tl.int64)
    row = (index // blocks) * ROWS + tl.arange(0, ROWS)
    live_row = row < rows
    j = (index % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = live_row[:, None] & (j < n)
    x = tl.load(theta + row[:, None] * row_stride + j * column_stride, mask=live, other=0.0).to(tl.float32)
    g = harmonics_adjoint(x, features, g_features, row, live_row, n, groups, HARMONICS)
    tl.store(out + row[:, None] * n + j, g.to(out.dtype.element_ty), mask=live)


def forward(theta: Tensor, harmonics: int) -> Tensor:
    n = theta.shape[-1]
    out = theta.new_empty(*theta.shape[:-1], 3 * harmonics)
    data, rows, row_stride, column_stride = rows_of(theta)
    if rows == 0:
        return out
    hp = power_of_two(harmonics, 16)
    row_block, row_blocks = row_block_length(n, harmonics, theta.dtype), row_block_count(n, harmonics, theta.dtype)
    tile_rows, block = tile_of(n)
    sums = out if row_blocks == 1 else torch.empty(rows, row_blocks, 2 * hp, dtype=torch.float32, device=theta.device)
    launch(
        _forward_kernel,
        triton.cdiv(rows * row_blocks, tile_rows),
        theta,
        *(data, sums, rows * row_blocks, n, row_blocks, row_block, row_stride, column_stride, groups_of(harmonics)),
        HARMONICS=harmonics, HP=hp, FINAL=row_blocks == 1, ROWS=tile_rows, BLOCK=block, num_warps=1,
    )  # fmt: skip
    while row_blocks > 1:
        left = triton.cdiv(row_blocks, ADDED_AT_ONCE)
        to = out if left == 1 else torch.empty(rows, left, 2 * hp, dtype=torch.float32, device=theta.device)
        launch(
            _add_kernel, rows * left, theta, sums, to, n, row_blocks, left,
            HARMONICS=harmonics, HP=hp, FINAL=left == 1, COUNT=ADDED_AT_ONCE, num_warps=1,
        )  # fmt: skip
        sums, row_blocks = to, left
    return out


def backward(theta: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    n = theta.shape[-1]
    out = theta.new_empty(*theta.shape)
    data, rows, row_stride, column_stride = rows_of(theta)
    if rows == 0:
        return out
    harmonics = features.shape[-1] // 3
    _, block = tile_of(n)
    blocks = triton.cdiv(n, block)
    launch(
        _backward_kernel,
        lambda meta: (triton.cdiv(rows, meta["WARPS"] * launching.per_warp() // block) * blocks,),
        theta,
        *(data, features, grad, out, rows, n, blocks, row_stride, column_stride, groups_of(harmonics)),
        HARMONICS=harmonics,
        PER_WARP=launching.per_warp(),
        BLOCK=block,
    )
    return out

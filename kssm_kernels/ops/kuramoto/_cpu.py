"""The Kuramoto update and its adjoint by the compiled CPU kernel: tensors to addresses, strides and targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import address, packer
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import strided
from kssm_kernels.ops.kuramoto._calls import KuramotoBackward, KuramotoForward
from kssm_kernels.ops.kuramoto._update import (
    OPERANDS,
    Operand,
    Update,
    is_plain,
    is_shared,
    operand_rows,
    seed_value,
    theta_rows,
)

_pack_forward, _pack_backward = packer(KuramotoForward), packer(KuramotoBackward)
_OTHERS = "omega", "phase_lag", "noise_scale"  # operands that a plain call has not
_pack_plain_forward, _pack_plain_backward = packer(KuramotoForward, *_OTHERS), packer(KuramotoBackward, *_OTHERS)

Fields = tuple[Any, ...]  # integers and floats
_ABSENT: Fields = (0, 0, 0, 0.0, 0)


def _operand(operand: Operand, batch_shape: torch.Size, n: int, dtype: torch.dtype, keep: list[Tensor]) -> Fields:
    if operand is None:
        return _ABSENT
    tensor, row_stride, column_stride, value = operand_rows(operand, batch_shape, n, dtype)
    if tensor is None:
        return (0, 0, 0, value, 1)
    keep.append(tensor)  # owns the memory until the kernel is done
    return (tensor.data_ptr(), row_stride, column_stride, value, 1)


def _fields(theta: Tensor, u: Update, batch_shape: torch.Size, keep: list[Tensor]) -> tuple[bool, Fields]:
    """Whether the call is plain, and the fields of KuramotoUpdate and KuramotoStart, of a plain one without _OTHERS."""
    n, rows = theta.shape[-1], math.prod(batch_shape)
    code, compute = DTYPES[theta.dtype]
    plain = is_plain(u)
    if plain and theta.is_contiguous():
        theta = strided("theta", theta)
        keep.append(theta)
        return True, (rows, n, u.dt, 0, 0, 0, 0, u.coupling, 1, theta.data_ptr(), n, 1, code)
    start, row_stride, column_stride, _ = theta_rows(theta, batch_shape, rows)
    assert start is not None
    keep.append(start)
    where = start.data_ptr(), row_stride, column_stride, code
    if plain:
        return True, (rows, n, u.dt, 0, 0, 0, 0, u.coupling, 1, *where)
    return False, (
        *(rows, n, u.dt, 0 if u.noise_scale is None else seed_value(u)),
        *_operand(u.coupling, batch_shape, n, compute, keep),
        *_operand(u.omega, batch_shape, n, compute, keep),
        *_operand(u.phase_lag, batch_shape, n, compute, keep),
        *_operand(u.noise_scale, batch_shape, n, compute, keep),
        *where,
    )


def forward(theta: Tensor, u: Update, batch_shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    keep: list[Tensor] = []
    plain, fields = _fields(theta, u, batch_shape, keep)
    features = phases = None
    features_at = phases_at = 0
    if u.harmonics:
        features = theta.new_empty(*batch_shape, 3 * u.harmonics)
        features_at = features.data_ptr()
    if u.return_phases:
        # the first takes 0.2 us less
        same = theta.is_contiguous() and theta.numel() == fields[0] * fields[1] and theta.dim() == len(batch_shape) + 1
        phases = torch.empty_like(theta) if same else theta.new_empty(*batch_shape, theta.shape[-1])
        phases_at = phases.data_ptr()
    pack = _pack_plain_forward if plain else _pack_forward
    call = pack(*fields, u.steps, u.harmonics, features_at, phases_at)
    cpu.extension.kuramoto_forward(call, torch.get_num_threads())
    return features, phases


def backward(
    theta: Tensor,
    u: Update,
    batch_shape: torch.Size,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    keep: list[Tensor] = []
    plain, fields = _fields(theta, u, batch_shape, keep)
    rows, compute = fields[0], DTYPES[theta.dtype][1]
    results: list[Tensor | None] = []
    targets: list[int | bool] = []  # per operand: address, per row, per column
    for i, (source, need) in enumerate(zip((theta, *u[:OPERANDS]), needed, strict=True)):
        if not need or not isinstance(source, Tensor):
            results.append(None)
            targets += (0, 0, 0)
            continue
        columns = source.shape[-1] if source.dim() else 1
        per_row = not is_shared(source, rows) if i == 0 else source.numel() != columns
        # theta's own gradient leaves in theta's dtype; what is summed over rows or columns, in the compute dtype
        dtype = theta.dtype if i == 0 and per_row else compute
        result = torch.empty((*batch_shape, columns) if per_row else (columns,), dtype=dtype, device=theta.device)
        results.append(result)
        targets += (result.data_ptr(), per_row, i == 0 or columns > 1)
    # Rounded to 16 bits the phases no longer reproduce the features: the kernel then starts from theta again.
    start = phases if theta.dtype == compute else None
    saved = address(features), address(start), address(g_features), address(g_phases)
    pack = _pack_plain_backward if plain else _pack_backward
    call = pack(*fields, u.steps, u.harmonics, *saved, *targets)
    cpu.extension.kuramoto_backward(call, torch.get_num_threads())
    return results

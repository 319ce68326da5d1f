"""The Kuramoto update and its adjoint by the compiled CPU kernel: tensors to addresses, strides and targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import strided
from kssm_kernels.ops.kuramoto._update import (
    OPERANDS,
    Strided,
    Update,
    is_plain,
    is_shared,
    operand_rows,
    seed_value,
    theta_rows,
)

Addressed = tuple[int, int, int, float]  # Strided with the address of its memory, 0 for none
_ABSENT: Addressed = (0, 0, 0, 0.0)
# seed and flags, and the operands after the coupling strength, of a plain call
_PLAIN, _NO_OTHERS = (0, False, False, False), (*_ABSENT, *_ABSENT, *_ABSENT)


def _addressed(operand: Strided, keep: list[Tensor]) -> Addressed:
    tensor, row_stride, column_stride, value = operand
    if tensor is None:
        return (0, 0, 0, value)
    keep.append(tensor)  # owns the memory until the kernel is done
    return (tensor.data_ptr(), row_stride, column_stride, value)


def call_arguments(theta: Tensor, u: Update, batch_shape: torch.Size, keep: list[Tensor]) -> tuple[Any, ...]:
    """What the forward and the backward kernel share, flat, in the order of kuramoto_call in csrc/bindings.cpp."""
    n = theta.shape[-1]
    rows = math.prod(batch_shape)
    code, compute = DTYPES[theta.dtype]
    coupling, omega, phase_lag, noise_scale, _, dt, steps, harmonics, _ = u
    sizes = (rows, n, code, steps, harmonics, torch.get_num_threads(), dt)
    if is_plain(u) and theta.is_contiguous():
        theta = strided("theta", theta)
        keep.append(theta)
        return (*sizes, *_PLAIN, theta.data_ptr(), n, 1, 0.0, 0, 0, 0, coupling, *_NO_OTHERS)
    seed = 0 if noise_scale is None else seed_value(u)
    return (
        *sizes,
        *(seed, omega is not None, phase_lag is not None, noise_scale is not None),
        *_addressed(theta_rows(theta, batch_shape, rows), keep),
        *_addressed(operand_rows(coupling, batch_shape, n, compute), keep),
        *_addressed(operand_rows(omega, batch_shape, n, compute), keep),
        *_addressed(operand_rows(phase_lag, batch_shape, n, compute), keep),
        *_addressed(operand_rows(noise_scale, batch_shape, n, compute), keep),
    )


def forward(theta: Tensor, u: Update, batch_shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    keep: list[Tensor] = []
    call = call_arguments(theta, u, batch_shape, keep)
    features = phases = None
    features_at = phases_at = 0
    if u.harmonics:
        features = theta.new_empty(*batch_shape, 3 * u.harmonics)
        features_at = features.data_ptr()
    if u.return_phases:
        # the first takes 0.2 us less
        same = theta.is_contiguous() and theta.numel() == call[0] * call[1] and theta.dim() == len(batch_shape) + 1
        phases = torch.empty_like(theta) if same else theta.new_empty(*batch_shape, call[1])
        phases_at = phases.data_ptr()
    cpu.extension.kuramoto_forward(call, features_at, phases_at)
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
    call = call_arguments(theta, u, batch_shape, keep)
    rows = call[0]
    compute = DTYPES[theta.dtype][1]
    results: list[Tensor | None] = []
    targets: list[int | bool] = []  # per operand: address, per row, per column
    for i, (source, need) in enumerate(zip((theta, *u[:OPERANDS]), needed, strict=True)):
        if not need or not isinstance(source, Tensor):
            results.append(None)
            targets += (0, False, False)
            continue
        columns = source.shape[-1] if source.dim() else 1
        per_row = not is_shared(source, rows) if i == 0 else source.numel() != columns
        # theta's own gradient leaves in theta's dtype; what is summed over rows or columns, in the arithmetic dtype
        dtype = theta.dtype if i == 0 and per_row else compute
        result = torch.empty((*batch_shape, columns) if per_row else (columns,), dtype=dtype, device=theta.device)
        results.append(result)
        targets += (result.data_ptr(), per_row, i == 0 or columns > 1)
    # Rounded to 16 bits the phases no longer reproduce the features: the kernel then starts from theta again.
    start = phases if theta.dtype == compute else None
    saved = (_address(features), _address(start), _address(g_features), _address(g_phases))
    cpu.extension.kuramoto_backward(call, *saved, tuple(targets))
    return results


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

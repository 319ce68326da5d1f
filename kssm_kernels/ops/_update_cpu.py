"""The Kuramoto update and its adjoint by the compiled CPU kernel: tensors to addresses, strides and targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._door import DTYPES
from kssm_kernels.ops._update import OPERANDS, Operand, Update, is_plain, leading_shape, seed_value

# An operand as the kernel reads it: (address, row stride, column stride, value), strides 0 where it is shared.
Rows = tuple[int, int, int, float]
_ABSENT: Rows = (0, 0, 0, 0.0)
# seed and flags, and the operands after the coupling strength, of a plain call
_PLAIN, _NO_OTHERS = (0, False, False, False), (*_ABSENT, *_ABSENT, *_ABSENT)


def _operand_rows(operand: Operand, lead: torch.Size, n: int, dtype: torch.dtype, keep: list[Tensor]) -> Rows:
    if operand is None:
        return _ABSENT
    if type(operand) is float or not isinstance(operand, Tensor):
        return (0, 0, 0, operand)
    if operand.dtype != dtype:
        operand = operand.to(dtype)
    columns = operand.shape[-1] if operand.dim() else 1
    if operand.numel() == columns:
        row_stride = 0
        if not operand.is_contiguous():
            operand = operand.contiguous()
    else:
        if operand.shape[:-1] != lead:
            operand = operand.expand(*lead, columns)
        if not operand.is_contiguous():
            operand = operand.reshape(-1, columns)
            if columns > 1 and operand.stride(1) != 1:
                operand = operand.contiguous()
            row_stride = operand.stride(0)
        else:
            row_stride = columns
    keep.append(operand)  # owns the memory until the kernel is done
    return (operand.data_ptr(), row_stride, int(columns > 1), 0.0)


def _theta_rows(theta: Tensor, lead: torch.Size, rows: int, keep: list[Tensor]) -> Rows:
    """theta in its own dtype and with its own strides; one vector for all rows is read where it lies."""
    n = theta.shape[-1]
    if theta.is_contiguous() and theta.numel() == rows * n:  # lead differs by axes of length 1 at most
        return (theta.data_ptr(), n, 1, 0.0)
    if _shared(theta, rows):
        return (theta.data_ptr(), 0, theta.stride(-1), 0.0)
    flat = theta.expand(*lead, n).reshape(rows, n)
    keep.append(flat)
    return (flat.data_ptr(), flat.stride(0), flat.stride(1), 0.0)


def _shared(theta: Tensor, rows: int) -> bool:
    return theta.numel() == theta.shape[-1] and rows != 1


def call_arguments(theta: Tensor, u: Update, lead: torch.Size, keep: list[Tensor]) -> tuple[Any, ...]:
    """What the forward and the backward kernel share, flat, in the order of kuramoto_call in csrc/bindings.cpp."""
    n = theta.shape[-1]
    rows = math.prod(lead)
    code, compute = DTYPES[theta.dtype]
    coupling, omega, phase_lag, noise_scale, _, dt, steps, harmonics, _ = u
    sizes = (rows, n, code, steps, harmonics, torch.get_num_threads(), dt)
    if is_plain(u) and theta.is_contiguous():
        return (*sizes, *_PLAIN, theta.data_ptr(), n, 1, 0.0, 0, 0, 0, coupling, *_NO_OTHERS)
    seed = 0 if noise_scale is None else seed_value(u)
    return (
        *sizes,
        *(seed, omega is not None, phase_lag is not None, noise_scale is not None),
        *_theta_rows(theta, lead, rows, keep),
        *_operand_rows(coupling, lead, n, compute, keep),
        *_operand_rows(omega, lead, n, compute, keep),
        *_operand_rows(phase_lag, lead, n, compute, keep),
        *_operand_rows(noise_scale, lead, n, compute, keep),
    )


def forward(theta: Tensor, u: Update, lead: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    keep: list[Tensor] = []
    call = call_arguments(theta, u, lead, keep)
    features = phases = None
    features_at = phases_at = 0
    if u.harmonics:
        features = theta.new_empty(*lead, 3 * u.harmonics)
        features_at = features.data_ptr()
    if u.return_phases:
        # the first takes 0.2 us less
        same = theta.is_contiguous() and theta.numel() == call[0] * call[1] and theta.dim() == len(lead) + 1
        phases = torch.empty_like(theta) if same else theta.new_empty(*lead, call[1])
        phases_at = phases.data_ptr()
    backends.cpu_extension.kuramoto_forward(call, features_at, phases_at)
    return features, phases


def backward(
    theta: Tensor,
    u: Update,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    lead = leading_shape(theta, u[:OPERANDS])
    keep: list[Tensor] = []
    call = call_arguments(theta, u, lead, keep)
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
        per_row = not _shared(source, rows) if i == 0 else source.numel() != columns
        # theta's own gradient leaves in theta's dtype; what is summed over rows or columns, in the arithmetic dtype
        dtype = theta.dtype if i == 0 and per_row else compute
        result = torch.empty((*lead, columns) if per_row else (columns,), dtype=dtype, device=theta.device)
        results.append(result)
        targets += (result.data_ptr(), per_row, i == 0 or columns > 1)
    # Rounded to 16 bits the phases no longer reproduce the features: the kernel then starts from theta again.
    start = phases if theta.dtype == compute else None
    if g_features is not None:
        g_features = g_features.to(theta.dtype).contiguous()
    if g_phases is not None:
        g_phases = g_phases.to(theta.dtype).contiguous()
    saved = (_address(features), _address(start), _address(g_features), _address(g_phases))
    backends.cpu_extension.kuramoto_backward(call, *saved, tuple(targets))
    return results


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

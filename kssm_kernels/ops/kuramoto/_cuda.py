"""The Kuramoto update and its adjoint by the CUDA kernels: tensors to the fields of csrc/cuda/kuramoto*.cu."""

from __future__ import annotations

import functools
import sys

from torch import Tensor

from kssm_kernels.backends.calls import address, packer
from kssm_kernels.backends.cuda import call as launch
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops.kuramoto import _calls, _gpu
from kssm_kernels.ops.kuramoto._gpu import Call, End, Rows, Target, Targets
from kssm_kernels.ops.order_parameters import _cuda as order_parameters
from kssm_kernels.ops.order_parameters._cuda import partial_sums

FUSED_LIMIT = 2048  # eight oscillators for each thread of the largest team
ROW_BLOCK = 2048  # kRowBlock of csrc/cuda/row_blocks.h

Fields = tuple[int | float, ...]

_ABSENT, _NOT_WANTED = (0, 0, 0, 0.0, 0), (0, 0, 0)
_NO_END = (0, 0, 0)
_pack_forward, _pack_backward = packer(_calls.KuramotoFusedForward), packer(_calls.KuramotoFusedBackward)
_pack_step = packer(_calls.KuramotoStep)
_pack_sums, _pack_adjoint = packer(_calls.KuramotoAdjointSums), packer(_calls.KuramotoAdjointStep)


def row_blocks_of(n: int) -> int:
    """Row blocks of a row whose sums adjoint_step leaves."""
    return -(-n // ROW_BLOCK)


def _operand(rows: Rows | None) -> Fields:
    if rows is None:
        return _ABSENT
    return (address(rows.tensor), rows.row_stride, rows.column_stride, rows.value, 1)


def _update(call: Call) -> Fields:
    operands = (call.coupling, call.omega, call.phase_lag, call.noise_scale)
    return (call.rows, call.n, call.dt, call.seed, *(field for operand in operands for field in _operand(operand)))


def _target(target: Target | None) -> Fields:
    return _NOT_WANTED if target is None else (target.tensor.data_ptr(), target.per_row, target.per_column)


def _start(start: Rows) -> tuple[Tensor, Fields]:
    assert start.tensor is not None
    code = DTYPES[start.tensor.dtype][0]
    return start.tensor, (start.tensor.data_ptr(), start.row_stride, start.column_stride, code)


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype][0]


def _fields(targets: Targets) -> Fields:
    return tuple(field for target in targets for field in _target(target))


def fused_forward(
    call: Call, start: Rows, first: int, steps: int, harmonics: int, features: Tensor | None, phases: Tensor | None
) -> None:
    tensor, where = _start(start)
    outputs = address(features), address(phases), _code(phases)
    fields = _pack_forward(*_update(call), *where, call.keeping, first, steps, harmonics, *outputs)
    launch("kuramoto_forward", fields, tensor)


def fused_backward(
    call: Call,
    start: Rows,
    first: int,
    steps: int,
    states: Tensor | None,
    end: End | None,
    g: Tensor | None,
    targets: Targets,
    parts: int,
    accumulate: bool,
) -> None:
    tensor, where = _start(start)
    harmonics, saved = 0, _NO_END
    if end is not None:
        harmonics, saved = end.harmonics, (end.features.data_ptr(), end.g_features.data_ptr(), _code(end.features))
    steps_taken = call.keeping, first, steps, address(states)
    sums = address(g), _code(g), parts, accumulate
    fields = _pack_backward(*_update(call), *where, *steps_taken, harmonics, *saved, *sums, *_fields(targets))
    launch("kuramoto_backward", fields, tensor)


def step(call: Call, state: Tensor, moved: Tensor | None, z: Tensor, index: int, out: Tensor) -> None:
    own = _code(state), state.data_ptr(), address(moved), z.data_ptr(), index, out.data_ptr()
    launch("kuramoto_step", _pack_step(*_update(call), call.keeping, *own), state)


def adjoint_sums(call: Call, state: Tensor, z: Tensor, g: Tensor) -> Tensor:
    sums = state.new_empty(call.rows, 2)
    row_blocks = row_blocks_of(call.n)
    work = state.new_empty(call.rows * 2 * row_blocks + partial_sums(call.rows, row_blocks, 2))
    own = _code(state), state.data_ptr(), z.data_ptr(), g.data_ptr(), sums.data_ptr(), work.data_ptr()
    launch("kuramoto_adjoint_sums", _pack_sums(*_update(call), *own), state)
    return sums


def adjoint_step(call: Call, state: Tensor, z: Tensor, gz: Tensor, index: int, g: Tensor, targets: Targets) -> None:
    own = _code(state), state.data_ptr(), z.data_ptr(), gz.data_ptr(), index, g.data_ptr()
    launch("kuramoto_adjoint_step", _pack_adjoint(*_update(call), *own, *_fields(targets)), state)


forward = functools.partial(_gpu.forward, sys.modules[__name__], order_parameters)
backward = functools.partial(_gpu.backward, sys.modules[__name__], order_parameters)

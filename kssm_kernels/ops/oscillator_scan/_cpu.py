"""The oscillator scan and its adjoint by the compiled CPU kernel: tensors to addresses and strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import address, packer
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import strided
from kssm_kernels.ops.oscillator_scan import _torch
from kssm_kernels.ops.oscillator_scan._calls import OscillatorScanBackward, OscillatorScanForward
from kssm_kernels.ops.oscillator_scan._scan import Grads, Scan, operands_of, result_shapes

_pack_forward, _pack_backward = packer(OscillatorScanForward), packer(OscillatorScanBackward)


def _sequence(name: str, x: Tensor | None, keep: list[Tensor]) -> tuple[int, int, int, int]:
    """[..., T, C] as [rows, T, C], copied only if its rows are not evenly spaced or its last axis is not dense."""
    if x is None:
        return 0, 0, 0, 0
    x = strided(name, x)
    steps, columns = x.shape[-2:]
    if x.is_contiguous():
        strides = steps * columns, columns
    else:
        x = x.reshape(math.prod(x.shape[:-2]), steps, columns)
        if x.stride(2) != 1 and columns > 1:
            x = x.contiguous()
        strides = x.stride(0), x.stride(1)
    keep.append(x)
    return x.data_ptr(), *strides, DTYPES[x.dtype][0]


def _start(name: str, x: Tensor | None, s: Scan, columns: int, keep: list[Tensor]) -> tuple[int, int]:
    """Address and row stride of what broadcasts to [..., columns], in the compute dtype; 0 for one row for all."""
    if x is None:
        return 0, 0
    x = strided(name, x).to(s.compute)
    if not _is_shared(x):
        x = x.expand(*s.batch_shape, columns)
    x = x.expand(*x.shape[:-1], columns).reshape(-1, columns).contiguous()
    keep.append(x)
    return x.data_ptr(), columns if x.shape[0] > 1 else 0


def _is_shared(x: Tensor) -> bool:
    """Whether one row serves all."""
    return math.prod(x.shape[:-1]) == 1


def _fields(s: Scan, states_re: Tensor, states_im: Tensor, keep: list[Tensor]) -> tuple[int, ...]:
    """Of the struct OscillatorScan."""
    width = s.p.shape[-1]
    sequences = ("p", s.p), ("q", s.q), ("gate", s.gate), ("phase", s.phase)
    heads = ("coupling", s.coupling), ("forget", s.forget)
    lag = _start("phase_lag", s.phase_lag, s, s.heads, keep)
    re = _start("initial_state[0]", s.initial_re, s, width, keep)
    im = _start("initial_state[1]", s.initial_im, s, width, keep)
    reset = None
    if s.reset is not None:
        reset = strided("reset", s.reset).contiguous()
        keep.append(reset)
    sizes = math.prod(s.batch_shape), s.steps, s.heads, s.oscillators
    options = DTYPES[s.compute][0], int(s.kind == "moebius"), int(s.tied_leak), s.harmonics
    inputs = [field for name, x in (*sequences, *heads) for field in _sequence(name, x, keep)]
    states = (states_re.data_ptr(), states_im.data_ptr()) if s.every else (0, 0)
    return *sizes, *options, *inputs, *lag, re[0], im[0], re[1], im[1], address(reset), s.every, *states


def forward(s: Scan) -> tuple[Tensor, ...]:
    if s.communities is not None:
        return _torch.forward(s)
    keep: list[Tensor] = []  # owns the memory until the kernel is done
    results = tuple(s.p.new_empty(shape, dtype=dtype) for shape, dtype in result_shapes(s) for _ in range(2))
    order_re, order_im, last_re, last_im, states_re, states_im = results
    orders = order_re.data_ptr(), order_im.data_ptr(), DTYPES[s.p.dtype][0]
    call = _pack_forward(*_fields(s, states_re, states_im, keep), *orders, last_re.data_ptr(), last_im.data_ptr())
    cpu.extension.oscillator_scan_forward(call, torch.get_num_threads())
    return results


def backward(
    s: Scan,
    states_re: Tensor,
    states_im: Tensor,
    given: Grads,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of the operands; the start's in the compute dtype, one row or ``[..., columns]``."""
    if s.communities is not None:
        return _torch.backward(s, states_re, states_im, given, needed)
    keep: list[Tensor] = []
    results: list[Tensor | None] = []
    summed: list[bool] = []
    for i, (source, need) in enumerate(zip(operands_of(s)[:9], needed[:9], strict=True)):
        if source is None or not need:
            results.append(None)
        elif i < 6:
            results.append(source.new_empty(source.shape))
        else:
            columns = s.heads if i == 6 else s.p.shape[-1]
            shape = (columns,) if _is_shared(source) else (*s.batch_shape, columns)
            results.append(source.new_empty(shape, dtype=s.compute))
        if i >= 6:
            summed.append(source is not None and _is_shared(source))
    orders = address(given.order_re), address(given.order_im), DTYPES[s.p.dtype][0]
    rest = address(given.last_re), address(given.last_im), address(given.states_re), address(given.states_im)
    targets = [address(r) for r in results]
    call = _pack_backward(*_fields(s, states_re, states_im, keep), *orders, *rest, *targets, *summed)
    cpu.extension.oscillator_scan_backward(call, torch.get_num_threads())
    return [*results, None, None, None]

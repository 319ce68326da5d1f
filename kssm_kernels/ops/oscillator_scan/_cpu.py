"""The oscillator scan and its adjoint by the compiled CPU kernel: tensors to addresses and strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import address, packer
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._memory import strided
from kssm_kernels.ops.oscillator_scan._calls import OscillatorScanBackward, OscillatorScanForward
from kssm_kernels.ops.oscillator_scan._loop import product
from kssm_kernels.ops.oscillator_scan._scan import Grads, Scan, operands_of, result_shapes

# For an open loop and a closed one.
_pack_forward = packer(OscillatorScanForward, "loop"), packer(OscillatorScanForward)
_pack_backward = packer(OscillatorScanBackward, "loop"), packer(OscillatorScanBackward)


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
    sequences = [("p", s.p), ("q", s.q), ("gate", s.gate), ("phase", s.phase)]
    heads = [("coupling", s.coupling), ("forget", s.forget)]
    if s.communities is not None:  # in the compute dtype: products of their gradients are those of U
        sequences = [(name, x.to(s.compute)) for name, x in sequences]
        heads[1] = "forget", None if s.forget is None else s.forget.to(s.compute)
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
    loop: tuple[int, ...] = ()
    if s.communities is not None and s.feedback is not None:
        weights = [strided("feedback", x).to(s.compute).contiguous() for x in (s.communities, s.feedback)]
        keep += weights
        listen = _sequence("feedback[2]", s.listen, keep)
        loop = s.communities.shape[0], weights[0].data_ptr(), weights[1].data_ptr(), *listen
    states = (states_re.data_ptr(), states_im.data_ptr()) if s.every else (0, 0)
    start = *lag, re[0], im[0], re[1], im[1]
    return *sizes, *options, *inputs, *start, *loop, address(reset), s.every, *states


def forward(s: Scan) -> tuple[Tensor, ...]:
    keep: list[Tensor] = []  # owns the memory until the kernel is done
    results = tuple(s.p.new_empty(shape, dtype=dtype) for shape, dtype in result_shapes(s) for _ in range(2))
    order_re, order_im, last_re, last_im, states_re, states_im = results
    orders = order_re.data_ptr(), order_im.data_ptr(), DTYPES[s.p.dtype][0]
    pack = _pack_forward[s.communities is not None]
    call = pack(*_fields(s, states_re, states_im, keep), *orders, last_re.data_ptr(), last_im.data_ptr())
    cpu.extension.oscillator_scan_forward(call, torch.get_num_threads())
    return results


def backward(
    s: Scan, states_re: Tensor, states_im: Tensor, given: Grads, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of the operands; the start's in the compute dtype, one row or ``[..., columns]``."""
    keep: list[Tensor] = []
    closed = s.communities is not None
    of_weights = closed and (needed[9] or needed[10])
    *sequences, lag, initial_re, initial_im = operands_of(s)[:9]
    results: list[Tensor | None] = []
    for i, source in enumerate(sequences):
        # those of U are made of them, in the compute dtype
        wanted = source is not None and (needed[i] or (of_weights and i != 4))
        dtype = s.compute if closed and i != 4 else None
        results.append(source.new_empty(source.shape, dtype=dtype) if wanted else None)
    summed: list[bool] = []
    for i, source in enumerate((lag, initial_re, initial_im), len(sequences)):
        shared = source is not None and _is_shared(source)
        columns = s.heads if i == 6 else s.p.shape[-1]
        shape = (columns,) if shared else (*s.batch_shape, columns)
        results.append(source.new_empty(shape, dtype=s.compute) if source is not None and needed[i] else None)
        summed.append(shared)
    orders = address(given.order_re), address(given.order_im), DTYPES[s.p.dtype][0]
    rest = address(given.last_re), address(given.last_im), address(given.states_re), address(given.states_im)
    targets = [address(r) for r in results]
    loop = _LoopGradients(s, of_weights, needed[11]) if closed else None
    fields = _fields(s, states_re, states_im, keep)
    of_loop = loop.fields() if loop else ()
    call = _pack_backward[closed](*fields, *orders, *rest, *targets, *summed, *of_loop)
    cpu.extension.oscillator_scan_backward(call, torch.get_num_threads())
    if loop is None:
        return [*results, None, None, None]
    of_c = loop.of_communities() if needed[9] else None
    of_u = loop.of_feedback((*results[:4], results[5])) if needed[10] else None
    return [*(r if need else None for r, need in zip(results, needed, strict=False)), of_c, of_u, loop.g_listen]


class _LoopGradients:
    """What the kernel writes for the gradients of C and U: each is a product over all steps of all sequences."""

    def __init__(self, s: Scan, of_weights: bool, of_listen: bool) -> None:
        assert s.communities is not None
        width, communities = s.p.shape[-1], s.communities.shape[0]
        rows = math.prod(s.batch_shape) * s.steps if of_weights else 0
        self.communities = communities
        self.v = [s.p.new_empty((rows, width), dtype=s.compute) for _ in range(2)]
        self.f, self.g_y = (s.p.new_empty((rows, 2 * communities), dtype=s.compute) for _ in range(2))
        self.g_listen = (
            torch.empty_like(s.listen, memory_format=torch.contiguous_format)
            if s.listen is not None and of_listen
            else None
        )

    def fields(self) -> tuple[int, ...]:
        """Of the struct ScanLoopGradients."""
        return *(x.data_ptr() for x in (*self.v, self.f, self.g_y)), address(self.g_listen)

    def of_communities(self) -> Tensor:
        re, im = torch.split(self.g_y, self.communities, -1)
        return product(re.t(), self.v[0]) + product(im.t(), self.v[1])

    def of_feedback(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        flat = [g.reshape(-1, g.shape[-1]) for g in inputs if g is not None]
        return torch.cat([product(g.t(), self.f) for g in flat])

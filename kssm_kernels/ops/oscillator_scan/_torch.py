"""The scan and its adjoint in pure torch: the reference, and what runs on every device without a kernel.

A loop over time, or a scan in parallel where ``_parallel.wins`` says so. The adjoint keeps the states that the scan was
told to keep, and no more; it computes a segment's others anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _step
from kssm_kernels.ops.oscillator_scan._call import Call
from kssm_kernels.ops.oscillator_scan._reverse import Adjoint
from kssm_kernels.ops.oscillator_scan._scan import Grads, Scan, result_shapes
from kssm_kernels.ops.oscillator_scan._step import Pair

Results = tuple[Tensor, ...]  # Z, last state, kept states, (re, im) of each


def forward(s: Scan) -> Results:
    call = Call(s)
    z, orders, kept = call.start, [], []
    for first, last in call.segments():
        states = call.states(first, last, z)
        z = states[0].select(-3, -1), states[1].select(-3, -1)
        if s.every and last - first >= s.every:
            to_keep = slice(s.every - 1, None, s.every)
            kept.append((states[0][..., to_keep, :, :], states[1][..., to_keep, :, :]))
        if s.harmonics:
            orders.append(_step.order_parameters(_step.seen(s, states), s.harmonics))
    return finished(s, orders, z if s.steps else call.given, kept)


def finished(s: Scan, orders: list[Pair], last: Pair, kept: list[Pair]) -> Results:
    """Segments' results put together, in the shapes and dtypes of ``result_shapes``."""

    def joined(parts: list[Pair], shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
        if not parts:
            return last[0].new_empty(shape, dtype=dtype), last[0].new_empty(shape, dtype=dtype)
        re, im = torch.cat([z[0] for z in parts], -3), torch.cat([z[1] for z in parts], -3)
        return re.reshape(shape).to(dtype), im.reshape(shape).to(dtype)

    order, final, states = result_shapes(s)
    end = tuple(z.reshape(final[0]).clone(memory_format=torch.contiguous_format) for z in last)
    return *joined(orders, *order), *end, *joined(kept, *states)


def backward(
    s: Scan, states_re: Tensor, states_im: Tensor, given: Grads, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of the operands, phase_lag's of shape [..., G] and the initial state's of [..., D]."""
    return Adjoint(s, (states_re, states_im)).run(given, needed)

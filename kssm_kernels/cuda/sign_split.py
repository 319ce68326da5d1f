"""The sign-split EMA step by a CUDA kernel: its place, and the interface that it has to have.

The mathematics of one element is in csrc/math/sign_split.h and the storage of the means in csrc/math/state_rounding.h,
for host and device alike.
"""

from __future__ import annotations

from kssm_kernels.optim._hyper import Hyper
from kssm_kernels.optim._table import Table

AVAILABLE = False  # until it is, the optimizer takes Triton on NVIDIA devices


def step(table: Table, hyper: Hyper) -> None:
    """Steps all tensors of a table (kssm_kernels/optim/_table.py) on their device and its current stream.

    Reads ``hyper.lr``, ``hyper.grad_scale`` and ``hyper.found_inf`` on the device where they are tensors, and does
    nothing where found_inf is not 0: no call may wait for the device, so that a step can be captured in a graph.
    """
    raise NotImplementedError("SignSplitEMA: there is no CUDA kernel yet; use_backend('triton') or fused=False")

"""The step by the compiled extension (csrc/cpu/sign_split.cpp)."""

from __future__ import annotations

import torch

from kssm_kernels.backends import cpu
from kssm_kernels.backends.calls import packer
from kssm_kernels.optim.sign_split._calls import SignSplit, options_of
from kssm_kernels.optim.sign_split._hyper import Hyper
from kssm_kernels.optim.sign_split._table import Table

_pack = packer(SignSplit)


def step(table: Table, hyper: Hyper) -> None:
    """Steps all tensors of a table on torch's number of threads; the bits do not depend on it."""
    if hyper.found_inf is not None and float(hyper.found_inf):
        return
    scale = 1.0 if hyper.grad_scale is None else float(hyper.grad_scale)
    options = options_of(table.tensors[0], hyper)
    call = _pack(*options, table.rows.ctypes.data, len(table.rows), float(hyper.lr), scale)
    cpu.extension.sign_split(call, torch.get_num_threads())

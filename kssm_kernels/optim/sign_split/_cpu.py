"""The step by the compiled extension (csrc/cpu/sign_split.cpp)."""

from __future__ import annotations

import torch

from kssm_kernels.backends import cpu
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.optim.sign_split._hyper import Hyper
from kssm_kernels.optim.sign_split._table import Table

DYNAMIC_8 = 4  # kDynamic8 in csrc/cpu/kernels.h
_ABSENT = (0.0, 0.0, 0.0)


def step(table: Table, hyper: Hyper) -> None:
    """Steps all tensors of a table on torch's number of threads; the bits do not depend on it."""
    if hyper.found_inf is not None and float(hyper.found_inf):
        return
    first = table.tensors[0]
    low_precision = first.p.dtype == torch.bfloat16
    state_code = DYNAMIC_8 if first.positive_scale is not None else DTYPES[first.positive.dtype][0]
    floor, cool, heat = hyper.temperature or _ABSENT
    cpu.extension.sign_split(
        (
            table.rows.ctypes.data, len(table.rows),
            DTYPES[first.p.dtype][0], DTYPES[first.g.dtype][0], state_code, hyper.mode,
            hyper.lazy and hyper.mode != 0, hyper.maximize, first.temperature is not None,
            low_precision and hyper.param_rounding == "stochastic",
            first.step is not None and hyper.state_rounding == "stochastic",
            first.compensation is not None,
            torch.get_num_threads(),
            float(hyper.lr), hyper.beta, hyper.kappa, hyper.eps, hyper.weight_decay, hyper.cryo,
            1.0 if hyper.grad_scale is None else float(hyper.grad_scale),
            cool, heat, floor, hyper.seed,
        )
    )  # fmt: skip

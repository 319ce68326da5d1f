"""The calls of native code, as csrc/calls.h has them, and what the calls of all devices have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kssm_kernels.backends.calls import Word
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.optim.sign_split._hyper import Hyper
from kssm_kernels.optim.sign_split._tensors import Tensors

DYNAMIC_8 = 4  # kDynamic8 in csrc/calls.h
_ABSENT = (0.0, 0.0, 0.0)


class SignSplitOptions(NamedTuple):
    param_code: int
    grad_code: int
    state_code: int
    mode: int
    lazy: int
    maximize: int
    temperature: int
    stochastic_param: int
    stochastic_state: int
    kahan: int
    beta: float
    kappa: float
    eps: float
    decay: float
    cryo: float
    cool: float
    heat: float
    floor: float
    seed: Word


class SignSplitTensor(NamedTuple):
    p: int
    g: int
    positive: int
    negative: int
    temperature: int
    compensation: int
    positive_scale: int
    negative_scale: int
    cryo: int
    rms: int
    step: int
    n: int
    row: int
    stream: int


class SignSplit(NamedTuple):
    options: SignSplitOptions
    tensors: int
    tensor_count: int
    lr: float
    scale: float


class SignSplitDevice(NamedTuple):
    options: SignSplitOptions
    tensors: int
    gradients: int
    first: int
    tensor_count: int
    chunks: int
    cryo_rows: int
    lr: float
    scale: float
    lr_at: int
    lr_code: int
    scale_at: int
    scale_code: int
    found_at: int
    found_code: int
    sums: int


class Upload(NamedTuple):
    source: int
    target: int
    words: int


def options_of(first: Tensors, hyper: Hyper) -> SignSplitOptions:
    """Of tensors like ``first``: a table's are of one kind."""
    floor, cool, heat = hyper.temperature or _ABSENT
    return SignSplitOptions(
        DTYPES[first.p.dtype][0],
        DTYPES[first.g.dtype][0],
        DYNAMIC_8 if first.positive_scale is not None else DTYPES[first.positive.dtype][0],
        hyper.mode,
        hyper.lazy and hyper.mode != 0,
        hyper.maximize,
        first.temperature is not None,
        first.p.dtype == torch.bfloat16 and hyper.param_rounding == "stochastic",
        first.step is not None and hyper.state_rounding == "stochastic",
        first.compensation is not None,
        hyper.beta,
        hyper.kappa,
        hyper.eps,
        hyper.weight_decay,
        hyper.cryo,
        cool,
        heat,
        floor,
        Word(hyper.seed),
    )

"""The sign-split EMA step by the CUDA kernel (csrc/cuda/sign_split.cu)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kssm_kernels.backends.calls import packer
from kssm_kernels.backends.cuda import call
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.optim.sign_split._calls import SignSplitDevice, Upload, options_of
from kssm_kernels.optim.sign_split._hyper import MODES, Hyper
from kssm_kernels.optim.sign_split._table import FIELDS, GRADIENT, Table

CHUNK = 512  # elements: kChunk in csrc/cuda/sign_split.cu
_pack, _pack_upload = packer(SignSplitDevice), packer(Upload)
_CRYO, _SIZE = FIELDS.index("cryo"), FIELDS.index("n")

_read_by_graphs: list[Tensor] = []  # a graph does not say when it is gone

_Words = np.ndarray[Any, np.dtype[np.int64]]


def step(table: Table, hyper: Hyper) -> None:
    """Steps all tensors of a table (kssm_kernels/optim/sign_split/_table.py) on their device and its current stream.

    Reads ``hyper.lr``, ``hyper.grad_scale`` and ``hyper.found_inf`` on the device if they are tensors there, and then
    does nothing where found_inf is not 0: no call waits for the device, so that a step can be captured in a graph.
    """
    first, count = table.tensors[0], len(table.rows)
    p = first.p
    lr, *lr_place = _given(hyper.lr, p)
    scale, *scale_place = _given(1.0 if hyper.grad_scale is None else hyper.grad_scale, p)
    found_inf, *found_place = _given(0.0 if hyper.found_inf is None else hyper.found_inf, p)
    if found_inf:
        return
    chunks = int(_chunks(table).sum())
    fixed, gradients = _on_device(table)
    sums = p.new_empty(chunks if MODES[hyper.mode] == "consolidate" else 0, dtype=torch.float64)
    fields = _pack(
        *options_of(first, hyper),
        *(fixed.data_ptr(), gradients.data_ptr(), fixed.data_ptr() + table.rows.nbytes, count, chunks),
        bool(table.rows[:, _CRYO].any()),
        *(lr, scale, *lr_place, *scale_place, *found_place, sums.data_ptr()),
    )
    call("sign_split", fields, p)


def _given(x: float | Tensor, p: Tensor) -> tuple[float, int, int]:
    """A number, or the address and dtype of one that lies beside the parameters."""
    if not isinstance(x, Tensor):
        return float(x), 0, 0
    if x.device != p.device:
        return float(x), 0, 0
    return 0.0, x.data_ptr(), DTYPES[x.dtype][0]


def _chunks(table: Table) -> _Words:
    chunks: _Words = -(-table.rows[:, _SIZE] // CHUNK)
    return chunks


def _on_device(table: Table) -> tuple[Tensor, Tensor]:
    """Rows with the numbers of their first chunks behind them, and this step's gradients.

    Both stay on the device while they hold: ``device_chunks`` as long as the table, ``device_rows``, the gradients
    alone, until their addresses change. A graph uploads what is not there yet in each of its replays, into memory of
    its own: a step outside may come before the first. What it finds there it reads for as long as it lives.
    """
    p = table.tensors[0].p
    graph = p.is_cuda and torch.cuda.is_current_stream_capturing()
    fixed, gradients = table.device_chunks, table.device_rows
    if graph:
        _read_by_graphs.extend(t for t in (fixed, gradients) if t is not None)
    if fixed is None:
        firsts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(_chunks(table))])
        fixed = _uploaded(np.concatenate([table.rows.reshape(-1), firsts]), p)
    if gradients is None:
        gradients = _uploaded(np.ascontiguousarray(table.rows[:, GRADIENT]), p)
    if not graph:
        table.device_chunks, table.device_rows = fixed, gradients
        if p.is_cuda:  # memory of another stream must not be given away before this step is done
            for t in (fixed, gradients):
                t.record_stream(torch.cuda.current_stream(p.device))
    return fixed, gradients


def _uploaded(words: _Words, p: Tensor) -> Tensor:
    """Words on the device, sent as parameters of launches: no copy from pageable memory could be captured."""
    target = p.new_empty(words.size, dtype=torch.int64)
    call("upload", _pack_upload(words.ctypes.data, target.data_ptr(), words.size), p)
    return target

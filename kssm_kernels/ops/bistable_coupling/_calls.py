"""The calls of native code, as csrc/calls.h has them."""

from __future__ import annotations

from typing import NamedTuple


class BistableCouplingForward(NamedTuple):
    params: int
    rows: int
    code: int
    low: float
    high: float
    k: int
    u: int
    delta: int


class BistableCouplingBackward(NamedTuple):
    params: int
    rows: int
    code: int
    low: float
    high: float
    g_k: int
    g_u: int
    g_delta: int
    g_params: int

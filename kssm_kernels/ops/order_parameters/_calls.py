"""The calls of native code, as csrc/calls.h has them."""

from __future__ import annotations

from typing import NamedTuple


class SavedFeatures(NamedTuple):
    features: int
    g_features: int
    code: int


class OrderParametersForward(NamedTuple):
    theta: int
    rows: int
    n: int
    row_stride: int
    column_stride: int
    code: int
    harmonics: int
    features: int
    row_block: int
    workspace: int


class OrderParametersBackward(NamedTuple):
    theta: int
    rows: int
    n: int
    row_stride: int
    column_stride: int
    code: int
    harmonics: int
    features: int
    g_features: int
    g_theta: int

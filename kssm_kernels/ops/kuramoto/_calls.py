"""The calls of native code, as csrc/calls.h has them."""

from __future__ import annotations

from typing import NamedTuple

from kssm_kernels.backends.calls import Word
from kssm_kernels.ops.order_parameters._calls import SavedFeatures


class Operand(NamedTuple):
    data: int
    row_stride: int
    column_stride: int
    value: float
    present: int


class Target(NamedTuple):
    data: int
    per_row: int
    per_column: int


class KuramotoUpdate(NamedTuple):
    rows: int
    n: int
    dt: float
    seed: Word
    coupling: Operand
    omega: Operand
    phase_lag: Operand
    noise_scale: Operand


class KuramotoStart(NamedTuple):
    theta: int
    row_stride: int
    column_stride: int
    code: int


class KuramotoForward(NamedTuple):
    update: KuramotoUpdate
    start: KuramotoStart
    steps: int
    harmonics: int
    features: int
    phases: int


class KuramotoBackward(NamedTuple):
    update: KuramotoUpdate
    start: KuramotoStart
    steps: int
    harmonics: int
    features: int
    phases: int
    g_features: int
    g_phases: int
    targets: tuple[Target, Target, Target, Target, Target]


class KuramotoFusedForward(NamedTuple):
    update: KuramotoUpdate
    start: KuramotoStart
    keeping: int
    first: int
    steps: int
    harmonics: int
    features: int
    phases: int
    phases_code: int


class KuramotoFusedBackward(NamedTuple):
    update: KuramotoUpdate
    start: KuramotoStart
    keeping: int
    first: int
    steps: int
    states: int
    harmonics: int
    end: SavedFeatures
    g: int
    g_code: int
    parts: int
    accumulate: int
    targets: tuple[Target, Target, Target, Target, Target]


class KuramotoStep(NamedTuple):
    update: KuramotoUpdate
    keeping: int
    code: int
    state: int
    moved: int
    z: int
    step: int
    out: int


class KuramotoAdjointSums(NamedTuple):
    update: KuramotoUpdate
    code: int
    state: int
    z: int
    g: int
    sums: int
    workspace: int


class KuramotoAdjointStep(NamedTuple):
    update: KuramotoUpdate
    code: int
    state: int
    z: int
    gz: int
    step: int
    g: int
    targets: tuple[Target, Target, Target, Target]

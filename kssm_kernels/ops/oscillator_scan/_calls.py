"""The calls of native code, as csrc/calls.h has them."""

from __future__ import annotations

from typing import NamedTuple


class ScanSequence(NamedTuple):
    data: int
    row_stride: int
    time_stride: int
    code: int


class ScanStart(NamedTuple):
    phase_lag: int
    lag_stride: int
    initial_re: int
    initial_im: int
    re_stride: int
    im_stride: int


class ScanLoop(NamedTuple):
    communities: int
    c: int
    u: int
    listen: ScanSequence


class OscillatorScan(NamedTuple):
    rows: int
    steps: int
    heads: int
    oscillators: int
    code: int
    moebius: int
    tied_leak: int
    harmonics: int
    p: ScanSequence
    q: ScanSequence
    gate: ScanSequence
    phase: ScanSequence
    coupling: ScanSequence
    forget: ScanSequence
    start: ScanStart
    loop: ScanLoop
    reset: int
    every: int
    states_re: int
    states_im: int


class OscillatorScanForward(NamedTuple):
    scan: OscillatorScan
    order_re: int
    order_im: int
    order_code: int
    last_re: int
    last_im: int


class ScanLoopGradients(NamedTuple):
    v_re: int
    v_im: int
    f: int
    g_y: int
    g_listen: int


class OscillatorScanBackward(NamedTuple):
    scan: OscillatorScan
    g_order_re: int
    g_order_im: int
    order_code: int
    g_last_re: int
    g_last_im: int
    g_states_re: int
    g_states_im: int
    g_p: int
    g_q: int
    g_gate: int
    g_phase: int
    g_coupling: int
    g_forget: int
    g_lag: int
    g_initial_re: int
    g_initial_im: int
    lag_summed: int
    re_summed: int
    im_summed: int
    loop: ScanLoopGradients

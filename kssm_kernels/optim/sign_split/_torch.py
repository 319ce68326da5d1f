"""The step in torch operators: one tensor at a time (any dtype; float64 is truth), or all of a list as one (foreach).

Every operation is rounded once and in the order of csrc/math/sign_split.h, so that in modes ``paper`` and
``normalized`` all implementations give the same bits; in ``consolidate`` the order of the sum behind the rms differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kssm_kernels.optim.sign_split import _rounding as rounding
from kssm_kernels.optim.sign_split._hyper import MODES, Hyper
from kssm_kernels.optim.sign_split._tensors import Tensors

NORMALIZED, CONSOLIDATE = MODES.index("normalized"), MODES.index("consolidate")
FOREACH_ELEMENTS = 1 << 24  # of a concatenation, at most: it costs five copies in the compute dtype


def advance(
    hyper: Hyper,
    resistance: float | Tensor,
    step: Tensor,
    gradient: Tensor,
    p: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """New p, P, N and T, each ``[n]`` in the compute dtype. step: lr / cryo, 0-dim or [n]."""
    g = gradient
    if hyper.grad_scale is not None:
        g = g / hyper.grad_scale.to(g)
    if hyper.maximize:
        g = -g
    part = (1.0 - hyper.beta) * g
    new_positive = hyper.beta * positive + part.clamp_min(0.0)
    new_negative = hyper.beta * negative - part.clamp_max(0.0)
    opposite = torch.where(g < 0, new_positive, new_negative)
    lazy = hyper.lazy and MODES[hyper.mode] != "paper"
    if not lazy:
        opposite = torch.where(g != 0, opposite, 0.0)
    difference = new_positive - new_negative
    weight = new_positive + new_negative + hyper.eps
    if hyper.eps == 0:
        weight = torch.where(weight > 0, weight, 1.0)  # both means 0: r is 0, not 0/0
    # normalized: r / (1 + kappa D / weight) in one division
    top, base = (difference, weight) if hyper.mode == NORMALIZED else (g, 1.0)
    u = top / (base + resistance * opposite)
    live = g - g == 0
    if lazy:
        live = live & (g != 0)
    if temperature is not None and hyper.temperature is not None:
        floor, cool, heat = hyper.temperature
        t = (cool * temperature + heat * (difference / weight).abs() * (1.0 - temperature)).clamp_max(1.0)
        temperature = torch.where(live, t, temperature)
        u = u * (floor + (1.0 - floor) * t)
    if hyper.weight_decay != 0:
        u = u + hyper.weight_decay * p
    p = torch.where(live, p - step * u, p)
    return p, torch.where(live, new_positive, positive), torch.where(live, new_negative, negative), temperature


def _resistance(hyper: Hyper, rms: Tensor) -> Tensor:
    return torch.where(rms > 0, hyper.kappa / torch.where(rms > 0, rms, 1.0), 0.0)


def _step_size(hyper: Hyper, t: Tensors, compute: torch.dtype) -> Tensor:
    lr = torch.as_tensor(hyper.lr, dtype=compute, device=t.p.device).reshape(())
    step = lr / torch.full_like(lr, hyper.cryo)
    return step if t.cryo is None else step / t.cryo.to(compute).repeat_interleave(t.row)


def _read_means(state: Sequence[Tensor], scales: Sequence[Tensor | None], compute: torch.dtype) -> Tensor:
    if scales[0] is None:
        return torch.cat(list(state)).to(compute)
    return torch.cat([rounding.dequantized(s, c) for s, c in zip(state, scales, strict=True) if c is not None]).to(
        compute
    )


def _copy(targets: Sequence[Tensor], values: Tensor) -> None:
    parts = torch.split(values, [t.numel() for t in targets])
    if len(targets) == 1:
        targets[0].copy_(parts[0])
    else:
        torch._foreach_copy_(list(targets), list(parts))


def _write_means(
    states: Sequence[Tensor], scales: Sequence[Tensor | None], value: Tensor, random: Tensor | None
) -> None:
    if scales[0] is not None:
        sizes = [s.numel() for s in states]
        drawn = [None] * len(sizes) if random is None else torch.split(random, sizes)
        for state, scale, x, bits in zip(
            states, scales, torch.split(value.to(torch.float32), sizes), drawn, strict=True
        ):
            codes, new_scale = rounding.quantized(x, bits)
            state.copy_(codes)
            assert scale is not None
            scale.copy_(new_scale)
    elif random is not None and states[0].dtype == torch.bfloat16:
        _copy(states, rounding.stochastic_bfloat16(value.to(torch.float32), random))
    else:
        _copy(states, value)


def _together(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    """Steps tensors with one key (kssm_kernels/optim/sign_split/_table.py) end to end, as if they were one."""
    first = tensors[0]
    compute = torch.float64 if first.p.dtype == torch.float64 else torch.float32
    sizes = [t.p.numel() for t in tensors]

    def joined(parts: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([x for x in parts if x is not None])

    def per_element(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([v.expand(n) for v, n in zip(values, sizes, strict=True)])

    resistance: float | Tensor = hyper.kappa
    if first.rms is not None:
        resistance = per_element([_resistance(hyper, t.rms.to(compute)) for t in tensors if t.rms is not None])
    steps = [_step_size(hyper, t, compute) for t in tensors]
    step = steps[0] if all(t.cryo is None for t in tensors) else per_element(steps)
    p = joined([t.p for t in tensors]).to(compute)
    if first.compensation is not None:
        p = p + joined([t.compensation for t in tensors]).to(compute)
    positive_scales, negative_scales = [t.positive_scale for t in tensors], [t.negative_scale for t in tensors]
    new_p, positive, negative, temperature = advance(
        hyper,
        resistance,
        step,
        joined([t.g for t in tensors]).to(compute),
        p,
        _read_means([t.positive for t in tensors], positive_scales, compute),
        _read_means([t.negative for t in tensors], negative_scales, compute),
        None if first.temperature is None else joined([t.temperature for t in tensors]),
    )
    words = None
    if first.step is not None:
        drawn = ((t.step, t) for t in tensors if t.step is not None)
        words = torch.cat(
            [rounding.random_words(t.p.numel(), seed=hyper.seed, step=k, index=t.stream) for k, t in drawn]
        )
    _write_parameters(tensors, hyper, new_p, new_p != p, words)
    random = words if hyper.state_rounding == "stochastic" else None
    of_positive, of_negative = (
        (None, None) if random is None else (rounding.bits_for_positive(random), rounding.bits_for_negative(random))
    )
    _write_means([t.positive for t in tensors], positive_scales, positive, of_positive)
    _write_means([t.negative for t in tensors], negative_scales, negative, of_negative)
    if temperature is not None:
        _copy([t.temperature for t in tensors if t.temperature is not None], temperature)
    if first.rms is not None:
        for t, size in zip(tensors, torch.split(positive + negative, sizes), strict=True):
            wide = size if size.device.type == "mps" else size.double()
            assert t.rms is not None
            t.rms.copy_(wide.square().mean().sqrt())


def _write_parameters(tensors: Sequence[Tensors], hyper: Hyper, p: Tensor, moved: Tensor, words: Tensor | None) -> None:
    first, targets = tensors[0], [t.p for t in tensors]
    if first.compensation is not None:  # what did not move stays as it is, in its last bit too
        buffers = [t.compensation for t in tensors if t.compensation is not None]
        stored = p.to(torch.bfloat16)
        lost = (p - stored.to(p.dtype)).to(torch.bfloat16)
        _copy(targets, torch.where(moved, stored, torch.cat(targets)))
        _copy(buffers, torch.where(moved, lost, torch.cat(buffers)))
    elif words is not None and first.p.dtype == torch.bfloat16 and hyper.param_rounding == "stochastic":
        _copy(targets, rounding.stochastic_bfloat16(p, rounding.bits_for_parameter(words)))
    else:
        _copy(targets, p)


def single_tensor(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    for t in tensors:
        if t.p.numel():
            _together([t], hyper)


def foreach(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    """All tensors as one: the launches of one, whatever their number."""
    batch: list[Tensors] = []
    elements = 0
    for t in tensors:
        if elements + t.p.numel() > FOREACH_ELEMENTS and batch:
            _together(batch, hyper)
            batch, elements = [], 0
        if t.p.numel():
            batch.append(t)
            elements += t.p.numel()
    if batch:
        _together(batch, hyper)

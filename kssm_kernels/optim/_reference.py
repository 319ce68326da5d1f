"""The step in torch operators: one tensor at a time (any dtype; float64 is truth), or all of a list as one (foreach).

Every operation is rounded once and in the order of csrc/math/sign_split.h, so that in modes ``paper`` and
``normalized`` all implementations give the same bits; in ``consolidate`` the order of the sum behind the rms differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kssm_kernels.optim import _rounding as rounding
from kssm_kernels.optim._hyper import MODES, Hyper
from kssm_kernels.optim._tensors import Tensors

NORMALIZED, CONSOLIDATE = MODES.index("normalized"), MODES.index("consolidate")
FOREACH_ELEMENTS = 1 << 24  # of a concatenation, at most: it costs five copies in the arithmetic dtype


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
    """New p, P, N and T, each ``[n]`` in the arithmetic dtype. step: lr / cryo, 0-dim or [n]; resistance: see Tensors."""
    g = -gradient if hyper.maximize else gradient
    if hyper.grad_scale is not None:
        g = g / hyper.grad_scale.to(g)
    fresh = 1.0 - hyper.beta
    new_positive = hyper.beta * positive + fresh * torch.where(g > 0, g, 0.0)
    new_negative = hyper.beta * negative + fresh * torch.where(g < 0, -g, 0.0)
    opposite = torch.where(g > 0, new_negative, torch.where(g < 0, new_positive, 0.0))
    weight = new_positive + new_negative + hyper.eps
    weight = torch.where(weight > 0, weight, 1.0)
    r = (new_positive - new_negative) / weight
    if hyper.mode == NORMALIZED:
        u = r / (1.0 + resistance * opposite / weight)
    else:
        u = g / (1.0 + resistance * opposite)
    live = g - g == 0
    if hyper.lazy and MODES[hyper.mode] != "paper":
        live = live & (g != 0)
    if temperature is not None and hyper.temperature is not None:
        floor, cool, heat = hyper.temperature
        t = (cool * temperature + heat * r.abs() * (1.0 - temperature)).clamp_max(1.0)
        temperature = torch.where(live, t, temperature)
        u = u * (floor + (1.0 - floor) * t)
    moved = p - step * (u + hyper.weight_decay * p)
    kept = (torch.where(live, a, b) for a, b in ((moved, p), (new_positive, positive), (new_negative, negative)))
    return (*kept, temperature)


def _resistance(hyper: Hyper, t: Tensors, compute: torch.dtype) -> float | Tensor:
    if t.rms is None:
        return hyper.kappa
    rms = t.rms.to(compute)
    return torch.where(rms > 0, hyper.kappa / torch.where(rms > 0, rms, 1.0), 0.0)


def _step_sizes(hyper: Hyper, t: Tensors, compute: torch.dtype) -> Tensor:
    lr = torch.as_tensor(hyper.lr, dtype=compute, device=t.p.device).reshape(())
    step = lr / torch.full_like(lr, hyper.cryo)
    return step if t.cryo is None else step / t.cryo.to(compute).repeat_interleave(t.row)


class _Open:
    """The numbers of one tensor in the arithmetic dtype, and how they go back to memory."""

    def __init__(self, hyper: Hyper, t: Tensors) -> None:
        self.t, self.hyper = t, hyper
        compute = torch.float64 if t.p.dtype == torch.float64 else torch.float32
        self.compute = compute
        self.p = t.p.to(compute)
        if t.compensation is not None:
            self.p = self.p + t.compensation.to(compute)
        self.gradient = t.g.to(compute)
        self.positive = self._read(t.positive, t.positive_scale)
        self.negative = self._read(t.negative, t.negative_scale)
        self.resistance, self.step = _resistance(hyper, t, compute), _step_sizes(hyper, t, compute)

    def _read(self, state: Tensor, scale: Tensor | None) -> Tensor:
        return state.to(self.compute) if scale is None else rounding.dequantized(state, scale).to(self.compute)

    def write(self, p: Tensor, positive: Tensor, negative: Tensor, temperature: Tensor | None) -> None:
        t, words = self.t, None
        if t.step is not None:
            words = rounding.random_words(t.p.numel(), seed=self.hyper.seed, step=t.step, index=t.index)
        if t.compensation is not None:
            moved, stored = p != self.p, p.to(t.p.dtype)
            lost = (p - stored.to(self.compute)).to(t.compensation.dtype)
            t.compensation.copy_(torch.where(moved, lost, t.compensation))
            t.p.copy_(torch.where(moved, stored, t.p))
        elif t.p.dtype == torch.bfloat16 and self.hyper.param_rounding == "stochastic" and words is not None:
            t.p.copy_(rounding.stochastic_bfloat16(p, rounding.bits_for_parameter(words)))
        else:
            t.p.copy_(p)
        random = self.hyper.state_rounding == "stochastic" and words is not None
        for state, scale, value, bits in (
            (t.positive, t.positive_scale, positive, rounding.bits_for_positive),
            (t.negative, t.negative_scale, negative, rounding.bits_for_negative),
        ):
            drawn = bits(words) if random and words is not None else None
            if scale is not None:
                codes, scales = rounding.quantized(value.to(torch.float32), drawn)
                state.copy_(codes)
                scale.copy_(scales)
            elif state.dtype == torch.bfloat16 and drawn is not None:
                state.copy_(rounding.stochastic_bfloat16(value.to(torch.float32), drawn))
            else:
                state.copy_(value)
        if t.temperature is not None and temperature is not None:
            t.temperature.copy_(temperature)
        if t.rms is not None:
            size = positive + negative
            t.rms.copy_((size if size.device.type == "mps" else size.double()).square().mean().sqrt())


def single_tensor(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    for t in tensors:
        if t.p.numel():
            x = _Open(hyper, t)
            x.write(*advance(hyper, x.resistance, x.step, x.gradient, x.p, x.positive, x.negative, t.temperature))


def foreach(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    """All tensors (of one arithmetic dtype and device) end to end as one: the launches of one, whatever their number."""
    batch: list[Tensors] = []
    elements = 0
    for t in tensors:
        if elements + t.p.numel() > FOREACH_ELEMENTS and batch:
            _concatenated(batch, hyper)
            batch, elements = [], 0
        if t.p.numel():
            batch.append(t)
            elements += t.p.numel()
    if batch:
        _concatenated(batch, hyper)


def _concatenated(tensors: Sequence[Tensors], hyper: Hyper) -> None:
    opened = [_Open(hyper, t) for t in tensors]
    sizes = [t.p.numel() for t in tensors]

    def per_element(values: Sequence[float | Tensor]) -> float | Tensor:
        """A number all have in common stays one; otherwise each tensor's, once per element."""
        if all(not isinstance(v, Tensor) for v in values):
            return values[0]
        return torch.cat([torch.as_tensor(v).expand(n) for v, n in zip(values, sizes, strict=True)])

    same_step = all(t.cryo is None for t in tensors)
    step = opened[0].step if same_step else per_element([x.step for x in opened])
    heat = [t.temperature for t in tensors if t.temperature is not None]
    results = advance(
        hyper,
        per_element([x.resistance for x in opened]),
        torch.as_tensor(step),
        torch.cat([x.gradient for x in opened]),
        torch.cat([x.p for x in opened]),
        torch.cat([x.positive for x in opened]),
        torch.cat([x.negative for x in opened]),
        torch.cat(heat) if heat else None,
    )
    parts = [[None] * len(sizes) if r is None else r.split(sizes) for r in results]
    for x, p, positive, negative, temperature in zip(opened, *parts, strict=True):
        x.write(p, positive, negative, temperature)  # type: ignore[arg-type]  # only the last may be None

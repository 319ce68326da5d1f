"""The closed loop in pure torch: what communities of oscillators add to the inputs of the next step, and its adjoint.

Equations: __init__.py. Every step has products of its own, in the adjoint too, so that cutting a sequence changes no
bit; the gradients of C and U are two products over all steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops.oscillator_scan import _step
from kssm_kernels.ops.oscillator_scan._scan import Scan
from kssm_kernels.ops.oscillator_scan._step import Pair

Moved = tuple[Tensor, ...]  # what is added to p, q, gate, phase [..., D] and forget [..., G]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype: autocast would take it in 16 bits, and the op promises that of its input."""
    device = a.device.type
    if not torch.is_autocast_enabled(device):
        return a @ b
    with torch.autocast(device, enabled=False):
        return a @ b


class Communities(NamedTuple):
    """Of one step."""

    v: Pair  # [..., D], of the state before
    y: Pair  # Y [..., M]
    strength: Tensor | None  # K' [..., M]; None: 1
    f: Tensor  # F [..., 2 M]


class Loop:
    def __init__(self, s: Scan) -> None:
        assert s.communities is not None
        assert s.feedback is not None
        self.c, self.u = s.communities.to(s.compute), s.feedback.to(s.compute)
        self.listen = None if s.listen is None else s.listen.to(s.compute)
        self.sizes = [s.p.shape[-1]] * 4 + ([] if s.forget is None else [s.heads])

    def communities(self, t: int, v: Pair) -> Communities:
        """Seen at step t; v: [..., G, N]."""
        flat = v[0].flatten(-2).contiguous(), v[1].flatten(-2).contiguous()
        y = product(flat[0], self.c.t()), product(flat[1], self.c.t())
        if self.listen is None:
            return Communities(flat, y, None, torch.cat(y, -1))
        strength = _step.sigmoid(self.listen.select(-2, t))
        return Communities(flat, y, strength, torch.cat(_step.scaled(y, strength), -1))

    def moved(self, f: Tensor) -> Moved:
        return torch.split(product(f, self.u.t()), self.sizes, -1)

    def adjoint(self, seen: Communities, a: Tensor) -> tuple[Pair, Pair, Tensor | None]:
        """Gradients of v, Y and k, from those of the inputs."""
        re, im = torch.chunk(product(a, self.u), 2, -1)
        gf = re, im
        gy, gk = gf, None
        if seen.strength is not None:
            gy = _step.scaled(gf, seen.strength)
            gk = seen.strength * (1 - seen.strength) * _step.real_of(seen.y, gf)
        return (product(gy[0], self.c), product(gy[1], self.c)), gy, gk


class Gathered:
    """What the products over all steps are made of, the last step first."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.a: list[Tensor] = []
        self.f: list[Tensor] = []
        self.gy: list[Pair] = []
        self.v: list[Pair] = []
        self.gk: list[Tensor] = []

    def step(self, seen: Communities, inputs: list[Tensor | None]) -> Pair:
        """The gradient of v, from those of a step's p, q, gate, phase, coupling and forget, [..., 1, D] and so on."""
        a = torch.cat([g.squeeze(-2) for g in (*inputs[:4], inputs[5]) if g is not None], -1)
        gv, gy, gk = self.loop.adjoint(seen, a)
        self.a.append(a)
        self.f.append(seen.f)
        self.gy.append(gy)
        self.v.append(seen.v)
        if gk is not None:
            self.gk.append(gk)
        return gv

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of C, U and k."""
        loop = self.loop
        if not self.a:
            gk = None if loop.listen is None else torch.zeros_like(loop.listen)
            return torch.zeros_like(loop.c), torch.zeros_like(loop.u), gk

        def rows(steps: list[Tensor]) -> Tensor:
            return torch.stack(steps).flatten(0, -2)

        g_communities = sum(product(rows([g[i] for g in self.gy]).t(), rows([v[i] for v in self.v])) for i in range(2))
        assert isinstance(g_communities, Tensor)
        return (
            g_communities,
            product(rows(self.a).t(), rows(self.f)),
            torch.stack(self.gk[::-1], -2) if self.gk else None,
        )

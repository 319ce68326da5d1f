"""The recurrent bank: projections, oscillator scan and readout of one layer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kssm_kernels.nn.banks import _check_last, _positive
from kssm_kernels.ops.oscillator_scan import State, oscillator_scan
from kssm_kernels.ops.oscillator_scan._scan import KINDS

__all__ = ["OscillatorBank"]

Readout = Literal["heads", "communities"]


class _Linear(nn.Linear):
    """Starts as its bank says, also where a tool resets every module by itself; torch's own start would replace it."""

    start: Callable[[nn.Linear], None] | None = None

    def reset_parameters(self) -> None:
        if self.start is None:  # in nn.Linear's __init__
            super().reset_parameters()
        else:
            self.start(self)


@torch.no_grad()
def _start_projection(linear: nn.Linear, sizes: list[int], of_heads: int, listen: bool) -> None:
    one = 1 / math.sqrt(linear.in_features)
    weights, biases = torch.split(linear.weight, sizes), torch.split(linear.bias, sizes)
    scales = [one, one, one, 0.3 * one, *[0.02] * of_heads, *[0.5 * one] * listen]
    for weight, scale in zip(weights, scales, strict=True):
        weight.normal_(std=scale)
    for bias in biases[:2]:
        bias.normal_(std=0.3)
    biases[2].uniform_(-4.0, 1.0)  # write gates from nearly shut to open: memories of many lengths
    turn = torch.empty_like(biases[3]).uniform_(math.log(1e-3), 0.0).exp_()  # frequencies, log-uniform, both signs
    biases[3].copy_(turn * (torch.rand_like(turn) < 0.5).to(turn).mul_(2).sub_(1))
    for bias in biases[4 : 4 + of_heads]:
        bias.fill_(-2.0)  # weak coupling, slow forgetting
    for bias in biases[4 + of_heads :]:
        bias.fill_(1.0)


@torch.no_grad()
def _start_out(linear: nn.Linear, std: float) -> None:
    linear.weight.normal_(std=std)


class OscillatorBank(nn.Module):
    """A bank of coupled oscillators whose state runs through the sequence; its output sees order parameters alone.

    Equation: with ``[p | q | gate | phase | k | f | l] = W x + b``, the states z of
    :func:`kssm_kernels.oscillator_scan`, and v what its readout sees of them, ``out = W_o [Re Z | Im Z]``, where::

        heads          Z_{n,h} = (1/N) sum_j v_j^n over the oscillators of head h,  n = 1 .. harmonics
        communities    Z_{n,m} = sum_j C_mj v_j^n over all oscillators, C real, signed and learned

    With ``feedback`` the loop is closed: sums over further communities, at their strengths, move the next step::

        Y(t-1) = C' v(t-1),   K = sigmoid(l(t)), or 1 without listen
        [p | q | gate | phase | f](t) += U [K Re Y(t-1) | K Im Y(t-1)],   C' and U real, signed and learned

    Args:
        dim: width of the input. oscillators: D, all of them. heads: G, a divisor of D.
        kind: ``"moebius"`` or ``"stuart_landau"``.
        coupling: whether each head's oscillators feel their mean field, with a strength and a phase lag of their own.
        forget: whether heads have a forget gate.
        harmonics: H, 1 to 32.
        readout: ``"heads"`` or ``"communities"``. communities: how many of them the readout has.
        feedback: how many communities close the loop; 0: it is open. listen: whether x says how strongly each counts.
        initial: ``"zero"``, or ``"learned"`` phases at radius 1/2, for the state before a sequence.
        out_dim: width of the output; default: dim.
        layers: of the model that adds such outputs up: W_o begins smaller by sqrt(2 layers).
        save: of :func:`kssm_kernels.oscillator_scan`, with the readout of heads; communities read all states.

    Input ``x [..., T, dim]``; returns ``(out [..., T, out_dim], (z_re, z_im))``, the last state ``[..., D]``, which
    continues the sequence. W_o has no bias, so that what does not pass by an order parameter does not pass.

    Raises: ValueError for a bad size, mode or input shape; what the op raises.

    Source: K-SSM v4.

    >>> import torch
    >>> from kssm_kernels import OscillatorBank
    >>> bank = OscillatorBank(dim=16, oscillators=24, heads=3)
    >>> x = torch.randn(2, 5, 16)
    >>> out, state = bank(x)
    >>> out.shape, state[0].shape
    (torch.Size([2, 5, 16]), torch.Size([2, 24]))
    >>> first, state = bank(x[:, :4])
    >>> last, state = bank.step(x[:, 4], state)              # as a generator goes on, token by token
    >>> torch.allclose(last, out[:, 4], atol=1e-5)
    True
    >>> closed = OscillatorBank(dim=16, oscillators=24, heads=3, coupling=False, feedback=5)
    >>> closed(x)[0].shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        oscillators: int = 256,
        heads: int = 32,
        *,
        kind: str = "moebius",
        coupling: bool = True,
        forget: bool = True,
        harmonics: int = 2,
        readout: Readout = "heads",
        communities: int = 64,
        feedback: int = 0,
        listen: bool = True,
        initial: Literal["zero", "learned"] = "zero",
        out_dim: int | None = None,
        layers: int = 1,
        save: str | int = "all",
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.dim, self.oscillators, self.heads, self.harmonics, self.communities, self.out_dim, self.layers = _positive(
            "OscillatorBank",
            dim=dim,
            oscillators=oscillators,
            heads=heads,
            harmonics=harmonics,
            communities=communities,
            out_dim=out_dim,
            layers=layers,
        )
        count: Any = feedback  # to mypy no int is an Integral
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
            raise ValueError(f"OscillatorBank: feedback must be an int of at least 0, got {feedback!r}")
        self.feedback = int(feedback)
        if self.oscillators % self.heads:
            raise ValueError(f"OscillatorBank: heads must divide oscillators = {oscillators}, got {heads}")
        for name, value, known in (
            ("kind", kind, KINDS),
            ("readout", readout, ("heads", "communities")),
            ("initial", initial, ("zero", "learned")),
        ):
            if value not in known:
                raise ValueError(f"OscillatorBank: {name} must be {' or '.join(map(repr, known))}, got {value!r}")
        self.kind, self.readout, self.save = kind, readout, save
        self.coupling, self.forget, self.listen = bool(coupling), bool(forget), bool(listen) and self.feedback > 0
        self.sizes = [self.oscillators] * 4 + [self.heads] * (self.coupling + self.forget)
        moved = 4 * self.oscillators + self.heads * self.forget
        if self.listen:
            self.sizes.append(self.feedback)
        self.projection = _Linear(self.dim, sum(self.sizes))
        self.projection.start = partial(
            _start_projection, sizes=self.sizes, of_heads=self.coupling + self.forget, listen=self.listen
        )
        self.phase_lag = nn.Parameter(torch.empty(self.heads)) if coupling else None
        self.initial_phase = nn.Parameter(torch.empty(self.oscillators)) if initial == "learned" else None
        groups = self.communities if readout == "communities" else self.heads
        self.community = nn.Parameter(torch.empty(groups, self.oscillators)) if readout == "communities" else None
        closed = self.feedback > 0
        self.loop_community = nn.Parameter(torch.empty(self.feedback, self.oscillators)) if closed else None  # C'
        self.loop_weight = nn.Parameter(torch.empty(moved, 2 * self.feedback)) if closed else None  # U
        self.out = _Linear(2 * groups * self.harmonics, self.out_dim, bias=False)
        scale = 1.4 if readout == "communities" else 0.7 * math.sqrt(self.oscillators / self.heads)
        self.out.start = partial(_start_out, std=scale / math.sqrt(2 * groups * self.harmonics * 2 * self.layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter as a new bank has it (after ``to_empty`` of a bank made on the meta device, say)."""
        self.projection.reset_parameters()
        if self.phase_lag is not None:
            self.phase_lag.zero_()
        if self.initial_phase is not None:
            self.initial_phase.uniform_(-math.pi, math.pi)
        if self.loop_community is not None and self.loop_weight is not None:
            self.loop_community.normal_(std=1 / math.sqrt(self.oscillators))
            self.loop_weight.normal_(std=0.5 / math.sqrt(2 * self.feedback))
            self.loop_weight[3 * self.oscillators : 4 * self.oscillators].mul_(0.3)  # as the phases' own weights
        if self.community is not None:
            self.community.normal_(std=1 / math.sqrt(self.oscillators))
        self.out.reset_parameters()

    def initial_state(self) -> State | None:
        """(re, im) before a sequence, ``[D]`` each; None: zero."""
        if self.initial_phase is None:
            return None
        return 0.5 * torch.cos(self.initial_phase), 0.5 * torch.sin(self.initial_phase)

    def order_parameters(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """What the output is made of: ``(Z_re, Z_im)``, ``[..., T, groups, H]``, and the last state."""
        _check_last("OscillatorBank", x, self.dim)
        p, q, gate, phase, *logits = torch.split(self.projection(x), self.sizes, -1)
        coupling = logits[0] if self.coupling else None
        forget = logits[self.coupling] if self.forget else None
        loop = None
        if self.loop_community is not None and self.loop_weight is not None:
            loop = self.loop_community, self.loop_weight, logits[-1] if self.listen else None
        whole = self.community is not None
        z_re, z_im, last, *states = oscillator_scan(
            *(p, q, gate, phase, coupling, forget),
            kind=self.kind,
            heads=self.heads,
            harmonics=0 if whole else self.harmonics,
            phase_lag=self.phase_lag,
            initial_state=self.initial_state() if state is None else state,
            reset=reset,
            cu_seqlens=cu_seqlens,
            feedback=loop,
            return_states=whole,
            save=self.save,
        )
        if whole:
            z_re, z_im = self._communities(states[0][0], states[0][1], z_re.dtype)
        return z_re, z_im, last

    def _communities(self, re: Tensor, im: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``sum_j C_mj v_j^n``, [..., T, M, H]."""
        if self.kind == "stuart_landau":
            size = torch.maximum(re.abs(), im.abs()).clamp(min=1).detach()  # whose square may overflow
            a, b = re / size, im / size
            root = torch.sqrt(1 / (size * size) + a * a + b * b)
            re, im = a / root, b / root
        assert self.community is not None
        power_re, power_im, found = re, im, []
        for n in range(self.harmonics):
            if n:
                power_re, power_im = power_re * re - power_im * im, power_re * im + power_im * re
            both = torch.stack((power_re, power_im), -2).to(dtype)
            found.append(nn.functional.linear(both, self.community.to(dtype)))
        z = torch.stack(found, -1)
        return z.select(-3, 0), z.select(-3, 1)

    def forward(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        z_re, z_im, last = self.order_parameters(x, state, reset=reset, cu_seqlens=cu_seqlens)
        return self.read(z_re, z_im), last

    def read(self, z_re: Tensor, z_im: Tensor) -> Tensor:
        """The output ``[..., T, out_dim]`` that order parameters ``[..., T, groups, H]`` make."""
        out: Tensor = self.out(torch.cat((z_re.flatten(-2), z_im.flatten(-2)), -1))
        return out

    def coherence(self, z_re: Tensor, z_im: Tensor) -> Tensor:
        """R ``[..., T, groups]``, in [0, 1] but for rounding: ``|Z_1|`` of each head or community.

        A community's is divided by ``sum_j |C_mj|``: 1 says that all its oscillators are at radius 1 and at one phase,
        or, where C_mj is negative, at the opposite one.
        """
        r = torch.hypot(z_re[..., 0], z_im[..., 0])
        if self.community is None:
            return r
        return r / self.community.abs().sum(-1).clamp(min=torch.finfo(self.community.dtype).tiny).to(r.dtype)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token, ``x [..., dim]``: ``(out [..., out_dim], state)`` at a cost that knows no past."""
        _check_last("OscillatorBank", x, self.dim)
        out, last = self(x.unsqueeze(-2), state)
        return out.squeeze(-2), last

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, oscillators={self.oscillators}, heads={self.heads}, harmonics={self.harmonics}"
        options = f"kind={self.kind!r}, coupling={self.coupling}, forget={self.forget}, readout={self.readout!r}"
        if self.community is not None:
            options += f", communities={self.communities}"
        if self.feedback:
            options += f", feedback={self.feedback}, listen={self.listen}"
        return f"{sizes}, {options}"

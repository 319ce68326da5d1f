"""The equations as a textbook writes them, in plain torch with torch's own autograd; nothing of the packages is used.

In float64 this is the truth; in the dtype of a kernel it is what a user would write without it ("the framework"), and
what the benches time the kernels against. Two formulas of a thing stand here where the truth asks for more than a user
who wants speed would write: :func:`mean_field`, :class:`OriginalBank`.

The order parameters store tensors of size [..., N, H].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def order_parameters(theta: Tensor, harmonics: int) -> Tensor:
    """[..., N] -> [..., 3H] through tensors of size [..., N, H]."""
    n = torch.arange(1, harmonics + 1, dtype=theta.dtype, device=theta.device)
    angles = theta.unsqueeze(-1) * n
    c, s = angles.cos().mean(-2), angles.sin().mean(-2)
    return torch.cat([c, s, (c * c + s * s + 1e-8).sqrt()], -1)


def kuramoto_update(
    theta: Tensor,
    coupling: Tensor | float,
    *,
    omega: Tensor | float | None = None,
    dt: float = 1.0,
    phase_lag: Tensor | float | None = None,
    steps: int = 1,
    noise_scale: Tensor | float | None = None,
    xi: Tensor | None = None,
) -> Tensor:
    """``xi [steps, ..., N]`` is given, not drawn."""
    lead = torch.broadcast_shapes(
        theta.shape[:-1], *(v.shape[:-1] for v in (coupling, omega, phase_lag, noise_scale) if isinstance(v, Tensor))
    )
    theta = theta.expand(*lead, theta.shape[-1]).clone()
    for k in range(steps):
        z_cos, z_sin = theta.cos().mean(-1, keepdim=True), theta.sin().mean(-1, keepdim=True)
        shifted = theta if phase_lag is None else theta + phase_lag
        velocity = coupling * (z_sin * shifted.cos() - z_cos * shifted.sin())
        if omega is not None:
            velocity = velocity + omega
        theta = theta + dt * velocity
        if noise_scale is not None:
            assert xi is not None
            theta = theta - noise_scale * xi[k].to(theta.dtype)
    return theta


def mean_field(
    theta: Tensor, coupling: Tensor | float, omega: Tensor | float = 0.0, dt: float = 1.0, steps: int = 1
) -> Tensor:
    """:func:`kuramoto_update` without phase lag, noise and operands larger than theta, for the benches.

    Each cosine and sine is taken once; with a lag the truth has to take them twice. The matrix of all N x N differences
    would only make a weaker baseline.
    """
    for _ in range(steps):
        cos, sin = torch.cos(theta), torch.sin(theta)
        mean_cos, mean_sin = cos.mean(-1, keepdim=True), sin.mean(-1, keepdim=True)
        theta = theta + dt * (omega + coupling * (mean_sin * cos - mean_cos * sin))
    return theta


def bistable_coupling(params: Tensor, clamp: tuple[float, float] | None = (0.1, 10.0)) -> tuple[Tensor, Tensor, Tensor]:
    """Coupling strength, clamped latent and determinant from ten algebraic parameters, two of them unused."""
    a, b, c, d, e, f, g, h, _, _ = params.unbind(-1)
    u = (d * g - c * h) / (a * g - c * e + 1e-6)
    if clamp is not None:
        u = u.clamp(*clamp)
    return 2 * torch.sigmoid(u), u, b * g - c * f


def oscillator_scan(
    p: Tensor,
    q: Tensor,
    gate: Tensor,
    phase: Tensor,
    coupling: Tensor | None = None,
    forget: Tensor | None = None,
    *,
    kind: str = "stuart_landau",
    heads: int,
    harmonics: int = 4,
    phase_lag: Tensor | float = 0.0,
    tied_leak: bool = False,
    initial_state: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    feedback: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Order parameters [..., T, G, H] and states [..., T, D], both complex.

    What needs no state is computed for all steps at once, the rest in a loop over time. Its steps come from unbind: the
    gradient of indexing would be of the size of the whole for each of them. A closed loop is a scan of one step after
    another.
    """
    if feedback is not None:
        inputs = p, q, gate, phase, coupling, forget
        options = {"kind": kind, "heads": heads, "harmonics": harmonics, "phase_lag": phase_lag, "tied_leak": tied_leak}
        return _closed(inputs, feedback, initial_state, reset, options)
    g = torch.sigmoid(gate)
    keep = torch.sqrt(1 - (1 - 1e-6) * g * g) if kind == "stuart_landau" else 1 - g
    shape = (*p.shape[:-1], heads, p.shape[-1] // heads)
    write, turn = torch.complex(g * p, g * q).reshape(shape), torch.polar(keep, phase).reshape(shape)
    strength: Tensor | None = None
    if coupling is not None:
        strength = (
            torch.sigmoid(coupling) if kind == "stuart_landau" else nn.functional.softplus(coupling, threshold=100)
        )
        if tied_leak:
            turn = turn * (1 - strength).unsqueeze(-1)
        lag = torch.as_tensor(phase_lag, dtype=p.dtype, device=p.device)
        strength = strength * torch.polar(torch.ones_like(lag), -lag).expand(*p.shape[:-2], heads).unsqueeze(-2)
    if forget is not None:
        turn = turn * (1 - torch.sigmoid(forget)).unsqueeze(-1)
    start = torch.zeros((*p.shape[:-2], p.shape[-1]), dtype=write.dtype, device=p.device)
    if initial_state is not None:
        start = torch.complex(*initial_state).to(write.dtype).expand_as(start)
    z = start = start.reshape(*start.shape[:-1], *shape[-2:])
    states, orders = [], []
    strengths = [None] * p.shape[-2] if strength is None else strength.unbind(-2)
    for t, (force, turned, strong) in enumerate(zip(write.unbind(-3), turn.unbind(-3), strengths, strict=True)):
        if reset is not None:
            z = torch.where(reset[..., t, None, None], start, z)
        if strong is not None:
            force = force + strong.unsqueeze(-1) * seen_state(kind, z).mean(-1, keepdim=True)
        z = turned * z
        if kind == "stuart_landau":
            z = z + force
        else:
            w = force / torch.sqrt(1 + force.real**2 + force.imag**2)
            z = (z + w) / (1 + w.conj() * z)
        states.append(z.flatten(-2))
        power = v = seen_state(kind, z)
        found = []
        for _ in range(harmonics):
            found.append(power.mean(-1))
            power = power * v
        orders.append(torch.stack(found, -1) if found else v[..., :0])
    if not states:
        empty = write.sum() + turn.sum()
        return empty.expand((*shape[:-1], harmonics)), empty.expand(p.shape)
    return torch.stack(orders, -3), torch.stack(states, -2)


def _closed(
    inputs: tuple[Tensor | None, ...],
    feedback: tuple[Tensor, Tensor, Tensor | None],
    initial_state: tuple[Tensor, Tensor] | None,
    reset: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    p = inputs[0]
    assert p is not None
    c, u, listen = feedback
    steps, width, heads = p.shape[-2], p.shape[-1], options["heads"]
    shape = (*p.shape[:-2], width)
    zero = torch.zeros(shape, dtype=p.dtype, device=p.device)
    start = torch.complex(zero, zero) if initial_state is None else torch.complex(*initial_state).expand(shape)
    strengths = [1.0] * steps if listen is None else torch.sigmoid(listen).unbind(-2)
    by_step = [[None] * steps if x is None else x.unbind(-2) for x in inputs]
    z, orders, states = start, [], []
    for t, (strong, *given) in enumerate(zip(strengths, *by_step, strict=True)):
        if reset is not None:
            z = torch.where(reset[..., t, None], start, z)
        y = strong * (seen_state(options["kind"], z) @ c.t().to(z.dtype))
        moved = torch.cat([y.real, y.imag], -1) @ u.t()
        *wide, forget = torch.split(moved, [width] * 4 + [u.shape[0] - 4 * width], -1)
        moved_inputs = [
            x if add is None or x is None else x + add for x, add in zip(given, (*wide, None, forget), strict=True)
        ]
        order, state = oscillator_scan(
            *(None if x is None else x.unsqueeze(-2) for x in moved_inputs),  # type: ignore[arg-type]  # p .. are given
            initial_state=(z.real, z.imag),
            **options,
        )
        z = state.squeeze(-2)
        orders.append(order)
        states.append(state)
    if not states:
        moving = (x for x in (*inputs, *feedback, *(initial_state or ())) if x is not None)
        empty = sum(x.sum() for x in moving) * torch.ones((), dtype=start.dtype, device=p.device)
        assert isinstance(empty, Tensor)
        return empty.expand((*shape[:-1], 0, heads, options["harmonics"])), empty.expand(p.shape)
    return torch.cat(orders, -3), torch.cat(states, -2)


def seen_state(kind: str, z: Tensor) -> Tensor:
    """What the mean field and the readout see of a state."""
    return z / torch.sqrt(1 + z.real**2 + z.imag**2) if kind == "stuart_landau" else z


class BankV1(nn.Module):
    """The first bank of the family: fixed coupling strength, the N x N matrix takes no part."""

    def __init__(self, n_oscillators: int, coupling_strength: float = 2.0) -> None:
        super().__init__()
        self.coupling_strength = coupling_strength
        self.omega = nn.Parameter(torch.linspace(-math.pi, math.pi, n_oscillators))
        self.coupling = nn.Parameter(torch.randn(n_oscillators, n_oscillators))

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        theta = kuramoto_update(self.omega + f, self.coupling_strength)
        r = 0.99 * torch.sigmoid(f.abs().mean(-1, keepdim=True))
        return r * theta.cos(), r * theta.sin(), order_parameters(theta, 1)[..., 2], theta


class BankV2(nn.Module):
    """The second bank: frequencies and coupling from the hidden state, a residual readout."""

    def __init__(self, hidden_dim: int, n_oscillators: int = 128, base_coupling: float = 2.0) -> None:
        super().__init__()
        self.base_coupling = base_coupling
        self.to_freq = nn.Linear(hidden_dim, n_oscillators)
        self.omega = nn.Parameter(torch.linspace(-math.pi, math.pi, n_oscillators))
        self.coupling_mod = nn.Linear(hidden_dim, 1)
        self.phase_to_hidden = nn.Linear(2 * n_oscillators, hidden_dim)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        strength = self.base_coupling * torch.sigmoid(self.coupling_mod(h))
        theta = kuramoto_update(self.omega + self.to_freq(h), strength)
        out = h + self.phase_to_hidden(torch.cat([theta.sin(), theta.cos()], -1))
        return out, order_parameters(theta, 1)[..., 2], theta


class BankV3(nn.Module):
    """The third bank: ten algebraic parameters, bistable coupling, noise in every mode, H order parameters."""

    def __init__(
        self,
        hidden_dim: int,
        n_oscillators: int = 128,
        base_coupling: float = 2.0,
        n_harmonics: int = 32,
        *,
        clamp: tuple[float, float] | None = (0.1, 10.0),
    ) -> None:
        super().__init__()
        self.base_coupling, self.n_harmonics, self.clamp = base_coupling, n_harmonics, clamp
        self.to_params = nn.Linear(hidden_dim, 10)
        self.omega_0 = nn.Parameter(torch.linspace(-math.pi, math.pi, n_oscillators))
        self.readout = nn.Linear(3 * n_harmonics, hidden_dim)
        self.delta_param = nn.Parameter(torch.tensor([0.1]))
        self.last_delta_val: Tensor | None = None
        self.last_u_val: Tensor | None = None

    def forward(self, x: Tensor, xi: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``xi`` [..., N] is the noise; None stands for none."""
        strength, u, delta = bistable_coupling(self.to_params(x), self.clamp)
        self.last_delta_val, self.last_u_val = delta.abs().mean(), u.mean()
        theta = self.step(self.omega_0 + x.mean(-1, keepdim=True), strength.unsqueeze(-1), xi)
        features = order_parameters(theta, self.n_harmonics)
        return self.readout(features), features[..., 2 * self.n_harmonics], theta

    def step(self, theta: Tensor, strength: Tensor, xi: Tensor | None) -> Tensor:
        if xi is None:
            return kuramoto_update(theta, strength)
        return kuramoto_update(theta, strength, noise_scale=self.delta_param.abs() + 1e-5, xi=xi.unsqueeze(0))

    def get_regularization_loss(self, lambda1: float = 0.1, lambda2: float = 0.5, epsilon: float = 1e-5) -> Tensor:
        assert self.last_delta_val is not None
        assert self.last_u_val is not None
        return lambda1 / (self.last_delta_val + epsilon) - lambda2 * torch.log(self.last_u_val.clamp_min(epsilon))


class OriginalBank(BankV3):
    """The third bank as the family writes it, for the benches: it draws its noise itself, in evaluation too, and its
    step is :func:`mean_field`. ``draw`` can be what the fused bank draws, so that the two can be compared.
    """

    draw: Callable[[Tensor], Tensor] = staticmethod(torch.randn_like)

    def step(self, theta: Tensor, strength: Tensor, xi: Tensor | None) -> Tensor:
        theta = mean_field(theta, strength)
        return theta - (self.delta_param.abs() + 1e-5) * self.draw(theta)


def sign_split_ema(
    p: Tensor, g: Tensor, positive: Tensor, negative: Tensor, lr: float = 1e-3, beta: float = 0.9, eps: float = 1e-12
) -> None:
    """A normalized, lazy step with kappa 1, one operator after the other. Changes p and both means."""
    live = g.isfinite() & (g != 0)
    positive.copy_(torch.where(live, beta * positive + (1 - beta) * g.clamp_min(0), positive))
    negative.copy_(torch.where(live, beta * negative + (1 - beta) * (-g).clamp_min(0), negative))
    opposite = torch.where(g > 0, negative, torch.where(g < 0, positive, 0))
    total = positive + negative + eps
    update = (positive - negative) / total / (1 + opposite / total)
    p.sub_(torch.where(live, lr * update, 0))

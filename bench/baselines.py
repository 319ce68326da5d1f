"""What the kernels are measured against: the formulas in plain torch, those of the K-SSM family as it writes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from kssm_kernels import philox_normal

Model = TypeVar("Model", bound=nn.Module)


def order_parameters(theta: Tensor, harmonics: int) -> Tensor:
    """[..., N] -> [..., 3H] through tensors of size [..., N, H]."""
    n = torch.arange(1, harmonics + 1, dtype=theta.dtype, device=theta.device)
    angles = theta.unsqueeze(-1) * n
    c, s = torch.cos(angles).mean(-2), torch.sin(angles).mean(-2)
    return torch.cat([c, s, torch.sqrt(c * c + s * s + 1e-8)], dim=-1)


def kuramoto_update(
    theta: Tensor, coupling: Tensor | float, omega: Tensor | float = 0.0, dt: float = 1.0, steps: int = 1
) -> Tensor:
    """The O(N) mean-field form; the N x N matrix of differences would only make a weaker baseline."""
    for _ in range(steps):
        cos, sin = torch.cos(theta), torch.sin(theta)
        mean_cos, mean_sin = cos.mean(-1, keepdim=True), sin.mean(-1, keepdim=True)
        theta = theta + dt * (omega + coupling * (mean_sin * cos - mean_cos * sin))
    return theta


def bistable_coupling(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coupling strength, clamped latent and determinant from the ten algebraic parameters."""
    a, b, c, d, e, f, g, h, _, _ = params.unbind(-1)
    u = torch.clamp((d * g - c * h) / (a * g - c * e + 1e-6), 0.1, 10.0)
    return 2 * torch.sigmoid(u), u, b * g - c * f


def philox_draw(theta: Tensor) -> Tensor:
    """The noise that the fused bank draws from the same state of torch's generator, so that the two can be compared."""
    seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
    n = theta.shape[-1]
    return philox_normal(theta.numel() // n, n, seed=seed).to(theta.dtype).view_as(theta)


class OriginalBank(nn.Module):
    """The v3 bank of the family, parameter for parameter the one that FusedKuramoto replaces.

    Like the original it draws its noise in evaluation too; ``draw`` is what draws it (see :func:`philox_draw`).
    """

    def __init__(self, hidden_dim: int, n_oscillators: int = 128, base_coupling: float = 2.0, n_harmonics: int = 32):
        super().__init__()
        self.n_harmonics = n_harmonics
        self.draw: Callable[[Tensor], Tensor] = torch.randn_like
        self.to_params = nn.Linear(hidden_dim, 10)
        self.omega_0 = nn.Parameter(torch.linspace(-math.pi, math.pi, n_oscillators))
        self.readout = nn.Linear(3 * n_harmonics, hidden_dim)
        self.delta_param = nn.Parameter(torch.tensor([0.1]))
        self.last_delta_val: Tensor | None = None
        self.last_u_val: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coupling, u, determinant = bistable_coupling(self.to_params(x))
        theta = kuramoto_update(self.omega_0 + x.mean(-1, keepdim=True), coupling.unsqueeze(-1))
        theta = theta - (self.delta_param.abs() + 1e-5) * self.draw(theta)
        features = order_parameters(theta, self.n_harmonics)
        self.last_delta_val, self.last_u_val = determinant.abs().mean(), u.mean()
        return self.readout(features), features[..., 2 * self.n_harmonics], theta

    def get_regularization_loss(self, lambda1: float = 0.1, lambda2: float = 0.5, epsilon: float = 1e-5) -> Tensor:
        assert self.last_delta_val is not None
        assert self.last_u_val is not None
        return lambda1 / (self.last_delta_val + epsilon) - lambda2 * torch.log(self.last_u_val.clamp_min(epsilon))


class NoBank(nn.Module):
    """A bank that costs nothing: what is left of a model bounds any speed-up of its banks."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return x, x.new_zeros(()), None

    def get_regularization_loss(self) -> Tensor:
        return torch.zeros(())


def with_banks(model: Model, bank: Callable[[], nn.Module]) -> Model:
    """A copy of a KSSMv3 with other banks, which get the model's parameters if they have any."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        other = bank()
        if not isinstance(other, NoBank):
            other.load_state_dict(block.oscillators.state_dict())
        block.oscillators = other
    return model


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

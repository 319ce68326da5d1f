"""Drop-in oscillator banks of the K-SSM family: the original classes' parameters and returns, on the fused ops.

Assigning one over the original class is the whole migration; a checkpoint of the original loads with ``strict=True``.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kssm_kernels.ops.bistable_coupling import bistable_coupling
from kssm_kernels.ops.kuramoto import kuramoto_features

__all__ = ["FusedKuramoto", "FusedKuramotoV1", "FusedKuramotoV2"]

Noise = Literal["train", "always", "off"]


def _positive(module: str, **sizes: Any) -> list[int]:
    """The sizes as Python's integers."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{module}: {name} must be an int of at least 1, got {size!r}")
    return [int(size) for size in sizes.values()]


def _check_last(module: str, x: Tensor, wanted: int) -> None:
    if x.dim() == 0 or x.shape[-1] != wanted:
        raise ValueError(f"{module}: input must have shape [..., {wanted}], got {tuple(x.shape)}")


@torch.no_grad()
def _spread(omega: Tensor) -> None:
    """Natural frequencies from -pi to pi, evenly."""
    omega.copy_(torch.linspace(-math.pi, math.pi, omega.numel(), dtype=omega.dtype, device=omega.device))


def _outside(value: Tensor | None) -> Tensor | None:
    """A scalar that a module kept from its last call, usable after the transform that the call ran under.

    torch.func wraps the tensors of each level; outside, the wrapper is dead. Under vmap it held one scalar per member.
    """
    functorch: Any = torch._C._functorch
    found = value
    while found is not None and not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(found):
        level = functorch.maybe_get_level(found)
        if 0 < level <= (functorch.maybe_current_level() or 0):
            break  # still inside the transform
        found = functorch.get_unwrapped(found)
    return found if found is None or found is value else found.mean()


class FusedKuramoto(nn.Module):
    """The K-SSM v3 bank: bistable coupling from ten algebraic parameters, one noisy update, H order parameters.

    Equation: ``K, u, Delta = bistable_coupling(to_params(x))``; ``theta = omega_0 + mean_D(x)``; one step of
    :func:`kssm_kernels.kuramoto_update` with dt = 1, K and noise ``(|delta_param| + 1e-5) xi``; features of
    :func:`kssm_kernels.order_parameters`; ``out = readout(features)``. The pull of the mean field does not change under
    a shift common to all oscillators: mean_D(x) enters as a natural frequency, and omega_0 is read once for all rows.

    Args:
        hidden_dim: D. n_oscillators: N. n_harmonics: H, 1 to 256.
        base_coupling: kept for the original's signature; the original's K does not depend on it either.
        clamp: bounds of u, or None (monostable).
        noise: ``"train"`` (none in eval), ``"always"`` (the original) or ``"off"``.

    Input ``x [..., D]``; returns ``(out [..., D], R [...], theta [..., N] in radians)``. After a call
    ``last_delta_val`` is ``mean |Delta|`` and ``last_u_val`` is ``mean u``, both differentiable.

    Raises: ValueError for a bad size, mode or input shape; what the ops raise.

    >>> import torch
    >>> from kssm_kernels import FusedKuramoto
    >>> bank = FusedKuramoto(hidden_dim=16, n_oscillators=24, n_harmonics=4)
    >>> out, R, theta = bank(torch.randn(2, 5, 16))
    >>> out.shape, R.shape, theta.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 5]), torch.Size([2, 5, 24]))
    """

    _last_delta_val: Tensor | None = None
    _last_u_val: Tensor | None = None

    def __init__(
        self,
        hidden_dim: int,
        n_oscillators: int = 128,
        base_coupling: float = 2.0,
        n_harmonics: int = 32,
        *,
        clamp: tuple[float, float] | None = (0.1, 10.0),
        noise: Noise = "train",
    ) -> None:
        super().__init__()
        hidden_dim, n_oscillators, n_harmonics = _positive(
            "FusedKuramoto", hidden_dim=hidden_dim, n_oscillators=n_oscillators, n_harmonics=n_harmonics
        )
        if noise not in ("train", "always", "off"):
            raise ValueError(f"FusedKuramoto: noise must be 'train', 'always' or 'off', got {noise!r}")
        self.hidden_dim = hidden_dim
        self.n_oscillators = n_oscillators
        self.base_coupling = base_coupling
        self.n_harmonics = n_harmonics
        self.clamp = clamp
        self.noise = noise
        self.to_params = nn.Linear(hidden_dim, 10)
        self.omega_0 = nn.Parameter(torch.empty(n_oscillators))
        self.readout = nn.Linear(3 * n_harmonics, hidden_dim)
        self.delta_param = nn.Parameter(torch.empty(1))
        self.last_delta_val = None
        self.last_u_val = None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Every parameter as a new bank has it (after ``to_empty`` of a bank made on the meta device, say)."""
        self.to_params.reset_parameters()
        self.readout.reset_parameters()
        self._reset_own()

    @torch.no_grad()
    def _reset_own(self) -> None:
        _spread(self.omega_0)
        self.delta_param.fill_(0.1)

    @property
    def last_delta_val(self) -> Tensor | None:
        """``mean |Delta|`` of the last call; after one under ``torch.func.vmap``, over all members."""
        return _outside(self._last_delta_val)

    @last_delta_val.setter
    def last_delta_val(self, value: Tensor | None) -> None:
        self._last_delta_val = value

    @property
    def last_u_val(self) -> Tensor | None:
        """``mean u`` of the last call; after one under ``torch.func.vmap``, over all members."""
        return _outside(self._last_u_val)

    @last_u_val.setter
    def last_u_val(self, value: Tensor | None) -> None:
        self._last_u_val = value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _check_last("FusedKuramoto", x, self.hidden_dim)
        coupling, u, delta = bistable_coupling(self.to_params(x), self.clamp)
        noisy = self.noise == "always" or (self.noise == "train" and self.training)
        # not x.mean: its backward divides after it has repeated the gradient D times, in an order that is slow to add
        # (0.5 of 8.1 ms of the bank at width 384, batch 4, length 512)
        mean = x.sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) / self.hidden_dim
        features, theta = kuramoto_features(
            self.omega_0,
            coupling.unsqueeze(-1),
            self.n_harmonics,
            omega=mean,
            noise_scale=self.delta_param.abs() + 1e-5 if noisy else None,
            return_phases=True,
        )
        self.last_delta_val = delta.abs().mean()
        self.last_u_val = u.mean()
        return self.readout(features), features[..., 2 * self.n_harmonics], theta

    def get_regularization_loss(self, lambda1: float = 0.1, lambda2: float = 0.5, epsilon: float = 1e-5) -> Tensor:
        """``lambda1 / (mean |Delta| + epsilon) - lambda2 log(max(mean u, epsilon))`` of the last call."""
        delta, u = self.last_delta_val, self.last_u_val
        if delta is None or u is None:
            raise RuntimeError("FusedKuramoto: get_regularization_loss needs a forward call first")
        return lambda1 / (delta + epsilon) - lambda2 * torch.log(u.clamp_min(epsilon))

    def __getstate__(self) -> dict[str, Any]:
        # The last call's values belong to its graph: a copy or a pickle starts without them.
        return {**self.__dict__, "_last_delta_val": None, "_last_u_val": None}

    def extra_repr(self) -> str:
        sizes = f"n_oscillators={self.n_oscillators}, n_harmonics={self.n_harmonics}"
        return f"{sizes}, clamp={self.clamp}, noise={self.noise!r}"


class FusedKuramotoV1(nn.Module):
    """The K-SSM v1 bank: one update of ``omega + f`` with a fixed coupling strength.

    Equation: ``theta = omega + f``, one step of :func:`kssm_kernels.kuramoto_update` with dt = 1; ``R = M_1`` of it;
    ``r = 0.99 sigmoid(mean_j |f_j|)``. ``coupling [N, N]`` is in the state dict and takes no part, as in the original.

    Input: frequency perturbation ``f [..., N]``; returns ``(r cos theta, r sin theta, R [...], theta [..., N])``.

    >>> import torch
    >>> from kssm_kernels import FusedKuramotoV1
    >>> x, y, R, theta = FusedKuramotoV1(8)(torch.randn(3, 8))
    >>> R.shape, theta.shape
    (torch.Size([3]), torch.Size([3, 8]))
    """

    def __init__(self, n_oscillators: int, coupling_strength: float = 2.0) -> None:
        super().__init__()
        (n_oscillators,) = _positive("FusedKuramotoV1", n_oscillators=n_oscillators)
        self.n_oscillators = n_oscillators
        self.coupling_strength = coupling_strength
        self.omega = nn.Parameter(torch.empty(n_oscillators))
        self.coupling = nn.Parameter(torch.empty(n_oscillators, n_oscillators))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter as a new bank has it."""
        _spread(self.omega)
        self.coupling.normal_(0.0, 0.1)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _check_last("FusedKuramotoV1", f, self.n_oscillators)
        features, theta = kuramoto_features(self.omega + f, self.coupling_strength, 1, return_phases=True)
        r = 0.99 * torch.sigmoid(f.abs().mean(-1, keepdim=True))
        return r * torch.cos(theta), r * torch.sin(theta), features[..., 2], theta


class FusedKuramotoV2(nn.Module):
    """The K-SSM v2 bank: frequencies and coupling strength from the hidden state, one update, a residual readout.

    Equation: ``theta = omega + to_freq(h)``, ``K = base_coupling sigmoid(coupling_mod(h))``, one step of
    :func:`kssm_kernels.kuramoto_update` with dt = 1; ``R = M_1`` of it; ``out = h + phase_to_hidden([sin | cos])``.

    Input ``h [..., D]``; returns ``(out [..., D], R [...], theta [..., N] in radians)``.

    >>> import torch
    >>> from kssm_kernels import FusedKuramotoV2
    >>> out, R, theta = FusedKuramotoV2(hidden_dim=16, n_oscillators=8)(torch.randn(2, 5, 16))
    >>> out.shape, R.shape, theta.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 5]), torch.Size([2, 5, 8]))
    """

    def __init__(self, hidden_dim: int, n_oscillators: int = 128, base_coupling: float = 2.0) -> None:
        super().__init__()
        hidden_dim, n_oscillators = _positive("FusedKuramotoV2", hidden_dim=hidden_dim, n_oscillators=n_oscillators)
        self.hidden_dim = hidden_dim
        self.n_oscillators = n_oscillators
        self.base_coupling = base_coupling
        self.to_freq = nn.Linear(hidden_dim, n_oscillators)
        self.omega = nn.Parameter(torch.empty(n_oscillators))
        self.coupling_mod = nn.Linear(hidden_dim, 1)
        self.phase_to_hidden = nn.Linear(2 * n_oscillators, hidden_dim)
        _spread(self.omega)

    def reset_parameters(self) -> None:
        """Every parameter as a new bank has it."""
        for linear in (self.to_freq, self.coupling_mod, self.phase_to_hidden):
            linear.reset_parameters()
        _spread(self.omega)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _check_last("FusedKuramotoV2", h, self.hidden_dim)
        coupling = self.base_coupling * torch.sigmoid(self.coupling_mod(h))
        features, theta = kuramoto_features(self.omega + self.to_freq(h), coupling, 1, return_phases=True)
        out = h + self.phase_to_hidden(torch.cat([torch.sin(theta), torch.cos(theta)], dim=-1))
        return out, features[..., 2], theta

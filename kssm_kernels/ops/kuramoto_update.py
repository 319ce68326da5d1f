"""Mean-field Kuramoto phase update: the public op. Equation, adjoint and kernels: kuramoto_features.py (H = 0)."""

from __future__ import annotations

from torch import Tensor

from kssm_kernels.ops._update import Update
from kssm_kernels.ops.kuramoto_features import run

OP = "kuramoto_update"


def kuramoto_update(
    theta: Tensor,
    coupling: Tensor | float,
    *,
    omega: Tensor | float | None = None,
    dt: float = 1.0,
    phase_lag: Tensor | float = 0.0,
    steps: int = 1,
    noise_scale: Tensor | float | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Advances each ensemble of phase oscillators by ``steps`` steps under its own mean field.

    Equation, repeated ``steps`` times::

        Z = (1/N) sum_j exp(i theta_j)
        theta_j <- theta_j + dt (omega_j + K Im(Z exp(-i (theta_j + alpha)))) - delta xi_j

    Args:
        theta: phases in radians, ``[..., N]``, N >= 1, any strides; float32, float64, bfloat16 or float16 (the last two
            are widened to float32 inside). Leading axes broadcast with the operands'.
        coupling: K, 1/time. A number, or a tensor that broadcasts against theta with a last axis of 1 (one value per
            ensemble: ``K.unsqueeze(-1)``) or N (per oscillator).
        omega: natural frequencies, radians/time, likewise; None: zero.
        dt: time step.
        phase_lag: Sakaguchi phase lag alpha, radians, likewise.
        steps: number of steps, 0 or more.
        noise_scale: delta, radians, likewise; None: no noise.
        seed: integer (64 bits), or an integer tensor of one element; None draws one from torch's default generator.
            xi is :func:`kssm_kernels.philox_normal`: the same bits on every backend and for every number of threads.
            Under ``torch.vmap`` members get noise of their own, but with ``randomness="same"``.

    Returns:
        The updated phases, ``[..., N]``, theta's dtype and device. Differentiable with respect to theta, coupling,
        omega, phase_lag and noise_scale; the noise is the same in forward and backward.

        A call of up to 256 steps, and any in float64, wraps nothing. A longer one in float32 (16-bit phases are
        computed in it) returns phases that are right modulo 2 pi, within a few steps of [-pi, pi]: a phase of 1e5 rad
        would have no bits left for small steps. Every call of more than 16 steps carries what rounding cuts off, so
        that the mean frequency is right to 1e-6 of itself for any number of steps. Ctrl+C ends a long call on the CPU
        within a fraction of a second.

    Raises:
        TypeError, ValueError: bad argument, named with what was got and what was wanted.
        RuntimeError: a backend that cannot run here was asked for; a second derivative was asked for; a tensor's
            storage was freed under it.

    Source: H. Sakaguchi, Y. Kuramoto, Prog. Theor. Phys. 76 (1986).

    >>> import torch
    >>> from kssm_kernels import kuramoto_update
    >>> kuramoto_update(torch.tensor([0.0, 1.0]), 1.0, dt=0.1).round(decimals=4)
    tensor([0.0421, 0.9579])
    """
    lag = None if type(phase_lag) in (float, int) and phase_lag == 0 else phase_lag
    _, phases = run(OP, theta, Update(coupling, omega, lag, noise_scale, seed, dt, steps, 0, True))
    assert phases is not None
    return phases

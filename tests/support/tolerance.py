"""The tolerance rule, and every slack with its reason; the specs of the ops (specs/) put them together.

    |kernel - truth| <= 2 max|framework - truth| + slack

truth: the equations in float64 (naive.py) on the very numbers the kernel got. framework: the same equations in
the kernel's dtype by torch; for 16-bit dtypes also widened to float32 and rounded once: the better of the two counts.

Slack, with e = eps of the arithmetic inside (float32 or float64) and o = eps of the dtype stored:

    harmonics       f = (4 + m + L^2) e, L = ceil(H / m), m = 4, 8, 16 for H up to 32, 128, 256: 4 e for sincos (2 ulp),
                    mean and magnitude; m e for cos(m theta) out of products (an error of e per factor); L^2 e for a
                    recurrence of length L (an error made in one step grows linearly, and L of them add up; its
                    coefficient must be good to e for that). C, S and M are at most 1.
    phases          r = steps ((1 + |dt K|) (|theta| + |alpha|) + 4 |dt| (|omega| + 2 |K|) + 12 |delta|) e: a step has
                    one rounding of theta and of theta + alpha, a few of the velocity, two of the noise (|xi| < 6).
    sensitivity     r moves everything computed from the phases: 4 r times the largest change of that result per radian,
                    measured on the truth itself with two random displacements of theta by 1e-6.
    harmonic sums   of the gradient: f times W = (1/N) sum_n n (|gC| + |gS| + |gM| (1 + 2 / M_n)), for C / M with C
                    wrong by f.
    adjoint         4 sqrt(steps) e max|g| (1 + |dt K|) per element: independent roundings of g add up as a random walk;
                    for an operand times its factor (dt, dt, |dt K|, 6) and the number of steps, and for one shared by q
                    elements times 2 sqrt(q), again a random walk.
    16 bits         o |truth| for the one rounding at the end (half of it would do) and the spacing of the subnormals;
                    o W more for order_parameters, whose gradient reads the saved features, which were rounded.
    float64         truth itself rounds n theta: H |theta| e.
    bistable        8 e times the magnitudes of the terms: (|d g| + |c h|) / |den| + |u| (|a g| + |c e|) / |den| for u,
                    |b g| + |c f| for Delta; the gradient is that times the largest parameter over |den|.
    scan            4 e (S + max|truth|), S the largest change of that result per relative displacement of all inputs,
                    measured on the truth itself with two random displacements by 1e-6 (1 + |x|): a step's error is
                    amplified along the sequence as a displacement of its inputs is, and its gates and its map take
                    about four roundings. States come in the dtype inside, so that 16 bits add nothing to them.

Order parameters of phases of any size are held to the slack alone: there torch's n theta is rounded by whole turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inside(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def harmonic_slack(harmonics: int, dtype: torch.dtype) -> float:
    m = min(4 if harmonics <= 32 else 8 if harmonics <= 128 else 16, harmonics)
    return (4 + m + math.ceil(harmonics / m) ** 2) * torch.finfo(inside(dtype)).eps


def largest(value: Tensor | float | None) -> float:
    if value is None or (isinstance(value, Tensor) and value.numel() == 0):
        return 0.0
    return float(value.abs().max()) if isinstance(value, Tensor) else abs(value)


def stored_slack(dtype: torch.dtype, truth: Tensor) -> Tensor | float:
    info = torch.finfo(dtype)
    return info.eps * (truth.abs() + info.tiny) if info.bits == 16 else 0.0


def assert_within(label: str, kernel: Tensor, truth: Tensor, framework: float, slack: Tensor | float) -> None:
    """The rule, element by element; says where it fails first and with which three values. A NaN fails."""
    assert kernel.shape == truth.shape, f"{label}: shape {tuple(kernel.shape)}, want {tuple(truth.shape)}"
    got = kernel.detach().cpu().double()
    bound = (2 * framework + torch.as_tensor(slack, dtype=torch.float64)).expand(truth.shape)
    error = (got - truth).abs()
    bad = ~(error <= bound)
    if bad.any():
        worst = int(torch.where(bad, (error / bound.clamp_min(1e-300)).nan_to_num(math.inf), -1.0).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.dim() else ()
        raise AssertionError(
            f"{label}: {int(bad.sum())} of {bad.numel()} outside the tolerance; the worst at {index}: "
            f"kernel {got[index].item()!r}, truth {truth[index].item()!r}, bound {bound[index].item():.3e} = "
            f"2 x framework error {framework:.3e} + slack {(bound[index] - 2 * framework).item():.3e}"
        )

"""The arguments of one Kuramoto update, as both paths and every backend pass them, and their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops._entry import as_integer, as_number, check_dense, check_phases
from kssm_kernels.ops._memory import strided

Operand = Tensor | float | None


class Update(NamedTuple):
    coupling: Operand
    omega: Operand
    phase_lag: Operand
    noise_scale: Operand
    seed: int | Tensor | None
    dt: float
    steps: int
    harmonics: int  # 0: no features
    return_phases: bool


OPERANDS = 4  # how many fields of Update come first and are differentiable
CHECKPOINT_STEPS = 64  # trajectories up to this many steps are kept whole (kCheckpointSteps in C++)

# A call of more than PLAIN steps keeps a phase as x + moved. A phase of 3 rad in float32 takes up steps of 0.01 to 1e-5
# of their size; `moved`, which is small, takes them up to 1e-7. Every FOLD steps it is added to x, and what rounding
# cuts off stays in it. A call in float32 of more than UNWRAPPED steps also takes whole turns off x, which has bits for
# no more. The kernels' names of these are in csrc/math/phase_step.h.
FOLD = 8
PLAIN = 16
UNWRAPPED = 256
# 2 pi = TURN + REST; a multiple of TURN, which has 8 bits, is exact, and so is what it leaves of x.
TURN, REST = 6.28125, 0.0019353071795864769
# Up to here the turns of a float32 phase are counted exactly; larger phases are reduced once, before the first step.
COUNTABLE = 1e5

# An operand as a kernel reads it: (owner of the memory or None, row stride, column stride, value), strides in elements
# and 0 where it is shared; a number has no memory.
Strided = tuple[Tensor | None, int, int, float]


def wraps(steps: int, compute: torch.dtype) -> bool:
    """Whether a call takes whole turns off its phases."""
    return steps > UNWRAPPED and compute == torch.float32


def steps_together(steps: int) -> int:
    """How many steps of a trajectory a backward pass keeps at a time: all of a short one, about sqrt(steps) else."""
    return max(1, steps if steps <= CHECKPOINT_STEPS else math.isqrt(steps - 1) + 1)


def seed_value(u: Update) -> int:
    return 0 if u.seed is None else int(u.seed) & 0xFFFFFFFFFFFFFFFF


def is_plain(u: Update) -> bool:
    """Whether a call has a float for the coupling strength and no other operand: the commonest, kept cheap."""
    return type(u.coupling) is float and u.omega is None and u.phase_lag is None and u.noise_scale is None


def any_requires_grad(operands: tuple[Any, ...]) -> bool:
    for operand in operands:  # a generator in any() takes twice as long
        if operand is not None and type(operand) is not float and getattr(operand, "requires_grad", False):
            return True
    return False


def batch_shape_of(theta: Tensor, operands: tuple[Any, ...]) -> torch.Size:
    """Shape of the ensembles: theta's leading axes broadcast with every operand's."""
    batch_shape = theta.shape[:-1]
    for operand in operands:
        if isinstance(operand, Tensor) and operand.dim() > 1:
            own = operand.shape[:-1]
            if own != batch_shape:
                # torch.broadcast_shapes takes 30 us: not for the common case of one vector of phases for all rows
                batch_shape = torch.broadcast_shapes(batch_shape, own) if batch_shape else own  # type: ignore[no-untyped-call]  # no stub
    return batch_shape


def operand_rows(operand: Operand, batch_shape: torch.Size, n: int, dtype: torch.dtype) -> Strided:
    """An operand over ensembles ``[*batch_shape, N]`` in the compute dtype, copied only if it must be."""
    if not isinstance(operand, Tensor):
        return (None, 0, 0, 0.0 if operand is None else operand)
    operand = strided("an operand", operand)
    if operand.dtype != dtype:
        operand = operand.to(dtype)
    columns = operand.shape[-1] if operand.dim() else 1
    if operand.numel() == columns:
        row_stride = 0
        if not operand.is_contiguous():
            operand = operand.contiguous()
    else:
        if operand.shape[:-1] != batch_shape:
            operand = operand.expand(*batch_shape, columns)
        if not operand.is_contiguous():
            operand = operand.reshape(-1, columns)
            if columns > 1 and operand.stride(1) != 1:
                operand = operand.contiguous()
            row_stride = operand.stride(0)
        else:
            row_stride = columns
    return (operand, row_stride, int(columns > 1), 0.0)


def theta_rows(theta: Tensor, batch_shape: torch.Size, rows: int) -> Strided:
    """theta in its own dtype and with its own strides; one vector for all rows is read where it lies."""
    n, theta = theta.shape[-1], strided("theta", theta)
    if theta.is_contiguous() and theta.numel() == rows * n:  # batch_shape differs by axes of length 1 at most
        return (theta, n, 1, 0.0)
    if is_shared(theta, rows):
        return (theta, 0, theta.stride(-1), 0.0)
    flat = theta.expand(*batch_shape, n).reshape(rows, n)
    return (flat, flat.stride(0), flat.stride(1), 0.0)


def is_shared(theta: Tensor, rows: int) -> bool:
    """Whether one vector of phases serves all rows."""
    return theta.numel() == theta.shape[-1] and rows != 1


def _checked_operand(op: str, name: str, value: Any, theta: Tensor) -> Operand:
    """An operand is a finite number or a floating tensor on theta's device whose last axis is 1 or N."""
    if not isinstance(value, Tensor):
        return value if value is None else as_number(op, name, value, "a number or a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")
    check_dense(op, name, value)
    if value.device != theta.device:
        raise ValueError(f"{op}: {name} must be on theta's device {theta.device}, got {value.device}")
    if value.dim() and value.shape[-1] not in (1, theta.shape[-1]):
        hint = "; write .unsqueeze(-1) for one value per ensemble" if value.shape == theta.shape[:-1] else ""
        raise ValueError(
            f"{op}: {name} must be a scalar or broadcast against theta {tuple(theta.shape)} with a last axis of "
            f"1 (per ensemble) or {theta.shape[-1]} (per oscillator), got {tuple(value.shape)}{hint}"
        )
    return value


def checked(op: str, theta: Tensor, u: Update) -> tuple[Update, torch.Size, bool]:
    """The update with Python's numbers for NumPy's, the shape of the ensembles, and whether the call is plain.

    Raises for a bad argument.
    """
    check_phases(op, theta)
    coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases = u
    plain = is_plain(u) and isinstance(coupling, float) and -math.inf < coupling < math.inf
    if not plain:
        if coupling is None:
            raise TypeError(f"{op}: coupling must be a number or a torch.Tensor, got NoneType")
        coupling = _checked_operand(op, "coupling", coupling, theta)
        omega = _checked_operand(op, "omega", omega, theta)
        phase_lag = _checked_operand(op, "phase_lag", phase_lag, theta)
        noise_scale = _checked_operand(op, "noise_scale", noise_scale, theta)
    if type(dt) is not float or not -math.inf < dt < math.inf:
        dt = as_number(op, "dt", dt)
    if type(steps) is not int or not 0 <= steps < 2**31:
        steps = as_integer(op, "steps", steps, 0, 2**31 - 1)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point():
            got = f"{seed.dtype} {tuple(seed.shape)}"
            raise ValueError(f"{op}: seed must be an int or an integer tensor of one element, got {got}")
    elif seed is not None:
        seed = as_integer(op, "seed", seed, -(2**63), 2**64 - 1)
    if plain and dt is u.dt and steps is u.steps and seed is u.seed:  # making another takes 0.3 us
        return u, theta.shape[:-1], True
    if plain:
        return Update(coupling, None, None, None, seed, dt, steps, harmonics, return_phases), theta.shape[:-1], True
    try:
        batch_shape = batch_shape_of(theta, (coupling, omega, phase_lag, noise_scale))
    except RuntimeError as error:
        shapes = [tuple(v.shape) for v in (theta, coupling, omega, phase_lag, noise_scale) if isinstance(v, Tensor)]
        raise ValueError(f"{op}: leading axes of theta and its operands must broadcast, got shapes {shapes}") from error
    return (
        Update(coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases),
        batch_shape,
        False,
    )

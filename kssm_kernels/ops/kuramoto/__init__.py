"""Mean-field phase update, and the order parameters of the updated phases in the same pass.

    Z = (1/N) sum_j exp(i theta_j) = C + i S,      p_j = Im(Z exp(-i (theta_j + alpha_j))),   q_j = Re(same)
    theta_j <- theta_j + dt (omega_j + K_j p_j) - delta_j xi_j,                               repeated `steps` times

The adjoint of one step, g = dL/d(theta after it):

    gC = -dt sum_j g_j K_j sin(theta_j + alpha_j),   gS = dt sum_j g_j K_j cos(theta_j + alpha_j)
    g_j <- g_j (1 - dt K_j q_j) + (gS cos theta_j - gC sin theta_j) / N
    gK_j += dt g_j p_j,   gomega_j += dt g_j,   galpha_j -= dt g_j K_j q_j,   gdelta_j -= g_j xi_j

One reduction and one sincos per oscillator and step. The backward pass recomputes the trajectory from theta; past
CHECKPOINT_STEPS steps it keeps every sqrt(steps)-th state only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._entry import (
    EAGER,
    MAX_HARMONICS,
    as_integer,
    backward_path_of,
    number_tensor,
    path_of,
    refuse_second_derivative,
)
from kssm_kernels.ops._memory import whole
from kssm_kernels.ops._registered import is_absent, registered
from kssm_kernels.ops.kuramoto import _tangent, _vmap
from kssm_kernels.ops.kuramoto._update import (
    OPERANDS,
    Update,
    any_requires_grad,
    batch_shape_of,
    checked,
    is_plain,
)

UPDATE, FEATURES = "kuramoto_update", "kuramoto_features"

Pair = tuple[Tensor | None, Tensor | None]  # (features, phases); what was not asked for is None


# ---- the eager path ----


class _Kuramoto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Update, batch_shape: torch.Size, theta: Tensor, *operands: Any) -> Pair:
        """``operands`` are those of ``u``, where autograd sees them."""
        kernel = backends.kernel(FEATURES, theta)
        features, phases = kernel.forward(theta, u, batch_shape)
        ctx.set_materialize_grads(False)
        if is_plain(u):
            ctx.context = kernel, u, ()
            ctx.save_for_backward(theta, features, phases)
        else:  # autograd watches what it saves for changes in place: tensors there, the other fields in ctx
            places = [i for i, v in enumerate(u) if isinstance(v, Tensor)]
            ctx.context = kernel, [None if isinstance(v, Tensor) else v for v in u], places
            ctx.save_for_backward(theta, features, phases, *[u[i] for i in places])
        return features, phases

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        theta, features, phases, *tensors = ctx.saved_tensors
        g_features, g_phases = grads
        kernel, known, places = ctx.context
        fields = list(known)
        for i, tensor in zip(places, tensors, strict=True):
            fields[i] = tensor
        u, needed = Update(*fields), ctx.needs_input_grad[2:]
        with torch.no_grad():
            if backward_path_of((theta, *u[:OPERANDS], *grads)) is EAGER:
                results = _gradients(kernel, theta, u, features, phases, g_features, g_phases, needed)
            else:
                made = _adjoint(*_arguments(theta, u)[:-1], features, phases, *grads, list(needed))
                results = [r if need else None for r, need in zip(made, needed, strict=True)]
        return None, None, *refuse_second_derivative(FEATURES, tuple(results), (theta, *u[:OPERANDS], *grads))


def _gradients(
    kernel: Any,
    theta: Tensor,
    u: Update,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Of theta and the operands, in their shapes and dtypes; None where not needed."""
    batch_shape = batch_shape_of(theta, u[:OPERANDS])
    wide, long = (*batch_shape, 3 * u.harmonics), (*batch_shape, theta.shape[-1])
    results: list[Tensor | None] = kernel.backward(
        theta,
        u,
        batch_shape,
        None if features is None else whole("features", features, wide, theta),
        None if phases is None else whole("phases", phases, long, theta),
        None if g_features is None else whole("the features' gradient", g_features, wide, theta),
        None if g_phases is None else whole("the phases' gradient", g_phases, long, theta),
        needed,
    )
    for i, (result, source) in enumerate(zip(results, (theta, *u[:OPERANDS]), strict=True)):
        if result is None or not isinstance(source, Tensor):
            continue
        if result.shape != source.shape:
            same = result.numel() == source.numel()  # only axes of length 1 differ
            result = result.reshape(source.shape) if same else result.sum_to_size(source.shape).contiguous()
        results[i] = result.to(source.dtype)
    return results


# ---- the dispatcher path; torch.ops hands in what nobody has checked ----


def _arguments(theta: Tensor, u: Update) -> tuple[Any, ...]:
    """The registered op's: every number that may change from call to call a tensor."""
    compute = DTYPES[theta.dtype][1]
    operands = (u.coupling, u.omega, u.phase_lag, u.noise_scale)
    tensors = [v if v is None or isinstance(v, Tensor) else number_tensor(v, compute, theta.device) for v in operands]
    seed = None if u.noise_scale is None else u.seed
    if isinstance(seed, int):
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
    dt = number_tensor(u.dt, torch.float64, "cpu")
    return (theta, *tensors, seed, dt, u.steps, u.harmonics, u.return_phases)


def _update_of(arguments: tuple[Any, ...]) -> Update:
    coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases = arguments
    as_integer(FEATURES, "harmonics", harmonics, 0, MAX_HARMONICS)
    return Update(coupling, omega, phase_lag, noise_scale, seed, float(dt), steps, harmonics, return_phases)


def _filled(theta: Tensor, results: Any) -> tuple[Tensor, ...]:
    """An op of torch.library returns tensors only: one of shape [0] stands for None (``is_absent``)."""
    return tuple(theta.new_empty(0) if r is None else r for r in results)


def _forward(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    u, batch_shape, _ = checked(FEATURES, theta, _update_of(rest))
    return _filled(theta, backends.kernel(FEATURES, theta).forward(theta, u, batch_shape))


def _backward(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, needed = rest
    features, phases, g_features, g_phases = (None if is_absent(t) else t for t in arguments[-4:])
    u, _, _ = checked(FEATURES, theta, _update_of((*arguments[:-4], phases is not None)))
    kernel = backends.kernel(FEATURES, theta)
    return _filled(theta, _gradients(kernel, theta, u, features, phases, g_features, g_phases, tuple(needed)))


def _eager(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    u, operands = _update_of(rest), rest[:OPERANDS]
    batch_shape = batch_shape_of(theta, operands)
    if torch.is_grad_enabled() and any_requires_grad((theta, *operands)):
        return _filled(theta, _Kuramoto.apply(u, batch_shape, theta, *operands))  # type: ignore[no-untyped-call]  # no stub
    return _filled(theta, backends.kernel(FEATURES, theta).forward(theta, u, batch_shape))


def _fake(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch_shape, (harmonics, return_phases) = batch_shape_of(theta, rest[:OPERANDS]), rest[-2:]
    return (
        theta.new_empty((*batch_shape, 3 * harmonics) if harmonics else (0,)),
        theta.new_empty((*batch_shape, theta.shape[-1]) if return_phases else (0,)),
    )


_ARGUMENTS = (
    "Tensor theta, Tensor coupling, Tensor? omega, Tensor? phase_lag, Tensor? noise_scale, Tensor? seed, Tensor dt, "
    "SymInt steps, SymInt harmonics"
)
_evaluate, _adjoint = registered(
    "kuramoto",
    f"({_ARGUMENTS}, bool return_phases) -> (Tensor, Tensor)",
    _forward,
    f"({_ARGUMENTS}, Tensor? features, Tensor? phases, Tensor? g_features, Tensor? g_phases, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    outputs=["features", "phases"],
    fake=_fake,
    tangents=_tangent.tangents,
    eager=_eager,
    vmap=_vmap.forward_rule,
    vmap_backward=_vmap.backward_rule,
    title=FEATURES,
)


# ---- the public ops ----


def _run(op: str, theta: Tensor, u: Update) -> Pair:
    u, batch_shape, plain = checked(op, theta, u)
    # field by field: torch.compile fails on a slice of a named tuple (torch 2.8) and on its _replace (2.4)
    operands = (u.coupling, u.omega, u.phase_lag, u.noise_scale)
    eager = path_of((theta,) if plain else (theta, *operands)) is EAGER
    if u.noise_scale is not None and u.seed is None:
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")  # whatever the default device
        u = Update(*operands, int(drawn) if eager else drawn, u.dt, u.steps, u.harmonics, u.return_phases)
    if eager:
        result: Pair
        if torch.is_grad_enabled() and (theta.requires_grad or (not plain and any_requires_grad(operands))):
            result = _Kuramoto.apply(u, batch_shape, theta, *operands)  # type: ignore[no-untyped-call]  # no stub
        else:
            result = backends.kernel(op, theta).forward(theta, u, batch_shape)
        return result
    features, phases = _evaluate(*_arguments(theta, u))
    return features if u.harmonics else None, phases if u.return_phases else None


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
    _, phases = _run(UPDATE, theta, Update(coupling, omega, lag, noise_scale, seed, dt, steps, 0, True))
    assert phases is not None
    return phases


def kuramoto_features(
    theta: Tensor,
    coupling: Tensor | float,
    harmonics: int,
    *,
    omega: Tensor | float | None = None,
    dt: float = 1.0,
    phase_lag: Tensor | float = 0.0,
    steps: int = 1,
    noise_scale: Tensor | float | None = None,
    seed: int | Tensor | None = None,
    return_phases: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Phase update and order parameters of the updated phases in one pass; the phases are written only if asked for.

    Equation: :func:`kssm_kernels.order_parameters` of :func:`kssm_kernels.kuramoto_update`, with their arguments.

    Args:
        theta: phases in radians ``[..., N]``; its leading axes broadcast with those of every operand, so one vector
            ``[N]`` of phases may serve all ensembles of a batch (it is then read once, and its gradient summed inside).
        coupling, omega, phase_lag, noise_scale: a number, or a tensor that broadcasts against theta with a last axis
            of 1 (per ensemble) or N (per oscillator); units: 1/time, radians/time, radians, radians.
        harmonics: H, 1 to 256.
        dt, steps, seed: as for ``kuramoto_update``.
        return_phases: also return the updated phases.

    Returns:
        ``[..., 3H]`` laid out ``[C | S | M]``, or ``(features, phases [..., N])``; theta's dtype.

    Raises:
        TypeError, ValueError: bad argument, named with what was got and what was wanted.
        RuntimeError: a backend that cannot run here was asked for; a second derivative was asked for.

    >>> import torch
    >>> from kssm_kernels import kuramoto_features
    >>> theta = torch.linspace(-1, 1, 5)
    >>> features, phases = kuramoto_features(theta, 1.0, 2, steps=20, return_phases=True)
    >>> features.shape, bool(phases.abs().max() < 1e-3)     # in step after 20 updates
    (torch.Size([6]), True)
    """
    harmonics = as_integer(FEATURES, "harmonics", harmonics, 1, MAX_HARMONICS)
    lag = None if type(phase_lag) in (float, int) and phase_lag == 0 else phase_lag
    u = Update(coupling, omega, lag, noise_scale, seed, dt, steps, harmonics, return_phases)
    features, phases = _run(FEATURES, theta, u)
    assert features is not None
    return features if phases is None else (features, phases)

"""Mean-field phase update, and the order parameters of the updated phases in the same pass.

    Z = (1/N) sum_j exp(i theta_j) = C + i S,      p_j = Im(Z exp(-i (theta_j + alpha_j))),   q_j = Re(same)
    theta_j <- theta_j + dt (omega_j + K_j p_j) - delta_j xi_j,                               repeated `steps` times

The adjoint of one step, g = dL/d(theta after it):

    gC = -dt sum_j g_j K_j sin(theta_j + alpha_j),   gS = dt sum_j g_j K_j cos(theta_j + alpha_j)
    g_j <- g_j (1 - dt K_j q_j) + (gS cos theta_j - gC sin theta_j) / N
    gK_j += dt g_j p_j,   gomega_j += dt g_j,   galpha_j -= dt g_j K_j q_j,   gdelta_j -= g_j xi_j

One reduction and one sincos per oscillator and step. The backward pass recomputes the trajectory from theta; past
SEGMENT steps it keeps every sqrt(steps)-th state only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops import _update_cpu, _update_gpu, _update_tangent, _update_torch
from kssm_kernels.ops._door import (
    DIRECT,
    DTYPES,
    DUAL,
    MAX_HARMONICS,
    TRANSFORMED,
    alive,
    as_integer,
    backward_door,
    door,
    forward_mode,
    number_tensor,
    refuse_second_derivative,
    register,
    register_vmap,
    second_derivative_message,
)
from kssm_kernels.ops._memory import on_one_device, whole
from kssm_kernels.ops._update import OPERANDS, Update, any_requires_grad, checked, is_plain, leading_shape
from kssm_kernels.ops._update_vmap import backward_rule, forward_rule

OP = "kuramoto_features"


def _forward(theta: Tensor, u: Update, lead: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """(features, phases) of ensembles [*lead, N]; what was not asked for is None."""
    backend = backends.select(OP, theta)
    if backend == "cpu":
        return _update_cpu.forward(theta, u, lead)
    if backend == "torch":
        return _update_torch.forward(theta, u)
    kernels, order_parameters = backends.kernels(backend, "kuramoto", "order_parameters")
    return _update_gpu.forward(kernels, order_parameters, theta, u, lead)


def _backward(
    theta: Tensor,
    u: Update,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of theta and the operands, in their shapes and dtypes; None where not needed."""
    backend = backends.select(OP, theta)
    lead = leading_shape(theta, u[:OPERANDS])
    if features is not None:
        features = whole("features", features, (*lead, 3 * u.harmonics), theta)
    if phases is not None:
        phases = whole("phases", phases, (*lead, theta.shape[-1]), theta)
    if g_features is not None:
        g_features = whole("the features' gradient", g_features, (*lead, 3 * u.harmonics), theta)
    if g_phases is not None:
        g_phases = whole("the phases' gradient", g_phases, (*lead, theta.shape[-1]), theta)
    if backend == "cpu":
        results = _update_cpu.backward(theta, u, lead, features, phases, g_features, g_phases, needed)
    elif backend == "torch":
        results = _update_torch.backward(theta, u, g_features, g_phases, needed)
    else:
        kernels, order_parameters = backends.kernels(backend, "kuramoto", "order_parameters")
        results = _update_gpu.backward(
            kernels, order_parameters, theta, u, lead, features, g_features, g_phases, needed
        )
    for i, (result, source) in enumerate(zip(results, (theta, *u[:OPERANDS]), strict=True)):
        if result is None or not isinstance(source, Tensor):
            continue
        if result.shape != source.shape:
            same = result.numel() == source.numel()  # only axes of length 1 differ
            result = result.reshape(source.shape) if same else result.sum_to_size(source.shape).contiguous()
        results[i] = result.to(source.dtype)
    return results


# ---- the direct door ----


class _Kuramoto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Update, lead: torch.Size, theta: Tensor, *operands: Any) -> tuple[Tensor | None, ...]:
        """``operands`` are those of ``u``, where autograd sees them."""
        features, phases = _forward(theta, u, lead)
        ctx.set_materialize_grads(False)
        if is_plain(u):
            ctx.fields, ctx.places = u, ()
            ctx.save_for_backward(theta, features, phases)
        else:  # autograd watches what it saves for changes in place: tensors there, the other fields in ctx
            ctx.places = [i for i, v in enumerate(u) if isinstance(v, Tensor)]
            ctx.fields = [None if isinstance(v, Tensor) else v for v in u]
            ctx.save_for_backward(theta, features, phases, *[u[i] for i in ctx.places])
        return features, phases

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        theta, features, phases, *tensors = ctx.saved_tensors
        fields = list(ctx.fields)
        for i, tensor in zip(ctx.places, tensors, strict=True):
            fields[i] = tensor
        u, needed = Update(*fields), ctx.needs_input_grad[2:]
        with torch.no_grad():
            if backward_door((theta, *u[:OPERANDS], *grads)) is DIRECT:
                results = _backward(theta, u, features, phases, grads[0], grads[1], needed)
            else:
                needed = [need and (i == 0 or isinstance(u[i - 1], Tensor)) for i, need in enumerate(needed)]
                flat = _flat(theta, u)
                results = list(adjoint(*flat[:9], features, phases, *grads, needed))
                results = [r if need else None for r, need in zip(results, needed, strict=True)]
        return None, None, *refuse_second_derivative(OP, tuple(results), (theta, *u[:OPERANDS], *grads))


def _flat(theta: Tensor, u: Update) -> tuple[Any, ...]:
    """The registered op's arguments: every number that may change from call to call a tensor."""
    compute = DTYPES[theta.dtype][1]
    operands = (u.coupling, u.omega, u.phase_lag, u.noise_scale)
    tensors = [v if v is None or isinstance(v, Tensor) else number_tensor(v, compute, theta.device) for v in operands]
    seed = None if u.noise_scale is None else u.seed
    if isinstance(seed, int):
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
    dt = number_tensor(u.dt, torch.float64, "cpu")
    return (theta, *tensors, seed, dt, u.steps, u.harmonics, u.return_phases)


def _as_update(args: tuple[Any, ...]) -> Update:
    coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases = args[1:]
    return Update(coupling, omega, phase_lag, noise_scale, seed, float(dt), steps, harmonics, return_phases)


# ---- the registered door; torch.ops hands in what nobody has checked ----

_SCHEMA = (
    "Tensor theta, Tensor coupling, Tensor? omega, Tensor? phase_lag, Tensor? noise_scale, Tensor? seed, "
    "Tensor dt, SymInt steps, SymInt harmonics"
)


def _filled(theta: Tensor, results: tuple[Tensor | None, ...] | list[Tensor | None]) -> tuple[Tensor, ...]:
    """An op of torch.library returns tensors only: one without elements stands for None."""
    return tuple(theta.new_empty(0) if r is None else r for r in results)


def _checked(args: tuple[Any, ...]) -> tuple[Update, torch.Size]:
    as_integer(OP, "harmonics", args[8], 0, MAX_HARMONICS)
    u, lead, _ = checked(OP, args[0], _as_update(args))
    return u, lead


def _evaluate_backward(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    theta, (features, phases, g_features, g_phases), needed = args[0], args[9:13], tuple(args[13])
    u = _as_update((*args[:9], phases is not None))
    return _filled(theta, _backward(theta, u, features, phases, g_features, g_phases, needed))


@register("kuramoto", f"({_SCHEMA}, bool return_phases) -> (Tensor, Tensor)")
def _registered(*args: Any) -> tuple[Tensor, ...]:
    u, lead = _checked(args)
    return _filled(args[0], _forward(args[0], u, lead))


@register(
    "kuramoto_backward",
    f"({_SCHEMA}, Tensor? features, Tensor? phases, Tensor? g_features, Tensor? g_phases, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _registered_backward(*args: Any) -> tuple[Tensor, ...]:
    _checked((*args[:9], False))
    return _evaluate_backward(args)


@_registered.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    theta, harmonics, return_phases = args[0], args[8], args[9]
    on_one_device(*args[:5])
    lead = leading_shape(theta, args[1:5])
    return (
        theta.new_empty((*lead, 3 * harmonics) if harmonics else (0,)),
        theta.new_empty((*lead, theta.shape[-1]) if return_phases else (0,)),
    )


@_registered_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    theta, sources, needed = args[0], args[:5], args[-1]
    on_one_device(*sources, *args[9:13])
    return tuple(
        s.new_empty(s.shape) if need and s is not None else theta.new_empty(0)
        for s, need in zip(sources, needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, steps, harmonics, return_phases = inputs
    features, phases = output
    ctx.save_for_backward(*tensors, features if harmonics else None, phases if return_phases else None)
    ctx.numbers = (steps, harmonics)


def _gradient_by(function: Any, ctx: Any, grads: tuple[Any, ...]) -> Any:
    *tensors, features, phases, g_features, g_phases = alive((*ctx.saved_tensors, *grads))
    needed = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad[:5], tensors[:5], strict=True)]
    given = (None if features is None else g_features, None if phases is None else g_phases)
    results = function(*tensors, *ctx.numbers, features, phases, *given, needed)
    return *(r if n else None for r, n in zip(results, needed, strict=True)), *[None] * 5


def _registered_gradient(ctx: Any, *grads: Tensor) -> Any:
    return _gradient_by(_registered_backward, ctx, grads)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(second_derivative_message(OP))


_registered.register_autograd(_registered_gradient, setup_context=_setup_context)
_registered_backward.register_autograd(_no_second_derivative)


def _vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
    return forward_rule(evaluate, info, dims, args)


def _vmap_backward(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
    return backward_rule(adjoint, info, dims, args)


register_vmap(_registered, _vmap)
register_vmap(_registered_backward, _vmap_backward)


# ---- torch.func.grad and its like ----


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return evaluate(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7], *output)
        ctx.flags = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gradient_by(adjoint, ctx, grads)

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        *tensors, features, phases = ctx.saved_tensors
        made = _update_tangent.tangents((*tensors, *ctx.flags), given, (features, phases))
        return tuple(t.to(o.dtype) for t, o in zip(made, (features, phases), strict=True))

    vmap = staticmethod(_vmap)


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return adjoint(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = jvp = staticmethod(_no_second_derivative)
    vmap = staticmethod(_vmap_backward)


# ---- every door, for the registered op's arguments ----


def evaluate(*args: Any) -> tuple[Tensor, ...]:
    """The registered op's results, through the door that fits."""
    theta, way = args[0], door(args[:6])
    result: Any
    if way is DIRECT:
        u = _as_update(args)
        lead = leading_shape(theta, u[:OPERANDS])
        if torch.is_grad_enabled() and any_requires_grad(args[:5]):
            result = _filled(theta, _Kuramoto.apply(u, lead, *args[:5]))  # type: ignore[no-untyped-call]  # no stub
        else:
            result = _filled(theta, _forward(theta, u, lead))
    elif way is DUAL:
        result = forward_mode(evaluate, _update_tangent.tangents, args)
    elif way is TRANSFORMED:
        result = _Transformed.apply(*args)  # type: ignore[no-untyped-call]  # torch has no stub
    else:
        result = _registered(*args)
    return result  # type: ignore[no-any-return]  # torch has no stub for apply


def adjoint(*args: Any) -> tuple[Tensor, ...]:
    """The registered backward op's results, through the door that fits."""
    way = backward_door((*args[:6], *args[9:13]))
    result: Any
    if way is DIRECT:
        result = _evaluate_backward(args)
    elif way is DUAL:
        raise RuntimeError(second_derivative_message(OP))
    elif way is TRANSFORMED:
        result = _TransformedBackward.apply(*args)  # type: ignore[no-untyped-call]  # torch has no stub
    else:
        result = _registered_backward(*args)
    return result  # type: ignore[no-any-return]  # torch has no stub for apply


# ---- the public op ----


def run(op: str, theta: Tensor, u: Update) -> tuple[Tensor | None, Tensor | None]:
    """(features, phases) through the door that fits; what was not asked for is None."""
    u, lead, plain = checked(op, theta, u)
    # field by field: torch.compile fails on a slice of a named tuple (torch 2.8) and on its _replace (2.4)
    operands = (u.coupling, u.omega, u.phase_lag, u.noise_scale)
    direct = door((theta,) if plain else (theta, *operands)) is DIRECT
    if u.noise_scale is not None and u.seed is None:
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")  # whatever the default device
        u = Update(*operands, int(drawn) if direct else drawn, u.dt, u.steps, u.harmonics, u.return_phases)
    if direct:
        result: tuple[Tensor | None, Tensor | None]
        if torch.is_grad_enabled() and (theta.requires_grad or (not plain and any_requires_grad(operands))):
            result = _Kuramoto.apply(u, lead, theta, *operands)  # type: ignore[no-untyped-call]  # torch has no stub
        else:
            result = _forward(theta, u, lead)
        return result
    features, phases = evaluate(*_flat(theta, u))
    return features if u.harmonics else None, phases if u.return_phases else None


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
    harmonics = as_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS)
    lag = None if type(phase_lag) in (float, int) and phase_lag == 0 else phase_lag
    u = Update(coupling, omega, lag, noise_scale, seed, dt, steps, harmonics, return_phases)
    features, phases = run(OP, theta, u)
    assert features is not None
    return features if phases is None else (features, phases)

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
from kssm_kernels.ops import _update_cpu, _update_gpu, _update_torch
from kssm_kernels.ops._door import (
    DTYPES,
    MAX_HARMONICS,
    check_integer,
    is_direct,
    refuse_second_derivative,
    register,
    register_vmap,
    second_derivative_message,
)
from kssm_kernels.ops._update import OPERANDS, Update, any_requires_grad, check_update, is_plain, leading_shape
from kssm_kernels.ops.order_parameters import move_batch

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
    if backend == "cpu":
        results = _update_cpu.backward(theta, u, features, phases, g_features, g_phases, needed)
    elif backend == "torch":
        results = _update_torch.backward(theta, u, g_features, g_phases, needed)
    else:
        kernels, order_parameters = backends.kernels(backend, "kuramoto", "order_parameters")
        results = _update_gpu.backward(kernels, order_parameters, theta, u, features, g_features, g_phases, needed)
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
        u = Update(*fields)
        with torch.no_grad():
            results = _backward(theta, u, features, phases, grads[0], grads[1], ctx.needs_input_grad[2:])
        return None, None, *refuse_second_derivative(OP, tuple(results), (theta, *u[:OPERANDS], *grads))


# ---- the registered door ----

_SCHEMA = (
    "Tensor theta, Tensor coupling, Tensor? omega, Tensor? phase_lag, Tensor? noise_scale, Tensor? seed, "
    "float dt, SymInt steps, SymInt harmonics"
)


@register("kuramoto", f"({_SCHEMA}, bool return_phases) -> (Tensor, Tensor)")
def _registered(
    theta: Tensor,
    coupling: Tensor,
    omega: Tensor | None,
    phase_lag: Tensor | None,
    noise_scale: Tensor | None,
    seed: Tensor | None,
    dt: float,
    steps: int,
    harmonics: int,
    return_phases: bool,
) -> tuple[Tensor, Tensor]:
    u = Update(coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases)
    features, phases = _forward(theta, u, leading_shape(theta, u[:OPERANDS]))
    return theta.new_empty(0) if features is None else features, theta.new_empty(0) if phases is None else phases


@register(
    "kuramoto_backward",
    f"({_SCHEMA}, Tensor? features, Tensor? phases, Tensor? g_features, Tensor? g_phases, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _registered_backward(
    theta: Tensor,
    coupling: Tensor,
    omega: Tensor | None,
    phase_lag: Tensor | None,
    noise_scale: Tensor | None,
    seed: Tensor | None,
    dt: float,
    steps: int,
    harmonics: int,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u = Update(coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, phases is not None)
    results = _backward(theta, u, features, phases, g_features, g_phases, tuple(needed))
    a, b, c, d, e = (theta.new_empty(0) if r is None else r for r in results)
    return a, b, c, d, e


@_registered.register_fake
def _(
    theta: Tensor,
    coupling: Tensor,
    omega: Tensor | None,
    phase_lag: Tensor | None,
    noise_scale: Tensor | None,
    seed: Tensor | None,
    dt: float,
    steps: int,
    harmonics: int,
    return_phases: bool,
) -> tuple[Tensor, Tensor]:
    lead = leading_shape(theta, (coupling, omega, phase_lag, noise_scale))
    return (
        theta.new_empty((*lead, 3 * harmonics) if harmonics else (0,)),
        theta.new_empty((*lead, theta.shape[-1]) if return_phases else (0,)),
    )


@_registered_backward.register_fake
def _(theta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sources, needed = (theta, *rest[:4]), rest[-1]
    return tuple(
        s.new_empty(s.shape) if need and s is not None else theta.new_empty(0)
        for s, need in zip(sources, needed, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dt, steps, harmonics, return_phases = inputs
    features, phases = output
    ctx.save_for_backward(*tensors, features if harmonics else None, phases if return_phases else None)
    ctx.numbers = (dt, steps, harmonics)


def _registered_gradient(ctx: Any, g_features: Tensor, g_phases: Tensor) -> Any:
    *tensors, features, phases = ctx.saved_tensors
    needed = [bool(n) and t is not None for n, t in zip(ctx.needs_input_grad[:5], tensors[:5], strict=True)]
    results = _registered_backward(
        *tensors,
        *ctx.numbers,
        features,
        phases,
        None if features is None else g_features,
        None if phases is None else g_phases,
        needed,
    )
    return *(r if n else None for r, n in zip(results, needed, strict=True)), None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(second_derivative_message(OP))


_registered.register_autograd(_registered_gradient, setup_context=_setup_context)
_registered_backward.register_autograd(_no_second_derivative)


def _aligned(tensor: Tensor | None, dim: int | None, rank: int, size: int | None) -> Tensor | None:
    """A vmapped operand as [B, 1, .., 1, *own shape], which still broadcasts; an unbatched one too if sized."""
    if tensor is None or (dim is None and size is None):
        return tensor
    if dim is not None:
        moved = tensor.movedim(dim, 0)
    else:
        assert size is not None
        moved = tensor.expand(size, *tensor.shape)
    return moved.reshape(moved.shape[0], *([1] * (rank + 1 - moved.dim())), *moved.shape[1:])


def _logical_rank(tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]) -> int:
    return max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None)


def _refuse_batched_seed(dim: int | None) -> None:
    if dim is not None:
        raise RuntimeError(
            f"{OP}: a seed that differs along the vmapped axis is not supported; pass one seed "
            "(the noise differs along that axis all the same)"
        )


def _vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
    _refuse_batched_seed(dims[5])
    rank = _logical_rank(args[:5], dims[:5])
    operands = [_aligned(t, d, rank, None) for t, d in zip(args[:5], dims[:5], strict=True)]
    harmonics, return_phases = args[8], args[9]
    return _registered(*operands, *args[5:]), (0 if harmonics else None, 0 if return_phases else None)


def _vmap_backward(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
    _refuse_batched_seed(dims[5])
    size, sources, needed = info.batch_size, args[:5], args[-1]
    rank = _logical_rank(sources, dims[:5])
    operands = [_aligned(t, d, rank, size) for t, d in zip(sources, dims[:5], strict=True)]
    saved = [None if t is None else move_batch(t, d, size) for t, d in zip(args[9:13], dims[9:13], strict=True)]
    results = _registered_backward(*operands, *args[5:9], *saved, needed)
    shaped = [
        r.reshape(size, *(s.shape if d is None else s.shape[:d] + s.shape[d + 1 :])) if n else r
        for r, s, d, n in zip(results, sources, dims[:5], needed, strict=True)
    ]
    return tuple(shaped), tuple(0 if n else None for n in needed)


register_vmap(_registered, _vmap)
register_vmap(_registered_backward, _vmap_backward)


# ---- the public op ----


def run(op: str, theta: Tensor, u: Update) -> tuple[Tensor | None, Tensor | None]:
    """(features, phases) through the door that fits; what was not asked for is None."""
    lead, plain = check_update(op, theta, u)
    # field by field: torch.compile fails on a slice of a named tuple (torch 2.8) and on its _replace (2.4)
    operands = (u.coupling, u.omega, u.phase_lag, u.noise_scale)
    direct = is_direct(op, (theta,) if plain else (theta, *operands))
    if u.noise_scale is not None and u.seed is None:
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")  # whatever the default device
        u = Update(*operands, int(drawn) if direct else drawn, u.dt, u.steps, u.harmonics, u.return_phases)
    result: tuple[Tensor | None, Tensor | None]
    if direct:
        if torch.is_grad_enabled() and (theta.requires_grad or (not plain and any_requires_grad(operands))):
            result = _Kuramoto.apply(u, lead, theta, *operands)  # type: ignore[no-untyped-call]  # torch has no stub
        else:
            result = _forward(theta, u, lead)
        return result
    compute = DTYPES[theta.dtype][1]
    tensors = [
        torch.full((), float(v), dtype=compute, device=theta.device) if isinstance(v, (int, float)) else v
        for v in operands
    ]
    seed = None if u.noise_scale is None else u.seed
    if isinstance(seed, int):
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)
    features, phases = _registered(theta, *tensors, seed, float(u.dt), u.steps, u.harmonics, u.return_phases)
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
    check_integer(OP, "harmonics", harmonics, 1, MAX_HARMONICS)
    lag = None if type(phase_lag) in (float, int) and phase_lag == 0 else phase_lag
    u = Update(coupling, omega, lag, noise_scale, seed, dt, steps, harmonics, return_phases)
    features, phases = run(OP, theta, u)
    assert features is not None
    return features if phases is None else (features, phases)

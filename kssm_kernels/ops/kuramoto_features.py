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

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._door import (
    DTYPES,
    MAX_HARMONICS,
    check_integer,
    check_operand,
    check_phases,
    is_direct,
    refuse_second_derivative,
    second_derivative_message,
)
from kssm_kernels.ops.noise import philox_normal
from kssm_kernels.ops.order_parameters import features_backward_torch, features_torch, move_batch

OP = "kuramoto_features"
SEGMENT = 64  # trajectories up to this many steps are kept whole (the same in csrc/cpu/kuramoto.cpp)

Operand = Tensor | float | None


class Update(NamedTuple):
    """The operands of one call, as both doors and every backend pass them."""

    coupling: Operand
    omega: Operand
    phase_lag: Operand
    noise_scale: Operand
    seed: int | Tensor | None
    dt: float
    steps: int
    harmonics: int  # 0: no features
    return_phases: bool

    @property
    def operands(self) -> tuple[Operand, Operand, Operand, Operand]:
        return self.coupling, self.omega, self.phase_lag, self.noise_scale

    def seed_value(self) -> int:
        return 0 if self.seed is None else int(self.seed) & 0xFFFFFFFFFFFFFFFF


def leading_shape(theta: Tensor, operands: tuple[Operand, ...]) -> torch.Size:
    """Shape of the ensembles: theta's leading axes broadcast with every operand's."""
    lead = theta.shape[:-1]
    for operand in operands:
        if isinstance(operand, Tensor) and operand.dim() > 1 and operand.shape[:-1] != lead:
            lead = torch.broadcast_shapes(lead, operand.shape[:-1])
    return lead


# ---- pure torch: the reference, and what runs on every device without a kernel ----


def _in_compute(operand: Operand, dtype: torch.dtype) -> Any:
    return operand.to(dtype) if isinstance(operand, Tensor) else operand


class _Torch:
    """One call's operands in the arithmetic dtype, its steps and their adjoints, on whole tensors."""

    def __init__(self, theta: Tensor, u: Update):
        self.u, self.n = u, theta.shape[-1]
        self.dtype = DTYPES[theta.dtype][1]
        self.lead = leading_shape(theta, u.operands)
        self.device = theta.device
        self.coupling, self.omega, self.lag, self.noise = (_in_compute(v, self.dtype) for v in u.operands)
        self.start = theta.to(self.dtype).expand(*self.lead, self.n).clone(memory_format=torch.contiguous_format)

    def xi(self, step: int) -> Tensor:
        rows = math.prod(self.lead)
        xi = philox_normal(rows, self.n, seed=self.u.seed_value(), step=step, device=self.device)
        return xi.to(self.dtype).reshape(*self.lead, self.n)

    def _mean_field(self, theta: Tensor) -> tuple[Tensor, ...]:
        cos, sin = torch.cos(theta), torch.sin(theta)
        mean_cos, mean_sin = cos.mean(-1, keepdim=True), sin.mean(-1, keepdim=True)
        if self.lag is None:
            return cos, sin, cos, sin, mean_cos, mean_sin
        shifted = theta + self.lag
        return cos, sin, torch.cos(shifted), torch.sin(shifted), mean_cos, mean_sin

    def step(self, theta: Tensor, index: int) -> Tensor:
        _, _, cos, sin, mean_cos, mean_sin = self._mean_field(theta)
        velocity = (mean_sin * cos).addcmul_(mean_cos, sin, value=-1).mul_(self.coupling)
        if self.omega is not None:
            velocity += self.omega
        out = theta + self.u.dt * velocity
        if self.noise is not None:
            out -= self.noise * self.xi(index)
        return out

    def adjoint(self, theta: Tensor, index: int, g: Tensor, totals: list[Any]) -> Tensor:
        dt = self.u.dt
        cos, sin, lag_cos, lag_sin, mean_cos, mean_sin = self._mean_field(theta)
        p = (mean_sin * lag_cos).addcmul_(mean_cos, lag_sin, value=-1)
        q = (mean_sin * lag_sin).addcmul_(mean_cos, lag_cos)
        pull = dt * g * self.coupling
        contributions = (dt * g * p, dt * g, -(pull * q), None)
        for k, contribution in enumerate(contributions):
            if totals[k] is not None and contribution is not None:
                totals[k] += contribution
        if totals[3] is not None:
            totals[3] -= g * self.xi(index)
        g_cos = -(pull * lag_sin).sum(-1, keepdim=True) / self.n
        g_sin = (pull * lag_cos).sum(-1, keepdim=True) / self.n
        return g - pull * q + g_sin * cos - g_cos * sin

    def trajectory(self, theta: Tensor, first: int, last: int) -> list[Tensor]:
        states = [theta]
        for index in range(first, last):
            states.append(self.step(states[-1], index))
        return states


def _forward_torch(theta: Tensor, u: Update) -> tuple[Tensor, Tensor]:
    call = _Torch(theta, u)
    state = call.start
    for index in range(u.steps):
        state = call.step(state, index)
    features = features_torch(state, u.harmonics) if u.harmonics else state.new_empty(0)
    phases = state if u.return_phases else state.new_empty(0)
    return features.to(theta.dtype), phases.to(theta.dtype)


def _backward_torch(
    theta: Tensor, u: Update, g_features: Tensor | None, g_phases: Tensor | None, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    call = _Torch(theta, u)
    length = max(1, u.steps if u.steps <= SEGMENT else math.isqrt(u.steps - 1) + 1)
    marks = [call.start]  # the state at steps 0, length, 2 length, ...
    for first in range(0, u.steps - length, length):
        marks.append(call.trajectory(marks[-1], first, first + length)[-1])
    totals: list[Any] = [
        torch.zeros(*call.lead, call.n, dtype=call.dtype, device=call.device) if need else None for need in needed[1:]
    ]
    g = torch.zeros(*call.lead, call.n, dtype=call.dtype, device=call.device)
    if g_phases is not None:
        g = g + g_phases.to(call.dtype)
    for k in range(len(marks) - 1, -1, -1):
        first, last = k * length, min((k + 1) * length, u.steps)
        states = call.trajectory(marks[k], first, last)
        if last == u.steps and g_features is not None:
            g = g + features_backward_torch(states[-1], features_torch(states[-1], u.harmonics), g_features)
        for index in range(last - 1, first - 1, -1):
            g = call.adjoint(states[index - first], index, g, totals)
    return [g if needed[0] else None, *totals]


# ---- the compiled CPU kernel ----


class _Rows(NamedTuple):
    """An operand as the kernel reads it: value + address with a row and a column stride (0: shared)."""

    address: int
    row_stride: int
    column_stride: int
    value: float
    keep: Tensor | None  # owns the memory at address
    per_row: bool
    per_column: bool


_ABSENT = _Rows(0, 0, 0, 0.0, None, False, False)


def _rows_of(operand: Operand, lead: torch.Size, n: int, dtype: torch.dtype) -> _Rows:
    if operand is None:
        return _ABSENT
    if not isinstance(operand, Tensor):
        return _Rows(0, 0, 0, float(operand), None, False, False)
    operand = operand.to(dtype)
    columns = operand.shape[-1] if operand.dim() else 1
    if operand.numel() == columns:
        flat = operand.reshape(1, columns)
        per_row = False
    else:
        flat = operand.expand(*lead, columns).reshape(-1, columns)
        per_row = True
    per_column = columns > 1
    if per_column and flat.stride(1) != 1:
        flat = flat.contiguous()
    row_stride = flat.stride(0) if per_row else 0
    return _Rows(flat.data_ptr(), row_stride, int(per_column), 0.0, flat, per_row, per_column)


def _theta_rows(theta: Tensor, lead: torch.Size) -> tuple[_Rows, int]:
    """(theta as the kernel reads it, rows): strided, in its own dtype, shared by all rows where it is one vector."""
    n = theta.shape[-1]
    rows = math.prod(lead)
    per_row = theta.numel() != n or rows == 1
    flat = theta.expand(*lead, n).reshape(rows, n) if per_row else theta.reshape(1, n)
    row_stride, column_stride = flat.stride()
    return _Rows(flat.data_ptr(), row_stride if per_row else 0, column_stride, 0.0, flat, per_row, True), rows


def _forward(theta: Tensor, u: Update) -> tuple[Tensor, Tensor]:
    """(features or an empty tensor, phases or an empty tensor)."""
    if backends.select(OP, theta.device) == "torch":
        return _forward_torch(theta, u)
    lead, n = leading_shape(theta, u.operands), theta.shape[-1]
    code, compute = DTYPES[theta.dtype]
    start, rows = _theta_rows(theta, lead)
    k, w, a, d = (_rows_of(v, lead, n, compute) for v in u.operands)
    features = theta.new_empty((*lead, 3 * u.harmonics) if u.harmonics else (0,))
    phases = theta.new_empty((*lead, n) if u.return_phases else (0,))
    backends.cpu_extension.kuramoto_forward(  # type: ignore[union-attr]
        (rows, n, code, u.steps, u.harmonics, torch.get_num_threads()),
        (u.dt, u.seed_value()),
        (start[:4], k[:4], w[:4], a[:4], d[:4]),
        (u.omega is not None, u.phase_lag is not None, u.noise_scale is not None),
        features.data_ptr(),
        phases.data_ptr(),
    )
    return features, phases


def _backward(
    theta: Tensor,
    u: Update,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of theta, coupling, omega, phase_lag and noise_scale, in their shapes and dtypes; None where not needed."""
    sources = (theta, *u.operands)
    if backends.select(OP, theta.device) == "torch":
        results = _backward_torch(theta, u, g_features, g_phases, needed)
    else:
        results = _backward_cpu(theta, u, features, phases, g_features, g_phases, needed)
    for i, (result, source) in enumerate(zip(results, sources, strict=True)):
        if result is not None and isinstance(source, Tensor):
            results[i] = result.sum_to_size(source.shape).to(source.dtype).contiguous()
    return results


def _backward_cpu(
    theta: Tensor,
    u: Update,
    features: Tensor | None,
    phases: Tensor | None,
    g_features: Tensor | None,
    g_phases: Tensor | None,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    lead, n = leading_shape(theta, u.operands), theta.shape[-1]
    code, compute = DTYPES[theta.dtype]
    start, rows = _theta_rows(theta, lead)
    operands = (start, *(_rows_of(v, lead, n, compute) for v in u.operands))
    results: list[Tensor | None] = []
    for i, (operand, need) in enumerate(zip(operands, needed, strict=True)):
        shape = (*(lead if operand.per_row else ()), n if operand.per_column else 1)
        # theta's own gradient leaves in theta's dtype; what is summed over rows or columns, in the arithmetic dtype
        dtype = theta.dtype if i == 0 and operand.per_row else compute
        results.append(torch.empty(shape, dtype=dtype, device=theta.device) if need else None)
    # Rounded to 16 bits the phases no longer reproduce the features: the kernel then starts from theta again.
    exact = phases is not None and theta.dtype == compute
    if g_features is not None:
        g_features = g_features.to(theta.dtype).contiguous()
    if g_phases is not None:
        g_phases = g_phases.to(theta.dtype).contiguous()
    backends.cpu_extension.kuramoto_backward(  # type: ignore[union-attr]
        (rows, n, code, u.steps, u.harmonics, torch.get_num_threads()),
        (u.dt, u.seed_value()),
        tuple(o[:4] for o in operands),
        (u.omega is not None, u.phase_lag is not None, u.noise_scale is not None),
        (_address(features), _address(phases) if exact else 0, _address(g_features), _address(g_phases)),
        tuple((_address(r), o.per_row, o.per_column) for r, o in zip(results, operands, strict=True)),
    )
    return results


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- the direct door ----


class _Kuramoto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, *fields: Any) -> tuple[Tensor | None, Tensor | None]:
        u = Update(*fields)
        features, phases = _forward(theta, u)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            theta,
            *(v if isinstance(v, Tensor) else None for v in fields),
            features if u.harmonics else None,
            phases if u.return_phases else None,
        )
        ctx.numbers = tuple(None if isinstance(v, Tensor) else v for v in fields)
        return features if u.harmonics else None, phases if u.return_phases else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        theta, *tensors, features, phases = ctx.saved_tensors
        u = Update(*(n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True)))
        with torch.no_grad():
            results = _backward(theta, u, features, phases, grads[0], grads[1], ctx.needs_input_grad[:5])
        guarded = refuse_second_derivative(OP, tuple(results), (theta, *u.operands, *grads))
        return *guarded, *(None for _ in range(len(Update._fields) - 4))


# ---- the registered door ----


@torch.library.custom_op("kssm_kernels::kuramoto", mutates_args=())
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
    return _forward(theta, Update(coupling, omega, phase_lag, noise_scale, seed, dt, steps, harmonics, return_phases))


@torch.library.custom_op("kssm_kernels::kuramoto_backward", mutates_args=())
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
    """A vmapped operand as [B, 1, .., 1, *own shape], so that it still broadcasts; an unbatched one likewise if sized."""
    if tensor is None or (dim is None and size is None):
        return tensor
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)  # type: ignore[arg-type]
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
        r.reshape(size, *s.shape[:d], *s.shape[d + 1 :])
        if n and d is not None
        else r.reshape(size, *s.shape)
        if n
        else r
        for r, s, d, n in zip(results, sources, dims[:5], needed, strict=True)
    ]
    return tuple(shaped), tuple(0 if n else None for n in needed)


if hasattr(_registered, "register_vmap"):  # torch >= 2.5
    _registered.register_vmap(_vmap)
    _registered_backward.register_vmap(_vmap_backward)


# ---- the public op ----


def check_update(op: str, theta: Tensor, u: Update) -> None:
    check_phases(op, theta)
    for name, operand in zip(Update._fields, u.operands, strict=False):
        if operand is not None:
            check_operand(op, name, operand, theta)
    if u.coupling is None:
        raise TypeError(f"{op}: coupling must be a number or a torch.Tensor, got None")
    if isinstance(u.dt, bool) or not isinstance(u.dt, (int, float)):
        raise TypeError(f"{op}: dt must be a number, got {type(u.dt).__name__}")
    if not math.isfinite(u.dt):
        raise ValueError(f"{op}: dt must be finite, got {u.dt}")
    check_integer(op, "steps", u.steps, 0, 2**31 - 1)
    if isinstance(u.seed, Tensor):
        if u.seed.numel() != 1 or u.seed.is_floating_point():
            raise ValueError(
                f"{op}: seed must be an int or an integer tensor of one element, got {u.seed.dtype} {tuple(u.seed.shape)}"
            )
    elif u.seed is not None:
        check_integer(op, "seed", u.seed, -(2**63), 2**64 - 1)
    try:
        leading_shape(theta, u.operands)
    except RuntimeError as error:
        shapes = [tuple(v.shape) for v in (theta, *u.operands) if isinstance(v, Tensor)]
        raise ValueError(f"{op}: leading axes of theta and its operands must broadcast, got shapes {shapes}") from error


def run(op: str, theta: Tensor, u: Update) -> tuple[Tensor | None, Tensor | None]:
    """(features, phases) through the door that fits; what was not asked for is None."""
    check_update(op, theta, u)
    direct = is_direct(op, theta, *u.operands)
    if u.noise_scale is None:
        u = u._replace(seed=None)
    elif u.seed is None:
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
        u = u._replace(seed=int(drawn) if direct else drawn)
    if direct:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (theta, *u.operands)):
            return _Kuramoto.apply(theta, *u)  # type: ignore[no-any-return, no-untyped-call]
        features, phases = _forward(theta, u)
    else:
        compute = DTYPES[theta.dtype][1]
        operands = [
            torch.full((), float(v), dtype=compute, device=theta.device) if isinstance(v, (int, float)) else v
            for v in u.operands
        ]
        seed = u.seed
        if isinstance(seed, int):
            seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)
        features, phases = _registered(theta, *operands, seed, float(u.dt), u.steps, u.harmonics, u.return_phases)
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
    lag = None if isinstance(phase_lag, (int, float)) and phase_lag == 0 else phase_lag
    u = Update(coupling, omega, lag, noise_scale, seed, dt, steps, harmonics, return_phases)
    features, phases = run(OP, theta, u)
    assert features is not None
    return features if phases is None else (features, phases)

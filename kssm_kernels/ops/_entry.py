"""What every op shares at its entry: which path a call takes, the checks, and the refusal to differentiate twice.

An eager call on plain tensors goes straight to an ``autograd.Function`` and the kernel. Under ``torch.compile``,
``torch.export``, ``torch.jit.trace``, ``torch.func.vmap``, dispatch modes and tensor subclasses it goes through
torch's dispatcher to the registered ``torch.library`` op, which ends in the same kernel. The dispatcher path costs
several times the eager one (docs/performance.md), more than a small kernel does: hence two. ``torch.func.grad`` and its
like take an ``autograd.Function`` of the ``setup_context`` form, which costs still more. In forward mode the op runs on
the primal values and its tangents are computed in torch operators.
"""

from __future__ import annotations

import enum
import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kssm_kernels.ops._dtypes import DTYPES

MAX_HARMONICS = 256

_PLAIN = frozenset((Tensor, Parameter, float, int, type(None)))  # anything else may be a subclass of torch.Tensor


def _never(*_: object) -> Any:
    return 0


# Private names of torch, present from 2.4 to 2.13. A torch without them sends such calls down the eager path,
# where a wrapper tensor has no data pointer and torch raises.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _never)
_tracing = getattr(torch._C, "_get_tracing_state", _never)
_functorch: Any = getattr(torch._C, "_functorch", None)
_functorch_level = getattr(_functorch, "peek_interpreter_stack", _never)
_is_legacy_batched = getattr(_functorch, "is_legacy_batchedtensor", _never)
_is_compiling = torch.compiler.is_compiling
_dual_levels: Any = forward_ad
_unpack_dual: Any = forward_ad.unpack_dual


class Path(enum.Enum):
    """Which path a call takes."""

    EAGER = enum.auto()  # autograd.Function and kernel, on the tensors' memory
    DISPATCHER = enum.auto()  # the torch.library op
    TRANSFORMED = enum.auto()  # an autograd.Function that torch.func.grad, vjp, jvp and their like can take apart
    DUAL = enum.auto()  # forward mode: some tensor carries a tangent


# Looking an attribute up in an Enum takes 0.2 us on Python 3.10, 0.05 us here.
EAGER, DISPATCHER, TRANSFORMED, DUAL = Path.EAGER, Path.DISPATCHER, Path.TRANSFORMED, Path.DUAL


def path_of(arguments: tuple[object, ...]) -> Path:
    """The one place that decides whether a kernel may be called on these tensors' memory right here."""
    if _dual_levels._current_level >= 0 and _has_tangent(arguments):
        return DUAL
    if _is_compiling():
        if _functorch_derivative():  # neither way can be traced: eager serves
            torch._dynamo.graph_break()
        return DISPATCHER
    if _functorch_level():
        return TRANSFORMED if _functorch_derivative() else DISPATCHER
    if _dispatch_modes() or _tracing() is not None:
        return DISPATCHER
    for argument in arguments:  # 0.1 us less than a set's issuperset for one or two
        if type(argument) not in _PLAIN:
            return DISPATCHER
    return EAGER


def backward_path_of(arguments: tuple[object, ...]) -> Path:
    """The same where autograd calls: ``is_grads_batched`` and ``vectorize=True`` hand tensors of torch's first vmap in,
    whose type is Tensor and which have no memory."""
    for argument in arguments:  # a generator in any() takes twice as long
        if isinstance(argument, Tensor) and _is_legacy_batched(argument):
            return DISPATCHER
    return path_of(arguments)


def is_traced() -> bool:
    """Whether torch.jit.trace records the call."""
    return _tracing() is not None


def _functorch_derivative() -> bool:
    """Whether torch.func.grad, vjp or jvp is at work.

    Any level counts, not the innermost alone: the registered op inside torch.func.vmap(...) would meet the outer one
    next, and an autograd rule of torch.library takes no part in it.
    """
    if not _functorch_level():
        return False
    derivatives = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return any(level.key() in derivatives for level in _functorch.get_interpreter_stack())


# torch.compile cannot trace the stack of levels: it calls the function while it traces, and keeps the answer (it guards
# the stack itself). What torch.compiler.assume_constant_result does, which would import the compiler.
setattr(_functorch_derivative, "_dynamo_marked_constant", True)  # noqa: B010  # a function has no such attribute


def _has_tangent(arguments: tuple[object, ...]) -> bool:
    tensors = (a for a in arguments if isinstance(a, Tensor))
    return any(_unpack_dual(t).tangent is not None for t in tensors)


# ---- checks ----


def check_phases(op: str, theta: Tensor) -> None:
    if not isinstance(theta, Tensor):
        raise TypeError(f"{op}: theta must be a torch.Tensor, got {type(theta).__name__}")
    if theta.dtype not in DTYPES:
        raise TypeError(f"{op}: theta must be float32, float64, bfloat16 or float16, got {theta.dtype}")
    check_dense(op, "theta", theta)
    if theta.dim() == 0 or theta.shape[-1] == 0:
        raise ValueError(f"{op}: theta must have shape [..., N] with N >= 1 oscillators, got {tuple(theta.shape)}")


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")


def as_integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int (torch's symbolic ones as they are), NumPy's integers included."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        value = int(value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be from {low} to {high}, got {value}")
    return value  # type: ignore[no-any-return]  # an int or a SymInt by now


def as_number(op: str, name: str, value: Any, wanted: str = "a number") -> float:
    """``value`` as a Python number (torch's symbolic ones as they are), NumPy's included; finite."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")
        if not isinstance(value, (int, torch.SymFloat, torch.SymInt)):
            value = float(value)
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced with a symbolic number
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value  # type: ignore[no-any-return]  # a number by now, Python's or symbolic


def number_tensor(value: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A number as a tensor of no axes for the registered op.

    Not ``torch.full((), value)``: Inductor keeps the value of the first call in it (torch 2.13).
    """
    return torch.zeros((), dtype=dtype, device=device) + value


class _RefuseSecondDerivative(torch.autograd.Function):
    """Identity on a first gradient; its own backward names the op that has no second one."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(second_derivative_message(ctx.op))


def second_derivative_message(op: str) -> str:
    return f"{op}: double backward is not supported (the gradient of a gradient was asked for)"


def refuse_second_derivative(op: str, gradients: tuple[Tensor | None, ...], sources: tuple[Any, ...]) -> Any:
    """Guards ``gradients`` when backward runs with ``create_graph=True``; costs nothing otherwise."""
    if not torch.is_grad_enabled():
        return gradients
    tensors = [s for s in sources if isinstance(s, Tensor)]
    guard: Any = _RefuseSecondDerivative.apply
    return tuple(g if g is None else guard(op, g, *tensors) for g in gradients)

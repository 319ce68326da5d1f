"""What every op shares at its door: which way a call goes in, the checks, and the refusal to differentiate twice.

An eager call on plain tensors goes straight to an ``autograd.Function`` and the kernel. Under ``torch.compile``,
``torch.export``, ``torch.func`` transforms, dispatch modes and tensor subclasses it goes through the registered
``torch.library`` op, which ends in the same kernel. The registered door costs several times the direct one
(docs/performance.md), more than a small kernel does: hence two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

# dtype -> (code in csrc/cpu/memory.h, dtype of the arithmetic inside)
DTYPES: dict[torch.dtype, tuple[int, torch.dtype]] = {
    torch.float32: (0, torch.float32),
    torch.float64: (1, torch.float64),
    torch.bfloat16: (2, torch.float32),
    torch.float16: (3, torch.float32),
}
MAX_HARMONICS = 256

_PLAIN = frozenset((Tensor, Parameter, float, int, type(None)))  # anything else may be a subclass of torch.Tensor


def _always_zero() -> Any:
    return 0


# Both are private names of torch, present from 2.4 to 2.13; a torch without them sends such calls through the
# direct door, where a wrapper tensor has no data pointer and torch raises.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _always_zero)
_functorch: Any = getattr(torch._C, "_functorch", None)
_functorch_level = getattr(_functorch, "peek_interpreter_stack", _always_zero)


def is_direct(op: str, arguments: tuple[object, ...]) -> bool:
    """True when the kernel may be called on these tensors' memory right here."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    level = _functorch_level()
    if level:
        # torch.library's autograd rules do not take part in torch.func.grad (torch 2.13: "must override the
        # setup_context staticmethod"); say so by name.
        if level.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp):
            raise RuntimeError(
                f"{op}: torch.func.grad, vjp, jvp and their like are not supported; torch.autograd.grad is, "
                "and so is torch.func.vmap"
            )
        return False
    return _PLAIN.issuperset(map(type, arguments))


def check_phases(op: str, theta: Tensor) -> None:
    if not isinstance(theta, Tensor):
        raise TypeError(f"{op}: theta must be a torch.Tensor, got {type(theta).__name__}")
    if theta.dtype not in DTYPES:
        raise TypeError(f"{op}: theta must be float32, float64, bfloat16 or float16, got {theta.dtype}")
    if theta.dim() == 0 or theta.shape[-1] == 0:
        raise ValueError(f"{op}: theta must have shape [..., N] with N >= 1 oscillators, got {tuple(theta.shape)}")


def check_integer(op: str, name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be from {low} to {high}, got {value}")


def register(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: the function as ``kssm_kernels::name``. torch 2.4 cannot infer a schema from postponed annotations."""
    return torch.library.custom_op(f"kssm_kernels::{name}", mutates_args=(), schema=schema)


def register_vmap(op: CustomOpDef, rule: Callable[..., Any]) -> None:
    """``op.register_vmap(rule)``, and the same on torch 2.4, which lacks it, and 2.5, whose own loses gradients.

    Without a rule torch calls the op once per member, with one seed: all members would get the same noise. The private
    names below are those of two releases that will not change any more.
    """
    if torch.__version__ >= "2.6":  # torch compares the numbers, not the letters
        op.register_vmap(rule)
        return
    from torch._functorch import vmap
    from torch._functorch.autograd_function import VmapInfo
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    def batched(*arguments: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        info = VmapInfo(batch_size=interpreter.batch_size(), randomness=interpreter.randomness())
        unwrapped, dims = vmap.unwrap_batched(arguments, level)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            if all(dim is None for dim in torch.utils._pytree.tree_leaves(dims)):
                return op(*unwrapped)
            result, result_dims = rule(info, dims, *unwrapped)
        return vmap.wrap_batched(result, result_dims, level)

    op._lib.impl(op._name, batched, "FuncTorchBatched")  # type: ignore[no-untyped-call]  # torch has no stub


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

"""The dispatcher path of an op, derived from two plain functions: its forward and its backward pass.

torch wants a schema, shapes, an autograd rule and a vmap rule for each of the two, a refusal of second derivatives, and
an ``autograd.Function`` of another form for torch.func.grad and its like. All of it follows from the names in the two
schemas. The eager ``autograd.Function`` of an op stays written out in its own file: derived as well, it
took 1 us more forward and 2 us more with backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kssm_kernels.ops._entry import DUAL, EAGER, TRANSFORMED, backward_path_of, path_of, second_derivative_message
from kssm_kernels.ops._memory import on_one_device

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

Function = Callable[..., Any]
# rule(function, info, dims, arguments) -> (results, their batch axes), as torch.library's vmap rules and the op itself
VmapRule = Callable[[Function, Any, tuple[Any, ...], tuple[Any, ...]], Any]
_make_dual: Any = forward_ad.make_dual
_unpack_dual: Any = forward_ad.unpack_dual


def _itself(tensor: Tensor) -> Tensor:
    return tensor


# A private name of torch, present from 2.4 to 2.13.
_unwrap_if_dead = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", _itself)


def registered(
    name: str,
    schema: str,
    forward: Function,
    backward_schema: str,
    backward: Function,
    *,
    outputs: Sequence[str],
    fake: Function,
    tangents: Function,
    eager: Function,
    vmap: VmapRule | None = None,
    vmap_backward: VmapRule | None = None,
    title: str = "",
) -> tuple[Function, Function]:
    """Registers ``kssm_kernels::name`` and ``kssm_kernels::name_backward``.

    Returns both as functions that take the path that fits.

    Args:
        name: of the op.
        schema: of forward. torch 2.4 cannot infer one from postponed annotations.
        forward: the op. torch.ops hands it arguments that nobody has checked.
        backward_schema: of backward. Its names say what backward gets: an argument or an output of forward, which is
            saved for it; ``g_<output>``, the gradient of that output; ``needed``, which gradients are wanted.
        backward: the gradients of the op's first arguments, shaped like them, one for each result in its schema. What
            is not needed may be any tensor.
        outputs: names of forward's results.
        fake: shapes and dtypes of forward's results, as torch.library's fakes.
        tangents: (arguments, their tangents or None, results) -> a tangent for each result, from torch operators that
            autograd and vmap know.
        eager: forward on the tensors' memory, with the ``autograd.Function`` where a gradient may be asked for.
        vmap, vmap_backward: default: one call with the batch as the first axis of every differentiable tensor.
        title: what messages call the op; default: its name.
    """
    takes, wants, title = _names_of(schema), _names_of(backward_schema), title or name
    saved = [n for n in wants if not n.startswith("g_") and n != "needed"]
    places = [[*takes, *outputs].index(n) for n in saved]
    count = backward_schema.rpartition("->")[2].count("Tensor")  # arguments with a gradient
    batched = {*takes[:count], *outputs, *(f"g_{n}" for n in outputs)}

    op = _custom_op(name, schema, forward)
    adjoint_op = _custom_op(f"{name}_backward", backward_schema, backward)

    # ---- shapes ----

    def fake_forward(*arguments: Any) -> Any:
        on_one_device(*arguments[:count])
        return fake(*arguments)

    def fake_backward(*arguments: Any) -> Any:
        known = dict(zip(wants, arguments, strict=True))
        on_one_device(*(v for n, v in known.items() if n in batched))
        sources, needed = [known[n] for n in takes[:count]], known.get("needed", [True] * count)
        shaped = [
            s.new_empty(s.shape) if need and s is not None else sources[0].new_empty(0)
            for s, need in zip(sources, needed, strict=True)
        ]
        return tuple(shaped) if count > 1 else shaped[0]

    op.register_fake(fake_forward)
    adjoint_op.register_fake(fake_backward)

    # ---- gradients ----

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        every = (*inputs, *_as_tuple(output))
        kept = [every[i] for i in places]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in kept))
        ctx.others = [None if isinstance(v, Tensor) else v for v in kept]

    def gradients(function: Function, ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = [o if t is None else t for t, o in zip(_alive(ctx.saved_tensors), ctx.others, strict=True)]
        known = dict(zip(saved, kept, strict=True))
        known.update({f"g_{n}": g for n, g in zip(outputs, _alive(grads), strict=True)})
        needed = known["needed"] = [bool(n) for n in ctx.needs_input_grad[:count]]
        results = _as_tuple(function(*(known[n] for n in wants)))
        wanted = (r if need else None for r, need in zip(results, needed, strict=True))
        return *wanted, *[None] * (len(takes) - count)

    def no_second_derivative(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_derivative_message(title))

    op.register_autograd(lambda ctx, *grads: gradients(adjoint_op, ctx, grads), setup_context=save)
    adjoint_op.register_autograd(no_second_derivative)

    # ---- vmap ----

    def batch_first(names: Sequence[str], function: Function, info: Any, dims: Any, arguments: Any) -> Any:
        moved = []
        for n, argument, dim in zip(names, arguments, dims, strict=True):
            if n in batched:
                argument = move_batch(argument, dim, info.batch_size)
            elif dim is not None:
                raise RuntimeError(f"{title}: vmap over {n} is not supported")
            moved.append(argument)
        results = function(*moved)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    def forward_rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        if vmap is not None:
            return vmap(evaluate, info, dims, arguments)
        return batch_first(takes, evaluate, info, dims, arguments)

    def backward_rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        if vmap_backward is not None:
            return vmap_backward(adjoint, info, dims, arguments)
        return batch_first(wants, adjoint, info, dims, arguments)

    _register_vmap(op, forward_rule)
    _register_vmap(adjoint_op, backward_rule)

    # ---- torch.func.grad and its like, and forward mode ----

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return evaluate(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)
            results = _as_tuple(output)
            ctx.save_for_forward(*(v if isinstance(v, Tensor) else None for v in inputs), *results)
            ctx.numbers = [None if isinstance(v, Tensor) else v for v in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(adjoint, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *given: Any) -> Any:
            tensors = ctx.saved_tensors
            inputs = tuple(n if t is None else t for t, n in zip(tensors[: len(takes)], ctx.numbers, strict=True))
            results = tuple(tensors[len(takes) :])
            made = tuple(t.to(r.dtype) for t, r in zip(tangents(inputs, given, results), results, strict=True))
            return made if len(made) > 1 else made[0]

        vmap = staticmethod(forward_rule)

    class TransformedBackward(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return adjoint(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        backward = jvp = staticmethod(no_second_derivative)
        vmap = staticmethod(backward_rule)

    def forward_mode(arguments: tuple[Any, ...]) -> Any:
        """Dual results of dual arguments. Not ``autograd.Function.jvp``: torch does not call it where vmap hands in
        batched tangents of plain tensors (``torch.autograd.functional.jacobian(strategy="forward-mode")``).
        """
        pairs = [_unpack_dual(a) if isinstance(a, Tensor) else (a, None) for a in arguments]
        primals, given = tuple(p for p, _ in pairs), tuple(t for _, t in pairs)
        output = evaluate(*primals)
        results = _as_tuple(output)
        made = tangents(primals, given, results)
        duals = tuple(_make_dual(r, t.to(r.dtype)) for r, t in zip(results, made, strict=True))
        return duals if isinstance(output, tuple) else duals[0]

    # ---- the path that fits ----

    transform: Any = Transformed.apply
    transform_backward: Any = TransformedBackward.apply

    def evaluate(*arguments: Any) -> Any:
        path = path_of(_tensors(arguments))
        if path is EAGER:
            return eager(*arguments)
        if path is DUAL:
            return forward_mode(arguments)
        return transform(*arguments) if path is TRANSFORMED else op(*arguments)

    def adjoint(*arguments: Any) -> Any:
        path = backward_path_of(_tensors(arguments))
        if path is EAGER:
            return backward(*arguments)
        if path is DUAL:
            raise RuntimeError(second_derivative_message(title))
        return transform_backward(*arguments) if path is TRANSFORMED else adjoint_op(*arguments)

    return evaluate, adjoint


def move_batch(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped tensor with its batch axis first; an unbatched one repeated (a view)."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def aligned(tensor: Tensor | None, dim: int | None, rank: int, size: int | None) -> Tensor | None:
    """A vmapped operand as [B, 1, .., 1, *own shape], which still broadcasts; an unbatched one too if sized."""
    if tensor is None or (dim is None and size is None):
        return tensor
    if dim is not None:
        moved = tensor.movedim(dim, 0)
    else:
        assert size is not None
        moved = tensor.expand(size, *tensor.shape)
    return moved.reshape(moved.shape[0], *([1] * (rank + 1 - moved.dim())), *moved.shape[1:])


def is_absent(result: Tensor | None, batched: bool = False) -> bool:
    """Whether a registered op's result, or its gradient, stands for none: its shape is [0], but for a vmap's axis."""
    return result is None or (result.dim() == 1 + batched and result.numel() == 0)


def _names_of(schema: str) -> list[str]:
    return re.findall(r"(\w+)(?=[,)])", schema.partition("->")[0])


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _tensors(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple([a for a in arguments if isinstance(a, Tensor)])


def _alive(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without the wrappers of levels that are over: the function that torch.func.vjp returns runs after its level."""
    return tuple(_unwrap_if_dead(t) if isinstance(t, Tensor) else t for t in tensors)


def _custom_op(name: str, schema: str, function: Function) -> CustomOpDef:
    return torch.library.custom_op(
        f"kssm_kernels::{name}", lambda *arguments: function(*arguments), mutates_args=(), schema=schema
    )


def _register_vmap(op: CustomOpDef, rule: Callable[..., Any]) -> None:
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

"""What the pure-torch path asks of an `mps` device, found without one: a trace of every operator call, and its faults.

In a :class:`Trace` tensors on `mps` have shapes, strides and dtypes, no data. Python sees their device as `mps`, so
that branches on it take that side; torch's C++ sees `meta`, since the autograd engine of a torch built without MPS
aborts the process at the first gradient of a fake tensor on `mps`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

MPS = torch.device("mps", 0)

# dtype -> why no tensor on mps may have it. The unsigned types came with torch 2.9; 2.4 is the oldest supported.
FORBIDDEN_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "Metal has no such type: github.com/pytorch/pytorch/issues/122602",
    torch.complex128: "Metal has no float64, of which it consists: github.com/pytorch/pytorch/issues/122602",
    torch.uint16: "torch < 2.9 refuses it: github.com/pytorch/pytorch/pull/159094",
    torch.uint32: "torch < 2.9 refuses it: github.com/pytorch/pytorch/pull/159094",
    torch.uint64: "torch < 2.9 refuses it: github.com/pytorch/pytorch/pull/159094",
    torch.float8_e4m3fn: "torch refuses it: github.com/Comfy-Org/ComfyUI/issues/9263",
    torch.float8_e5m2: "as float8_e4m3fn",
}
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_THROUGH_FLOAT = "computed in float32 and wrong beyond 2^24"

# operator -> (dtypes of an input or result, why not): kernels that exist and in some torch from 2.4 on refuse the dtype
# or give wrong numbers
FORBIDDEN_CALLS: dict[str, tuple[frozenset[torch.dtype], str]] = {
    "remainder": (_INTEGERS, f"{_THROUGH_FLOAT} (2.7): github.com/pytorch/pytorch/issues/154171"),
    "fmod": (_INTEGERS, "as remainder"),
    "abs": (_INTEGERS, f"{_THROUGH_FLOAT} (2.13): github.com/pytorch/pytorch/issues/190052"),
    "__lshift__": (frozenset((torch.uint8,)), "wrong (2.5): github.com/pytorch/pytorch/issues/144190"),
    "__rshift__": (frozenset((torch.uint8,)), "wrong (2.5): github.com/pytorch/pytorch/issues/144190"),
    "bitwise_left_shift": (frozenset((torch.uint8,)), "as __lshift__"),
    "bitwise_right_shift": (frozenset((torch.uint8,)), "as __rshift__"),
    "bitwise_left_shift.Scalar_Tensor": (_INTEGERS, "wrong (2.6): github.com/pytorch/pytorch/issues/147889"),
    "bitwise_right_shift.Scalar_Tensor": (_INTEGERS, "as bitwise_left_shift.Scalar_Tensor"),
    "arange": (
        frozenset((torch.bfloat16,)),
        "refused (2.4): github.com/lllyasviel/stable-diffusion-webui-forge/pull/1264",
    ),
}


class OnMPS(Tensor):
    """A tensor on `mps` as far as Python can tell; ``meta`` has its shape, strides and dtype."""

    meta: Tensor
    device = property(lambda self: MPS)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> OnMPS:
        layout: Any = {"strides": meta.stride(), "storage_offset": meta.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, meta.shape, dtype=meta.dtype, device=torch.device("meta"), **layout)

    def __init__(self, meta: Tensor) -> None:
        self.meta = meta

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on an mps tensor outside its trace")


class Operand(NamedTuple):
    device: str
    dtype: torch.dtype


class Call(NamedTuple):
    op: str  # as in native_functions.yaml: "add.Tensor"
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


class Trace(TorchDispatchMode):
    """Runs a block as on an `mps` device and keeps its kinds of operator call, those of backward included.

    Tensors of both devices in one call raise, as there; a number (a tensor of no axes) may come from the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}  # each once, in order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        inputs = tuple(map(_operand, filter(_is_tensor, flat)))
        # what leaves the device arrives as zeros: the trace goes on, and faults() tells of it
        leaves = func.overloadpacket is torch.ops.aten._local_scalar_dense or any(map(_is_cpu, flat))
        owners: dict[int, OnMPS] = {id(x.meta): x for x in flat if isinstance(x, OnMPS)}
        here: Callable[[Any], Any] = _on_cpu if leaves else _on_meta
        run_args, run_kwargs = tree_unflatten(list(map(here, flat)), spec)
        result = func(*run_args, **run_kwargs)
        outputs = tree_map(lambda x: owners[id(x)] if id(x) in owners else _on_mps(x), result)
        found = tuple(map(_operand, filter(_is_tensor, tree_leaves(outputs))))
        self.calls[Call(func._schema.name.removeprefix("aten::") + _overload(func), inputs, found)] = None
        return outputs


def _overload(func: Any) -> str:
    return f".{func._schema.overload_name}" if func._schema.overload_name else ""


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_cpu(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cpu"


def _operand(x: Tensor) -> Operand:
    return Operand(x.device.type, x.dtype)


def _on_meta(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "mps":
        return torch.device("meta")
    return x.meta if isinstance(x, OnMPS) else x


def _on_cpu(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, OnMPS) else x


def _on_mps(x: Any) -> Any:
    return OnMPS(x) if isinstance(x, Tensor) and x.is_meta else x


@cache
def kernels() -> dict[str, bool] | None:
    """Every operator of the installed torch, and whether MPS has a kernel for it, its own or one for all devices.

    From native_functions.yaml, which every wheel from 2.4 to 2.13 carries whatever it was built for; None without.
    """
    found = importlib.util.find_spec("torchgen")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "packaged/ATen/native/native_functions.yaml"
    if not path.exists():
        return None
    own: dict[str, bool] = {}
    delegates: dict[str, str] = {}
    for entry in path.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        name, *lines = entry.splitlines()
        name = name.partition("(")[0]
        keys: set[str] = set()
        inside = False
        for line in lines:
            if inside and line.startswith("    "):
                keys.update(line.partition(":")[0].strip().split(", "))
                continue
            field, _, value = line.strip().partition(": ")
            inside = line.strip() == "dispatch:"
            if field == "structured_delegate":
                delegates[name] = value.split()[0]
            elif field == "autogen":  # variants that torch generates from this one, for all devices
                own.update((variant, True) for variant in value.split(", "))
        own[name] = bool(keys & _SERVE_MPS) or (not keys and name not in delegates)
    return own | {name: own[delegate] for name, delegate in delegates.items()}


_SERVE_MPS = frozenset(
    ("MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
)


def faults(calls: Iterable[Call]) -> list[str]:
    """What an `mps` device would refuse, compute wrongly or hand to the CPU; each once, in order."""
    return list(dict.fromkeys(fault for call in calls for fault in _faults(call)))


def _faults(call: Call) -> Iterable[str]:
    op, inputs, outputs = call
    on_mps = [x for x in (*inputs, *outputs) if x.device == "mps"]
    if not on_mps:
        return
    for x in on_mps:
        if x.dtype in FORBIDDEN_DTYPES:
            yield f"{op}: {x.dtype}: {FORBIDDEN_DTYPES[x.dtype]}"
    known = kernels()
    if known is not None and not known.get(op, False):
        yield f"{op}: torch {torch.__version__} has no kernel for mps"
    name = op.partition(".")[0]
    for key in dict.fromkeys((op, name, name.removesuffix("_"))):  # an overload, all of them, those in place
        dtypes, reason = FORBIDDEN_CALLS.get(key, (frozenset(), ""))
        yield from (f"{op}: {x.dtype}: {reason}" for x in (*inputs, *outputs) if x.dtype in dtypes)
    if any(x.device == "cpu" for x in outputs) or op == "_local_scalar_dense":
        yield f"{op}: a result on the CPU"

"""Compiles the kernels of the cases for targets that need not be here: Triton for NVIDIA and AMD, CUDA C++ by nvcc."""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_compile import listing
from bench.gpu_compile.cases import CASES, MANY_STEPS
from bench.gpu_compile.listing import Code
from kssm_kernels.backends import OPS, no_kernels

ROOT = Path(__file__).parents[2]
NVIDIA, AMD = (80, 90, 100), ("gfx942",)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
Launch = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # name, kernel, arguments, compile-time arguments


@contextmanager
def recorded(lanes: int) -> Iterator[list[Launch]]:
    """Triton launches within, as on a device with so many lanes: noted down in place of being run."""
    # these import Triton; pytest collects this file without it too
    from kssm_kernels.ops.kuramoto import _triton as kuramoto
    from kssm_kernels.ops.kuramoto import _triton_long
    from kssm_kernels.triton_math import launch as launching

    served = [op for op in OPS if not no_kernels(op, "triton")]
    modules: list[Any] = [*dict.fromkeys(map(_module, served)), _triton_long]
    found: list[Launch] = []

    def record(kernel: Any, grid: Any, on: Tensor, *args: Any, **meta: Any) -> None:
        if hasattr(kernel, "configs"):  # autotuned: the first choice stands for all
            first = kernel.configs[0]
            kernel, meta = kernel.fn, {**meta, **first.kwargs, "num_warps": first.num_warps}
        owner = kernel.fn.__module__.split(".")[-2]  # the op's folder
        found.append((f"{owner}{kernel.fn.__name__.removesuffix('_kernel')}", kernel, args, meta))

    before = [(module, module.launch) for module in modules]
    asked = launching.lanes
    try:
        for module in modules:
            module.launch = record
        launching.lanes = kuramoto.lanes = lambda: lanes
        yield found
    finally:
        launching.lanes = kuramoto.lanes = asked
        for module, launch in before:
            module.launch = launch


def source_of(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Source and options as a launch with these arguments compiles them, and a key that tells compilations apart."""
    from triton.compiler import ASTSource

    meta = dict(meta)
    options = {"num_warps": meta.pop("num_warps", 4), "enable_fp_fusion": False}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if i >= len(args):
            signature[name], constants[(i,)] = "constexpr", meta[name]
        elif isinstance(args[i], Tensor):
            signature[name], attributes[(i,)] = TYPES[args[i].dtype], [["tt.divisibility", 16]]
        elif isinstance(args[i], bool):
            signature[name] = "u1"
        elif isinstance(args[i], float):
            signature[name] = "fp32"
        elif args[i] == 1:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= args[i] < 2**31 else "i64"
            if args[i] % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    key = f"{kernel.fn.__qualname__}{signature}{constants}{attributes}{options}"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options, key


def _module(op: str) -> Any:
    return importlib.import_module(f"kssm_kernels.{OPS[op]}._triton")


def _triton_kernels(lanes: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """Label, source and options of each different compilation."""
    found: dict[str, tuple[str, Any, dict[str, Any]]] = {}
    with recorded(lanes) as launches:
        for case in (c for c in CASES if "triton" in c.backends):
            for dtype in (torch.float32, torch.bfloat16):
                case.call(_module, case.rows, dtype)
        for call in MANY_STEPS:
            for dtype in (torch.float32, torch.bfloat16):
                call(_module, 1, dtype)
    for name, kernel, args, meta in launches:
        source, options, key = source_of(kernel, args, meta)
        dtype = next(a for a in args if isinstance(a, Tensor)).dtype
        found.setdefault(key, (f"{name}, {str(dtype).removeprefix('torch.')}", source, options))
    return list(found.values())


def triton_codes() -> list[Code]:
    import triton
    from triton.backends.compiler import GPUTarget

    from kssm_kernels.triton_math import launch as launching

    found: list[Code] = []
    for label, source, options in _triton_kernels(32):
        for arch in NVIDIA:
            wanted = {**options, "maxnreg": launching.REGISTERS}
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=wanted)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(compiled.asm["cubin"])
                code = listing.of_cubin("triton", f"sm_{arch}", Path(file.name))[0]
            found.append(Code(**{**code.__dict__, "kernel": label}))
    for label, source, options in _triton_kernels(64):
        for target in AMD:
            compiled = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
            found.append(listing.of_amdgcn("triton", label, target, compiled.asm["amdgcn"]))
    return found


STORED = {"float": "float32", "double": "float64", "BFloat16": "bfloat16", "Float16": "float16", "Dynamic8": "8 bits"}


def _readable(names: Iterable[str]) -> dict[str, str]:
    """C++ names as ``kernel, dtype``, or ``kernel, dtype and dtype`` where what it stores has two.

    ``kernel, dtype in two`` keeps phases in two parts, of which it has a number.
    """
    names = list(names)
    shown = listing.run("c++filt", *names).splitlines()
    readable = {}
    for name, text in zip(names, shown, strict=True):
        found = re.search(r"(\w+)(?:<([^>]*)>)?\(", text.replace("(anonymous namespace)::", ""))
        assert found is not None, text
        given = [argument.removeprefix("kssm::cuda::") for argument in (found[2] or "").split(", ")]
        types = " and ".join(dict.fromkeys(STORED[argument] for argument in given if argument in STORED))
        options, parts = "_options" if "false" in given else "", " in two" if "2" in given else ""
        readable[name] = f"{found[1]}{options}, {types or None}{parts}"
    return readable


def _labelled(stem: str, kernel: str) -> str:
    """A kernel by the name of its op: its file's, or that and its own."""
    if kernel.startswith("sum_row_blocks"):
        return kernel
    own, dtype = kernel.split(", ")
    return f"{stem if stem.endswith(own) else f'{stem}_{own}'}, {dtype}"


def cuda_codes() -> list[Code]:
    """All CUDA kernels; none where nvcc is not found."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    flags = ("-cubin", "-O3", "-std=c++17", "-fmad=false", "-DKSSM_ISA=cuda", '-DKSSM_CUDA_BUILD=""')
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(job: tuple[Path, int]) -> list[Code]:
            source, arch = job
            cubin = Path(folder, f"{source.stem}-{arch}.cubin")
            listing.run(nvcc, *flags, f"-arch=sm_{arch}", str(source), "-o", str(cubin))
            codes = listing.of_cubin("cuda", f"sm_{arch}", cubin)
            names = _readable(code.kernel for code in codes)
            return [Code(**{**c.__dict__, "kernel": _labelled(source.stem, names[c.kernel])}) for c in codes]

        sources = [s for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if s.stem != "library"]
        with ThreadPoolExecutor(2) as pool:
            jobs = [(source, arch) for source in sources for arch in NVIDIA]
            codes = [code for found in pool.map(compile_one, jobs) for code in found]
    return list({(code.kernel, code.target): code for code in codes}.values())  # sum_row_blocks is in two files


CODES: dict[str, Callable[[], list[Code]]] = {"triton": triton_codes, "cuda": cuda_codes}

"""Every launch of the conformance cases passes Triton's front end as on a device, where an argument that is 1 becomes a
constant and one that 16 divides is known to be so: the interpreter, which runs the same kernels, has neither.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kssm_kernels import backends
from kssm_kernels.backends import triton
from tests.support import devices
from tests.support.cases import Case, evaluate
from tests.support.specs import CASES, arguments, by_package
from tests.support.tolerance import inside

pytest.importorskip("triton", reason="Triton is not installed: pip install .[gpu]")
if triton.interpreting():
    pytest.skip("the interpreter stands in for the compiler under TRITON_INTERPRET=1", allow_module_level=True)

from bench.gpu_compile.compile import recorded, source_of  # imports Triton

MORE = [
    Case("order_parameters", (16, 16), 16),
    Case("kuramoto_update", (1, 1), coupling=(1,), omega=(1,), phase_lag=(1,), noise_scale=(1,)),
    Case("kuramoto_features", (1, 1), 1, coupling=(1, 1), noise_scale=(1,), steps=3),
    # phases in two, and with turns taken off: rows in registers and longer ones
    Case("kuramoto_features", (3, 16), 3, coupling=0.7, phase_lag=(1,), noise_scale=(1,), steps=17),
    Case("kuramoto_features", (3, 16), 3, coupling=0.7, omega=(16,), steps=257),
    Case("kuramoto_update", (1, 1100), coupling=0.7, steps=17),
    Case("kuramoto_update", (1, 1100), coupling=0.7, omega=(1,), steps=257),
]
seen: set[str] = set()


def to_triton_ir(kernel: Any, args: tuple[object, ...], meta: dict[str, object]) -> None:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    source, options, key = source_of(kernel, args, meta)
    if key in seen:
        return
    seen.add(key)
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    # Triton binds the arguments in a function that it generates; one that has the name of a local of that function
    # ("params") hides it, and the launch fails.
    create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **meta)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 20 * 2**32 + 7)])
def test_every_launch_compiles(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "select", lambda op, tensor: "triton")
    monkeypatch.setattr("tests.support.specs.kuramoto.SEED", seed)
    for case in (c for c in [*CASES, *MORE] if devices.serves("triton", dtype, c.op)):
        with recorded(32) as launches:
            results = evaluate(by_package, case, arguments(case, dtype), dtype)
        assert launches or results[next(iter(results))].numel() == 0
        assert all(v.dtype in (dtype, inside(dtype)) for v in results.values())
        for _, kernel, args, meta in launches:
            to_triton_ir(kernel, args, meta)

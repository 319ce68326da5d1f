"""Which backend runs a call: the default of a device, use_backend, KSSM_BACKEND, and what explain says of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kssm_kernels
from kssm_kernels import backends, explain, ops, order_parameters, use_backend

ROOT = Path(kssm_kernels.__file__).parents[1]


class OnDevice:
    """What the choice looks at: a tensor's device and dtype."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.is_cpu = torch.device(device), dtype, device == "cpu"


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A dict that says which GPU backends can run; both can until a test says otherwise."""
    state = {"cuda": True, "triton": True}
    for name in state:
        monkeypatch.setattr(
            backends.LOADERS[name], "status", lambda name=name: (state[name], f"{name} as the test has it")
        )
    monkeypatch.setattr(backends.cuda, "on_host", lambda: False)
    monkeypatch.setattr(backends.triton, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "_automatic", {})
    monkeypatch.setattr(backends, "_fallen_back", set())
    monkeypatch.setattr(backends, "_environment", "")
    return state


def chosen(device: str, dtype: torch.dtype = torch.float32) -> str:
    return backends.select("order_parameters", OnDevice(device, dtype))  # type: ignore[arg-type]  # enough of a tensor


@pytest.mark.parametrize(
    ("device", "cuda", "triton", "dtype", "want"),
    [
        ("cuda", True, True, torch.float32, "cuda"),
        ("cuda", True, True, torch.float64, "cuda"),
        ("cuda", False, True, torch.bfloat16, "triton"),  # ROCm, or no CUDA library
        ("cuda", False, True, torch.float64, "torch"),
        ("cuda", False, False, torch.float32, "torch"),
        ("xpu", True, True, torch.float32, "triton"),
        ("mps", True, True, torch.float32, "torch"),
    ],
)
def test_the_default_of_a_device(
    device: str, cuda: bool, triton: bool, dtype: torch.dtype, want: str, usable: dict[str, bool]
) -> None:
    usable.update(cuda=cuda, triton=triton)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chosen(device, dtype) == want


def test_a_device_that_has_better_and_falls_back_to_torch_says_so_once(usable: dict[str, bool]) -> None:
    usable.update(cuda=False, triton=False)
    with pytest.warns(RuntimeWarning, match="pure-torch path: cuda: cuda as the test has it; triton: "):
        assert chosen("cuda") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("cuda") == chosen("cuda", torch.bfloat16) == "torch"
        assert chosen("mps") == "torch"  # has nothing better


def test_an_explicit_request_that_cannot_be_served_raises(usable: dict[str, bool]) -> None:
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"order_parameters: backend 'triton' was asked for.*float64"):
            chosen("cuda", torch.float64)
        with pytest.raises(RuntimeError, match="'triton' was asked for, but the tensors are on cpu"):
            order_parameters(torch.zeros(3), 1)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for, but the tensors are on xpu"):
        chosen("xpu")
    usable["cuda"] = False
    with pytest.raises(RuntimeError, match=r"use_backend\('cuda'\): cuda as the test has it"):
        use_backend("cuda")


def test_an_op_without_kernels_for_a_backend_runs_on_another(
    usable: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder has _triton.py and _torch.py: no backend is chosen that would not find its module."""
    (tmp_path / "toy").mkdir()
    for name in ("__init__", "_triton", "_torch"):
        (tmp_path / "toy" / f"{name}.py").touch()
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setitem(backends.OPS, "toy", "ops.toy")
    on_cuda, on_cpu = OnDevice("cuda"), torch.zeros(3)
    assert backends.select("toy", on_cuda) == "triton"  # type: ignore[arg-type]  # enough of a tensor
    assert chosen("cuda") == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert backends.select("toy", on_cpu) == "torch"
    assert "\n  cpu: cannot run: " in explain("toy", on_cpu)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="toy: backend 'cuda' was asked for, but toy has no ke"):
        backends.select("toy", on_cuda)  # type: ignore[arg-type]  # enough of a tensor


def explained() -> str:
    return explain("order_parameters", torch.zeros(3))


def test_use_backend_as_a_plain_call_stays_until_the_next() -> None:
    with use_backend(None):  # puts back at its end what was before
        use_backend("torch")
        assert chosen("cpu") == "torch"
        with use_backend(None):
            assert "chosen by use_backend" not in explained()
        assert chosen("cpu") == "torch"
        assert "torch, chosen by use_backend" in explained()


def test_blocks_nest() -> None:
    with use_backend("torch"):
        with use_backend(None), use_backend("torch"):
            pass
        assert "torch, chosen by use_backend" in explained()


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    wanted = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=wanted, timeout=120)


def test_the_environment_variable() -> None:
    code = "import torch, kssm_kernels; print(kssm_kernels.explain('order_parameters', torch.zeros(3)))"
    assert "torch, chosen by the environment variable KSSM_BACKEND" in in_process(code, KSSM_BACKEND="torch").stdout
    names = ", ".join(map(repr, backends.BACKENDS))
    assert f"want one of {names}" in in_process(code, KSSM_BACKEND="gpu").stderr
    calls = "import torch, kssm_kernels; kssm_kernels.order_parameters(torch.zeros(3), 1)"
    done = in_process(calls, KSSM_BACKEND="triton", TRITON_INTERPRET="0")
    assert "backend 'triton' was asked for, but" in done.stderr, done.stderr


def test_importing_the_package_imports_no_triton_and_opens_no_cuda_library() -> None:
    code = (
        "import sys, kssm_kernels; from kssm_kernels.backends import cuda as library;"
        "print('triton' in sys.modules, library._opened is None)"
    )
    assert in_process(code).stdout.split() == ["False", "True"]


def test_explain_names_what_runs_and_why_not_the_others(usable: dict[str, bool]) -> None:
    usable["triton"] = False
    text = explain(order_parameters, torch.zeros(3))
    assert text.startswith("order_parameters on cpu, float32: ")
    assert "cuda: cannot run: the tensors are on cpu" in text
    assert "triton: cannot run: triton as the test has it" in text
    assert "forward mode (torch.func.jvp, jacfwd) computes its tangents here" in text.splitlines()[-1]
    assert "torch: " in text
    with use_backend("torch"):
        assert "torch, chosen by use_backend" in explain("kuramoto_update", torch.zeros(3))
    with use_backend("cuda"):
        assert "an error: use_backend asks for cuda" in explain("kuramoto_update", torch.zeros(3))
    assert len(text.splitlines()) == 1 + len(backends.BACKENDS)


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="got op 'sum', want one of 'order_parameters'"):
        explain("sum", torch.zeros(3))
    with pytest.raises(TypeError, match="wants the tensors"):
        explain("order_parameters")


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (lambda t: order_parameters(t, 2), (3, 5)),
        (lambda t: kssm_kernels.kuramoto_features(t, 1.0, 2, omega=0.5), (3, 5)),
        (lambda t: kssm_kernels.bistable_coupling(t)[0], (3, 10)),
    ],
    ids=["order_parameters", "kuramoto_features", "bistable_coupling"],
)
def test_backward_runs_where_forward_ran(
    op: Callable[[Tensor], Tensor], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What forward saves may be laid out as its own backend wants it."""
    leaf = torch.rand(shape, requires_grad=True)
    with use_backend("torch"):
        out = op(leaf)
        (wanted,) = torch.autograd.grad(op(leaf).sum(), leaf)
    monkeypatch.setattr(backends.cpu, "extension", None)  # whoever asks it for a kernel fails
    (found,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(found, wanted)

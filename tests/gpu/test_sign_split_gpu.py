"""On a device: the sign-split EMA step by its kernels, bit for bit against the reference on the CPU; graphs, streams.

pytest tests/gpu/test_sign_split_gpu.py -m gpu
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kssm_kernels
from kssm_kernels.optim import SignSplitEMA
from tests.optim.test_sign_split_conformance import OPTIONS
from tests.support import devices
from tests.support.sign_split import MODES, assert_same, everything, gradient, run, running

pytestmark = pytest.mark.gpu

Stage = tuple[list[nn.Parameter], SignSplitEMA]
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RANDOM: dict[str, Any] = {"state_dtype": torch.bfloat16, "state_rounding": "stochastic", "seed": 11}
# Around a thread's run, a warp's, a chunk of either backend; a scalar, nothing, and blocks of 8-bit means.
SHAPES = [(n,) for n in (1, 5, 8, 127, 129, 255, 257, 511, 513, 0, 2047, 2049, 4099, 9000)] + [(), (40, 3, 5), (70, 64)]


# Triton compiles each anew, in seconds: every mode, dtype and option, not every three of them.
TRITON = {
    *(("normalized", torch.float32, options) for options in OPTIONS),
    *(("normalized", torch.bfloat16, o) for o in ("stochastic parameters", "Kahan", "bfloat16 means, stochastic")),
    *((mode, torch.float32, o) for mode in ("paper", "consolidate") for o in ("plain", "all")),
    ("paper", torch.float16, "8-bit means"),
    ("consolidate", torch.bfloat16, "plain"),
}


def _cases() -> list[Any]:
    all_of_them = [(m, d, o) for m in MODES for d in DTYPES for o in OPTIONS]
    rows = [("cuda", *case) for case in all_of_them] + [("triton", *case) for case in all_of_them if case in TRITON]
    return [pytest.param(*row, id="-".join(str(x).removeprefix("torch.") for x in row)) for row in rows]


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest) -> str:
    """A backend that can run on the device here; its name is that of an implementation (support/sign_split.py)."""
    device = devices.device_or_skip()
    if request.param not in devices.backends_of(device):
        pytest.skip(f"no {request.param} kernels here")
    return str(request.param)


@pytest.fixture
def device() -> str:
    return devices.device_or_skip()


def close(mode: str, *rounded: bool) -> float:
    """Implementations agree bit for bit, in consolidate up to the order of a sum: one step of what is stored."""
    return 0.0 if mode != "consolidate" else 2**-7 if any(rounded) else 1e-6


@pytest.mark.parametrize(("on", "mode", "dtype", "options"), _cases(), indirect=["on"])
def test_the_reference_on_cpu_copies(on: str, mode: str, dtype: torch.dtype, options: str, device: str) -> None:
    chosen = OPTIONS[options]
    if mode == "consolidate" and "state_dtype" in chosen:
        pytest.skip("the order of the sum shows in the last bit of a rounding, and grows")
    arguments = {"mode": mode, "dtype": dtype, "shapes": SHAPES, "steps": 3, **chosen}
    rtol = close(mode, dtype in (torch.bfloat16, torch.float16))
    assert_same(run(on, device=device, **arguments), run("single", **arguments), rtol=rtol)


@pytest.mark.parametrize("options", [{}, RANDOM, {"state_dtype": torch.uint8}, {"temperature": True}], ids=str)
def test_memory_that_is_not_aligned(on: str, options: dict[str, Any], device: str) -> None:
    arguments = {"shapes": SHAPES, "steps": 2, **options}
    assert_same(run(on, device=device, offset=1, **arguments), run("single", **arguments))


def test_a_divisor_for_each_row(on: str, device: str) -> None:
    def between(k: int, optimizer: SignSplitEMA) -> None:
        for p in optimizer.param_groups[0]["params"][::2]:
            if k == 0 and p.dim():
                optimizer.state[p]["cryo"] = 1.0 + torch.arange(p.shape[0], device=p.device) % 5

    arguments: dict[str, Any] = {"shapes": [(40, 3, 5), (9,), (), (70, 64), (1, 700)], "between": between}
    assert_same(run(on, device=device, **arguments), run("single", **arguments))


@pytest.mark.parametrize("mode", MODES)
def test_four_hundred_small_tensors(on: str, mode: str, device: str) -> None:
    sizes = torch.randint(0, 3000, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    arguments: dict[str, Any] = {"mode": mode, "shapes": [(n,) for n in sizes], "steps": 2}
    assert_same(run(on, device=device, **arguments), run("foreach", **arguments), rtol=close(mode))


@pytest.mark.parametrize("options", [{}, {"mode": "consolidate"}, RANDOM], ids=str)
def test_a_large_tensor(on: str, options: dict[str, Any], device: str) -> None:
    arguments: dict[str, Any] = {"shapes": [(3_000_001,), (77,)], "steps": 2, **options}
    rtol = close(options.get("mode", ""))
    assert_same(run(on, device=device, **arguments), run("single", **arguments), rtol=rtol)


def test_two_runs_give_the_same_bits(on: str, device: str) -> None:
    arguments: dict[str, Any] = {"mode": "consolidate", "shapes": [(300_007,), (70, 64)], "steps": 3}
    first, second = (everything(*run(on, device=device, **arguments)) for _ in range(2))
    for (name, x), (_, y) in zip(first, second, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


# ---- numbers on the device, and no wait for them ----


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lr_and_scale_on_the_device(on: str, lr_dtype: torch.dtype, device: str) -> None:
    def result(name: str, where: str) -> tuple[list[nn.Parameter], SignSplitEMA]:
        def between(k: int, optimizer: SignSplitEMA) -> None:
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.found_inf, optimizer.grad_scale = (torch.tensor(x, device=where) for x in (0.0, 8.0))

        lr = torch.tensor(0.25, dtype=lr_dtype, device=where)
        return run(name, device=where, shapes=SHAPES, lr=lr, between=between, maximize=True, **RANDOM)

    assert_same(result(on, device), result("single", "cpu"))


@pytest.mark.parametrize("mode", MODES)
def test_found_inf_leaves_all_as_it_is(on: str, mode: str, device: str) -> None:
    params, optimizer = run(on, device=device, mode=mode, shapes=SHAPES, steps=2, **RANDOM)
    before = [t.clone() for _, t in everything(params, optimizer)]
    for found, same in ((1.0, True), (0.0, False)):
        optimizer.found_inf = torch.tensor(found, device=device)
        with running(on):
            optimizer.step()
        after = everything(params, optimizer)
        equal = [torch.equal(x.nan_to_num(), y.nan_to_num()) for x, (_, y) in zip(before, after, strict=True)]
        assert all(equal) == same


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
def test_the_host_does_not_wait(on: str, mode: str, device: str) -> None:
    if device != "cuda":
        pytest.skip("torch tells of waiting on CUDA alone")
    lr = torch.tensor(0.1, device=device)
    _, optimizer = run(on, device=device, mode=mode, steps=1, lr=lr, **RANDOM)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=device), torch.ones((), device=device)
    params = [p for p in optimizer.param_groups[0]["params"] if p.numel()]
    with running(on), no_waiting():
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)  # elsewhere than before
            optimizer.step()
            optimizer.step()


# ---- streams and graphs ----


def test_the_current_stream_is_used(on: str, device: str) -> None:
    """Gradients that another stream is still computing are seen only by a step behind them on that stream."""
    streams = torch.cuda if device == "cuda" else torch.xpu
    wanted, made = nn.Parameter(torch.zeros(1 << 20)), nn.Parameter(torch.zeros(1 << 20, device=device))
    with running(on):
        optimizer = SignSplitEMA([made], lr=0.5, mode="paper")
        made.grad = torch.zeros_like(made)
        optimizer.step()
        streams.synchronize()
        side = streams.Stream()
        with streams.stream(side):
            late = torch.zeros_like(made)
            for _ in range(300):  # keeps the stream busy while the host goes on
                late = late * 0.5
            made.grad = late + 3.0
            optimizer.step()
        side.synchronize()
    with running("single") as chosen:
        reference = SignSplitEMA([wanted], lr=0.5, mode="paper", **chosen)
        for value in (0.0, 3.0):
            wanted.grad = torch.full_like(wanted, value)
            reference.step()
    assert torch.equal(made.cpu(), wanted)


GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "consolidate": {"mode": "consolidate"},
    "random": {**RANDOM, "temperature": True},
    "8 bit": {"state_dtype": torch.uint8, "state_rounding": "stochastic"},
}


@pytest.mark.parametrize("fresh", [False, True], ids=["table there", "table in the graph"])
@pytest.mark.parametrize("options", GRAPHS)
def test_a_captured_step(on: str, options: str, fresh: bool, device: str) -> None:
    """Replays read gradients, lr, found_inf and counters anew; ``fresh``: the graph makes the kernel's table itself."""
    if device != "cuda":
        pytest.skip("graphs are CUDA's")
    g = torch.Generator().manual_seed(5)
    shapes = [(300,), (70, 64), (3,), (1025,)] * 20  # more words than one launch carries
    first = [torch.randn(s, generator=g) for s in shapes]
    inputs = [[gradient(s, g) for s in shapes] for _ in range(6)]
    rates = (0.1, 0.1, 0.1, 0.05, 0.05, 0.025)
    skipped = 4

    lr, found_inf = torch.tensor(0.1, device=device), torch.zeros((), device=device)
    params = [nn.Parameter(x.to(device)) for x in first]
    with running(on):
        optimizer = SignSplitEMA(params, lr=lr, **GRAPHS[options])
        optimizer.found_inf = found_inf

        def feed(k: int) -> None:
            lr.fill_(rates[k])
            found_inf.fill_(float(k == skipped))
            for p, x in zip(params, inputs[k], strict=True):
                p.grad = x.to(device) if p.grad is None else p.grad.copy_(x)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for k in range(2):
                feed(k)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        if fresh:
            optimizer._plans.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        optimizer._plans.clear()  # what the graph reads does not go with them
        for k in range(2, 6):
            feed(k)
            graph.replay()
        torch.cuda.synchronize()

    copies = [nn.Parameter(x) for x in first]
    with running("foreach") as chosen:
        reference = SignSplitEMA(copies, **GRAPHS[options], **chosen)
        for k, rate in enumerate(rates):
            if k == skipped:
                continue
            reference.param_groups[0]["lr"] = torch.tensor(rate)
            for p, x in zip(copies, inputs[k], strict=True):
                p.grad = x.clone()
            reference.step()
    assert_same((params, optimizer), (copies, reference), rtol=close(GRAPHS[options].get("mode", "")))


# ---- as a torch optimizer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_grad_scaler(on: str, dtype: torch.dtype, device: str) -> None:
    """Unscaling inside the step, and no step where a gradient is not finite: as by hand on the CPU."""
    x = torch.randn(3000).to(dtype)
    p, q = nn.Parameter(torch.ones(3000, dtype=dtype, device=device)), nn.Parameter(torch.ones(3000, dtype=dtype))
    options: dict[str, Any] = {"mode": "paper", "weight_decay": 0.1, **RANDOM}
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    on_device = SignSplitEMA([p], **options)
    plain = SignSplitEMA([q], fused=False, foreach=False, **options)
    for k in range(5):
        p.grad = None
        scaler.scale((p * x.to(device)).sum().float()).backward()
        assert p.grad is not None
        if k == 2:
            p.grad[3] = torch.inf
        scaled = p.grad.cpu()
        with running(on):
            scaler.step(on_device)
        scale = scaler.get_scale()
        if k != 2:
            q.grad = scaled
            plain.grad_scale = torch.tensor(scale)
            plain.step()
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(([p], on_device), ([q], plain))


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize("fused_on_cpu", [False, True], ids=["reference", "fused on the CPU"])
def test_state_moves_between_cpu_and_device(on: str, options: str, fused_on_cpu: bool, device: str) -> None:
    if fused_on_cpu and "cpu" not in kssm_kernels.available_backends():
        pytest.skip("no CPU kernels here")
    name = "cpu" if fused_on_cpu else "single"
    shapes = [(70, 64), (300,), (), (3, 7)]
    g = torch.Generator().manual_seed(9)
    first = [torch.randn(s, generator=g) for s in shapes]
    inputs = [[gradient(s, g) for s in shapes] for _ in range(6)]

    def stage(before: Stage | None, implementation: str, where: str, steps: range) -> Stage:
        params = [nn.Parameter(x.detach().to(where, copy=True)) for x in (first if before is None else before[0])]
        with running(implementation) as chosen:
            optimizer = SignSplitEMA(params, lr=0.05, **{**GRAPHS[options], **chosen})
            if before is not None:
                saved: dict[str, Any] = copy.deepcopy(before[1].state_dict())
                optimizer.load_state_dict(saved)
                optimizer.param_groups[0].update(chosen if "foreach" in chosen else {"fused": True, "foreach": None})
            for k in steps:
                for p, x in zip(params, inputs[k], strict=True):
                    p.grad = x.to(where)
                optimizer.step()
        return params, optimizer

    moved = stage(None, name, "cpu", range(2))
    moved = stage(moved, on, device, range(2, 4))
    assert all(t.device.type == device for t in moved[1].state[moved[0][0]].values())
    moved = stage(moved, name, "cpu", range(4, 6))
    stayed = stage(None, "single", "cpu", range(6))
    assert_same(moved, stayed, rtol=close(GRAPHS[options].get("mode", "")))


def test_the_default_of_the_device_is_a_kernel(device: str) -> None:
    """With no backend asked for."""
    if not set(BACKENDS) & set(devices.backends_of(device)):
        pytest.skip("no kernels here")
    arguments: dict[str, Any] = {"shapes": SHAPES, "steps": 2}
    g = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(s, generator=g).to(device)) for s in SHAPES]
    optimizer = SignSplitEMA(params, lr=0.05, fused=True)  # raises where no kernel serves
    for _ in range(2):
        for p in params:
            p.grad = gradient(p.shape, g).to(device)
        optimizer.step()
    assert_same((params, optimizer), run("single", **arguments))


def test_the_tensors_own_device_is_used(on: str, device: str) -> None:
    count = torch.cuda.device_count() if device == "cuda" else torch.xpu.device_count()
    if count < 2:
        pytest.skip("one device only")
    arguments: dict[str, Any] = {"shapes": SHAPES, "steps": 2}
    made = run(on, device=f"{device}:1", **arguments)
    assert all(isinstance(t, Tensor) and t.device.index == 1 for t in made[1].state[made[0][0]].values())
    assert_same(made, run("single", **arguments))

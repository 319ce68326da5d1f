"""Where a kernel's loops change: more rows than chunks, phases that all rows share, long rows, strides past 32 bits."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

from kssm_kernels import kuramoto_features, kuramoto_update, order_parameters, philox_normal, use_backend
from tests.support import naive

STEPS = [1, 2, 70]  # one; more, of which all are kept for the backward pass; more than are kept


def _with_gradients(loss: Tensor, *leaves: Tensor, again: bool = False) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=again))


# ---- phases that all rows share ----


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("rows", "n"), [(4, 9), (300, 9), (3, 70), (2, 4099)])
def test_one_vector_of_phases_is_the_same_as_a_copy_for_each_row(rows: int, n: int, steps: int, backend: str) -> None:
    """Each row has its own coupling, and so its own mean field from the second step on."""
    dtype, slack = (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-11)
    theta = torch.randn(n, dtype=dtype).requires_grad_()
    coupling = torch.linspace(0.1, 1.5, rows, dtype=dtype)[:, None].requires_grad_()
    weight = torch.randn(rows, n + 6, dtype=dtype)
    found = []
    for shared in (theta, theta.repeat(rows, 1)):
        given = {"dt": 0.1, "steps": steps, "omega": 0.3}
        features, phases = kuramoto_features(shared, coupling, 2, return_phases=True, **given)
        assert torch.equal(kuramoto_update(shared, coupling, **given), phases)
        loss = (torch.cat([features, phases], -1) * weight).sum()
        found.append((features.detach(), phases.detach(), *_with_gradients(loss, theta, coupling)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


# ---- more rows than chunks ----


@pytest.mark.parametrize("shape", [(200, 300), (2100, 20), (257, 64), (131, 65)], ids=str)
def test_more_rows_than_chunks(shape: tuple[int, int], backend: str) -> None:
    """Rows are shared out in at most 128 chunks, whose lengths differ where the rows do not divide."""
    theta = torch.randn(shape).requires_grad_()
    weight = torch.randn(shape[0], 15)
    got = _with_gradients((order_parameters(theta, 5) * weight).sum(), theta)
    moved = kuramoto_features(theta, 0.5, 5, omega=0.2)
    features = _with_gradients((moved * weight).sum(), theta)
    wide = theta.detach().double().requires_grad_()
    want = _with_gradients((naive.order_parameters(wide, 5) * weight).sum(), wide)
    torch.testing.assert_close(got, tuple(w.float() for w in want), rtol=1e-4, atol=1e-5)
    end = naive.kuramoto_update(wide, 0.5, omega=0.2)
    truth = _with_gradients((naive.order_parameters(end, 5) * weight).sum(), wide)
    torch.testing.assert_close(features, tuple(w.float() for w in truth), rtol=1e-4, atol=1e-5)


def test_pure_torch_in_passes_of_which_the_last_is_shorter() -> None:
    """Three rows of 50,000 phases are two and one."""
    theta = torch.randn(3, 50_000, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 6, dtype=torch.float64)
    with use_backend("torch"):
        features = order_parameters(theta, 2)
        (gradient,) = torch.autograd.grad((features * weight).sum(), theta)
    want = naive.order_parameters(theta, 2)
    torch.testing.assert_close(features, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, torch.autograd.grad((want * weight).sum(), theta)[0], rtol=1e-11, atol=1e-15)


# ---- long rows ----

KINDS = {  # what each operand has values for, so that every way to sum a gradient is taken
    "shared": {"coupling": (), "omega": ("n",), "phase_lag": ("n",), "noise_scale": ()},
    "per row": {
        "coupling": ("rows", 1),
        "omega": ("rows", 1),
        "phase_lag": ("rows", "n"),
        "noise_scale": ("rows", "n"),
    },
    "phases too": {"coupling": ("n",), "omega": ("rows", 1), "phase_lag": ("rows", 1), "noise_scale": ("n",)},
}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    ("n", "steps", "speed"),
    [(4112, 1, 1.0), (4099, 3, 1.0), (8195, 70, 1.0), (131_088, 3, 1.0), (131_079, 3, 40.0), (131_079, 18, 2.0)],
)
def test_long_rows_with_every_kind_of_operand(n: int, steps: int, speed: float, kinds: str, backend: str) -> None:
    """Rows whose lengths are whole vectors or not, past the cosines that the CPU keeps (131,072 in float64), and at
    speeds of which a step is a part of a turn or several; two rows, of which the second starts with nothing left over.
    """
    if backend == "triton" or (backend != "cpu" and n * steps > 20_000):
        pytest.skip("float32 alone" if backend == "triton" else "slow, and its code has no such sizes")
    wide = torch.float64
    sizes = {"rows": 2, "n": n}

    def drawn(shape: tuple[int | str, ...], centre: float, spread: float) -> Tensor:
        own = [sizes.get(k, 1) if isinstance(k, str) else k for k in shape]
        return (centre + spread * torch.randn(own, dtype=wide)).requires_grad_()

    spreads = {"coupling": (1.0, 0.2), "omega": (0.0, speed), "phase_lag": (0.1, 0.2), "noise_scale": (0.1, 0.02)}
    leaves = {k: drawn(shape, *spreads[k]) for k, shape in KINDS[kinds].items()}
    theta = (3 * torch.randn((n,) if kinds == "phases too" else (2, n), dtype=wide)).requires_grad_()
    weight = torch.randn(2, n + 9, dtype=wide)
    xi = torch.stack([philox_normal(2, n, seed=5, step=k).to(wide) for k in range(steps)])
    given = {**leaves, "dt": 0.1, "steps": steps}
    everything = (theta, *leaves.values())
    features, phases = kuramoto_features(theta, harmonics=3, seed=5, return_phases=True, **given)
    got = _with_gradients((torch.cat([features * n, phases], -1) * weight).sum(), *everything)
    end = naive.kuramoto_update(theta, xi=xi, **given)
    wanted = torch.cat([naive.order_parameters(end, 3) * n, end], -1)
    want = _with_gradients((wanted * weight).sum(), *everything, again=True)
    torch.testing.assert_close(torch.cat([features * n, phases], -1), wanted, rtol=1e-9, atol=1e-9)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * n)
    # without the phases the end of the trajectory is computed again
    alone = kuramoto_features(theta, harmonics=3, seed=5, **given)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, features)
    for a, b in zip(
        torch.autograd.grad((alone * n * weight[:, :9]).sum(), everything),
        torch.autograd.grad((naive.order_parameters(end, 3) * n * weight[:, :9]).sum(), everything),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * n)


# ---- strides past 32 bits ----

FAR = 2**31 + 16
APART = 3 * 2**27 + 16  # between columns: the sixth of nine is more than 2^31 away


@pytest.fixture(scope="module")
def sparse() -> Tensor:
    """float16 zeros; pages that nobody writes take no memory."""
    if sys.platform != "linux":
        pytest.skip("wants memory that is reserved and not there")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 2 * (8 * APART + 256), flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer(memory, dtype=torch.float16)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("n", [3, 70])
def test_phases_further_apart_than_32_bits_count(sparse: Tensor, layout: str, n: int, backend: str) -> None:
    shape, strides = ((2, n), (FAR, 1)) if layout == "rows" else ((n, 9), (1, APART))
    far = sparse.as_strided(shape, strides)
    near = torch.randn(shape).half()
    far.copy_(near)
    calls = (
        lambda t: order_parameters(t, 3),
        lambda t: kuramoto_features(t, 0.5, 3),
        lambda t: kuramoto_update(t, 0.5, omega=0.1, steps=3),
    )
    for call in calls:
        leaves = [t.detach().requires_grad_() for t in (far, near)]
        outputs = [call(leaf) for leaf in leaves]
        assert torch.equal(*outputs)
        assert torch.equal(
            *(torch.autograd.grad(o.square().sum(), leaf)[0] for o, leaf in zip(outputs, leaves, strict=True))
        )


def test_operands_further_apart_than_32_bits_count(backend: str) -> None:
    """Values per row, read in float32 where they lie."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * (FAR + 64), flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    whole = torch.frombuffer(memory, dtype=torch.float32)
    theta = torch.randn(2, 9)
    for columns in (1, 9):
        far = whole.as_strided((2, columns), (FAR, 1))
        near = torch.rand(2, columns)
        far.copy_(near)
        assert torch.equal(*(kuramoto_update(theta, t, omega=t, phase_lag=t, steps=2) for t in (far, near)))

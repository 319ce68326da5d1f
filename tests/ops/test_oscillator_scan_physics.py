"""What the equations of the scan say whatever computes them: bounds, symmetries, memory, and where a NaN goes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases import Args, Result
from tests.support.oscillator_scan import KINDS, SEQUENCES, both, by_package, drawn, leaves
from tests.support.tolerance import inside

OP = "oscillator_scan"

kinds = pytest.mark.parametrize("kind", KINDS)
WIDE = ("p", "q", "gate", "phase")


def picked(values: list[float], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One of the values at each place, the largest finite number where the dtype has no such."""
    most = torch.finfo(dtype).max
    table = torch.tensor(values, dtype=torch.float64).clamp(-most, most).to(dtype)
    return table[torch.randint(0, len(values), shape)]


def radius(found: Result, name: str) -> Tensor:
    re, im = found[f"{name}_re"].double(), found[f"{name}_im"].double()
    assert re.isfinite().all(), name
    assert im.isfinite().all(), name
    return torch.hypot(re, im)


# ---- bounds ----

EXTREMES: dict[str, list[float]] = {
    "p": [0.0, 1.0, -1e4, 1e20, -3e38, 3e38, 1e300],
    "q": [0.0, -1.0, 1e4, -1e20, 3e38, -3e38, -1e300],
    "gate": [0.0, -1e4, 1e4, 1e20, -1e20],
    "phase": [0.0, 1.0, -3.0, 1e4, 1e20],
    "coupling": [0.0, 3.0, 1e4, -1e4, 88.0, 3e38],
    "forget": [0.0, -1e4, 1e4, -3.0],
    "initial_re": [0.0, 1.0, -2.0, 1e20, 3e38],
    "initial_im": [0.0, -1.0, 1e20, -3e38],
}


@pytest.mark.parametrize("coupling", [True, False])
@pytest.mark.parametrize("oscillators", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_moebius_state_stays_in_the_disc(dtype: torch.dtype, oscillators: int, coupling: bool, backend: str) -> None:
    args = drawn((8,), 20, 2, oscillators, coupling=coupling, initial=(8,))
    args = {k: picked(EXTREMES[k], tuple(v.shape), dtype) for k, v in args.items()}
    lag = {"phase_lag": math.pi} if coupling else {}
    marks = torch.rand(8, 20) < 0.2
    found = by_package({**args, **lag}, kind="moebius", heads=2, harmonics=8, reset=marks, return_states=True)
    ulp = torch.finfo(inside(dtype)).eps
    assert (radius(found, "states") <= 1 + 4 * ulp).all()
    assert (radius(found, "last") <= 1 + 4 * ulp).all()
    n = torch.arange(1, 9, dtype=torch.float64)
    assert (radius(found, "order") <= 1 + 8 * n * ulp + (torch.finfo(dtype).eps if dtype != inside(dtype) else 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_moebius_write_that_takes_the_state_back(dtype: torch.dtype, backend: str) -> None:
    """s = -w, exactly and nearly, up to the edge where numerator and denominator are both nearly zero."""
    sizes = [0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1.0]
    logits = [0.0, 2.0, 5.0, 10.0, 20.0, 1e4]
    lags = [math.pi + x for x in (0.0, 1e-7, -1e-7, 1e-3, 1e-14)]
    rows = list(itertools.product(sizes, logits, lags))
    angle = torch.rand(len(rows), dtype=torch.float64) * 2 * math.pi
    size = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    shape = (len(rows), 12, 1)
    args = {name: torch.zeros(shape, dtype=dtype) for name in WIDE}
    args["gate"] = torch.full(shape, -1e4, dtype=dtype)  # shut: the field alone is written, the whole state kept
    args["coupling"] = torch.tensor([r[1] for r in rows], dtype=dtype).reshape(-1, 1, 1).repeat(1, 12, 1)
    args["phase_lag"] = torch.tensor([r[2] for r in rows], dtype=torch.float64)[:, None].to(dtype)
    args["initial_re"], args["initial_im"] = ((size * f(angle)).to(dtype)[:, None] for f in (torch.cos, torch.sin))
    own = leaves(args)
    found = by_package(own, kind="moebius", heads=1, return_states=True)
    assert (radius(found, "states") <= 1 + 4 * torch.finfo(dtype).eps).all()
    # where |z| is what makes |w| equal to it, the state comes to rest at zero: |z|^2 = 1 - 1 / K^2
    strength = math.log1p(math.e)
    at = torch.tensor([math.sqrt(1 - 1 / strength**2)], dtype=dtype)
    one = {k: v[:1, :1] for k, v in args.items() if k in SEQUENCES} | {
        "phase_lag": torch.tensor([math.pi], dtype=dtype)
    }
    one["coupling"] = torch.ones(1, 1, 1, dtype=dtype)
    rest = by_package({**one, "initial_re": at, "initial_im": 0 * at}, kind="moebius", heads=1)
    assert float(radius(rest, "last").max()) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_moebius_step_with_neither_numerator_nor_denominator(dtype: torch.dtype, backend: str) -> None:
    """s = 1 and w = -1: a huge write through a gate that is as good as shut, against a state on the unit circle."""
    shape = (1, 3, 5)
    args = {name: torch.zeros(shape, dtype=dtype) for name in WIDE}
    args |= {"p": args["p"] - 1e35, "gate": args["gate"] - 60}
    state = {"initial_re": torch.ones(5, dtype=dtype), "initial_im": torch.zeros(5, dtype=dtype)}
    found = both(args | state, kind="moebius", heads=1, return_states=True)
    assert (radius(found, "states") <= 1 + 4 * torch.finfo(dtype).eps).all()


def test_chunks_of_states_on_the_unit_circle_have_the_bits_of_the_whole(backend: str) -> None:
    """Rounding leaves some of them just outside, and none may be moved when it comes back as an initial state."""
    args = drawn((64,), 6, 8, 128, forget=False, dtype=torch.float32)
    args |= {k: 1e4 * args[k] for k in ("p", "q")} | {"gate": args["gate"] - 6}
    whole = by_package(args, kind="moebius", heads=8)
    first, second = ({k: v[:, part] for k, v in args.items()} for part in (slice(0, 3), slice(3, 6)))
    middle = by_package(first, kind="moebius", heads=8)
    state = {f"initial_{k}": middle[f"last_{k}"] for k in ("re", "im")}
    assert (middle["last_re"].double() ** 2 + middle["last_im"].double() ** 2 > 1).any()
    again = by_package(second | state, kind="moebius", heads=8)
    assert all(torch.equal(again[k], whole[k]) for k in ("last_re", "last_im"))


def test_gradients_at_the_edge_of_the_disc_are_finite(backend: str) -> None:
    args = drawn((4,), 30, 2, 5, initial=(4,), dtype=torch.float32)
    args["p"], args["q"] = 1e4 * args["p"], 1e4 * args["q"]
    found = both(args, kind="moebius", heads=2)
    assert all(v.isfinite().all() for v in found.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_stuart_landau_order_parameters_are_at_most_one(dtype: torch.dtype, tied: bool, backend: str) -> None:
    """In full synchrony too: all oscillators have the same state, and rounding must not add up."""
    args = drawn((3,), 12, 2, 7, forget=not tied, initial=(3,))
    args["phase"] = args["phase"][..., :1].expand_as(args["phase"])
    for name in ("p", "q", "initial_re", "initial_im"):
        shape = tuple(args[name].shape)
        args[name] = picked([0.0, 1.0, 1e20, -1e20], (*shape[:-1], 1), torch.float64).expand(shape)
    args = {k: v.to(dtype) for k, v in args.items()}
    found = by_package(args, heads=2, harmonics=8, tied_leak=tied, return_states=True)
    n = torch.arange(1, 9, dtype=torch.float64)
    stored = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    size = radius(found, "order")
    assert (size <= 1 + 4 * n * torch.finfo(inside(dtype)).eps + stored).all()
    assert float(size.max()) > 0.9


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_very_long_sequence_stays_finite(dtype: torch.dtype, kind: str, backend: str) -> None:
    steps = 100_000 if backend == "cpu" else 1_000
    found = both(drawn((), steps, 1, 4, initial=(), dtype=dtype), kind=kind, heads=1, harmonics=2, save=256)
    assert all(v.isfinite().all() for v in found.values())
    assert found["order_re"].shape == (steps, 1, 2)


@kinds
def test_what_a_nearly_open_gate_leaves_of_a_state_is_right_in_float32(kind: str, backend: str) -> None:
    """1 - g and 1 - (1 - 1e-6) g^2 keep their digits where g rounds to one."""
    gate = torch.linspace(4, 20, 33)[None]
    zero = torch.zeros_like(gate)
    state = {"initial_re": torch.full((33,), 0.5), "initial_im": torch.zeros(33)}
    args = {"p": zero, "q": zero, "gate": gate, "phase": zero}
    g = torch.sigmoid(gate.double())
    want = 0.5 * (torch.sigmoid(-gate.double()) if kind == "moebius" else torch.sqrt(1 - (1 - 1e-6) * g * g))
    got = by_package(args | state, kind=kind, heads=1)["last_re"]
    torch.testing.assert_close(got.double(), want[0], rtol=1e-5, atol=0)


# ---- symmetries ----


def turned(args: Args, angle: float) -> Args:
    c, s = math.cos(angle), math.sin(angle)
    found = dict(args)
    for re, im in (("p", "q"), ("initial_re", "initial_im")):
        found[re], found[im] = args[re] * c - args[im] * s, args[re] * s + args[im] * c
    return found


@kinds
@pytest.mark.parametrize("oscillators", [1, 7, 8])
def test_a_rotation_of_writes_and_states_rotates_all(oscillators: int, kind: str, backend: str) -> None:
    args = drawn((2,), 20, 2, oscillators, phase_lag=(2,), initial=(2,))
    options: dict[str, Any] = {"kind": kind, "heads": 2, "harmonics": 5, "return_states": True}
    angle = 0.7
    here, there = by_package(args, **options), by_package(turned(args, angle), **options)
    n = torch.arange(1, 6, dtype=torch.float64)
    for name, by in (("order", n * angle), ("states", n[:1] * angle)):
        want = torch.complex(here[f"{name}_re"], here[f"{name}_im"]) * torch.polar(torch.ones_like(by), by)
        got = torch.complex(there[f"{name}_re"], there[f"{name}_im"])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@kinds
@pytest.mark.parametrize("oscillators", [5, 16, 33])
def test_the_order_of_a_head_s_oscillators_does_not_matter(oscillators: int, kind: str, backend: str) -> None:
    args = drawn((2,), 12, 2, oscillators, initial=(2,))
    own = torch.randperm(oscillators)
    order = torch.cat([own, oscillators + own])
    moved = {k: v if k in ("coupling", "forget") else v[..., order] for k, v in args.items()}
    options: dict[str, Any] = {"kind": kind, "heads": 2, "harmonics": 5, "return_states": True}
    here, there = by_package(args, **options), by_package(moved, **options)
    for k, v in here.items():
        torch.testing.assert_close(there[k], v if k.startswith("order") else v[..., order], rtol=1e-12, atol=1e-13)


@kinds
def test_a_mirror_image_of_all_is_the_mirror_image(kind: str, backend: str) -> None:
    """Complex conjugates of writes, states, phases and lags: conjugate results, to the bit."""
    args = drawn((2,), 12, 2, 5, phase_lag=(2,), initial=(2,), dtype=torch.float32)
    mirrored = args | {k: -args[k] for k in ("q", "phase", "phase_lag", "initial_im")}
    here, there = by_package(args, kind=kind, heads=2), by_package(mirrored, kind=kind, heads=2)
    for k, v in here.items():
        assert torch.equal(there[k], -v if k.endswith("im") else v), k


def test_a_constant_moebius_write_is_a_hyperbolic_motion(backend: str) -> None:
    """|z(T)| = tanh(T artanh |w|), and artanh |w| = arsinh |a|."""
    steps, force = 40, 0.05
    shape = (1, steps, 1)
    gate = torch.full(shape, -30.0, dtype=torch.float64)
    write = force / torch.sigmoid(gate)
    zero = torch.zeros_like(gate)
    args = {"p": 0.6 * write, "q": 0.8 * write, "gate": gate, "phase": zero}
    found = by_package(args, kind="moebius", heads=1, return_states=True)
    want = torch.tanh(torch.arange(1, steps + 1, dtype=torch.float64) * math.asinh(force))
    torch.testing.assert_close(found["states_re"][0, :, 0], 0.6 * want, rtol=0, atol=1e-11)
    torch.testing.assert_close(found["states_im"][0, :, 0], 0.8 * want, rtol=0, atol=1e-11)


# ---- memory ----


@kinds
@pytest.mark.parametrize("phase", [0.0, 0.7])
def test_a_state_is_kept_through_ten_thousand_silent_steps(phase: float, kind: str, backend: str) -> None:
    """Gates shut: to the bit without rotation; with it, cos and sin of a step are off by half an ulp each time."""
    steps = 10_000
    shape = (steps, 3)
    silent = torch.zeros(shape)
    args = {"p": silent, "q": silent, "gate": torch.full(shape, -30.0), "phase": torch.full(shape, phase)}
    start = torch.tensor([0.5, -0.3, 0.0]), torch.tensor([0.1, 0.6, -0.8])
    found = by_package({**args, "initial_re": start[0], "initial_im": start[1]}, kind=kind, heads=1, harmonics=0)
    got = torch.complex(found["last_re"].double(), found["last_im"].double())
    total = torch.tensor(phase).double() * steps
    want = torch.complex(start[0].double(), start[1].double()) * torch.polar(torch.ones_like(total), total)
    if phase:
        assert float(((got - want).abs() / want.abs()).max()) < 1e-3
    else:
        assert torch.equal(got, want)


# ---- where a NaN goes ----


def differing(fine: Result, spoiled: Result, shared: tuple[str, ...]) -> dict[str, Tensor]:
    """Where results have other bits, by name; those that all sequences share left out."""
    return {k: (spoiled[k] != v) | spoiled[k].isnan() for k, v in fine.items() if k not in shared}


@kinds
@pytest.mark.parametrize("name", [*SEQUENCES, "initial_re"])
@pytest.mark.parametrize("oscillators", [1, 5, 8])
def test_a_nan_stays_in_its_sequence(oscillators: int, name: str, kind: str, backend: str) -> None:
    args = drawn((3,), 6, 2, oscillators, initial=(3,), dtype=torch.float32)
    spoiled = {k: v.clone() for k, v in args.items()}
    spoiled[name].select(0, 1).flatten()[0] = math.nan  # of the first step and head
    results = [both(a, kind=kind, heads=2, return_states=True) for a in (args, spoiled)]
    assert results[1]["order_re"][1, -1, 0].isnan().all()
    assert results[1]["last_im"][1, 0].isnan()
    for k, v in differing(results[0], results[1], ()).items():
        assert not v[[0, 2]].any(), k


@kinds
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("save", ["all", 2])
def test_a_nan_stays_in_its_document(save: Any, name: str, kind: str, backend: str) -> None:
    args = drawn((1,), 12, 2, 5, initial=(), dtype=torch.float32)
    spoiled = {k: v.clone() for k, v in args.items()}
    spoiled[name][0, 5] = math.nan  # the second of three documents has steps 4 to 8
    where = torch.tensor([0, 4, 9, 12])
    results = [both(a, kind=kind, heads=2, save=save, cu_seqlens=where) for a in (args, spoiled)]
    assert results[1]["order_re"][0, 5:9].isnan().all()
    shared = ("d initial_re", "d initial_im", "last_re", "last_im")
    assert torch.equal(results[0]["last_re"], results[1]["last_re"])
    for k, v in differing(results[0], results[1], shared).items():
        assert not v[:, [0, 1, 2, 3, 9, 10, 11]].any(), k


@kinds
@pytest.mark.parametrize("name", [*SEQUENCES, "initial_im", "phase_lag"])
@pytest.mark.parametrize("oscillators", [3, 4])
def test_a_nan_stays_in_its_head(oscillators: int, name: str, kind: str, backend: str) -> None:
    args = drawn((2,), 6, 3, oscillators, phase_lag=(3,), initial=(2,), dtype=torch.float32)
    spoiled = {k: v.clone() for k, v in args.items()}
    width = 1 if name in ("coupling", "forget", "phase_lag") else oscillators
    spoiled[name][..., width : 2 * width] = math.nan  # the second of three heads
    results = [both(a, kind=kind, heads=3) for a in (args, spoiled)]
    assert results[1]["order_re"][:, :, 1].isnan().all()
    for k, v in differing(results[0], results[1], ()).items():
        by_heads = v.any(-1) if k.startswith("order") else v.unflatten(-1, (3, -1)).any(-1)
        assert not by_heads[..., [0, 2]].any(), k

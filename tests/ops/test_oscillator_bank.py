"""The recurrent bank: its equation in complex arithmetic, its state, its initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kssm_kernels import OscillatorBank
from tests.support import naive

OP = "oscillator_scan"

OPTIONS: list[dict[str, Any]] = [
    {"kind": kind, "readout": readout, "coupling": coupling, "forget": forget, "initial": initial, "harmonics": 3}
    for kind in ("moebius", "stuart_landau")
    for readout in ("heads", "communities")
    for coupling, forget, initial in ((True, True, "learned"), (False, True, "zero"), (True, False, "zero"))
] + [{"coupling": False, "forget": False}]
OPTIONS += [
    {"kind": kind, "readout": readout, "coupling": coupling, "forget": forget, "feedback": 4, "listen": listen}
    for kind, readout, coupling, forget, listen in (
        ("moebius", "communities", False, True, True),
        ("moebius", "heads", True, True, False),
        ("stuart_landau", "communities", True, False, True),
        ("stuart_landau", "heads", False, False, True),
    )
]


def name(options: dict[str, Any]) -> str:
    return "-".join(str(v) for v in options.values())


def bank_of(**options: Any) -> OscillatorBank:
    torch.manual_seed(0)
    return OscillatorBank(7, 12, 3, communities=5, out_dim=4, **options).double()


def by_equation(bank: OscillatorBank, x: Tensor) -> Tensor:
    rows = nn.functional.linear(x, bank.projection.weight, bank.projection.bias)
    p, q, gate, phase = (rows[..., 12 * i : 12 * (i + 1)] for i in range(4))
    rest = rows[..., 48:]
    coupling, rest = (rest[..., :3], rest[..., 3:]) if bank.coupling else (None, rest)
    forget, rest = (rest[..., :3], rest[..., 3:]) if bank.forget else (None, rest)
    loop = None
    if bank.loop_community is not None and bank.loop_weight is not None:
        loop = bank.loop_community, bank.loop_weight, rest if bank.listen else None
    start = None
    if bank.initial_phase is not None:
        start = 0.5 * bank.initial_phase.cos(), 0.5 * bank.initial_phase.sin()
    lag = 0.0 if bank.phase_lag is None else bank.phase_lag
    order, states = naive.oscillator_scan(
        *(p, q, gate, phase, coupling, forget),
        kind=bank.kind,
        heads=3,
        harmonics=bank.harmonics,
        phase_lag=lag,
        initial_state=start,
        feedback=loop,
    )
    if bank.community is not None:
        v = naive.seen_state(bank.kind, states)
        order = torch.stack([(v**n) @ bank.community.t().to(v.dtype) for n in range(1, bank.harmonics + 1)], -1)
    return bank.out(torch.cat([order.real.flatten(-2), order.imag.flatten(-2)], -1))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_output_and_gradients_by_the_equation(options: dict[str, Any], backend: str) -> None:
    bank = bank_of(**options)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, *bank.parameters()]
    got, want = bank(x)[0], by_equation(bank, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad(out, leaves, weight) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_steps_give_what_the_sequence_gives(options: dict[str, Any], backend: str) -> None:
    bank, x, state = bank_of(**options), torch.randn(2, 9, 7, dtype=torch.float64), None
    whole, last = bank(x)
    outs = []
    for t in range(9):
        out, state = bank.step(x[:, t], state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), whole, rtol=1e-12, atol=1e-13)
    assert state is not None
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"readout": "communities", "feedback": 4}], ids=["open", "closed"])
def test_packed_documents_are_separate(options: dict[str, Any], backend: str) -> None:
    bank, x = bank_of(initial="learned", **options), torch.randn(1, 9, 7, dtype=torch.float64)
    packed, _ = bank(x, cu_seqlens=torch.tensor([0, 4, 9]))
    alone = torch.cat([bank(x[:, :4])[0], bank(x[:, 4:])[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-13)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 4] = True
    assert torch.equal(bank(x, reset=reset)[0], packed)


def test_order_parameters_are_the_only_way_through(backend: str) -> None:
    bank = bank_of()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    re, im, _ = bank.order_parameters(x)
    assert (re.shape, im.shape) == ((2, 5, 3, 2), (2, 5, 3, 2))
    assert (re.square() + im.square()).max() <= 1
    zero = torch.zeros_like(torch.cat([re.flatten(-2), im.flatten(-2)], -1))
    assert bank.out(zero).eq(0).all()


@pytest.mark.parametrize("readout", ["heads", "communities"])
def test_coherence_is_one_where_all_oscillators_agree(readout: Any, backend: str) -> None:
    bank = bank_of(readout=readout)
    re, im, _ = bank.order_parameters(10 * torch.randn(3, 50, 7, dtype=torch.float64))
    assert bank.read(re, im).shape == (3, 50, 4)
    r = bank.coherence(re, im)
    assert r.shape == (3, 50, 5 if readout == "communities" else 3)
    assert 0 <= r.min() <= r.max() <= 1
    if bank.community is not None:  # at one phase, those that count negatively at the opposite one
        v = torch.polar(torch.ones(5, 12).double(), torch.full((5, 12), 0.7).double()) * bank.community.sign()
        z = (v * bank.community).sum(-1)[:, None]
        torch.testing.assert_close(bank.coherence(z.real, z.imag), torch.ones(5).double())


def test_an_open_loop_has_nothing_of_a_closed_one() -> None:
    bank, closed = bank_of(), bank_of(feedback=4)
    added = closed.state_dict().keys() - bank.state_dict().keys()
    assert added == {"loop_community", "loop_weight"}
    assert not bank.listen
    assert closed.projection.weight.shape[0] == bank.projection.weight.shape[0] + 4
    assert bank_of(feedback=4, listen=False).projection.weight.shape == bank.projection.weight.shape


def test_the_loop_reaches_the_next_step_and_no_earlier_one(backend: str) -> None:
    bank, x = bank_of(feedback=4), torch.randn(2, 6, 7, dtype=torch.float64)
    assert bank.loop_weight is not None
    before = bank(x)[0]
    with torch.no_grad():
        bank.loop_weight.mul_(2)
    after = bank(x)[0]
    torch.testing.assert_close(after[:, 0], before[:, 0])  # its state was zero
    assert ((after - before)[:, 1:].abs().amax(-1) > 1e-6).all()


def test_from_the_meta_device_every_parameter_is_set_again() -> None:
    with torch.device("meta"):
        bank = OscillatorBank(64, 512, 64, initial="learned", readout="communities", layers=4, feedback=32)
    bank = bank.to_empty(device="cpu")
    for p in bank.parameters():
        p.data.fill_(math.nan)
    torch.manual_seed(1)
    bank.reset_parameters()
    assert all(p.isfinite().all() for p in bank.parameters())
    gate, turn = bank.projection.bias[1024:1536], bank.projection.bias[1536:2048]
    assert -4 <= gate.min() < -3.5
    assert 0.5 < gate.max() <= 1
    assert 1e-3 <= turn.abs().min() < 1e-2
    assert 0.5 < turn.abs().max() <= 1
    assert 0.3 < (turn > 0).float().mean() < 0.7
    assert abs(float(bank.projection.weight.detach()[:512].std()) * 8 - 1) < 0.05
    assert bank.projection.bias[2048:2176].eq(-2).all()
    assert bank.projection.bias[2176:].eq(1).all()
    assert bank.loop_community is not None
    assert bank.loop_weight is not None
    for part, std in (
        (bank.projection.weight[2176:], 0.5 / 8),
        (bank.loop_community, 512**-0.5),
        (bank.loop_weight[:1536], 0.5 / 8),
        (bank.loop_weight[1536:2048], 0.15 / 8),
        (bank.loop_weight[2048:], 0.5 / 8),
    ):
        assert abs(float(part.detach().std()) / std - 1) < 0.05
    again = OscillatorBank(64, 512, 64, initial="learned", readout="communities", layers=4, feedback=32)
    assert again.load_state_dict(bank.state_dict()).missing_keys == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide oscillators = 12, got 5"),
        ({"kind": "kuramoto"}, "kind must be 'stuart_landau' or 'moebius', got 'kuramoto'"),
        ({"readout": "all"}, "readout must be 'heads' or 'communities', got 'all'"),
        ({"initial": "one"}, "initial must be 'zero' or 'learned', got 'one'"),
        ({"feedback": -1}, "feedback must be an int of at least 0, got -1"),
        ({"feedback": True}, "feedback must be an int of at least 0, got True"),
        ({"harmonics": 0}, "harmonics must be an int of at least 1, got 0"),
    ],
)
def test_bad_sizes_and_modes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillatorBank(**{"dim": 7, "oscillators": 12, "heads": 3, **options})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"input must have shape \[..., 7\], got \(2, 5, 6\)"):
        bank_of()(torch.zeros(2, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("feedback", [0, 4])
@pytest.mark.parametrize("readout", ["heads", "communities"])
def test_trains_under_autocast(readout: Any, feedback: int, backend: str) -> None:
    torch.manual_seed(0)
    bank = OscillatorBank(7, 12, 3, readout=readout, initial="learned", feedback=feedback)
    x = torch.randn(2, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = bank(x)
        loss = out.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())
    assert (out.float() - bank(x)[0]).abs().max() < 0.1 * bank(x)[0].abs().max()  # linear layers in 8 bits

"""K-SSM v4: order parameters as the only path, causality, the state, sizes and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kssm import KSSMv4, LanguageModel
from kssm.models.v4 import V4Config
from kssm.options import UsageError
from kssm.train.config import PRESETS, ModelConfig, TrainConfig, check
from torch import Tensor
from torch.nn import functional

VOCABULARY = 11
OPTIONS: list[dict[str, Any]] = [
    {"kind": kind, "readout": readout, "feedback": feedback, "mlp": mlp}
    for kind in ("moebius", "stuart_landau")
    for readout in ("heads", "communities")
    for feedback, mlp in ((0, 0), (4, 0), (4, 6))
] + [{"coupling": True, "forget": False, "listen": False}, {"n_layers": 1, "mlp": 6}]


def name(options: dict[str, Any]) -> str:
    return "-".join(str(v) for v in options.values())


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model_of(**options: Any) -> KSSMv4:
    torch.manual_seed(0)
    given = {"dim": 10, "n_layers": 2, "n_oscillators": 12, "heads": 3, "communities": 5, "feedback": 4, **options}
    model = KSSMv4(VOCABULARY, **given).double()
    with torch.no_grad():
        model.output_head.weight.mul_(10)  # logits that differ by more than rounding
    return model


def some_tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def scaled(monkeypatch: pytest.MonkeyPatch, model: KSSMv4, block: int, factor: float | Tensor) -> Tensor:
    """Logits with the order parameters of a block multiplied by a factor, ``[groups, H]`` or a number."""
    bank = model.blocks[block].oscillators
    original = bank.order_parameters

    def changed(*args: Any, **options: Any) -> Any:
        re, im, last = original(*args, **options)
        return factor * re, factor * im, last

    with monkeypatch.context() as patch:
        patch.setattr(bank, "order_parameters", changed)
        logits: Tensor = model(some_tokens())
    return logits


@every_option
def test_without_order_parameters_all_logits_are_zero(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(**options)
    with torch.no_grad():  # whatever was learned
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert model(some_tokens()).std() > 1e-3
    assert scaled(monkeypatch, model, -1, 0.0).eq(0).all()


@every_option
def test_r_moves_the_logits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(**options)
    before = model(some_tokens())
    one = torch.ones(model.blocks[-1].oscillators.out.in_features // 4, 2).double()
    one[0] = 0.5  # the coherence of one head or community
    assert (scaled(monkeypatch, model, -1, one) - before).abs().max() > 1e-4
    if len(model.blocks) > 1:
        assert (scaled(monkeypatch, model, 0, 0.5) - before).abs().max() > 1e-4


def test_the_final_norm_takes_out_a_common_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with torch.no_grad():
        model.blocks[-1].oscillators.out.weight.mul_(100)  # far above the norm's eps
    torch.testing.assert_close(scaled(monkeypatch, model, -1, 0.5), model(some_tokens()), rtol=1e-3, atol=1e-4)


@every_option
def test_a_token_moves_itself_and_what_follows(options: dict[str, Any]) -> None:
    model, tokens = model_of(**options), some_tokens()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after)[:, 3:].abs().amax(-1) > 1e-9).all()


@every_option
def test_pieces_give_what_the_whole_gives(options: dict[str, Any]) -> None:
    model, tokens = model_of(**options), some_tokens()
    whole, state = model.advance(tokens)
    torch.testing.assert_close(model(tokens), whole, rtol=0, atol=0)
    parts, kept = [], None
    for piece in tokens.split([3, 1, 1, 2], dim=1):
        logits, kept = model.advance(piece, kept)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)
    assert kept is not None
    assert [s.shape for s in kept] == [(3, 12)] * 2 * len(model.blocks)
    for a, b in zip(kept, state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_option
def test_generation_by_state_is_generation_by_windows(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(**options), some_tokens(2, 3)
    by_state = model.generate(prompt, 12, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(KSSMv4, "_last_logits", LanguageModel._last_logits)
    by_windows = model.generate(prompt, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(by_state, by_windows)


@every_option
def test_gradient_reaches_every_parameter_and_r_is_in_its_bounds(options: dict[str, Any]) -> None:
    model = model_of(**options)
    assert model.last_r is None
    functional.cross_entropy(model(some_tokens()).flatten(0, 1), some_tokens().flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.last_r is not None
    assert model.last_r.shape == (len(model.blocks),)
    assert not model.last_r.requires_grad
    assert 0 < model.last_r.min() <= model.last_r.max() <= 1


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = KSSMv4(65, n_oscillators=64, heads=8, communities=16, feedback=16)
    tokens = torch.randint(65, (4, 20))
    loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - math.log(65)) < 0.1


@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [("v4-100k", 65, 103_992), ("v4-1m", 65, 811_872), ("v4-90m", 65, 89_504_640), ("v4-90m", 32_000, 138_556_800)],
)
def test_sizes_of_the_presets(preset: str, vocabulary: int, parameters: int) -> None:
    config = PRESETS[preset]
    check(config)
    assert config.model.architecture().parameters(vocabulary, config.context) == parameters


def test_defaults_are_those_of_v4_1m() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in KSSMv4(65).parameters()) == 811_872


@pytest.mark.parametrize("options", [{}, {"feedback": 0, "readout": "heads", "mlp": 6, "coupling": True}], ids=name)
def test_reset_parameters_after_meta_initialisation(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"dim": 32, "n_oscillators": 64, "heads": 8, **options}
    with torch.device("meta"):
        model = KSSMv4(50, **sizes)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, 1e30)
    torch.manual_seed(0)
    model.reset_parameters()
    torch.manual_seed(0)
    for (parameter, got), want in zip(model.named_parameters(), KSSMv4(50, **sizes).parameters(), strict=True):
        assert got.abs().max() < 6, parameter
        assert got.numel() < 20 or (got.std() - want.std()).abs() <= 0.3 * want.std() + 1e-6, parameter


def test_a_forward_pass_keeps_at_least_what_its_configuration_says() -> None:
    architecture = ModelConfig(arch="v4", dim=64, oscillators=128, heads=16, mlp=32, harmonics=2).architecture()
    assert isinstance(architecture, V4Config)
    model, kept = architecture.build(11, 16), {}

    def keep(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(some_tokens(2, 16))
    assert sum(kept.values()) >= 4 * 2 * 16 * architecture.activations()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 0}, "dim must be an int of at least 1, got 0"),
        ({"mlp": -1}, "mlp must be an int of at least 1, got -1"),
        ({"heads": 5}, "heads must divide oscillators = 12, got 5"),
        ({"feedback": -1}, "feedback must be an int of at least 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**sizes)


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, message in (
        ({"heads": 5}, "^--oscillators must be a multiple of the --heads 5, got 256$"),
        ({"harmonics": 33}, "^--harmonics must be at most 32 with --arch v4, got 33$"),
        ({"oscillators": 8200}, "^--oscillators must be at most 8192 with --heads 8, got 8200$"),
    ):
        with pytest.raises(UsageError, match=message):
            check(TrainConfig(model=ModelConfig(arch="v4", **options)))

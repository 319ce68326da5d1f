"""The baselines: what reaches what, the state, the equations of their parts, and sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from kssm import GPT, GRU, LSTM, KSSMv3, LanguageModel, RecurrentLM, SelectiveSSM
from kssm.models import ARCHITECTURES
from kssm.models.base import State
from kssm.models.baselines.gpt import rotary, rotate
from kssm.models.baselines.selective import selective_scan
from kssm.options import UsageError
from kssm.train.config import ModelConfig, OptimizerConfig, TrainConfig, check
from torch import nn
from torch.nn import functional

VOCABULARY = 11
SMALL: dict[str, Callable[[], RecurrentLM]] = {
    "gpt": lambda: GPT(VOCABULARY, dim=16, n_layers=2, heads=4),
    "gru": lambda: GRU(VOCABULARY, dim=12, n_layers=2),
    "lstm": lambda: LSTM(VOCABULARY, dim=12, n_layers=2),
    "mamba": lambda: SelectiveSSM(VOCABULARY, dim=20, n_layers=2),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these tensors are too small to share, and waiting threads slow whatever else runs


@pytest.fixture(params=list(SMALL))
def arch(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture
def model(arch: str) -> RecurrentLM:
    return SMALL[arch]()


def louder(model: RecurrentLM) -> RecurrentLM:
    """In float64, with weights so large that what should reach a logit is far above the tolerances."""
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and name.rpartition(".")[2] not in model.undecayed:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def some_tokens(batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_and_no_r(model: RecurrentLM) -> None:
    logits = model(some_tokens())
    assert logits.shape == (3, 12, VOCABULARY)
    assert logits.isfinite().all()
    assert model.last_r is None
    assert model.regularization_loss() == 0


def test_first_loss_is_that_of_a_uniform_guess(model: RecurrentLM) -> None:
    loss = functional.cross_entropy(model(some_tokens()).flatten(0, 1), some_tokens().flatten())
    assert abs(loss.item() - torch.tensor(float(VOCABULARY)).log().item()) < 0.5


def test_a_token_reaches_all_that_follow_and_nothing_before(model: RecurrentLM) -> None:
    model, tokens, at = louder(model), some_tokens(), 5
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % VOCABULARY
    difference = (model(changed) - model(tokens)).abs().amax(dim=-1)
    assert difference[:, :at].max() < 1e-12
    assert difference[:, at:].min() > 1e-6


@pytest.mark.parametrize("parts", [[1] * 12, [5, 7], [2, 1, 3, 6], [11, 1]], ids=str)
def test_pieces_equal_the_whole(model: RecurrentLM, parts: list[int]) -> None:
    model, tokens = louder(model), some_tokens()
    whole, last = model.advance(tokens)
    assert torch.equal(model(tokens), whole)
    state: State | None = None
    pieces = []
    for part in tokens.split(parts, dim=1):
        logits, state = model.advance(part, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    assert state is not None
    for got, want in zip(state, last, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_call_leaves_its_state_as_it_was(model: RecurrentLM) -> None:
    """Two continuations of one text, as a search would try them."""
    _, state = model.advance(some_tokens())
    before = [part.clone() for part in state]
    first, _ = model.advance(some_tokens(length=3), state)
    again, _ = model.advance(some_tokens(length=3), state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_gradients_cross_the_state(model: RecurrentLM) -> None:
    model, tokens = louder(model), some_tokens()

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    _, state = model.advance(tokens[:, :7])
    pieces, whole = gradients(model.advance(tokens[:, 7:], state)[0]), gradients(model(tokens)[:, 7:])
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradient_reaches_every_parameter(model: RecurrentLM) -> None:
    model(some_tokens()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


class TestGenerate:
    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}], ids=str)
    def test_by_state_equals_by_windows(self, model: RecurrentLM, options: dict[str, float]) -> None:
        model = louder(model)
        by_state, by_windows = (
            generate(model, some_tokens(2, 4), 20, generator=torch.Generator().manual_seed(3), **options)
            for generate in (LanguageModel.generate, generate_by_windows)
        )
        assert torch.equal(by_state, by_windows)
        assert len(by_state.unique()) > 1

    @pytest.mark.parametrize("prompt", [1, 7, 8, 12])
    def test_past_the_positions_gpt_sees_the_last_ones(self, prompt: int) -> None:
        torch.manual_seed(0)
        model = louder(GPT(VOCABULARY, 16, 2, 4, max_positions=8))
        by_state, by_windows = (
            generate(model, some_tokens(2, prompt), 15, generator=torch.Generator().manual_seed(3))
            for generate in (LanguageModel.generate, generate_by_windows)
        )
        assert torch.equal(by_state, by_windows)

    def test_reads_each_token_once(self, model: RecurrentLM, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths = []
        advance = model.advance

        def counted(tokens: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
            lengths.append(tokens.shape[1])
            return advance(tokens, state)

        monkeypatch.setattr(model, "advance", counted)
        assert model.generate(some_tokens(2, 5), 6).shape == (2, 11)
        assert lengths == [5, 1, 1, 1, 1, 1]


def generate_by_windows(model: RecurrentLM, *args: object, **options: object) -> torch.Tensor:
    """The same, with every token's logits from a pass over all before it that the model can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "_last_logits", LanguageModel._last_logits)
        return model.generate(*args, **options)  # type: ignore[arg-type]


def test_errors_name_what_was_wanted(model: RecurrentLM) -> None:
    with pytest.raises(TypeError, match=r"tokens must be int64, got torch\.int32"):
        model(some_tokens().int())
    with pytest.raises(ValueError, match=r"shape \[B, T\], got \(12,\)"):
        model.advance(some_tokens()[0])
    with pytest.raises(ValueError, match=r"T >= 1, got \(3, 0\)"):
        model(some_tokens(length=0))


def test_gpt_counts_the_positions_of_its_state() -> None:
    model = GPT(VOCABULARY, 16, 1, 2, max_positions=8)
    with pytest.raises(ValueError, match="at most 8 positions, got a sequence of 9"):
        model(some_tokens(length=9))
    _, state = model.advance(some_tokens(length=6))
    with pytest.raises(ValueError, match="at most 8 positions, got 9 with those before"):
        model.advance(some_tokens(length=3), state)


@pytest.mark.parametrize("size", ["vocab_size", "dim", "n_layers", "heads"])
@pytest.mark.parametrize("kind", [GPT, GRU, LSTM, SelectiveSSM])
def test_impossible_sizes_are_refused(kind: Callable[..., RecurrentLM], size: str) -> None:
    if size != "heads" or kind is GPT:
        with pytest.raises(ValueError, match=f"{size} must be an int of at least 1, got 0"):
            kind(**{"vocab_size": 5, "dim": 8, "n_layers": 1, size: 0})


def test_heads_must_divide_the_width_into_pairs() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of twice the 4 heads, got 12"):
        GPT(VOCABULARY, dim=12, heads=4)
    check(TrainConfig(model=ModelConfig(arch="gpt", dim=16)))
    check(TrainConfig(model=ModelConfig(arch="gru", dim=12)))
    with pytest.raises(UsageError, match=r"^--dim must be a multiple of twice the --heads 8, got 12$"):
        check(TrainConfig(model=ModelConfig(arch="gpt", dim=12)))
    with pytest.raises(UsageError, match=r"^--heads must be at least 1, got 0$"):
        check(TrainConfig(model=ModelConfig(arch="gpt", heads=0)))


@pytest.mark.parametrize(
    ("arch", "dim", "layers", "parameters"),
    [("gpt", 128, 4, 808_320), ("gru", 272, 2, 926_497), ("lstm", 224, 2, 835_585), ("mamba", 128, 7, 833_024)],
)
def test_sizes(arch: str, dim: int, layers: int, parameters: int) -> None:
    architecture = ModelConfig(arch=arch, dim=dim, layers=layers).architecture()
    assert architecture.parameters(65, 64) == parameters


def test_a_forward_pass_keeps_at_least_what_its_configuration_says(arch: str) -> None:
    architecture = ModelConfig(arch=arch, dim=64, layers=3).architecture()
    model, tokens = architecture.build(VOCABULARY, 32), some_tokens(4, 32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(tokens)
    assert logits.requires_grad
    assert sum(kept.values()) >= architecture.activations() * tokens.numel()


def test_reset_parameters_after_meta_initialisation(arch: str) -> None:
    with torch.device("meta"):
        model = SMALL[arch]()
    assert not list(model.buffers())
    model = model.to_empty(device="cpu")
    for by_children in (False, True):
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1e30)
        if by_children:  # parents first, as torch's own tools call them
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        else:
            model.reset_parameters()
        like = SMALL[arch]()
        for (name, got), want in zip(model.named_parameters(), like.parameters(), strict=True):
            assert got.abs().max() < 10, name
            if got.numel() >= 20:  # a draw of fewer says little
                assert (got.mean() - want.mean()).abs() <= 0.5 * want.std() + 1e-6, name
                assert (got.std() - want.std()).abs() <= 0.5 * want.std() + 1e-6, name


class TestGPT:
    def test_rotated_products_depend_on_distances_alone(self) -> None:
        torch.manual_seed(0)
        q, k = torch.randn(2, 1, 8, dtype=torch.float64)

        def product(at_q: int, at_k: int) -> torch.Tensor:
            turned = (rotate(x, rotary(at, at + 1, 8, x)) for x, at in ((q, at_q), (k, at_k)))
            return torch.linalg.vecdot(*turned)

        for start in (1, 7, 900):
            torch.testing.assert_close(product(start + 5, start), product(5, 0), rtol=0, atol=1e-12)
        assert (product(5, 0) - product(4, 0)).abs() > 1e-3
        torch.testing.assert_close(product(0, 0), torch.linalg.vecdot(q, k))

    def test_rotation_equals_a_product_of_complex_numbers(self) -> None:
        x = torch.randn(5, 8, dtype=torch.float64)
        turned = torch.complex(x[:, :4], x[:, 4:])
        for t in range(5):
            for i in range(4):
                angle = torch.tensor((3 + t) * 10000.0 ** (-2 * i / 8), dtype=torch.float64)
                turned[t, i] *= torch.polar(torch.ones_like(angle), angle)
        want = torch.cat([turned.real, turned.imag], dim=1)
        torch.testing.assert_close(rotate(x, rotary(3, 8, 8, x)), want, rtol=0, atol=1e-12)

    def test_angles_of_bfloat16_are_as_good_as_its_numbers(self) -> None:
        rough, fine = (rotary(1000, 1001, 8, torch.empty(0, dtype=t))[0] for t in (torch.bfloat16, torch.float64))
        torch.testing.assert_close(rough.double(), fine, rtol=0, atol=2**-8)

    def test_what_adds_to_the_residual_starts_smaller(self) -> None:
        block = GPT(VOCABULARY, dim=128, n_layers=8).blocks[3]
        starts = (block.attention_out, 128**-0.5 / 4), (block.mlp_out, 344**-0.5 / 4), (block.qkv, 128**-0.5)
        for layer, std in starts:
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert block.mlp_out.in_features == 344


class TestGated:
    def test_starts_orthogonal_with_an_open_forget_gate(self) -> None:
        for model, gates in ((GRU(VOCABULARY, 12), 3), (LSTM(VOCABULARY, 12), 4)):
            for gate in model.rnn.weight_hh_l1.detach().chunk(gates):
                torch.testing.assert_close(gate @ gate.T, torch.eye(12), rtol=0, atol=1e-5)
            forget = (model.rnn.bias_ih_l1 + model.rnn.bias_hh_l1).detach().chunk(gates)[1]
            assert torch.equal(forget, torch.full((12,), float(gates == 4)))

    @pytest.mark.parametrize("kind", [GRU, LSTM])
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.filterwarnings("error")
    def test_dropout_acts_in_training_alone(self, kind: Callable[..., RecurrentLM], layers: int) -> None:
        model = kind(VOCABULARY, dim=12, n_layers=layers, dropout=0.5)
        assert not torch.equal(model(some_tokens()), model(some_tokens()))
        model.eval()
        assert torch.equal(model(some_tokens()), model(some_tokens()))


class TestSelectiveSSM:
    def test_scan_equals_its_equation(self) -> None:
        torch.manual_seed(0)
        batch, length, channels, states = 2, 9, 5, 3
        u, delta = torch.randn(2, batch, length, channels, dtype=torch.float64)
        b, c = torch.randn(2, batch, length, states, dtype=torch.float64)
        a, start = -torch.rand(channels, states).double(), torch.randn(batch, channels, states, dtype=torch.float64)
        delta = functional.softplus(delta)
        y, last = selective_scan(u, delta, a, b, c, start)
        for i in range(batch):
            for e in range(channels):
                s = [start[i, e, n] for n in range(states)]
                for t in range(length):
                    step, driven = delta[i, t, e], delta[i, t, e] * u[i, t, e]
                    s = [(step * a[e, n]).exp() * s[n] + driven * b[i, t, n] for n in range(states)]
                    want = sum(c[i, t, n] * s[n] for n in range(states))
                    torch.testing.assert_close(y[i, t, e], want, rtol=0, atol=1e-12)
                torch.testing.assert_close(last[i, e], torch.stack(s), rtol=0, atol=1e-12)

    def test_no_step_overflows(self) -> None:
        u, b, c = torch.randn(1, 300, 2), torch.randn(1, 300, 3), torch.randn(1, 300, 3)
        for size in (1e-30, 1e4):
            delta = torch.full((1, 300, 2), size, requires_grad=True)
            y, _ = selective_scan(u, delta, -torch.ones(2, 3), b, c, torch.zeros(1, 2, 3))
            assert y.isfinite().all()
            assert torch.autograd.grad(y.sum(), delta)[0].isfinite().all()

    def test_time_steps_start_between_a_thousandth_and_a_tenth(self) -> None:
        delta = functional.softplus(SelectiveSSM(VOCABULARY, dim=128, n_layers=1).blocks[0].dt_proj.bias.detach())
        assert 0.99e-3 < delta.min() < 2e-3
        assert 0.05 < delta.max() < 0.101

    def test_rates_do_not_decay(self) -> None:
        pytest.importorskip("tqdm", reason="the trainer needs the train extra")
        from kssm.train.trainer import make_optimizer

        model = SMALL["mamba"]()
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, other = make_optimizer(model, OptimizerConfig(), torch.device("cpu")).param_groups
        assert sum(len(group["params"]) for group in (decayed, other)) == len(names)
        assert not any("a_log" in names[id(p)] for p in decayed["params"])
        assert {names[id(p)] for p in other["params"] if p.dim() > 1} == {f"blocks.{i}.a_log" for i in range(2)}


def test_every_baseline_is_an_architecture() -> None:
    assert {name for name in ARCHITECTURES if not name.startswith("v")} == set(SMALL)
    assert not isinstance(KSSMv3(5, 8, 1, 4, 2), RecurrentLM)
    for name in SMALL:
        assert "oscillators" not in {field.name for field in dataclasses.fields(ARCHITECTURES[name])}

"""The K-SSM models: names and sizes, gradients, what reaches what, and sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from kssm import KSSMv1, KSSMv2, KSSMv3, LanguageModel
from torch import nn
from torch.nn import functional

VOCABULARY = 11
SMALL: dict[str, Callable[[], LanguageModel]] = {
    "v1": lambda: KSSMv1(VOCABULARY, embed_dim=12, n_oscillators=8, n_harmonics=3),
    "v2": lambda: KSSMv2(VOCABULARY, hidden_dim=12, n_layers=2, n_oscillators=8, max_positions=16),
    "v3": lambda: KSSMv3(VOCABULARY, hidden_dim=12, n_layers=2, n_oscillators=8, n_harmonics=3, max_positions=16),
}
LAYERS = {"v1": 1, "v2": 2, "v3": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these tensors are too small to share, and waiting threads slow whatever else runs


@pytest.fixture(params=list(SMALL))
def version(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture
def model(version: str) -> LanguageModel:
    return SMALL[version]()


def some_tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def linear(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def block_names(i: int, bank: list[str], second_matrix: int) -> list[str]:
    rest = linear("norm1", "norm2", "ffn.0", f"ffn.{second_matrix}")
    return [f"blocks.{i}.{name}" for name in [*(f"oscillators.{b}" for b in bank), *rest]]


def test_state_dict_names_are_the_interface():
    ends = ["embed.weight", "pos_embed", "final_norm.weight", "final_norm.bias", "output_head.weight"]
    v2 = [*linear("to_freq", "coupling_mod", "phase_to_hidden"), "omega"]
    v3 = [*linear("to_params", "readout"), "omega_0", "delta_param"]
    v1 = [*linear("to_freq", "readout.0", "readout.2", "output_head"), "embed.weight"]
    assert set(SMALL["v1"]().state_dict()) == {*v1, "oscillators.omega", "oscillators.coupling"}
    assert set(SMALL["v2"]().state_dict()) == {*ends, *block_names(0, v2, 3), *block_names(1, v2, 3)}
    assert set(SMALL["v3"]().state_dict()) == {*ends, *block_names(0, v3, 2), *block_names(1, v3, 2)}
    assert SMALL["v3"]().state_dict()["pos_embed"].shape == (1, 16, 12)


def test_published_sizes():
    def size(model: LanguageModel) -> int:
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        assert size(KSSMv1(65)) == 48_833
        assert round(size(KSSMv2(50257)) / 1e6) == 28
        assert round(size(KSSMv3(50257, tied=False)) / 1e6) == 46
        assert round(size(KSSMv3(50257)) / 1e6) == 27
        v2, v3 = KSSMv2(65), KSSMv3(65)
    assert (len(v2.blocks), v2.embed.embedding_dim, v2.blocks[0].oscillators.n_oscillators) == (4, 256, 128)
    assert (len(v3.blocks), v3.embed.embedding_dim, v3.blocks[0].oscillators.n_oscillators) == (6, 384, 192)
    assert (v3.blocks[0].oscillators.n_harmonics, v3.max_positions) == (32, 1024)


def test_tied_head():
    tied, untied = SMALL["v3"](), KSSMv3(VOCABULARY, 12, 2, 8, 3, 16, tied=False)
    assert tied.output_head.weight is tied.embed.weight
    assert untied.output_head.weight is not untied.embed.weight
    assert SMALL["v2"]().output_head.weight.data_ptr() != SMALL["v2"]().embed.weight.data_ptr()
    untied.load_state_dict(tied.state_dict(), strict=True)  # either layout has the same names
    assert torch.equal(untied.eval()(some_tokens()), tied.eval()(some_tokens()))


def test_logits_and_r(model: LanguageModel, version: str):
    assert model.last_r is None
    logits = model(some_tokens())
    assert logits.shape == (3, 7, VOCABULARY)
    assert logits.isfinite().all()
    assert model.last_r is not None
    assert model.last_r.shape == (LAYERS[version],)
    assert not model.last_r.requires_grad
    assert ((model.last_r >= 0) & (model.last_r <= 1 + 1e-6)).all()


def test_first_loss_is_that_of_a_uniform_guess(model: LanguageModel):
    loss = functional.cross_entropy(model(some_tokens()).flatten(0, 1), some_tokens().flatten())
    assert abs(loss.item() - torch.log(torch.tensor(float(VOCABULARY))).item()) < 0.5


def test_nothing_crosses_positions(model: LanguageModel):
    model.eval()
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    others = [t for t in range(tokens.shape[1]) if t != 3]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_gradient_reaches_every_parameter(model: LanguageModel, version: str):
    loss = functional.cross_entropy(model(some_tokens()).flatten(0, 1), some_tokens().flatten())
    (loss + 0.1 * model.regularization_loss()).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == ({"oscillators.coupling"} if version == "v1" else set())


def test_v1_order_parameters_are_the_only_path():
    model = SMALL["v1"]()
    with torch.no_grad():
        model.readout[0].weight.zero_()
    logits = model(some_tokens())
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))


def test_v2_and_v3_blocks_equal_their_equations():
    h = torch.randn(2, 5, 12)
    block = SMALL["v2"]().eval().blocks[0]
    x = block.norm1(h)
    middle = h + block.oscillators(x)[0] - x
    torch.testing.assert_close(block(h)[0], middle + block.ffn(block.norm2(middle)))
    block = SMALL["v3"]().eval().blocks[0]
    middle = h + block.oscillators(block.norm1(h))[0]
    torch.testing.assert_close(block(h)[0], middle + block.ffn(block.norm2(middle)))


def test_regularization_is_the_mean_over_blocks():
    model = SMALL["v3"]()
    with pytest.raises(RuntimeError, match="forward call first"):
        model.regularization_loss()
    model(some_tokens())
    terms = [block.oscillators.get_regularization_loss() for block in model.blocks]
    torch.testing.assert_close(model.regularization_loss(), (terms[0] + terms[1]) / 2)
    assert SMALL["v2"]().regularization_loss() == 0


def test_monostable_and_noise_options_reach_the_banks():
    model = KSSMv3(VOCABULARY, 12, 2, 8, 3, 16, clamp=None, noise="always")
    assert {(block.oscillators.clamp, block.oscillators.noise) for block in model.blocks} == {(None, "always")}
    assert not torch.equal(model.eval()(some_tokens()), model(some_tokens()))
    quiet = SMALL["v3"]().eval()
    assert torch.equal(quiet(some_tokens()), quiet(some_tokens()))


def test_errors_name_what_was_wanted(model: LanguageModel, version: str):
    with pytest.raises(TypeError, match=r"tokens must be int64, got torch\.int32"):
        model(some_tokens().int())
    with pytest.raises(ValueError, match=r"shape \[B, T\], got \(7,\)"):
        model(some_tokens()[0])
    if version == "v1":
        assert model(some_tokens(1, 300)).shape == (1, 300, VOCABULARY)
    else:
        with pytest.raises(ValueError, match="at most 16 positions, got a sequence of 17"):
            model(some_tokens(1, 17))


@pytest.mark.parametrize(
    "size", ["vocab_size", "hidden_dim", "n_layers", "n_oscillators", "n_harmonics", "max_positions"]
)
def test_impossible_sizes_are_refused(size: str):
    with pytest.raises(ValueError, match=f"{size} must be an int of at least 1, got 0"):
        KSSMv3(**{"vocab_size": 5, "hidden_dim": 12, "n_layers": 1, "n_oscillators": 8, "n_harmonics": 3, size: 0})


def test_loss_falls(model: LanguageModel):
    """Token t + 1 is a function of token t here: what these models can learn."""
    first = torch.arange(VOCABULARY).repeat(4, 1)[:, :10]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(model(first).flatten(0, 1), ((first * 3 + 1) % VOCABULARY).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Told(LanguageModel):
    """A model whose logits at the last position are a given function of the tokens."""

    def __init__(
        self, vocab_size: int, last: Callable[[torch.Tensor], torch.Tensor], max_positions: int | None = None
    ) -> None:
        super().__init__(vocab_size, max_positions)
        self.last = last

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.last(tokens)[:, None]


class TestGenerate:
    def test_is_a_function_of_the_generator(self, model: LanguageModel):
        prompt = some_tokens(2, 3)
        state = torch.get_rng_state()
        a, b, c = (model.generate(prompt, 9, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert torch.equal(a[:, :3], prompt)
        assert torch.equal(torch.get_rng_state(), state)

    def test_restores_the_mode_and_runs_past_the_positions(self, model: LanguageModel):
        assert model.training
        assert model.generate(some_tokens(1, 12), 12).shape == (1, 24)
        assert model.training

    def test_temperature_zero_and_top_1_take_the_most_likely(self, model: LanguageModel):
        prompt = some_tokens(2, 3)
        greedy = model.generate(prompt, 1, temperature=0)
        assert torch.equal(greedy[:, -1], copy.deepcopy(model).eval()(prompt)[:, -1].argmax(-1))
        assert torch.equal(model.generate(prompt, 4, temperature=0), model.generate(prompt, 4, top_k=1))
        assert model.generate(prompt, 2, top_k=10 * VOCABULARY).max() < VOCABULARY

    @pytest.mark.parametrize(("temperature", "share"), [(0.5, 16 / 17), (1.0, 4 / 5), (2.0, 2 / 3)])
    def test_temperature_divides_the_logits(self, temperature: float, share: float):
        model = Told(2, lambda tokens: torch.tensor([[0.0, math.log(4)]]).expand(len(tokens), 2))
        rows = 20_000
        tokens = model.generate(torch.zeros(rows, 1, dtype=torch.int64), 1, temperature)
        deviation = math.sqrt(share * (1 - share) / rows)
        assert abs(tokens[:, 1].double().mean().item() - share) < 5 * deviation

    def test_the_last_positions_are_seen(self):
        windows: list[list[int]] = []

        def one_more(tokens: torch.Tensor) -> torch.Tensor:
            windows.append(tokens[0].tolist())
            return functional.one_hot(tokens[:, -1] + 1, 10).float()

        tokens = Told(10, one_more, max_positions=4).generate(torch.tensor([[0, 1, 2, 3, 7, 5]]), 3, temperature=0)
        assert tokens.tolist() == [[0, 1, 2, 3, 7, 5, 6, 7, 8]]
        assert windows == [[2, 3, 7, 5], [3, 7, 5, 6], [7, 5, 6, 7]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
            ({"temperature": -0.1}, "temperature must be at least 0"),
            ({"temperature": float("nan")}, "temperature must be at least 0"),
            ({"top_k": 0}, "top_k must be at least 1"),
            ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "T >= 1"),
        ],
    )
    def test_refuses(self, options: dict[str, object], message: str):
        with pytest.raises(ValueError, match=message):
            SMALL["v1"]().generate(**{"tokens": some_tokens(), "max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    "make", [lambda: KSSMv1(9, 8, 6, 2), lambda: KSSMv2(9, 8, 2, 6), lambda: KSSMv3(9, 8, 2, 6, 2)]
)
def test_reset_parameters_after_meta_initialisation(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e30)
    for module in model.modules():  # parents first, as torch's own tools call them
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    like = make()
    assert {k for k, _ in model.named_parameters()} == {k for k, _ in like.named_parameters()}  # a tied head stays tied
    for (name, got), want in zip(model.named_parameters(), like.parameters(), strict=True):
        assert got.abs().max() < 5, name
        assert got.numel() < 20 or (got.std() - want.std()).abs() <= 0.5 * want.std() + 1e-6, name

"""The trainer: runs, resumption, one step, evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kssm import data
from kssm.models import ARCHITECTURES
from kssm.train import checkpoint
from kssm.train.config import PRESETS, ModelConfig, OptimizerConfig, TrainConfig, check, least_memory

from tests.train.runs import kssm, metrics, train

pytest.importorskip("tyro", reason="the trainer needs the train extra")

from kssm.train.trainer import Trainer, learning_rate, make_optimizer  # imports tqdm

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, whatever nest of tensors it is."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    original = Trainer.train_step

    def stepped(self: Trainer) -> Any:
        values = original(self)
        if self.step == step:
            signal.raise_signal(number)
        return values

    monkeypatch.setattr(Trainer, "train_step", stepped)


class TestRun:
    def test_leaves_its_folder_and_its_last_line(self, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        run = tmp_path / "deep" / "run"
        assert train(text, run, "--max-steps", 6) == 0
        names = {"config.json", "tokens.bin", "tokens.json", "metrics.jsonl", "log.txt", "checkpoint.pt"}
        assert {path.name for path in run.iterdir()} == names
        out, err = capfd.readouterr()
        for part in ("loss", "R", "tokens/s", "6/6"):
            assert part in err
        lines = metrics(run)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in lines if "validation_loss" in line] == [4, 6]
        assert set(lines[0]) == {"step", "loss", "regularization", "grad_norm", "lr", "r"}
        last = lines[-1]
        assert f"validation loss {last['validation_loss']:.4f} nats/token" in out.splitlines()[-1]
        assert f"unigram entropy {last['unigram_entropy']:.4f}" in out.splitlines()[-1]
        assert f"{last['bits_per_byte']:.3f} bits/byte" in out.splitlines()[-1]
        log = (run / "log.txt").read_text()
        assert log.count("step ") == 2
        assert len(log.splitlines()) >= 4  # each evaluation and its sample
        assert log in out

    def test_entropies_are_those_of_the_evaluated_text(self, text: Path, tmp_path: Path):
        run = tmp_path / "run"
        assert train(text, run, "--max-steps", 1, "--eval-tokens", 10**6) == 0
        held_out = data.Dataset(run).validation
        targets = held_out[1 : 1 + (len(held_out) - 1) // 16 * 16]
        p = np.unique(targets, return_counts=True)[1] / len(targets)
        assert metrics(run)[-1]["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())
        before = held_out[: len(targets)]
        given = [np.unique(targets[before == b], return_counts=True)[1] for b in np.unique(before)]
        bigram = sum(-(n * np.log(n / n.sum())).sum() for n in given) / len(targets)
        assert metrics(run)[-1]["bigram_entropy"] == pytest.approx(bigram)

    @pytest.mark.parametrize("arch", ["gpt", "gru", "lstm", "mamba"])
    def test_r_is_left_out_where_there_are_no_oscillators(
        self, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arch: str
    ):
        run = tmp_path / "run"
        assert train(text, run, "--arch", arch, "--max-steps", 3) == 0
        lines = metrics(run)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert set(lines[0]) == {"step", "loss", "regularization", "grad_norm", "lr"}
        assert set(lines[-1]) == {"step", "validation_loss", "unigram_entropy", "bigram_entropy", "bits_per_byte"}
        assert "R by layer" not in (run / "log.txt").read_text()
        assert "R " not in capfd.readouterr().err.splitlines()[-1]
        assert kssm("sample", run, "--prompt", "lock", "--tokens", 30, "--device", "cpu") == 0

    @pytest.mark.parametrize("arch", ["v1", "v3", "v4", "gpt", "gru", "lstm", "mamba"])
    def test_beats_the_unigram_entropy(self, text: Path, tmp_path: Path, arch: str):
        run = tmp_path / "run"
        options = "--arch {} --max-steps 120 --eval-every 120 --lr 2e-2 --batch-size 8 --eval-tokens 320"
        assert train(text, run, *options.format(arch).split()) == 0
        last = metrics(run)[-1]
        assert last["validation_loss"] < 0.7 * last["unigram_entropy"]

    def test_byte_tokens(self, tmp_path: Path):
        binary = tmp_path / "noise.bin"
        binary.write_bytes(bytes(range(256)) * 4)
        assert train(binary, tmp_path / "run", "--tokens", "byte", "--max-steps", 1) == 0
        assert len(data.Dataset(tmp_path / "run").vocabulary) == 256
        last = metrics(tmp_path / "run")[-1]
        assert last["bits_per_byte"] == pytest.approx(last["validation_loss"] / np.log(2))

    def test_a_loss_that_is_not_finite_ends_the_run(
        self, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        run = tmp_path / "run"
        assert train(text, run, "--arch", "v1", "--lr", "1e38", "--max-steps", 4, "--warmup-steps", 0) == 1
        assert "the last checkpoint is kept" in capfd.readouterr().err.splitlines()[-1]
        state = checkpoint.load_checkpoint(run)
        assert state["step"] == 0
        assert all(value.isfinite().all() for value in state["model"].values())


class TestResume:
    @pytest.mark.parametrize(
        ("arch", "number"),
        [(arch, signal.SIGTERM if arch == "v2" else signal.SIGINT) for arch in ARCHITECTURES],
    )
    def test_equals_the_uninterrupted_run_bit_for_bit(
        self,
        text: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        arch: str,
        number: signal.Signals,
    ):
        """Dropout and v3's phase noise are drawn from torch's generator: they must go on where they stopped."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        options = ["--arch", arch, "--dropout", 0.2, "--max-steps", 10, "--accumulate", 2]
        assert train(text, whole, *options) == 0
        with monkeypatch.context() as patch:
            interrupt_after(patch, 7, number)
            assert train(text, parts, *options) == 0
        assert "stopped at step 7 of 10" in capfd.readouterr().out.splitlines()[-1]
        assert checkpoint.load_checkpoint(parts)["step"] == 7
        # a run that was killed later than its last checkpoint has lines that will come again
        with open(parts / "metrics.jsonl", "a") as file:
            file.write('{"step": 8, "loss": 0.0}\n{"step": 9, "lo')
        torch.manual_seed(1234)
        assert kssm("train", "--out", parts, "--resume") == 0
        a, b = checkpoint.load_checkpoint(whole), checkpoint.load_checkpoint(parts)
        for key in ("model", "optimizer", "rng", "step", "best_loss"):
            assert_same(a[key], b[key])
        assert metrics(whole) == metrics(parts)

    def test_a_finished_run_goes_on_with_more_steps(
        self, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        run = tmp_path / "run"
        assert train(text, run, "--max-steps", 3) == 0
        before = checkpoint.load_checkpoint(run)
        assert kssm("train", "--out", run, "--resume") == 2
        assert "is at step 3, --max-steps must be more, got 3" in capfd.readouterr().err.splitlines()[-1]
        assert_same(before, checkpoint.load_checkpoint(run))
        assert kssm("train", "--out", run, "--resume", "--max-steps", 5) == 0
        assert checkpoint.load_checkpoint(run)["step"] == 5
        assert checkpoint.load_config(run).max_steps == 5
        assert not checkpoint.load_config(run).resume

    def test_refuses_what_would_be_another_run(self, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        run = tmp_path / "run"
        assert train(text, run, "--max-steps", 1) == 0
        capfd.readouterr()
        files = {path: path.read_bytes() for path in run.iterdir()}
        for options, message in (
            (["--resume", "--dim", "32"], "has --dim 16, got 32"),
            (["--resume", "--preset", "v1"], "has --preset demo, got v1"),
            (["--resume", "--data", "elsewhere"], "has --data"),
            ([], "is not empty; --resume continues a run"),
        ):
            assert kssm("train", "--out", run, "--max-steps", 9, *options) == 2
            assert message in capfd.readouterr().err
        (run / "checkpoint.pt").write_bytes(b"not a checkpoint")
        assert kssm("train", "--out", run, "--max-steps", 9, "--resume") == 2
        assert "checkpoint.pt cannot be read" in capfd.readouterr().err
        (run / "checkpoint.pt").unlink()
        assert kssm("train", "--out", run, "--max-steps", 9, "--resume") == 2
        assert "holds no checkpoint.pt" in capfd.readouterr().err
        del files[run / "checkpoint.pt"]
        assert files == {path: path.read_bytes() for path in run.iterdir()}

    def test_a_failed_save_leaves_the_old_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        checkpoint.save_checkpoint(tmp_path, {"step": 1})

        def full_disk(state: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save_checkpoint(tmp_path, {"step": 2})
        assert checkpoint.load_checkpoint(tmp_path) == {"step": 1}


def make_trainer(text: Path, folder: Path, **options: Any) -> Trainer:
    folder.mkdir()
    model = ModelConfig(arch="v1", dim=8, oscillators=6, harmonics=2)
    config = TrainConfig(out=folder, context=16, eval_tokens=64, sample_tokens=0, model=model, **options)
    data.write_corpus(data.read_corpus([text], "char"), folder)
    dataset = data.Dataset(folder)
    torch.manual_seed(0)
    network = checkpoint.build_model(config, len(dataset.vocabulary))
    return Trainer(config, dataset, network, torch.device("cpu"))


def test_accumulation_averages_the_gradient(text: Path, tmp_path: Path):
    one = make_trainer(text, tmp_path / "one", batch_size=8, accumulate=1)
    four = make_trainer(text, tmp_path / "four", batch_size=2, accumulate=4)
    a, b = one.train_step(), four.train_step()
    torch.testing.assert_close(a["loss"], b["loss"])
    torch.testing.assert_close(a["grad_norm"], b["grad_norm"])


def test_evaluation_draws_nothing_and_changes_nothing(text: Path, tmp_path: Path):
    one = make_trainer(text, tmp_path / "one")
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in one.model.state_dict().items()}
    assert one.evaluate() == one.evaluate()
    one.sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(one.model.state_dict()), weights)


def test_the_evaluation_is_the_mean_over_its_windows(text: Path, tmp_path: Path):
    """Batches of unequal size weigh by their tokens."""
    split = make_trainer(text, tmp_path / "split", batch_size=3).evaluate()
    whole = make_trainer(text, tmp_path / "whole", batch_size=4).evaluate()
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert split.unigram_entropy == whole.unigram_entropy
    assert split.r == pytest.approx(whole.r, abs=1e-4)


def test_learning_rate_warms_up_and_follows_the_cosine():
    config = OptimizerConfig(lr=2.0, lr_floor=0.25, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_steps=0)) == 2.0


def test_only_matrices_decay(text: Path, tmp_path: Path):
    model = make_trainer(text, tmp_path / "one").model
    decayed, other = make_optimizer(model, OptimizerConfig(weight_decay=0.3), torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in other["params"]} == {1}
    assert len(decayed["params"]) + len(other["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible_and_survive_json(name: str):
    config = PRESETS[name]
    check(config)
    assert config.preset == name
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in checkpoint.build_model(config, 96).parameters())
    assert 16 * parameters * 0.8 < least_memory(dataclasses.replace(config, batch_size=0), 96) <= 16 * parameters

"""The training loop: AdamW, gradient accumulation, warm-up and cosine, evaluation with a sample, checkpoints.

A run is a function of its configuration and its text. On the CPU, with the same number of threads, an interrupted and
resumed run ends in the same bits as an uninterrupted one: batches and samples depend on (seed, step) alone, and the
checkpoint keeps torch's generators, from which dropout and the phase noise draw.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no stub

from kssm import data
from kssm.data import Dataset
from kssm.models import LanguageModel
from kssm.options import UsageError
from kssm.train.checkpoint import (
    build_model,
    load_checkpoint,
    load_config,
    save_checkpoint,
    save_config,
)
from kssm.train.config import OptimizerConfig, TrainConfig, check, check_same_run, least_memory
from kssm.train.device import (
    memory_in_use,
    release_memory,
    resolve_device,
    restore_generators,
    save_generators,
    synchronize,
    total_memory,
)

__all__ = ["Evaluation", "Trainer", "learning_rate", "train"]

METRICS, LOG = "metrics.jsonl", "log.txt"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # for control characters: an untrained byte model samples terminal commands


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found on its held-out windows; loss and entropies over the same target tokens."""

    loss: float  # nats per token
    unigram_entropy: float  # nats per token, as the next: of a token alone,
    bigram_entropy: float  # and given the one before it
    bits_per_byte: float
    r: list[float] | None  # mean order parameter of each layer; None of a model without oscillators

    def __str__(self) -> str:
        return (
            f"validation loss {self.loss:.4f} nats/token beside unigram entropy {self.unigram_entropy:.4f} and bigram "
            f"entropy {self.bigram_entropy:.4f}, {self.bits_per_byte:.3f} bits/byte"
        )


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Rate of the update number ``step`` (from 0): linear to ``lr``, then half a cosine to ``lr_floor * lr``.

    >>> [round(learning_rate(s, 6, OptimizerConfig(lr=1.0, warmup_steps=2)), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)


def make_optimizer(model: LanguageModel, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices (embeddings included) and leaves vectors, scalars and ``model.undecayed`` alone."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in parameters if p.dim() >= 2 and name.rpartition(".")[2] not in model.undecayed]
    ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for _, p in parameters if id(p) not in ids], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")  # the devices with a fused kernel in every torch since 2.4
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one of either raises KeyboardInterrupt at once."""
    requested = False

    def note(number: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run in its folder: model, optimizer, step count, and what they need to go on."""

    def __init__(self, config: TrainConfig, dataset: Dataset, model: LanguageModel, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.model = model.to(device)
        self.optimizer = make_optimizer(self.model, config.optimizer, device)
        self.step = 0
        self.best_loss = math.inf
        starts = data.even_starts(dataset.validation, config.context, config.eval_tokens)
        self.eval_starts = np.array_split(starts, math.ceil(len(starts) / config.batch_size))

    # ---- one step ----

    def train_step(self) -> dict[str, torch.Tensor]:
        """Accumulate the gradient, clip it, update; the mean loss, the bistability terms and the gradient's norm."""
        c, o = self.config, self.config.optimizer
        self.model.train()
        count = c.batch_size * c.accumulate
        starts = data.random_starts(self.dataset.train, c.context, count, c.seed, self.step)
        loss_sum, terms_sum = torch.zeros(2, device=self.device)
        for part in np.split(starts, c.accumulate):
            tokens, targets = (t.to(self.device) for t in data.windows(self.dataset.train, part, c.context))
            logits = self.model(tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            terms = self.model.regularization_loss()
            ((loss + o.lambda_reg * terms) / c.accumulate).backward()  # type: ignore[no-untyped-call]  # no stub
            loss_sum += loss.detach()
            terms_sum += terms.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, c.max_steps, o)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss_sum / c.accumulate, "regularization": terms_sum / c.accumulate, "grad_norm": norm}

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss, entropies and R on the held-out windows, in evaluation mode: no dropout, no noise."""
        vocabulary = self.dataset.vocabulary
        self.model.eval()
        total, r, pairs = 0.0, [], []
        counts = np.zeros(len(vocabulary), dtype=np.int64)
        tokens_seen = sum(map(len, self.eval_starts)) * self.config.context
        for part in self.eval_starts:
            tokens, targets = data.windows(self.dataset.validation, part, self.config.context)
            pairs.append(torch.stack([tokens, targets], -1).flatten(0, 1).numpy())
            counts += np.bincount(targets.flatten().numpy(), minlength=len(vocabulary))
            logits = self.model(tokens.to(self.device))
            total += functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten().to(self.device), reduction="sum"
            ).item()
            if self.model.last_r is not None:
                r.append(self.model.last_r.cpu() * (tokens.numel() / tokens_seen))
        loss = total / tokens_seen
        return Evaluation(
            loss,
            data.unigram_entropy(counts),
            data.bigram_entropy(np.concatenate(pairs)),
            data.bits_per_byte(loss, counts, vocabulary),
            [round(value, 4) for value in torch.stack(r).sum(0).tolist()] if r else None,
        )

    def sample(self) -> str:
        """Text after the first held-out token, the same for the same (seed, step)."""
        generator = torch.Generator(self.device).manual_seed(self.config.seed + self.step)
        prompt = torch.tensor([[int(self.dataset.validation[0])]], device=self.device)
        tokens = self.model.generate(prompt, self.config.sample_tokens, generator=generator)
        return self.dataset.vocabulary.decode(tokens[0].tolist())

    # ---- checkpoint ----

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": save_generators(self.device),
            "best_loss": self.best_loss,
            "config": self.config.to_dict(),
        }
        save_checkpoint(self.config.out, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; lines of metrics.jsonl written after it are dropped, since they will come again."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_loss = state["step"], state["best_loss"]
        restore_generators(self.device, state["rng"])
        metrics = self.config.out / METRICS
        if metrics.exists():
            kept = ""
            for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] > self.step:
                        break
                except ValueError:  # the process died in the middle of the line
                    break
                kept += line
            metrics.write_text(kept, encoding="utf-8")

    # ---- the loop ----

    def run(self) -> Evaluation | None:
        """Train to ``max_steps``; the last evaluation, or None where a signal stopped the run (its state is saved)."""
        c = self.config
        # a terminal wants a lively bar, a file a line now and then
        interval = 0.5 if sys.stderr.isatty() else 10.0
        with (
            stop_requests() as stop_requested,
            open(c.out / METRICS, "a", encoding="utf-8", buffering=1) as metrics,
            tqdm(total=c.max_steps, initial=self.step, unit="step", mininterval=interval) as bar,
        ):
            evaluation = None
            since, tokens = time.perf_counter(), 0
            while self.step < c.max_steps:
                values = self.train_step()
                tokens += c.batch_size * c.accumulate * c.context
                if self.step % c.log_every == 0 or self.step == c.max_steps:
                    synchronize(self.device)  # tokens per second are of work done, not of work asked for
                    record = self._record(values, tokens / (time.perf_counter() - since))
                    since, tokens = time.perf_counter(), 0
                    metrics.write(json.dumps(record) + "\n")
                    shown = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,} tokens/s"]
                    if "r" in record:
                        shown.insert(1, f"R {sum(record['r']) / len(record['r']):.3f}")
                    bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update()
                if self.step % c.eval_every == 0 or self.step == c.max_steps:
                    started = time.perf_counter()
                    evaluation = self._evaluate_and_save(metrics, bar)
                    since += time.perf_counter() - started  # tokens per second are of training
                if stop_requested() and self.step < c.max_steps:
                    self._require_finite("gradient norm", values["grad_norm"].item())
                    self.save()
                    return None
            return evaluation

    def _record(self, values: dict[str, torch.Tensor], tokens_per_second: float) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.step, **{name: value.item() for name, value in values.items()}}
        self._require_finite("loss", record["loss"])
        self._require_finite("gradient norm", record["grad_norm"])
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        if self.model.last_r is not None:
            record["r"] = [round(v, 4) for v in self.model.last_r.tolist()]
        record["tokens_per_second"] = round(tokens_per_second)
        memory = memory_in_use(self.device)
        if memory is not None:
            record["memory_in_use"] = memory
        return record

    def _require_finite(self, name: str, value: float) -> None:
        """Called before every save, so that a checkpoint never holds what cannot be trained on."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {self.step}: {name} is {value}; the last checkpoint is kept, try a smaller --lr"
            )

    def _evaluate_and_save(self, metrics: Any, bar: Any) -> Evaluation:
        evaluation = self.evaluate()
        self._require_finite("validation loss", evaluation.loss)
        self.best_loss = min(self.best_loss, evaluation.loss)
        values: dict[str, Any] = {
            "validation_loss": evaluation.loss,
            "unigram_entropy": evaluation.unigram_entropy,
            "bigram_entropy": evaluation.bigram_entropy,
            "bits_per_byte": evaluation.bits_per_byte,
        }
        text = f"step {self.step}: {evaluation}"
        if evaluation.r is not None:
            values["validation_r"] = evaluation.r
            text += f", R by layer {evaluation.r}"
        metrics.write(json.dumps({"step": self.step, **values}) + "\n")
        if self.config.sample_tokens:
            lines = "".join(c if c.isprintable() or c == "\n" else REPLACEMENT for c in self.sample()).split("\n")
            text += "\n" + "\n".join("    " + line for line in lines)
        with open(self.config.out / LOG, "a", encoding="utf-8") as log:
            log.write(text + "\n")
        bar.write(text)
        # Evaluation and sampling have left blocks of sizes that training does not ask for: a sample's length grows by
        # one with every token. torch.save then copies the state to the CPU, which on MPS is the same memory.
        release_memory(self.device)
        self.save()
        return evaluation


def _check_memory(config: TrainConfig, vocabulary_size: int, device: torch.device) -> None:
    available = total_memory(device)
    needed = least_memory(config, vocabulary_size)
    if needed > available:
        raise UsageError(
            f"these sizes need at least {needed / 2**30:,.1f} GiB of memory and {device} has {available / 2**30:,.1f}; "
            "lower --dim, --layers, --oscillators, --context or --batch-size"
        )


def _start(config: TrainConfig, device: torch.device) -> Trainer:
    """A new run; its folder is made only after everything that can be wrong has been looked at."""
    out = config.out
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out: {out} is not a folder")
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(f"--out: {out} is not empty; --resume continues a run, another --out starts one")
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be used: {error.strerror}") from error
    corpus = data.read_corpus(config.data, config.tokens)
    held_out = data.held_out(corpus.length)
    if held_out <= config.context:
        raise UsageError(
            f"the text has {corpus.length} tokens, and {held_out} of them (the last tenth) must be more than "
            f"--context {config.context}: give more text or a smaller context"
        )
    _check_memory(config, len(corpus.vocabulary), device)
    torch.manual_seed(config.seed)
    model = build_model(config, len(corpus.vocabulary))
    try:
        out.mkdir(parents=True, exist_ok=True)
        data.write_corpus(corpus, out)
        save_config(config)
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from error
    trainer = Trainer(config, Dataset(out), model, device)
    trainer.save()
    return trainer


def _resume(config: TrainConfig, device: torch.device) -> Trainer:
    check_same_run(load_config(config.out), config)
    dataset = Dataset(config.out)
    state = load_checkpoint(config.out)
    if state["step"] >= config.max_steps:
        raise UsageError(
            f"--resume: the run in {config.out} is at step {state['step']}, --max-steps must be more, "
            f"got {config.max_steps}"
        )
    trainer = Trainer(config, dataset, build_model(config, len(dataset.vocabulary)), device)
    trainer.restore(state)
    save_config(config)
    return trainer


def train(config: TrainConfig) -> None:
    """Run (or resume) a training run from its configuration to its last line of output.

    Raises: UsageError, before anything is written, for what cannot be run; FloatingPointError for a loss that is not
    finite, with the last checkpoint kept; OSError for a disk that stops taking data.
    """
    check(config)
    device = resolve_device(config.device)
    trainer = _resume(config, device) if config.resume else _start(config, device)
    dataset = trainer.dataset
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{type(trainer.model).__name__}, {parameters:,} parameters, on {device}; {len(dataset.train):,} training and "
        f"{len(dataset.validation):,} held-out tokens of {len(dataset.vocabulary)} kinds; "
        f"steps {trainer.step} to {config.max_steps}",
        flush=True,
    )
    evaluation = trainer.run()
    if evaluation is None:
        print(f"stopped at step {trainer.step} of {config.max_steps}, saved in {config.out}; --resume continues")
    else:
        print(f"{evaluation}; best {trainer.best_loss:.4f}; {trainer.step} steps, saved in {config.out}")

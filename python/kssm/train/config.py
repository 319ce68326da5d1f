"""What a run is: its typed configuration, the presets, and the checks made before anything is written.

Every field is an option of ``kssm train`` (``batch_size`` is ``--batch-size``); the text under it is its help.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from kssm.models import ARCHITECTURES, Architecture
from kssm.models.base import Harmonics
from kssm.models.v4 import Kind, Readout
from kssm.options import (
    NOT_NEGATIVE,
    POSITIVE,
    Probability,
    Size,
    UsageError,
    at_least,
    between,
    check_bounds,
    flag,
    metadata,
)

__all__ = ["PRESETS", "ModelConfig", "OptimizerConfig", "TrainConfig", "check", "check_same_run", "least_memory"]

# Metadata of a field that --resume may change without making it another run.
CHANGEABLE = "changeable"

if TYPE_CHECKING:
    Arch: TypeAlias = str
    Preset: TypeAlias = str
else:  # the choices that the command line shows; Preset stands below the presets
    Arch = Literal[tuple(ARCHITECTURES)]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and sizes."""

    arch: Arch = "v4"
    """K-SSM generation (v1, v2, v3, v4) or baseline (gpt, gru, lstm, mamba)."""
    dim: Size = 128
    """Width D (v1: of the embedding and the readout)."""
    layers: Size = 2
    """Blocks or recurrent layers (all but v1, which has one bank)."""
    oscillators: Size = 256
    """Oscillators in each bank (v1, v2, v3, v4)."""
    harmonics: Harmonics = 2
    """Order parameters H, 1 to 256 (v1, v3); powers of a state, 1 to 32 (v4)."""
    dropout: Probability = 0.0
    """Dropout probability (v2, gpt, gru, lstm)."""
    tied: bool = True
    """Share the output head's matrix with the embedding (v3)."""
    heads: Size = 8
    """Attention heads (gpt); oscillator heads, a divisor of the oscillators (v4)."""
    kind: Kind = "moebius"
    """What a step does to an oscillator (v4)."""
    readout: Readout = "communities"
    """Order parameters of heads, or of learned communities (v4)."""
    communities: Size = 80
    """Communities of the readout (v4)."""
    feedback: Annotated[int, at_least(0)] = 80
    """Communities whose sums move the next step; 0 for an open loop (v4)."""
    listen: bool = True
    """Tokens say how strongly each community of the loop counts (v4)."""
    coupling: bool = False
    """A head's oscillators feel their mean field (v4)."""
    forget: bool = True
    """Heads have a forget gate (v4)."""
    mlp: Annotated[int, at_least(0)] = 0
    """Width of the MLP behind each bank; 0 for none (v4)."""

    def architecture(self) -> Architecture:
        """The model's own options, taken from these by name; raises UsageError where ``arch`` names none."""
        if self.arch not in ARCHITECTURES:
            raise UsageError(f"--arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch}")
        kind = ARCHITECTURES[self.arch]
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up and cosine."""

    lr: Annotated[float, POSITIVE] = 4e-3
    """Peak learning rate: reached by a linear warm-up, left on a cosine."""
    lr_floor: Annotated[float, between(0, 1)] = 0.1
    """Last learning rate, as a fraction of the peak."""
    warmup_steps: Annotated[int, at_least(0)] = 50
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """Decoupled decay of matrices; vectors and scalars are left alone."""
    beta1: Probability = 0.9
    """Decay of the first moment."""
    beta2: Probability = 0.99
    """Decay of the second moment."""
    clip: Annotated[float, POSITIVE] = 1.0
    """Largest norm of the gradient."""
    lambda_reg: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of v3's bistability terms. At 0.01 moving u over its whole range (0.1 to 10) is worth 0.023 nats, so the
    terms cannot outbid the text; a determinant that collapses to 0.001 costs 1 nat, so they still prevent it."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a K-SSM language model, or a baseline, on text.

    Without --data the text is the Python standard library's own sources. Everything a run makes lies in its folder:
    config.json, tokens.bin and tokens.json, metrics.jsonl, log.txt, checkpoint.pt. Ctrl+C saves and stops.
    """

    preset: Preset = "demo"
    """Defaults of all other options: a small v4 (up to three minutes on two cores), or the published sizes."""
    data: tuple[Path, ...] = ()
    """Text files or folders (of which *.txt, *.md, *.rst and *.py are read, in sorted order), UTF-8 for char tokens."""
    out: Annotated[Path, CHANGEABLE] = Path("runs/demo")
    """The run's folder: new or empty, or one to --resume."""
    resume: Annotated[bool, CHANGEABLE] = False
    """Continue the run in --out from its checkpoint; of its options --max-steps and those on reporting may change."""
    tokens: Literal["char", "byte"] = "char"
    """Characters of the text, or its bytes."""
    context: Size = 128
    """Sequence length in tokens."""
    max_steps: Annotated[Size, CHANGEABLE] = 700
    """Optimizer steps in all; the cosine ends there."""
    batch_size: Size = 16
    """Sequences in one forward pass."""
    accumulate: Size = 1
    """Forward passes whose gradients one step averages."""
    seed: Annotated[int, between(0, 2**62)] = 0
    """Of the weights, the batches, dropout and phase noise."""
    device: Annotated[str, CHANGEABLE] = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps, ..."""
    eval_every: Annotated[Size, CHANGEABLE] = 175
    """Steps between evaluations; each prints a sample and saves a checkpoint. The last step is always evaluated."""
    eval_tokens: Annotated[Size, CHANGEABLE] = 65536
    """Held-out tokens of an evaluation, evenly spread over the last tenth of the text."""
    sample_tokens: Annotated[int, at_least(0), CHANGEABLE] = 200
    """Tokens sampled at an evaluation; 0 for none."""
    log_every: Annotated[Size, CHANGEABLE] = 10
    """Steps between lines of metrics.jsonl."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json and the checkpoint hold them."""
        values = dataclasses.asdict(self)
        values["data"] = [str(path) for path in self.data]
        values["out"] = str(self.out)
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainConfig:
        """Inverse of :meth:`to_dict`; raises TypeError or KeyError for anything else."""
        values = dict(values)
        values["data"] = tuple(Path(path) for path in values["data"])
        values["out"] = Path(values["out"])
        values["model"] = ModelConfig(**values["model"])
        values["optimizer"] = OptimizerConfig(**values["optimizer"])
        return TrainConfig(**values)


PRESETS: dict[str, TrainConfig] = {
    "demo": TrainConfig(),
    "v1": TrainConfig(
        preset="v1",
        out=Path("runs/v1"),
        context=256,
        max_steps=5000,
        batch_size=32,
        eval_every=500,
        model=ModelConfig(arch="v1", dim=128, layers=1, oscillators=64, harmonics=8),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=100, weight_decay=0.1),
    ),
    "v2": TrainConfig(
        preset="v2",
        out=Path("runs/v2"),
        context=512,
        max_steps=5000,
        batch_size=16,
        eval_every=500,
        model=ModelConfig(arch="v2", dim=256, layers=4, oscillators=128, dropout=0.1, tied=False),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=200, weight_decay=0.1),
    ),
    "v3": TrainConfig(
        preset="v3",
        out=Path("runs/v3"),
        context=1024,
        max_steps=10000,
        batch_size=8,
        eval_every=500,
        model=ModelConfig(arch="v3", dim=384, layers=6, oscillators=192, harmonics=32),
        optimizer=OptimizerConfig(lr=6e-4, warmup_steps=200, weight_decay=0.1),
    ),
    "v4-100k": TrainConfig(
        preset="v4-100k",
        out=Path("runs/v4-100k"),
        context=64,
        max_steps=2000,
        batch_size=12,
        eval_every=500,
        model=ModelConfig(
            arch="v4", dim=48, layers=2, oscillators=96, heads=12, harmonics=2, communities=24, feedback=24
        ),
        optimizer=OptimizerConfig(lr=8e-3, warmup_steps=100),
    ),
    "v4-1m": TrainConfig(
        preset="v4-1m",
        out=Path("runs/v4-1m"),
        context=64,
        max_steps=2000,
        batch_size=12,
        eval_every=500,
        model=ModelConfig(arch="v4", dim=128, layers=2, oscillators=256, heads=32, harmonics=2),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=100),
    ),
    # Near the proportions of v4-1m, three times as deep; nobody has trained it to the end, so its rate is a guess.
    "v4-90m": TrainConfig(
        preset="v4-90m",
        out=Path("runs/v4-90m"),
        context=256,
        max_steps=10000,
        batch_size=16,
        eval_every=500,
        model=ModelConfig(
            arch="v4", dim=768, layers=6, oscillators=1536, heads=192, harmonics=2, communities=512, feedback=512
        ),
        optimizer=OptimizerConfig(lr=6e-4, warmup_steps=200),
    ),
}

if not TYPE_CHECKING:
    Preset = Literal[tuple(PRESETS)]


def _options(config: TrainConfig) -> dict[str, Any]:
    """Every option by its name, the nested groups flattened as the command line shows them."""
    values = dataclasses.asdict(config)
    model, optimizer = values.pop("model"), values.pop("optimizer")
    return {**values, **model, **optimizer}


def check(config: TrainConfig) -> None:
    """Raise UsageError for the first option with an impossible value; touches no file."""
    architecture = config.model.architecture()
    for options in (config, config.model, config.optimizer, architecture):
        check_bounds(options)
    architecture.check()
    if config.eval_tokens < config.context:
        raise UsageError(f"--eval-tokens must be at least --context {config.context}, got {config.eval_tokens}")


def check_same_run(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raise UsageError where ``asked`` is not a continuation of ``saved``."""
    before, now = _options(saved), _options(asked)
    changeable = {name for name, marks in metadata(TrainConfig).items() if CHANGEABLE in marks}
    for name, value in before.items():
        if name not in changeable and now[name] != value:
            raise UsageError(f"--resume: the run in {asked.out} has {flag(name)} {value}, got {now[name]}")


def least_memory(config: TrainConfig, vocabulary_size: int) -> int:
    """Bytes that training needs at the very least: float32 weights, gradients and two moments, and one forward pass."""
    architecture = config.model.architecture()
    try:
        weights = architecture.parameters(vocabulary_size, config.context)
    except (RuntimeError, TypeError) as error:  # torch has no tensor of 2**63 bytes, not even one without memory
        if "overflow" not in str(error).lower():
            raise
        return 2**63
    activations = 2 * vocabulary_size + architecture.activations()
    return 16 * weights + 4 * config.batch_size * config.context * activations

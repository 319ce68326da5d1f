"""The command line: ``kssm train`` and ``kssm sample``, also as ``python -m kssm``."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kssm.options import UsageError

if TYPE_CHECKING:
    from kssm.train.config import TrainConfig

USAGE = """\
usage: kssm {train,sample} [options]

  kssm train                 train a small model on the standard library's sources (up to three minutes, two cores)
  kssm train --data PATH ... --preset v3 --out DIR
                             train on text files or folders
  kssm train --out DIR --resume
                             continue a run from its checkpoint
  kssm sample DIR --prompt TEXT
                             continue a text with a trained model

kssm train --help and kssm sample --help show every option; kssm --version the version.
"""

# How long an OpenMP thread spins before it sleeps while it waits for others. libgomp's default of some milliseconds
# takes the processor from whoever could end the wait as soon as other processes want it too (docs/waiting.md).
WAITING = ("GOMP_SPINCOUNT", "3000")
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 (the run failed), 2 (it could not be started), 130 (interrupted).

    Sets ``WAITING`` in the environment unless one of ``WAITING_VARIABLES`` is set, or torch is loaded already: OpenMP
    reads it when torch loads it, and a program that calls this function later has chosen by itself.
    """
    if "torch" not in sys.modules and not os.environ.keys() & set(WAITING_VARIABLES):
        os.environ[WAITING[0]] = WAITING[1]
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # sampled text may hold what the terminal's encoding does not
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from kssm_kernels import __version__

        print(__version__)
        return 0
    commands = {"train": _train, "sample": _sample}
    if args[0] not in commands:
        print(f"kssm: unknown command {args[0]!r}, want train or sample; kssm --help shows both", file=sys.stderr)
        return 2
    code = 2
    try:
        commands[args[0]](args[1:])
        return 0
    except UsageError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "tqdm"):
            raise
        message = f'{error.name} is missing: pip install ".[train]" brings it'
    except (FloatingPointError, OSError) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"kssm {args[0]}: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _train(args: list[str]) -> None:
    from kssm.train.checkpoint import load_config
    from kssm.train.config import PRESETS
    from kssm.train.trainer import train

    # The preset, or the run to resume, supplies the defaults of all other options: they are looked for first.
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(args)
    default = PRESETS.get(known.preset, PRESETS["demo"])
    if known.resume and not {"-h", "--help"} & set(args):
        default = load_config(known.out or default.out)
    train(_parse_train(args, default))


def _parse_train(args: list[str], default: TrainConfig) -> TrainConfig:
    """tyro's parser, its framed complaint made one line."""
    import tyro

    from kssm.train.config import TrainConfig

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                TrainConfig,
                prog="kssm train",
                args=args,
                default=default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_unframed(complaint.getvalue())) from stop


def _unframed(text: str) -> str:
    """The first paragraph inside a frame: from below its top edge to the first rule."""
    words: list[str] = []
    for line in text.splitlines()[1:]:
        line = line.strip(" │|")
        if line and not line.strip("─-+╰╯"):
            break
        words.append(line)
    return " ".join(words)


def _sample(args: list[str]) -> None:
    import torch

    from kssm.train.checkpoint import load_run
    from kssm.train.device import resolve_device

    parser = _Parser(
        prog="kssm sample",
        description="Continue a text with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder that kssm train wrote")
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--tokens", type=int, default=500, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token each time")
    parser.add_argument("--top-k", type=int, help="sample among the k most likely tokens only")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, mps, ...")
    options = parser.parse_args(args)
    for flag, value, possible in (
        ("--prompt", options.prompt, options.prompt != ""),
        ("--tokens", options.tokens, options.tokens >= 0),
        ("--temperature", options.temperature, 0 <= options.temperature < math.inf),
        ("--top-k", options.top_k, options.top_k is None or options.top_k >= 1),
        ("--seed", options.seed, 0 <= options.seed < 2**63),
    ):
        if not possible:
            raise UsageError(f"{flag} {value!r} is empty or out of range")
    device = resolve_device(options.device)
    model, vocabulary = load_run(options.run, device)
    prompt = torch.from_numpy(vocabulary.encode(options.prompt).astype("int64"))[None].to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    tokens = model.generate(prompt, options.tokens, options.temperature, options.top_k, generator)
    print(vocabulary.decode(tokens[0].tolist()))

"""Freezing groups of weights that have become solid, thawing them, and asking for more of them.

A weight is solid when its temperature T (see sign_split/__init__.py) is below 0.55: near the noise floor, 1/2.

    freeze   on 3 consecutive checks at least 1 - 1/e of a petal's weights are solid, and it is 1/(1-cool) steps old
    frozen   cryo = 10: the step divides the update by it; the means and T go on, so that the petal can thaw
    thaw     a frozen petal with less than 0.40 solid: T = 1, P = N = 0, cryo falls geometrically to 1
             over 1/(1-cool) steps
    expand   more than 0.8 of the petals are frozen: the model is asked for ceil(total / 2) more

A weight that never had a gradient other than zero is not solid: its T is still 1. A petal with more than 1/e of such
weights cannot freeze.

For comparison, tests on the balance of the two means, KL((P, N) / (P + N) || (1/2, 1/2)) < tau, of all weights
(``kl_all``) or of the same fraction of them (``kl_fraction``). What they do is measured in docs/optimizer.md: the first
never fired; the second depends on beta, as under pure noise half of the weights pass tau = 0.02 at beta 0.9 and nearly
all at 0.99.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.optim.sign_split import SignSplitEMA, _rounding, _tensors

NAME = "FreezeController"
KEY = "freeze"  # in the optimizer's state_dict
TESTS = ("temperature", "kl_all", "kl_fraction")


class Report(NamedTuple):
    """A petal at its last check: fraction of solid weights, whether it is frozen, mean T (NaN without), its cryo."""

    solid: float
    frozen: bool
    temperature: float
    cryo: float


@dataclass
class Petal:
    """A named set of rows (of the first axis) of parameters, and how it fares."""

    name: str
    parts: list[tuple[Tensor, slice]]
    frozen: bool = False
    age: int = 0  # steps since it was made or thawed
    streak: int = 0  # consecutive checks that found it solid
    thawing: int = 0  # steps left until cryo is 1
    solid: float = 0.0
    temperature: float = math.nan
    cryo: float = 1.0

    saved: tuple[str, ...] = field(
        default=("frozen", "age", "streak", "thawing", "solid", "temperature", "cryo"), init=False, repr=False
    )


Part = str | tuple[str, slice]  # a pattern of parameter names, or rows of the parameter of that name


class FreezeController:
    """Watches petals of an optimizer's weights, freezes the solid ones, thaws those that warm up. Rules: the module.

    Args:
        optimizer: a :class:`SignSplitEMA`; its groups need ``temperature`` for the test of that name.
        named_parameters: ``model.named_parameters()``; names are for the petals only.
        petals: name to patterns (``"blocks.0.*"``, as in fnmatch) and explicit rows (``("head.weight", slice(0, 8))``).
            No row may belong to two.
        every: steps between checks; each reads the temperatures of all petals once.
        test: ``"temperature"``, ``"kl_all"`` or ``"kl_fraction"``. tau: bound of the KL tests, in nats.
        solid_below, freeze_at, thaw_below, checks, cryo, expand_above: the numbers of the rules above.
        min_age: steps before a petal may freeze, and of a thaw. None: 1/(1-cool), or 1/(1-beta) for the KL tests.
        on_expand: called with the number of petals wanted. The model adds parameters (new output rows zero, so that
            its function does not change), the optimizer their group, and the controller a petal (:meth:`add`).

    Call :meth:`step` after every ``optimizer.step()``. The freeze itself is ``state[p]["cryo"]``, which the optimizer's
    own pass over memory reads row by row. The controller's state goes with the optimizer's ``state_dict``; what
    ``torch.distributed.checkpoint.state_dict`` makes of that leaves it out: save :meth:`state_dict` beside it.

    Raises ValueError for a bad number, a pattern without a parameter, rows in two petals; TypeError for an optimizer
    without temperatures; NotImplementedError for DTensors.

    >>> import torch
    >>> from kssm_kernels.optim import FreezeController, SignSplitEMA
    >>> model = torch.nn.Linear(4, 6)
    >>> optimizer = SignSplitEMA(model.parameters(), temperature=True)
    >>> controller = FreezeController(optimizer, model.named_parameters(), {"low": [("weight", slice(0, 3))]}, every=1)
    >>> model(torch.ones(4)).sum().backward()
    >>> optimizer.step()
    >>> controller.step()
    >>> controller.report()["low"].frozen
    False
    """

    def __init__(
        self,
        optimizer: SignSplitEMA,
        named_parameters: Iterable[tuple[str, Tensor]],
        petals: Mapping[str, Sequence[Part]],
        *,
        every: int = 10,
        test: str = "temperature",
        tau: float = 0.02,
        solid_below: float = 0.55,
        freeze_at: float = 1 - 1 / math.e,
        thaw_below: float = 0.40,
        checks: int = 3,
        cryo: float = 10.0,
        min_age: int | None = None,
        expand_above: float = 0.8,
        on_expand: Callable[[int], None] | None = None,
    ) -> None:
        if test not in TESTS:
            raise ValueError(f"{NAME}: test must be one of {', '.join(map(repr, TESTS))}, got {test!r}")
        if every < 1 or checks < 1:
            raise ValueError(f"{NAME}: every and checks must be at least 1, got {every} and {checks}")
        if not cryo >= 1:
            raise ValueError(f"{NAME}: cryo must be at least 1, got {cryo}")
        if not 0 <= thaw_below <= freeze_at <= 1:
            raise ValueError(f"{NAME}: want 0 <= thaw_below <= freeze_at <= 1, got {thaw_below} and {freeze_at}")
        if not tau > 0:
            raise ValueError(f"{NAME}: tau must be above 0, got {tau}")
        if min_age is not None and min_age < 0:
            raise ValueError(f"{NAME}: min_age must be at least 0, got {min_age}")
        self.optimizer, self.test, self.tau = optimizer, test, tau
        self.every, self.checks, self.cryo, self.min_age = every, checks, cryo, min_age
        self.solid_below, self.freeze_at, self.thaw_below = solid_below, freeze_at, thaw_below
        self.expand_above, self.on_expand = expand_above, on_expand
        self.steps, self.asked_at = 0, 0
        self._expected: Mapping[str, Any] | None = None
        self.petals: dict[str, Petal] = {}
        named = list(named_parameters)
        for name, parts in petals.items():
            self.add(name, parts, named)
        self._hooks = (
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._expect),
            optimizer.register_load_state_dict_post_hook(self._load),
        )

    # ---- petals ----

    def add(self, name: str, parts: Sequence[Part], named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """A new petal, of age 0."""
        if name in self.petals:
            raise ValueError(f"{NAME}: there is a petal {name!r} already")
        known = dict(named_parameters)
        found: list[tuple[Tensor, slice]] = []
        for part in parts:
            pattern, rows = (part, slice(None)) if isinstance(part, str) else part
            names = fnmatch.filter(known, pattern) if isinstance(part, str) else [n for n in known if n == pattern]
            if not names:
                raise ValueError(f"{NAME}: petal {name!r}: no parameter is named {pattern!r}")
            found += [(known[n], rows) for n in names if known[n].requires_grad]
        if not found:
            raise ValueError(f"{NAME}: petal {name!r} has no parameter that trains")
        petal = Petal(name, [])
        for p, rows in found:
            self._check(petal, p, rows)
            petal.parts.append((p, rows))
        self.petals[name] = petal

    def _check(self, petal: Petal, p: Tensor, rows: slice) -> None:
        name = petal.name
        if _tensors.is_dtensor(p):
            raise NotImplementedError(f"{NAME}: petal {name!r}: DTensor parameters are not supported")
        group = self._group(p)
        if self.test == "temperature" and group["temperature"] is None:
            raise TypeError(f"{NAME}: petal {name!r}: its parameter group has no temperature; want temperature=True")
        mine = set(_rows(p, rows))
        if not mine and p.numel():
            raise ValueError(f"{NAME}: petal {name!r}: {rows} has no row of a parameter of shape {tuple(p.shape)}")
        for other in (*self.petals.values(), petal):
            for q, taken in other.parts:
                if q is p and mine & set(_rows(p, taken)):
                    raise ValueError(f"{NAME}: petals {other.name!r} and {name!r} share rows; a row belongs to one")

    def _group(self, p: Tensor) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            if any(q is p for q in group["params"]):
                return group
        raise ValueError(f"{NAME}: a petal's parameter of shape {tuple(p.shape)} is not in the optimizer")

    def _patience(self, petal: Petal) -> int:
        if self.min_age is not None:
            return self.min_age
        group = self._group(petal.parts[0][0])
        memory = group["temperature"]["cool"] if self.test == "temperature" else group["beta"]
        return math.ceil(1 / (1 - memory)) if memory < 1 else 1

    # ---- the rules ----

    @torch.no_grad()
    def step(self) -> None:
        """Counts a step of the optimizer; every ``every`` of them it checks all petals."""
        self.steps += 1
        for petal in self.petals.values():
            petal.age += 1
            if petal.thawing:
                petal.thawing -= 1
                self._set_cryo(petal, self.cryo ** (petal.thawing / max(1, self._patience(petal))))
        if self.steps % self.every:
            return
        for petal in self.petals.values():
            self._check_petal(petal)
        total = len(self.petals)
        frozen = sum(petal.frozen for petal in self.petals.values())
        if self.on_expand is not None and total > self.asked_at and frozen > self.expand_above * total:
            self.asked_at = total
            self.on_expand(math.ceil(total / 2))

    def _check_petal(self, petal: Petal) -> None:
        petal.solid, petal.temperature = self._measured(petal)
        enough = 1.0 if self.test == "kl_all" else self.freeze_at
        petal.streak = petal.streak + 1 if petal.solid >= enough else 0
        if petal.frozen:
            if petal.solid < self.thaw_below:
                self._thaw(petal)
        elif petal.streak >= self.checks and petal.age >= self._patience(petal) and not petal.thawing:
            petal.frozen = True
            self._set_cryo(petal, self.cryo)

    def _thaw(self, petal: Petal) -> None:
        petal.frozen, petal.age, petal.streak = False, 0, 0
        petal.thawing = self._patience(petal)
        for p, rows in petal.parts:
            state = self.optimizer.state[p]
            for name, value in (("temperature", 1), ("positive", 0), ("negative", 0)):
                if name in state:
                    _part(state[name], rows).fill_(value)  # of 8-bit means too: code 0 is 0

    def _set_cryo(self, petal: Petal, value: float) -> None:
        petal.cryo = value
        for p, rows in petal.parts:
            state = self.optimizer.state[p]
            if "cryo" not in state:
                state["cryo"] = torch.ones(p.shape[0] if p.dim() else 1, dtype=torch.float32, device=p.device)
            state["cryo"][rows] = value

    def _measured(self, petal: Petal) -> tuple[float, float]:
        """Fraction of solid weights and mean temperature; two numbers from the device."""
        solid: list[Tensor] = []
        heat: list[Tensor] = []
        count = 0
        for p, rows in petal.parts:
            state = self.optimizer.state[p]
            if "positive" not in state:  # never had a gradient
                count += _part(p, rows).numel()
                continue
            t = state.get("temperature")
            if t is not None:
                heat.append(_part(t, rows).sum(dtype=torch.float32))
            if self.test == "temperature":
                assert t is not None
                firm = _part(t, rows) < self.solid_below
            else:
                firm = _part(self._divergence(state), rows) < self.tau
            solid.append(firm.sum())
            count += firm.numel()
        if not count or not solid:
            return 0.0, math.nan
        mean = float(torch.stack(heat).sum()) / count if heat else math.nan
        return float(torch.stack(solid).sum()) / count, mean

    def _divergence(self, state: Mapping[str, Any]) -> Tensor:
        """KL of (P, N) / (P + N) from (1/2, 1/2) in nats; infinite where nothing has pushed yet."""
        positive, negative = (_mean(state, name) for name in ("positive", "negative"))
        size = positive + negative
        share = positive / torch.where(size > 0, size, 1.0)
        kl = math.log(2) + torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)
        return torch.where(size > 0, kl, math.inf)

    # ---- what a trainer logs and saves ----

    def report(self) -> dict[str, Report]:
        """Per petal, as of its last check."""
        return {name: Report(p.solid, p.frozen, p.temperature, p.cryo) for name, p in self.petals.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters of the controller and of each petal, by name; the optimizer's state_dict holds it under "freeze"."""
        petals = {name: {key: getattr(petal, key) for key in petal.saved} for name, petal in self.petals.items()}
        return {"steps": self.steps, "asked_at": self.asked_at, "petals": petals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the saved petals are not these."""
        self._check_saved(state)
        self.steps, self.asked_at = state["steps"], state["asked_at"]
        for name, values in state["petals"].items():
            for key, value in values.items():
                setattr(self.petals[name], key, value)

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        if set(state["petals"]) != set(self.petals):
            got, want = sorted(state["petals"]), sorted(self.petals)
            raise ValueError(f"{NAME}: the saved petals are {got}, this controller has {want}")

    def _save(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict[KEY] = self.state_dict()

    # The optimizer may refuse its own part of a dict between the two: the controller then stays as it is too.
    def _expect(self, _: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._expected = state_dict.get(KEY)
        if self._expected is not None:
            self._check_saved(self._expected)

    def _load(self, _: torch.optim.Optimizer) -> None:
        if self._expected is not None:
            self.load_state_dict(self._expected)
        self._expected = None


def _part(t: Tensor, rows: slice) -> Tensor:
    return t[rows] if t.dim() else t


def _rows(p: Tensor, rows: slice) -> range:
    return range(p.shape[0] if p.dim() else 1)[rows]


def _mean(state: Mapping[str, Any], name: str) -> Tensor:
    mean: Tensor = state[name]
    scale = state.get(f"{name}_scale")
    if scale is None:
        return mean.to(torch.float32)
    values = _rounding.dequantized(_tensors.flat(mean), scale)
    return values.as_strided(mean.shape, mean.stride())

"""Sign-split EMA: an optimizer with one running mean of the gradient's magnitude per sign.

    g = gradient, negated for maximize, divided by a GradScaler's scale
    live = |g| < inf and (paper or not lazy or g != 0)
    P <- b P + (1-b) max(g, 0),   N <- b N + (1-b) max(-g, 0)
    D = N if g > 0, P if g < 0, 0 if g = 0,     S = P + N,     r = (P - N) / (S + eps)
    paper:        u = g / (1 + kappa D)
    normalized:   u = r / (1 + kappa D / (S + eps))
    consolidate:  u = g / (1 + kappa D / rms(S)),  rms over the whole parameter, of the step before
    temperature:  T <- clamp(cool T + heat |r| (1 - T), 0, 1),  u <- u (floor + (1 - floor) T)
    p <- p - lr (u + weight_decay p) / cryo

An element that is not live keeps p, P, N and T. P - N is the EMA of g, Adam's first moment, and S that of |g|: r
lies in [-1, 1], needs neither bias correction nor a step counter, and does not depend on the scale of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.optim.sign_split import _state, _table, _tensors, _torch
from kssm_kernels.optim.sign_split._hyper import NAME, OPTIONS, Hyper, hyper_of, plain, resolve
from kssm_kernels.optim.sign_split._state import check_ours
from kssm_kernels.optim.sign_split._tensors import Tensors

OP = "sign_split_ema"


def _takes_lists() -> bool:
    try:
        torch.autograd.graph.increment_version([torch.empty(0)])
    except (TypeError, AttributeError, RuntimeError):  # torch 2.4 takes a tensor only, and says so in either way
        return False
    return True


_TAKES_LISTS = _takes_lists()


def _bump(params: list[Tensor]) -> None:
    """Tells autograd that the parameters changed: a graph that saved one then refuses to run backward."""
    if _TAKES_LISTS:
        torch.autograd.graph.increment_version(params)  # 0.1 us each, not 0.4
    else:
        for p in params:
            torch.autograd.graph.increment_version(p)


def _kernel(p: Tensor) -> Callable[..., None] | None:
    """The kernel that serves a parameter: of the backend asked for, the best of its device; None: pure torch."""
    if not _tensors.is_plain(p) and not _tensors.has_memory(_tensors.local(p)):
        return None  # a fake tensor, or a subclass around others
    kernel = backends.kernel(OP, p)
    return None if kernel is _torch else kernel.step


def _implementation(group: Mapping[str, Any], p: Tensor, several: bool) -> Callable[..., None] | str:
    """A kernel's ``step(table, hyper)``, or the name of a torch implementation."""
    fused, foreach = group["fused"], group["foreach"]
    if fused or (fused is None and foreach is None):
        kernel = _kernel(p)
        if kernel is not None:
            return kernel
        if fused:
            raise RuntimeError(
                f"{NAME}: fused=True was asked for, but no kernel runs on {p.device} parameters of {p.dtype} here\n"
                + backends.explain(OP, p)
            )
    return "foreach" if foreach or (foreach is None and fused is None and several) else "single"


class SignSplitEMA(torch.optim.Optimizer):
    """Sign-split EMA, with the interface of ``torch.optim.AdamW``. Equations: the head of this module.

    Two means per parameter element, as AdamW has; 28 bytes of traffic per float32 element and step.

    Args:
        params: tensors, named tensors or groups. float32, float64, bfloat16 or float16; no two may share memory.
        lr: learning rate, a number or a tensor of one element.
        mode: ``"normalized"``, ``"paper"`` or ``"consolidate"``. Groups may differ in it and in all that follows.
        beta: decay b of the means in [0, 1). None: 0.9 in normalized, 0.99 in the others.
        kappa: resistance of the opposite side. None: 1; 30 in consolidate.
        eps: added to S where it divides.
        weight_decay: decoupled.
        lazy: a gradient of exactly zero leaves its element alone (never in paper).
        temperature: None; True observes (floor 1, cool 0.99, heat such that T settles at 1/2 in pure noise); or a
            mapping with ``floor``, ``cool`` and ``heat``.
        maximize: ascend.
        state_dtype: of the means: float32 (float64 for float64 parameters), bfloat16, or uint8: 8 bits and a float32
            scale per 256 elements, for parameters of 4096 elements or more (float32 for smaller ones).
        foreach: all tensors of a group end to end through torch operators; False and not fused: one tensor at a time.
        fused: one kernel for all tensors. None: where one serves, as :func:`kssm_kernels.explain` says. True: or raise.
        cryo: at least 1; divides the step of the whole group. ``state[p]["cryo"]``, float32 ``[rows]``, row by row.
        param_rounding: of bfloat16 parameters: ``"nearest"``, ``"stochastic"`` or ``"kahan"`` (with a buffer).
        state_rounding: of bfloat16 and 8-bit means: ``"nearest"`` or ``"stochastic"``. Nearest stalls for b above 0.99.
        seed: of stochastic rounding; the random number of an element depends on seed, step and place alone.
        differentiable: refused.

    State per parameter: ``positive``, ``negative`` (P, N, shaped like it) and what the options need. It moves between
    implementations and devices, keeps its dtypes, and a resumed run equals an uninterrupted one bit for bit.
    Implementations agree bit for bit in paper and normalized, for any number of threads; in consolidate up to the order
    of a sum. A GradScaler's ``found_inf`` and ``grad_scale`` are honoured inside. Under ``torch.compile`` the step runs
    as it is, outside the graph: nothing is compiled anew when the learning rate changes.

    Raises:
        TypeError, ValueError: a bad hyper-parameter, complex or sparse parameters, shared memory; in ``step`` and
            ``load_state_dict``, a state whose shape, dtype or device is not what its parameter wants (which a layer
            that grows in place must replace), named with both.
        RuntimeError: a sparse gradient, one of another shape or device, one without memory of its own (fake, or
            wrapped by functorch); ``fused=True`` where no kernel runs. NotImplementedError: 8 bits of a DTensor.

    >>> import torch
    >>> from kssm_kernels.optim import SignSplitEMA
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = SignSplitEMA([p], lr=0.25, beta=0.5, eps=0.0)
    >>> for gradient in (1.0, -2.0):
    ...     p.grad = torch.tensor([gradient, 0.0])
    ...     optimizer.step()
    >>> p.detach()
    tensor([0.8750, 1.0000])
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves unscaling and skipping to the step
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        mode: str = "normalized",
        beta: float | None = None,
        kappa: float | None = None,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        lazy: bool = True,
        temperature: bool | Mapping[str, float] | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
        fused: bool | None = None,
        *,
        cryo: float = 1.0,
        param_rounding: str = "nearest",
        state_rounding: str = "nearest",
        seed: int = 0,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError(f"{NAME}: differentiable=True is not supported: the step works in place, without a graph")
        defaults = {
            "lr": lr,
            "mode": mode,
            "beta": beta,
            "kappa": kappa,
            "eps": eps,
            "weight_decay": weight_decay,
            "lazy": lazy,
            "temperature": temperature,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "foreach": foreach,
            "fused": fused,
            "cryo": cryo,
            "param_rounding": param_rounding,
            "state_rounding": state_rounding,
            "seed": seed,
        }
        self._plans: dict[int, _table.Plan] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an older release, which lacked an option
            for name, value in self._options().items():
                group.setdefault(name, value)
        self._plans = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; what it leaves out takes the optimizer's value, and None the default of its own mode."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            resolve(group)
            for p in group["params"]:
                _tensors.check_param(p)
            _tensors.check_memory([(name, p) for p, (_, name) in self._names().items()])
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` of any implementation, on any device, has returned; dtypes stay as saved.

        An option that an older release did not save is as in the constructor. ``ValueError`` or ``TypeError``, and
        nothing changed, for another optimizer's dict, or state of other shapes or dtypes than these parameters want.
        """
        seen: list[Mapping[str, Any]] = []

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._check_saved(given)
            seen.append(given)

        def restore(_: torch.optim.Optimizer) -> None:
            saved = seen[-1]
            for number, p in self._saved_as(saved):
                if number in saved["state"]:
                    self.state[p] = _state.restored(p, saved["state"][number])
            for group in self.param_groups:
                resolve(group)

        # appended: it sees what the user's own hooks have made of the dict; prepended: theirs see the state restored
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _saved_as(self, saved: Mapping[str, Any]) -> list[tuple[Any, Tensor]]:
        """Each parameter's key in a state_dict, and the parameter."""
        keys = (key for group in saved["param_groups"] for key in group["params"])
        return list(zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True))

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raises for a state_dict that this optimizer cannot go on from, before anything is changed."""
        check_ours(saved)
        sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{NAME}: the saved groups have {sizes[0]} parameters, want {sizes[1]} as this optimizer's"
            )
        for group in saved["param_groups"]:
            resolve({**self._options(), **group})
        names = self._names()
        for key, p in self._saved_as(saved):
            if key in saved["state"]:
                _state.check(names[p][1], p, saved["state"][key], saved=True)

    def _options(self) -> dict[str, Any]:
        """What a group takes where it says nothing."""
        return {name: self.defaults[name] for name in OPTIONS if name in self.defaults}

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers that a scheduler has made numpy's are Python's, so that ``weights_only`` reads them."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update((name, plain(value)) for name, value in group.items())
        return saved

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss anew, with gradients, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    # not torch.compiler.disable, which would import the compiler along with this module
    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch's own optimizers use it, private as it is
    def _step_groups(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and float(found_inf):
            return
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(number, group, params, hyper_of(group, grad_scale, found_inf))
                _bump(params)

    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor], hyper: Hyper) -> None:
        plan = self._plans.get(number)
        if (
            plan is not None
            and plan.runs[0][2] is _implementation(group, params[0], True)
            and plan.renewed(_options(group), params)
        ):
            self._count(plan.states, hyper)
            for _, table, kernel in plan.runs:
                kernel(table, hyper)
            return
        self._plans.pop(number, None)
        names = self._names()
        states: list[dict[str, Any]] = [self.state[p] for p in params]
        tensors = []
        for p, state in zip(params, states, strict=True):
            assert p.grad is not None
            _tensors.check_param(p)
            tensors.append(_state.tensors_of(p, p.grad, state, group, *names[p]))
        _tensors.check_memory([x for p, s in zip(params, states, strict=True) for x in _state.named(names[p][1], p, s)])
        buckets = _table.bucketed(tensors)
        chosen = [_implementation(group, params[b[0]], len(params) > 1) for b in buckets]
        # all tables, with their checks, before anything is stepped
        work = [
            (bucket, _table.Table.of([tensors[i] for i in bucket]) if callable(how) else None, how)
            for bucket, how in zip(buckets, chosen, strict=True)
        ]
        self._count(states, hyper)
        runs: list[tuple[list[int], _table.Table, Callable[..., None]]] = []
        for bucket, made, how in work:
            if callable(how) and made is not None:
                runs.append((bucket, made, how))
                how(made, hyper)
            elif hyper.found_inf is None or not float(hyper.found_inf):
                advance = _torch.foreach if how == "foreach" else _torch.single_tensor
                advance([tensors[i] for i in bucket], hyper)
        plain = [_write_back(p, t, state) for p, t, state in zip(params, tensors, states, strict=True)]
        if all(plain) and len(runs) == len(buckets) > 0:
            self._plans[number] = _table.Plan(_options(group), params, states, runs)

    def _names(self) -> dict[Tensor, tuple[int, str]]:
        """Of each parameter its place in the optimizer, the number of its random stream, and what errors call it."""
        found: dict[Tensor, tuple[int, str]] = {}
        for group in self.param_groups:
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                found[p] = (len(found), f"parameter {len(found)}" + (f" {names[i]!r}" if names else ""))
        return found

    def _count(self, states: list[dict[str, Any]], hyper: Hyper) -> None:
        """Counts the step for the random words; a step that found_inf skips does not count."""
        steps = [state["step"] for state in states if "step" in state]
        if not steps:
            return
        if hyper.found_inf is None or hyper.found_inf.device.type == "cpu":
            torch._foreach_add_(steps, 1)
        else:
            done = (hyper.found_inf == 0).to(torch.int64)
            for step in steps:  # torch._foreach_add_ of a tensor waits for the device, and cannot be captured
                step.add_(done.to(step.device))


def _write_back(p: Tensor, t: Tensors, state: dict[str, Any]) -> bool:
    """Copies back a parameter that was stepped as a copy; True if it and its gradient were stepped where they lie."""
    if _tensors.is_dtensor(p):
        if t.rms is not None:
            _state.share_rms(p, state)
        return False
    if not p.numel():
        return True
    order = state["positive"]
    if not _tensors.lies_like(p, order):
        p.copy_(t.p.as_strided(order.shape, order.stride()))
        return False
    return p.grad is not None and _tensors.lies_like(p.grad, order)


def _options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which tensors a step takes."""
    wanted = ("mode", "param_rounding", "state_rounding", "fused", "foreach")
    return (group["temperature"] is None, *(group[name] for name in wanted))

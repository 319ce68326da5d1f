"""The arguments of one scan, as both paths and every backend pass them, and their checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kssm_kernels.ops._dtypes import DTYPES
from kssm_kernels.ops._entry import EAGER, as_integer, as_number, check_dense, number_tensor, path_of

KINDS = "stuart_landau", "moebius"
MAX_HARMONICS = 32
MAX_OSCILLATORS = 1024
LEAK = 1 - 1e-6  # of the squared write gate, which a Stuart-Landau state loses


class Scan(NamedTuple):
    """B stands for any leading axes, D = heads * N; the first OPERANDS fields are differentiable."""

    p: Tensor  # [B, T, D]
    q: Tensor
    gate: Tensor
    phase: Tensor
    coupling: Tensor | None  # [B, T, G]
    forget: Tensor | None
    phase_lag: Tensor | None  # broadcasts to [B, G]
    initial_re: Tensor | None  # broadcasts to [B, D]
    initial_im: Tensor | None
    communities: Tensor | None  # C [M, D]
    feedback: Tensor | None  # U [4 D + G, 2 M] with forget, [4 D, 2 M] without
    listen: Tensor | None  # k [B, T, M]
    reset: Tensor | None  # [B, T], bool
    kind: str
    heads: int
    harmonics: int
    tied_leak: bool
    every: int  # what is kept for backward: the states after steps every, 2 every, ...; 0: none
    exact: bool  # whether the parallel form over time is ruled out

    @property
    def batch_shape(self) -> torch.Size:
        return self.p.shape[:-2]

    @property
    def steps(self) -> int:
        return self.p.shape[-2]

    @property
    def oscillators(self) -> int:
        """N, of one head."""
        return self.p.shape[-1] // self.heads

    @property
    def compute(self) -> torch.dtype:
        return DTYPES[self.p.dtype][1]


OPERANDS = 12
SEQUENCES = 6  # p, q, gate, phase, coupling, forget


class Grads(NamedTuple):
    """Gradients of the results: Z and the last state, and, where they were returned, the states. None: zero."""

    order_re: Tensor | None = None
    order_im: Tensor | None = None
    last_re: Tensor | None = None
    last_im: Tensor | None = None
    states_re: Tensor | None = None
    states_im: Tensor | None = None


def operands_of(s: Scan) -> tuple[Any, ...]:
    """The differentiable fields, one by one: torch.compile fails on a slice of a named tuple (torch 2.8)."""
    start = s.phase_lag, s.initial_re, s.initial_im
    return s.p, s.q, s.gate, s.phase, s.coupling, s.forget, *start, s.communities, s.feedback, s.listen


def keeping(s: Scan, every: int) -> Scan:
    """The same with another interval of kept states."""
    return Scan(*operands_of(s), s.reset, s.kind, s.heads, s.harmonics, s.tied_leak, every, s.exact)  # type: ignore[call-arg]  # as many


def any_requires_grad(s: Scan) -> bool:
    return any(operand is not None and operand.requires_grad for operand in operands_of(s))


def saved_shape(s: Scan) -> tuple[int, ...]:
    """Of the states that are kept; one of no axis but itself stands for none (``is_absent``)."""
    return (*s.batch_shape, s.steps // s.every, s.p.shape[-1]) if s.every else (0,)


def result_shapes(s: Scan) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of Z, the last state and the kept states, each of which comes twice (re, im)."""
    order = (*s.batch_shape, s.steps, s.heads, s.harmonics)
    return (order, s.p.dtype), ((*s.batch_shape, s.p.shape[-1]), s.compute), (saved_shape(s), s.compute)


# ---- checks ----


def _floating(op: str, name: str, value: Any, like: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    check_dense(op, name, value)
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on p's device {like.device}, got {value.device}")


def _shaped(op: str, name: str, value: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    if value.shape != wanted:
        raise ValueError(f"{op}: {name} must have shape [{letters}] = {tuple(wanted)}, got {tuple(value.shape)}")


def _broadcasts(op: str, name: str, value: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    own = value.shape
    last = wanted[len(wanted) - len(own) :]  # torch.compile (2.4) zips tuples of one length alone
    fits = len(own) <= len(wanted) and all(a in (1, b) for a, b in zip(own, last, strict=True))
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to [{letters}] = {tuple(wanted)}, got {tuple(own)}")


def checked(op: str, s: Scan) -> Scan:
    """The scan with Python's integers for NumPy's. Raises for a bad argument."""
    _floating(op, "p", s.p, None)
    if s.p.dim() < 2 or s.p.shape[-1] == 0:
        raise ValueError(f"{op}: p must have shape [..., T, D] with D >= 1, got {tuple(s.p.shape)}")
    for name in ("q", "gate", "phase"):
        value = getattr(s, name)
        _floating(op, name, value, s.p)
        _shaped(op, name, value, s.p.shape, "..., T, D")
    if s.kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(map(repr, KINDS))}, got {s.kind!r}")
    heads = as_integer(op, "heads", s.heads, 1, 2**31 - 1)
    width = s.p.shape[-1]
    if width % heads or width // heads > MAX_OSCILLATORS:
        wanted = f"must divide D = {width} into heads of 1 to {MAX_OSCILLATORS} oscillators"
        raise ValueError(f"{op}: heads {wanted}, got {heads}")
    harmonics = as_integer(op, "harmonics", s.harmonics, 0, MAX_HARMONICS)
    batch_shape = s.p.shape[:-2]
    for name in ("coupling", "forget"):
        value = getattr(s, name)
        if value is not None:
            _floating(op, name, value, s.p)
            _shaped(op, name, value, (*s.p.shape[:-1], heads), "..., T, G")
    if s.phase_lag is not None:
        _floating(op, "phase_lag", s.phase_lag, s.p)
        _broadcasts(op, "phase_lag", s.phase_lag, (*batch_shape, heads), "..., G")
        if s.coupling is None:
            raise ValueError(f"{op}: phase_lag is that of the coupling, which is None")
    if (s.initial_re is None) != (s.initial_im is None):
        raise ValueError(f"{op}: initial_state must be a pair of tensors or None, got one tensor and None")
    for part, value in (("0", s.initial_re), ("1", s.initial_im)):
        if value is not None:
            _floating(op, f"initial_state[{part}]", value, s.p)
            _broadcasts(op, f"initial_state[{part}]", value, (*batch_shape, width), "..., D")
    if s.tied_leak and (s.kind != "stuart_landau" or s.coupling is None or s.forget is not None):
        got = f"kind={s.kind!r}, coupling {_given(s.coupling)}, forget {_given(s.forget)}"
        raise ValueError(f"{op}: tied_leak is for stuart_landau with coupling and without forget, got {got}")
    if s.reset is not None:
        if not isinstance(s.reset, Tensor) or s.reset.dtype != torch.bool:
            kind = s.reset.dtype if isinstance(s.reset, Tensor) else type(s.reset).__name__
            raise TypeError(f"{op}: reset must be a bool tensor, got {kind}")
        if s.reset.device != s.p.device:
            raise ValueError(f"{op}: reset must be on p's device {s.p.device}, got {s.reset.device}")
        _shaped(op, "reset", s.reset, s.p.shape[:-1], "..., T")
    every = as_integer(op, "save", s.every, 0, 2**31 - 1)
    _check_feedback(op, s, heads)
    return Scan(*operands_of(s), s.reset, s.kind, heads, harmonics, s.tied_leak, every, s.exact)  # type: ignore[call-arg]  # as many


def _check_feedback(op: str, s: Scan, heads: int) -> None:
    if s.communities is None or s.feedback is None:
        if (s.communities, s.feedback, s.listen) != (None, None, None):
            raise ValueError(f"{op}: feedback must be (C, U, k) with tensors C and U, got None for one of them")
        return
    width = s.p.shape[-1]
    _floating(op, "feedback[0]", s.communities, s.p)
    if s.communities.dim() != 2 or s.communities.shape[0] == 0 or s.communities.shape[1] != width:
        raise ValueError(f"{op}: feedback[0] must have shape [M, D = {width}], got {tuple(s.communities.shape)}")
    count = s.communities.shape[0]
    _floating(op, "feedback[1]", s.feedback, s.p)
    rows, letters = (4 * width, "4 D, 2 M") if s.forget is None else (4 * width + heads, "4 D + G, 2 M")
    _shaped(op, "feedback[1]", s.feedback, (rows, 2 * count), letters)
    if s.listen is not None:
        _floating(op, "feedback[2]", s.listen, s.p)
        _shaped(op, "feedback[2]", s.listen, (*s.p.shape[:-1], count), "..., T, M")


def _given(value: Tensor | None) -> str:
    return "None" if value is None else "given"


def heads_of(op: str, coupling: Any, forget: Any, heads: Any) -> int:
    """G, from the logits of a head or as a number."""
    given = [v.shape[-1] for v in (coupling, forget) if isinstance(v, Tensor) and v.dim()]
    if heads is None:
        if not given:
            raise ValueError(f"{op}: heads must be given where neither coupling nor forget says how many there are")
        return int(given[0]) if isinstance(given[0], Tensor) else given[0]  # torch.jit.trace has tensors for sizes
    return as_integer(op, "heads", heads, 1, 2**31 - 1)


def lag_tensor(op: str, p: Any, phase_lag: Any) -> Tensor | None:
    """None for a lag of zero."""
    if phase_lag is None or isinstance(phase_lag, Tensor) or not isinstance(p, Tensor) or p.dtype not in DTYPES:
        return phase_lag  # type: ignore[no-any-return]  # a tensor or None by now, or refused with p
    number = as_number(op, "phase_lag", phase_lag, "a number or a torch.Tensor")
    if type(number) in (float, int) and number == 0:
        return None
    return number_tensor(number, DTYPES[p.dtype][1], p.device)


def state_pair(op: str, name: str, state: Any) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{op}: {name} must be a pair of tensors (re, im) or None, got {type(state).__name__}")
    return state[0], state[1]


def feedback_of(op: str, feedback: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """C, U and k."""
    if feedback is None:
        return None, None, None
    if not isinstance(feedback, (tuple, list)) or len(feedback) != 3:
        raise TypeError(f"{op}: feedback must be (C, U, k) or None, got {type(feedback).__name__}")
    c, u, k = feedback
    if c is None or u is None:
        raise TypeError(f"{op}: feedback must be (C, U, k) with tensors C and U, got None for one of them")
    return c, u, k


def save_interval(op: str, save: Any) -> int:
    if isinstance(save, str):
        if save != "all":
            raise ValueError(f"{op}: save must be 'all' or a number of steps, got {save!r}")
        return 1
    return as_integer(op, "save", save, 1, 2**31 - 1)


def reset_of_documents(op: str, p: Any, cu_seqlens: Any) -> Tensor:
    """The reset mask of packed documents, whose first steps ``cu_seqlens[:-1]`` are.

    Values are checked where that costs no wait for a device.
    """
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
    ):
        got = (
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
        )
        raise TypeError(f"{op}: cu_seqlens must be an int32 or int64 tensor of one axis, got {got}")
    if not isinstance(p, Tensor) or p.dim() < 2 or p.shape[:-2].numel() != 1:
        got = str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__
        raise ValueError(f"{op}: cu_seqlens packs documents into one sequence, p of shape [1, T, D], got {got}")
    if cu_seqlens.device != p.device:
        raise ValueError(f"{op}: cu_seqlens must be on p's device {p.device}, got {cu_seqlens.device}")
    steps = p.shape[-2]
    if cu_seqlens.is_cpu and path_of((p, cu_seqlens)) is EAGER:
        marks = cu_seqlens.tolist()
        if len(marks) < 1 or marks[0] != 0 or marks[-1] != steps or marks != sorted(marks):
            shown = f"{marks[:4]} ... {marks[-2:]}" if len(marks) > 6 else str(marks)
            raise ValueError(f"{op}: cu_seqlens must grow from 0 to T = {steps}, got {shown}")
    mask = torch.zeros(steps + 1, dtype=torch.bool, device=p.device)  # an empty last document begins behind the end
    return mask.index_fill(0, cu_seqlens[:-1].long(), True)[:steps].reshape(p.shape[:-1])

"""Oscillator scan: heads of coupled oscillators whose state runs through a sequence, read out by order parameters.

G heads of N oscillators, complex state z, D = G N. A step's inputs are, for each oscillator, a write p + i q, a gate
logit and a phase advance phi; for each head, a coupling logit k and a forget logit l. The field and the readout see v:

    g = sigmoid(gate),  d = g (p + i q),  f = sigmoid(l) or 0,  Z(t-1) = (1/N) sum_j v_j(t-1) of a head

    stuart_landau   lam = sqrt(1 - (1 - 1e-6) g^2) (1 - f) exp(i phi),  K = sigmoid(k),  v = u = z / sqrt(1 + |z|^2)
                    z(t) = lam z(t-1) + d + K exp(-i alpha) Z(t-1)        (tied leak: lam (1 - K), no f)
    moebius         lam = (1 - g) (1 - f) exp(i phi),  K = log(1 + exp(k)),  v = z
                    a = d + K exp(-i alpha) Z(t-1),  w = a / sqrt(1 + |a|^2),  s = lam z(t-1)
                    z(t) = (s + w) / (1 + conj(w) s)
    readout         Z_n(t) = (1/N) sum_j v_j(t)^n,  n = 1..H

Closed loop: M communities, signed sums over all D oscillators, move what the next step is made of. C [M, D] and
U [4 D + G, 2 M] ([4 D, 2 M] without a forget gate) are real, K' = sigmoid(k) of logits k of [T, M], or 1:

    Y(t-1) = C v(t-1),   F = [K' Re Y | K' Im Y],   (p, q, gate, phi, l)(t) += U F

The Moebius map is the exact solution of d theta/dt = Im(h exp(-i theta)) over a time of 1, where h has the angle of a
and |h| = 2 arsinh |a|. As |w| < 1, it takes the unit disc onto itself (S. Watanabe, S. H. Strogatz, Physica D 74
(1994); E. Ott, T. M. Antonsen, Chaos 18 (2008)). Where rounding leaves |z| > 1 the state is scaled back, its gradient
unchanged.

The adjoint, with gX = dL/dRe X + i dL/dIm X and everything recomputed from z(t-1) and the inputs:

    readout         gv += (1/N) sum_n n conj(v)^(n-1) gZ_n
                    u = z r, r = 1 / sqrt(1 + |z|^2):  gz += r (gu - u Re(conj(u) gu))
    stuart_landau   gd = gs = gF = gz,   s = lam z(t-1)
    moebius         x = n / c, n = s + w, c = 1 + conj(w) s:  gn = gx / conj(c),  gc = -gn conj(x),  gs = gn + gc w,
                    gw = gn + conj(gc) s;   w = a r:  gd = gF = ga = r (gw - w Re(conj(w) gw))
    coupling        with e = exp(-i alpha), F = K e Z, gF summed over the head:  gK = Re(conj(e Z) gF),
                    galpha = -Im(conj(F) gF),   gv_j(t-1) += K conj(e) gF / N
    both kinds      gz(t-1) += gs conj(lam),   rho = Re(gs conj(s)),   gphi = Im(gs conj(s)),   gp + i gq = g gd
                    gl = -f sum_j rho;   tied leak: gk -= K sum_j rho
                    ggate = (1-g) Re(conj(d) gd) - g rho
                    (stuart_landau: - (1-1e-6) g^2 (1-g) rho / (1 - (1-1e-6) g^2) in place of - g rho)
    closed loop     a: the gradients of (p, q, gate, phi, l);  gF = U^T a,  gY = K' gF as complex numbers,
                    gv(t-1) += C^T gY,   gk = K' (1 - K') Re(conj(Y) gF)
                    gU = sum_t a F^T,   gC = sum_t Re(gY conj(v(t-1))^T)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kssm_kernels import backends
from kssm_kernels.ops._entry import EAGER, backward_path_of, is_traced, path_of, refuse_second_derivative
from kssm_kernels.ops._memory import whole
from kssm_kernels.ops._registered import is_absent, registered
from kssm_kernels.ops.oscillator_scan import _tangent, _vmap
from kssm_kernels.ops.oscillator_scan._parallel import runs_parallel as runs_parallel
from kssm_kernels.ops.oscillator_scan._scan import (
    OPERANDS,
    Grads,
    Scan,
    any_requires_grad,
    checked,
    feedback_of,
    heads_of,
    keeping,
    lag_tensor,
    operands_of,
    reset_of_documents,
    result_shapes,
    save_interval,
    state_pair,
)

SCAN, STEP = "oscillator_scan", "oscillator_step"

State = tuple[Tensor, Tensor]  # (re, im)
Feedback = tuple[Tensor, Tensor, Tensor | None]  # (C, U, k)
Results = tuple[Tensor, ...]  # Z, last state, kept states: (re, im) of each


# ---- the eager path ----


class _OscillatorScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], keep_states: bool, *operands: Any) -> Results:
        s = Scan(*operands, *rest)
        kernel = backends.kernel(SCAN, s.p)
        results: Results = kernel.forward(s)
        ctx.set_materialize_grads(False)
        ctx.context = kernel, rest[1:]
        ctx.save_for_backward(*operands, rest[0], *results[4:])
        return results if keep_states else results[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, states_re, states_im = ctx.saved_tensors
        kernel, rest = ctx.context
        s, needed = Scan(*tensors, *rest), ctx.needs_input_grad[2:]
        given = Grads(*grads)
        with torch.no_grad():
            if backward_path_of((*tensors, *grads)) is EAGER:
                results = _gradients(kernel, s, states_re, states_im, given, needed)
            else:
                made = _adjoint(*s, states_re, states_im, *given, list(needed))
                results = [r if need else None for r, need in zip(made, needed, strict=True)]
        return None, None, *refuse_second_derivative(SCAN, tuple(results), (*tensors, *grads))


def _rest(s: Scan) -> tuple[Any, ...]:
    """What follows the operands."""
    return tuple(s[OPERANDS:])


def _gradients(
    kernel: Any, s: Scan, states_re: Tensor, states_im: Tensor, grads: Grads, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Of the operands, in their shapes and dtypes; None where not needed."""
    if not s.every and s.steps:
        raise RuntimeError(f"{SCAN}: no states were kept for a backward pass")
    shapes = result_shapes(s)
    names = "Z", "the last state", "the states"
    kept = [whole(names[2], t, *shapes[2][:1], s.p, shapes[2][1]) for t in (states_re, states_im)]
    given = []
    for i, g in enumerate(grads):
        shape, dtype = shapes[i // 2]
        given.append(None if g is None else whole(f"the gradient of {names[i // 2]}", g, shape, s.p, dtype))
    results: list[Tensor | None] = kernel.backward(s, *kept, Grads(*given), needed)
    for i, (result, source) in enumerate(zip(results, operands_of(s), strict=True)):
        if result is not None and source is not None:
            if result.shape != source.shape:
                same = result.numel() == source.numel()  # only axes of length 1 differ
                result = result.reshape(source.shape) if same else result.sum_to_size(source.shape).contiguous()
            results[i] = result.to(source.dtype)
    return results


# ---- the dispatcher path; torch.ops hands in what nobody has checked ----


def _forward(*arguments: Any) -> Results:
    s = checked(SCAN, Scan(*arguments))
    return backends.kernel(SCAN, s.p).forward(s)  # type: ignore[no-any-return]  # tensors


def _backward(*arguments: Any) -> Results:
    s = checked(SCAN, Scan(*arguments[: len(Scan._fields)]))
    states_re, states_im, *grads, needed = arguments[len(Scan._fields) :]
    given = Grads(*(None if is_absent(g) else g for g in grads))
    results = _gradients(backends.kernel(SCAN, s.p), s, states_re, states_im, given, tuple(needed))
    return tuple(s.p.new_empty(0) if r is None else r for r in results)


def _eager(*arguments: Any) -> Results:
    s = Scan(*arguments)
    if torch.is_grad_enabled() and any_requires_grad(s):
        return _OscillatorScan.apply(_rest(s), True, *operands_of(s))  # type: ignore[no-any-return,no-untyped-call]  # no stub
    return backends.kernel(SCAN, s.p).forward(s)  # type: ignore[no-any-return]  # tensors


def _fake(*arguments: Any) -> Results:
    s = Scan(*arguments)
    return tuple(s.p.new_empty(shape, dtype=dtype) for shape, dtype in result_shapes(s) for _ in range(2))


_ARGUMENTS = (
    "Tensor p, Tensor q, Tensor gate, Tensor phase, Tensor? coupling, Tensor? forget, Tensor? phase_lag, "
    "Tensor? initial_re, Tensor? initial_im, Tensor? communities, Tensor? feedback, Tensor? listen, Tensor? reset, "
    "str kind, SymInt heads, SymInt harmonics, bool tied_leak, SymInt every, bool exact"
)
_OUTPUTS = "order_re", "order_im", "last_re", "last_im", "states_re", "states_im"
_evaluate, _adjoint = registered(
    SCAN,
    f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * len(_OUTPUTS))})",
    _forward,
    f"({_ARGUMENTS}, Tensor states_re, Tensor states_im, {', '.join(f'Tensor? g_{n}' for n in _OUTPUTS)}, "
    f"bool[] needed) -> ({', '.join(['Tensor'] * OPERANDS)})",
    _backward,
    outputs=_OUTPUTS,
    fake=_fake,
    tangents=_tangent.tangents,
    eager=_eager,
    vmap=_vmap.forward_rule,
    vmap_backward=_vmap.backward_rule,
)


# ---- the public ops ----


def _run(op: str, s: Scan, return_states: bool) -> Results:
    s = checked(op, s)
    if path_of((*operands_of(s), s.reset)) is not EAGER:
        # whether a gradient will be asked for is not known in a transformation's inner levels, nor of a trace
        needed = torch.is_grad_enabled() or return_states or is_traced()
        return _evaluate(*(s if needed else keeping(s, 0)))  # type: ignore[no-any-return]  # tensors
    if torch.is_grad_enabled() and any_requires_grad(s):
        return _OscillatorScan.apply(_rest(s), return_states, *operands_of(s))  # type: ignore[no-any-return,no-untyped-call]  # no stub
    if not return_states:
        s = keeping(s, 0)
    return backends.kernel(SCAN, s.p).forward(s)  # type: ignore[no-any-return]  # tensors


def oscillator_scan(
    p: Tensor,
    q: Tensor,
    gate: Tensor,
    phase: Tensor,
    coupling: Tensor | None = None,
    forget: Tensor | None = None,
    *,
    kind: str = "stuart_landau",
    heads: int | None = None,
    harmonics: int = 4,
    phase_lag: Tensor | float | None = None,
    tied_leak: bool = False,
    initial_state: State | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    feedback: Feedback | None = None,
    return_states: bool = False,
    save: str | int = "all",
    exact: bool = True,
) -> tuple[Any, ...]:
    """Runs G heads of N gated, coupled oscillators over T steps, and reads their order parameters at each.

    Equations. z is an oscillator's complex state, v what the readout and the other oscillators see of it. With the
    write gate ``g = sigmoid(gate)``, the write ``d = g (p + i q)``, the forget gate ``f = sigmoid(forget)``, or 0 where
    none is given, and the head's mean field ``Z = (1/N) sum_j v_j(t-1)``::

        stuart_landau   z(t) = sqrt(1 - (1 - 1e-6) g^2) (1 - f) exp(i phase) z(t-1) + d + K exp(-i phase_lag) Z
                        K = sigmoid(coupling),  v = z / sqrt(1 + |z|^2)
        moebius         z(t) = (s + w) / (1 + conj(w) s),  s = (1 - g) (1 - f) exp(i phase) z(t-1)
                        w = a / sqrt(1 + |a|^2),  a = d + K exp(-i phase_lag) Z,  K = log(1 + exp(coupling)),  v = z
        readout         Z_n(t) = (1/N) sum_j v_j(t)^n,  n = 1 .. harmonics

    With ``feedback = (C, U, k)`` the loop is closed: sums over communities of oscillators, Y = C v(t-1), move what the
    step is made of. [p | q | gate | phase | forget](t) becomes that plus ``U [K' Re Y | K' Im Y]``, K' = sigmoid(k).

    Args:
        p, q: real and imaginary part of what is written, ``[..., T, D]``, D = G N, T >= 0; the oscillators of a head
            lie side by side; dimensionless; any strides. float32, float64, bfloat16 or float16. p's dtype decides: the
            scan is computed in it, or in float32 for the last two. Other tensors may have another of the four, and are
            converted.
        gate: logit of the write gate g, ``[..., T, D]``.
        phase: advance of the phase in a step, radians, ``[..., T, D]``.
        coupling: logit k of the coupling strength, ``[..., T, G]``; None: no coupling.
        forget: logit of the forget gate f, ``[..., T, G]``; None: nothing is forgotten.
        kind: ``"stuart_landau"`` or ``"moebius"``.
        heads: G; needed where neither ``coupling`` nor ``forget`` is given. A head has 1 to 1024 oscillators.
        harmonics: H, how many order parameters a head has, 0 to 32.
        phase_lag: alpha, radians; a number, or a tensor that broadcasts to ``[..., G]``.
        tied_leak: for stuart_landau with coupling and without forget: z(t-1) is also multiplied by 1 - K.
        initial_state: (re, im), each broadcasting to ``[..., D]``; None: zero. For moebius, one outside of the unit
            disc is moved to its edge.
        reset: bool ``[..., T]``; true at t puts the initial state in place of z(t-1): a document begins at t.
        cu_seqlens: the same for documents packed into one sequence, ``[1, T, D]``, in place of ``reset``: int32 or
            int64 ``[documents + 1]``, the first step of each document, then T.
        feedback: (C, U, k): C ``[M, D]``, real and signed; U ``[4 D + G, 2 M]``, or ``[4 D, 2 M]`` without ``forget``,
            its rows in the order above; k ``[..., T, M]``, logits of how strongly a step listens to each community, or
            None, K' = 1. The coupling's logits are not moved.
        return_states: also return the state after every step.
        save: which states are kept for the backward pass: ``"all"``, or every S-th for an integer S; those between are
            then computed again. It changes no bit. With ``return_states`` all are kept.
        exact: False allows results that differ from the loop's by rounding. Only pure torch makes use of that: without
            coupling, where T >= 16 and B D <= 4096, B being the number of sequences, it goes over time in parallel; the
            loop is faster elsewhere. ``kssm_kernels.ops.oscillator_scan.runs_parallel`` says which form a shape takes.

    Returns:
        ``(Z_re, Z_im, (z_re, z_im))``: order parameters ``[..., T, G, H]`` in p's dtype, and the last state
        ``[..., D]`` in float32 (float64 for float64 p). With ``return_states`` also ``(z_re, z_im)``,
        ``[..., T, D]``. All are differentiable with respect to every tensor but ``reset`` and ``cu_seqlens``. If
        exact, a sequence that is cut and continued with its last state as the initial one gives the bits of the whole.

    Raises:
        TypeError, ValueError: bad argument, named with what was got and what was wanted.
        RuntimeError: a backend that cannot run here was asked for; a second derivative was asked for; a tensor's
            storage was freed under it.

    Source: K-SSM v4; S. Watanabe, S. H. Strogatz, Physica D 74 (1994), for the Moebius map.

    >>> import torch
    >>> from kssm_kernels import oscillator_scan
    >>> write = torch.zeros(1, 3, 4)
    >>> write[:, 0] = 1.0                                    # in the first of three steps
    >>> gate = torch.tensor([9.0, -9.0, -9.0]).reshape(1, 3, 1).expand(1, 3, 4)
    >>> quarter = torch.full((1, 3, 4), torch.pi / 2)        # each step turns the state by 90 degrees
    >>> re, im, last = oscillator_scan(write, 0 * write, gate, quarter, heads=2, harmonics=1)
    >>> [[round(x, 2) + 0.0 for x in part[0, :, 0, 0].tolist()] for part in (re, im)]
    [[0.71, 0.0, -0.71], [0.0, 0.71, 0.0]]
    """
    if cu_seqlens is not None:
        if reset is not None:
            raise ValueError(f"{SCAN}: reset and cu_seqlens say the same; give one of them, got both")
        reset = reset_of_documents(SCAN, p, cu_seqlens)
    initial, loop = state_pair(SCAN, "initial_state", initial_state), feedback_of(SCAN, feedback)
    count, every = heads_of(SCAN, coupling, forget, heads), 1 if return_states else save_interval(SCAN, save)
    lag = lag_tensor(SCAN, p, phase_lag)
    operands = p, q, gate, phase, coupling, forget, lag, *initial, *loop
    s = Scan(*operands, reset, kind, count, harmonics, tied_leak, every, exact)
    re, im, last_re, last_im, *states = _run(SCAN, s, return_states)
    return (re, im, (last_re, last_im), tuple(states)) if return_states else (re, im, (last_re, last_im))


def oscillator_step(
    p: Tensor,
    q: Tensor,
    gate: Tensor,
    phase: Tensor,
    coupling: Tensor | None = None,
    forget: Tensor | None = None,
    *,
    state: State | None = None,
    kind: str = "stuart_landau",
    heads: int | None = None,
    harmonics: int = 4,
    phase_lag: Tensor | float | None = None,
    tied_leak: bool = False,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor, State]:
    """One step of :func:`kssm_kernels.oscillator_scan`: state in, state out, at a cost that no past adds to.

    Equation: as there, for one t; the same bits. Hand each call the state that the one before returned.

    Args:
        p, q, gate, phase: as there, ``[..., D]``.
        coupling, forget: as there, ``[..., G]``.
        state: (re, im) before the step, each broadcasting to ``[..., D]``; None, at the beginning: zero.
        kind, heads, harmonics, phase_lag, tied_leak: as there.
        feedback: (C, U, k), as there, with k ``[..., M]`` or None.

    Returns:
        ``(Z_re, Z_im, (z_re, z_im))``: order parameters ``[..., G, H]`` and the state ``[..., D]`` after the step.

    Raises:
        TypeError, ValueError, RuntimeError: as there.

    >>> import torch
    >>> from kssm_kernels import oscillator_step
    >>> one, state = torch.ones(4), None
    >>> for _ in range(3):
    ...     re, im, state = oscillator_step(one, 0 * one, -9 * one, one, state=state, heads=1, harmonics=1)
    >>> re.shape, state[0].shape
    (torch.Size([1, 1]), torch.Size([4]))
    """

    def timed(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 0:
            raise ValueError(f"{STEP}: {name} must have shape [..., D], [..., G] or [..., M], got ()")
        return value.unsqueeze(-2) if isinstance(value, Tensor) else value

    re, im = state_pair(STEP, "state", state)
    count, lag = heads_of(STEP, coupling, forget, heads), lag_tensor(STEP, p, phase_lag)
    of_heads = timed("coupling", coupling), timed("forget", forget)
    write = timed("p", p), timed("q", q)
    gates = timed("gate", gate), timed("phase", phase)
    communities, weights, listen = feedback_of(STEP, feedback)
    loop = communities, weights, timed("feedback[2]", listen)
    s = Scan(*write, *gates, *of_heads, lag, re, im, *loop, None, kind, count, harmonics, tied_leak, 1, True)
    order_re, order_im, last_re, last_im, *_ = _run(STEP, s, False)
    return order_re.squeeze(-3), order_im.squeeze(-3), (last_re, last_im)

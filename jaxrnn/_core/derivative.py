"""The states of whole sequences and their one derivative rule.

The recurrence, with f and g elementwise over units and θ their parameters, such as the leak:

    a_t = W s_{t−1} + U x_t + b + drive_t,    s_{t−1} = g(h_{t−1}; θ),    h_t = f(a_t, h_{t−1}; θ)

Its derivative at each step consists of three diagonals around one matrix,

    p_t = ∂f/∂a,    k_t = ∂f/∂h,    q_{t−1} = g'(h_{t−1}),
    J_t = ∂h_t/∂h_{t−1} = diag(p_t) W diag(q_{t−1}) + diag(k_t),

(`_base/forms.py` lists them for each form). Masks and cuts are in them too: an invalid step has
p = 0 and k = 1, a cut step q = 0. The tangent of the states is a linear recurrence, forward in
time,

    dh_t = J_t dh_{t−1} + e_t
    e_t  = p_t (dW s_{t−1} + W (∂g/∂θ) dθ + dU x_t + U dx_t + db + ddrive_t) + (∂f/∂θ) dθ

where e is a few products over many steps at once. Its transpose is backpropagation through time:
the recurrence transposed, backward in time, followed by the products of e transposed, one over
many steps for the gradient of each parameter:

    λ_t = g_t + J_{t+1}ᵀ λ_{t+1},    δ_t = p_t λ_t            (λ_t = dL/dh_t, δ_t = dL/da_t)
    dL/dW = Σ δ_t s_{t−1}ᵀ,  dL/dU = Σ δ_t x_tᵀ,  dL/db = Σ δ_t,  dL/dx_t = Uᵀ δ_t
    dL/dθ = Σ (∂f/∂θ)ᵀ λ_t + Σ (∂g/∂θ)ᵀ Wᵀ δ_t

For α: ∂f/∂α is φ(a_t) − h_{t−1} in the rate form, where the forward pass saves φ(a), since dividing
h by α fails at 0. In the voltage form it is a_t − h_{t−1}, but a is not needed: with
G_W = Σ λ_t s_{t−1}ᵀ, G_U = Σ λ_t x_tᵀ and G_b = Σ λ_t, whose rows times α are dL/dW, dL/dU and
dL/db,

    dL/dα = rows of (W ∘ G_W) + rows of (U ∘ G_U) + b ∘ G_b + Σ λ_t (drive_t − h_{t−1}).

From top to bottom: the states and their registration with JAX; the Jacobians; the tangent; its
transpose; and the tangent in operations that JAX can differentiate, for higher orders.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._backends.select import choose
from jaxrnn._base import arithmetic, forms, masking
from jaxrnn._base.arithmetic import accumulation_dtype, cast, cast_like, like, product
from jaxrnn._base.masking import previous, select, valid_steps, without_padding
from jaxrnn._base.options import Options
from jaxrnn._core import forward, linear, remat, schedule, window
from jaxrnn._core.forward import Sequences, clean
from jaxrnn._jax import sharding
from jaxrnn._jax.batch_axes import run_loop
from jaxrnn._jax.linear_map import LinearMap
from jaxrnn._jax.primitive import jvp_of
from jaxrnn._types import Cell, CellGradients, Ids, leading_shape


class Tangents(NamedTuple):
    """Tangents, or gradients, of what the states depend on.

    None for what is constant, or not wanted. `state` is added to each h_t; its gradient is λ.
    """

    cell: Any
    xs: Any
    drive: jax.Array | None
    h0: jax.Array | None
    state: jax.Array | None = None


# The states. Jitted because an eager scan would be compiled in every call.
@partial(jax.jit, static_argnames="options")
def unroll(cell, xs, h0, lengths, mask, drive, cut=None, *, options: Options):
    """(h_last, hs) for checked arguments; derivatives are cut where `cut` is True."""
    cell, sequences, h0 = prepared(cell, xs, h0, lengths, mask, drive, options)
    sequences = sequences if cut is None else sequences._replace(cut=cut)
    if leading_shape(xs)[0] == 0:
        return h0, jnp.zeros((0, *h0.shape), h0.dtype)
    if options.checkpoint_every is None:
        return _valid_states(cell, sequences, h0, options)
    if lengths is not None:
        sequences = sequences._replace(mask=None)  # computed for one segment at a time
    return run_loop(partial(_checkpointed, options), cell, sequences, (h0, lengths))


def _checkpointed(options, cell, sequences, carry):
    # The carry and the weights are in the dtype of sums, so that gradients accumulate in it.
    h0, lengths = carry
    dtype, wide = h0.dtype, accumulation_dtype(h0.dtype)
    cell = cast(cell, wide)

    def segment(h, part, first):
        if lengths is not None:
            size = leading_shape(part.xs)[0]
            part = part._replace(mask=valid_steps(lengths, None, size, first))
        h, hs = _valid_states(cast(cell, dtype), part, h.astype(dtype), options)
        return h.astype(wide), hs

    every, reverse = options.checkpoint_every, options.reverse
    h_last, hs = remat.recomputed(segment, h0.astype(wide), sequences, every, reverse=reverse)
    return h_last.astype(dtype), hs


def prepared(cell, xs, h0, lengths, mask, drive, options) -> tuple[Cell, Sequences, jax.Array]:
    """The cell, sequences with masks and cuts, and h_0, in one dtype."""
    dtype, (time, *batch) = arithmetic.result_dtype(cell, xs, h0, drive), leading_shape(xs)
    if h0 is None:
        h0 = jnp.zeros((*batch, cell.W.shape[0]), dtype)
    cell, xs, h0, drive = cast((cell, xs, h0, drive), dtype)
    mask = valid_steps(lengths, mask, time)
    cut = None
    if options.truncate is not None:
        cut = masking.cut_steps(mask, (time, *batch), options.truncate, options.reverse)
    # A loop's carry keeps its type, so h_0 gets that of the states.
    cell, xs, h0, drive = sharding.varying_like((cell, xs, h0, drive), (xs, mask))
    if time:
        h0 = sharding.laid_out_as_state(h0, jax.tree.leaves(xs)[0][0], cell.U)
    return cell, Sequences(xs, drive, mask, cut), h0


def _valid_states(cell, sequences, h0, options):
    sequences = clean(sequences, cell.U.shape[1])
    h_last, (hs, _) = states(cell, sequences, h0, options)
    return h_last, without_padding(hs, sequences.mask)


def states(cell: Cell, sequences: Sequences, h0: jax.Array, options: Options):
    """(h_last, (hs, residuals)), with the derivative rule; frozen where the mask is False.

    h_last is a separate result, so that a loss of it alone has no cotangents of hs.
    """
    run, tangent = partial(forward.states, options), partial(_tangent, options)
    return run_loop(run, cell, sequences, h0, tangent)


def _tangent(options, arguments, results, tangents):
    """The derivative rule of `states`."""
    (cell, sequences, h0), (dcell, moved, dh0) = arguments, tangents
    dxs = None if isinstance(moved.xs, Ids) else moved.xs
    h_last, (hs, kept) = results
    known = cell, sequences._replace(hs=hs, kept=kept), h0
    moving = Tangents(dcell, dxs, moved.drive, dh0)
    dh_last, dhs = derivative(options, cell)(known, moving, like=(h_last, hs))
    # Derivatives of higher order do not use the residuals.
    return dh_last, (dhs, jax.tree.map(lambda _: None, kept))


def derivative(options: Options, cell: Cell) -> LinearMap:
    """(dh_last, dhs) as a linear map of the tangents, with a hand-written transpose."""
    push, pull, plain = _push_forward, _pull_back, _plain
    if options.window is not None:
        push, pull, plain = _push_in_window, _pull_in_window, _plain_in_window
    interpreted = options.device is not None and options.device.interpret
    effectful = interpreted or forms.has_effects(cell)
    push, pull, plain = (partial(f, options) for f in (push, pull, plain))
    return LinearMap(push, pull, plain, effectful)


# The Jacobians: this is where the derivative of a step is formed.
class At(NamedTuple):
    """The recurrence linearised at some steps."""

    cell: Cell
    steps: Sequences
    h_prev: jax.Array
    s_prev: jax.Array  # g(h_prev), as a depends on it
    J: linear.Jacobians
    by_f: tuple  # (∂f/∂α, ∂f/∂θ) of each unit; None without such a parameter
    by_g: tuple | None  # (None, ∂g/∂θ) of each unit; None without such parameters


def _before(options, cell, steps, h_before):
    """h_{t−1}, and the h_{t−1} that g and W read."""
    h_prev = seen = previous(steps.hs, h_before, options.reverse)
    if steps.cut is not None:
        # The value is the same; the cut takes effect if JAX differentiates this.
        seen = jnp.where(steps.cut[..., None], lax.stop_gradient(h_prev), h_prev)
    if forms.has_output(cell):
        seen = select(steps.mask, seen, 0.5)  # any value but 0, where a slope may be infinite
    return h_prev, seen


def residuals(options, cell, steps, h0):
    """The residuals, with their dependence on the other arguments, for differentiating again."""

    def again(cell, steps, h0):
        s_prev = forms.output(cell, _before(options, cell, steps, h0)[1])
        weights = arithmetic.row_weights(cell, steps.xs, options.precision)
        a = arithmetic.preactivation(weights, steps.xs, s_prev, steps.drive)
        return cast(forms.kept(cell, s_prev, a, forms.inner(cell, a)), h0.dtype)

    @jax.custom_jvp
    def value(kept, *_):
        return kept

    @value.defjvp
    def _(primals, tangents):
        return value(*primals), jax.jvp(again, primals[1:], tangents[1:])[1]

    return value(steps.kept, cell, steps._replace(kept=None), h0)


def linearised(options: Options, cell: Cell, steps: Sequences, h_before: jax.Array) -> At:
    """The Jacobians J_t of these steps, and the factors of the parameters' tangents in e_t."""
    xs, drive, mask, cut, hs, kept = steps
    h_prev, seen = _before(options, cell, steps, h_before)
    slope_of, wide = forms.slope_of(cell), accumulation_dtype(hs.dtype)
    custom, voltage = forms.is_custom(cell), cell.form == "voltage"
    p = q = k = by_alpha = by_theta = by_g = None
    known = forms.Kept(forms.output(cell, seen)) if kept is None else cast(kept, wide)
    s_prev, a, on = known
    if kept is not None and forms.has_output(cell):
        s_prev = select(mask, s_prev, forms.output(cell, jnp.full_like(s_prev[:1], 0.5)))
    elif kept is not None and cut is None:
        h_prev = s_prev
    # a is recomputed if it is needed and was not saved.
    if known.a is None and (cell.leak is not None or (slope_of is forms.identity and not voltage)):
        weights = arithmetic.row_weights(cell, xs, options.precision)
        a = arithmetic.preactivation(weights, xs, s_prev, drive)
    moved: Any = a
    if custom:
        p, k, by_theta = forms.update_derivatives(cell, a, h_prev)
        q, by_g = forms.output_derivatives(cell, seen.astype(a.dtype))
    elif voltage:
        q = forms.slope_basis(cell, s_prev, seen.astype(s_prev.dtype))
    elif a is not None:
        if kept is None or slope_of is forms.identity:  # else a is φ(a), from the residuals
            moved = forms.function_of(cell)(a).astype(a.dtype)
        p = forms.slope_basis(cell, moved, a) if on is None else on
    else:
        p = hs
    if cell.leak is not None:
        by_alpha = moved - h_prev.astype(moved.dtype)
    if slope_of is forms.identity:  # a slope on an invalid step may be infinite
        p, q, k, by_theta, by_g = jax.tree.map(
            partial(without_padding, mask=mask), (p, q, k, by_theta, by_g)
        )
    J = linear.Jacobians(cell.W, cell.leak, p, q, k, mask, cut, slope_of, options)
    by_g = None if by_g is None else (None, by_g)
    return At(cell, steps, h_prev, s_prev, J, (by_alpha, by_theta), by_g)


def _tangent_of_a(at: At, tangents: Tangents) -> jax.Array:
    """The factor of p_t in e_t: a few products over all these steps."""
    dcell, precision = tangents.cell, at.J.options.precision
    da = jnp.zeros_like(at.steps.hs, accumulation_dtype(at.steps.hs.dtype))
    if dcell.U is not None:
        da += arithmetic.tangent_from_U(dcell.U, at.steps.xs, precision)
    if dcell.W is not None:
        da += product(at.s_prev, dcell.W.T, precision)
    if (ds := _along(at.by_g, _theta(dcell))) is not None:
        da += product(ds, at.cell.W.T, precision)
    if dcell.b is not None:
        da += like(dcell.b, da)
    if tangents.xs is not None:
        da += product(tangents.xs, at.cell.U.T, precision)
    return da if tangents.drive is None else da + tangents.drive


def _theta(cell: Cell) -> tuple:
    return cell.leak, cell.parameters


def _along(slopes: Any, dtheta: Any) -> Any:
    """(∂/∂θ) dθ of f or g at these steps; None if θ is constant."""
    if slopes is None:
        return None
    moved = jax.tree.map(
        lambda d, slope: None if d is None else like(d, slope) * slope,
        dtheta, slopes, is_leaf=lambda d: d is None,
    )  # fmt: skip
    terms = jax.tree.leaves(moved)
    return sum(terms[1:], terms[0]) if terms else None


def _sources(at: At, tangents: Tangents) -> jax.Array:
    e = at.J.after_W(_tangent_of_a(at, tangents))
    if (moved := _along(at.by_f, _theta(tangents.cell))) is not None:
        e += moved
    e = e if tangents.state is None else e + tangents.state
    return select(at.steps.mask, e, 0)


# The tangent, forward in time, segment by segment.
def _push_forward(options, known, tangents):
    cell, steps, h0 = known
    dtype = steps.hs.dtype
    wide = accumulation_dtype(dtype)

    def segment(dh_before, part, start):
        steps, dxs, ddrive, dstate = part
        at = linearised(options, cell, steps, state_before(options, known, start, steps))
        moved = cast(Tangents(tangents.cell, dxs, ddrive, None, dstate), wide)
        dhs = linear.tangent_states(at.J, _sources(at, moved), dh_before)
        return dhs[options.last], dhs.astype(dtype)

    dh0 = jnp.zeros_like(h0, wide) if tangents.h0 is None else tangents.h0.astype(wide)
    length = segment_length(options, cell, steps.hs, h0)
    part = steps, tangents.xs, tangents.drive, tangents.state
    over = partial(remat.over_segments, segment, dh0, part, length, steps.hs)
    dh_last, dhs = over(reverse=options.reverse)
    return dh_last.astype(dtype), dhs


def state_before(options, known, start, steps):
    """The state before these steps in scan order; `start` is their first index."""
    (_, (*_, hs, _), h0), reverse = known, options.reverse
    t = start + steps.hs.shape[0] if reverse else start - 1
    inside = t < hs.shape[0] if reverse else t >= 0
    return jnp.where(inside, lax.dynamic_index_in_dim(hs, t, keepdims=False), h0)


def segment_length(options: Options, cell: Cell, hs, h0, widest: int = 0):
    """How many steps to process at once: fewer than all only for a scan on a CPU."""
    time, batch, size = hs.shape[0], h0.shape[:-1], hs.shape[-1]
    if choose(options, cell.W, batch, forms.slope_of(cell), cell.form) != "scan":
        return time
    return schedule.segment_length(time, batch, cell.U.shape[1], max(size, widest))


# Its transpose: backpropagation through time, segment by segment.
def _pull_back(options, known, cotangents, wanted):
    (cell, steps, h0), (g_last, g) = known, cotangents
    wide = accumulation_dtype(h0.dtype)

    def segment(carry, part, start):
        (steps, g), (from_later, sums) = part, carry
        h_before = state_before(options, known, start, steps)
        g = None if g is None else g.astype(wide)
        share = segment_gradient(options, cell, steps, h_before, g, from_later, wanted)
        sums = jax.tree.map(jnp.add, sums, share.cell)
        return (share.h0, sums), cast_like((share.xs, share.drive, share.state), per_step)

    per_step = wanted.xs, wanted.drive, wanted.state
    sums = jax.tree.map(jnp.zeros_like, _only(wanted.cell, cell))
    carry = cast((jnp.zeros_like(h0) if g_last is None else g_last, sums), wide)
    length = segment_length(options, cell, steps.hs, h0)
    (dh0, sums), (dxs, ddrive, dstate) = remat.over_segments(
        segment, carry, (steps, g), length, per_step, reverse=not options.reverse
    )
    grads = Tangents(sums, dxs, ddrive, None if wanted.h0 is None else dh0, dstate)
    return cast_like(grads, wanted)


def segment_gradient(options, cell, steps, h_before, g, from_later, wanted) -> Tangents:
    """Backpropagation through one segment: its contribution to each wanted gradient.

    `h_before` is the state before the segment in scan order, `g` is ∂L/∂h_t at fixed later states
    (None for 0), and `from_later` is the adjoint that later segments pass to its last state. They
    and the result are in the dtype of sums. Its h0 is the gradient of h_before, wanted or not.
    """
    at = linearised(options, cell, steps, h_before)
    both = jax.tree.leaves((wanted.state, _theta(wanted.cell)))  # λ and δ
    dh_before, adjoint = linear.adjoint_states(at.J, g, from_later, as_delta=not both)
    if both:
        adjoint = select(steps.mask, adjoint, 0)
    delta = at.J.after_W(adjoint) if both else adjoint
    dxs = None if isinstance(steps.xs, Ids) else _only(wanted.xs, steps.xs)
    of_a = partial(_tangent_of_a, at)
    moving = Tangents(_only(wanted.cell, cell), dxs, _only(wanted.drive, delta), None)
    if moving.cell.leak is not None and cell.form == "voltage":
        # First the sums of λ for all weights, which give dL/dα, then their rows times α.
        G = Tangents(replace(cell, leak=None), None, None, None)
        G = _transposed(of_a, G, adjoint).cell
        dcell = jax.tree.map(lambda x: like(cell.leak, x.T).T * x, G)
        dcell = replace(dcell, leak=_voltage_leak_gradient(at, G, adjoint))
        rest = moving._replace(cell=jax.tree.map(lambda _: None, cell))
        grads = _transposed(of_a, rest, delta)
        grads = grads._replace(cell=_only(wanted.cell, dcell))
    else:
        grads = _transposed(of_a, moving, delta)
        if jax.tree.leaves(theta := _theta(moving.cell)):
            of_f = _transposed(partial(_along, at.by_f), theta, adjoint)
            leak, parameters = jax.tree.map(jnp.add, of_f, _theta(grads.cell))
            grads = grads._replace(cell=replace(grads.cell, leak=leak, parameters=parameters))
    return grads._replace(h0=dh_before, state=_only(wanted.state, adjoint))


def _transposed(tangent, moving, cotangent):
    """The transpose: Σ δ_t s_{t−1}ᵀ, Σ δ_t x_tᵀ, Σ δ_t, Uᵀ δ_t; or Σ (∂f/∂θ)ᵀ λ_t."""
    moving = cast(moving, cotangent.dtype)
    if not jax.tree.leaves(moving):
        return moving
    return jax.linear_transpose(tangent, moving)(cotangent)[0]


def _voltage_leak_gradient(at, G, adjoint):
    W, U, b = cast((at.cell.W, at.cell.U, at.cell.b), adjoint.dtype)
    drive = 0 if at.steps.drive is None else at.steps.drive.astype(adjoint.dtype)
    rows = jnp.sum(W * G.W, -1) + jnp.sum(U * G.U, -1)
    rows = rows if b is None else rows + b * G.b
    per_step = adjoint * (drive - at.h_prev.astype(adjoint.dtype))
    beside = arithmetic.summed(per_step, at.cell.leak)
    return beside + (rows if at.cell.leak.ndim else jnp.sum(rows))


def _only(wanted, values):
    """`values`, with None wherever `wanted` is None."""
    return jax.tree.map(
        lambda w, v: None if w is None else v, wanted, values, is_leaf=lambda w: w is None
    )


# The tangent in operations that JAX differentiates, for the second order and beyond.
def _plain(options, known, tangents):
    def solve(at, e, dh0):
        if dh0 is not None:
            e = e.at[options.first].add(linear.times_first(at.J, dh0))
        return linear.solve(at.J, e)

    return _by_all_steps(options, known, tangents, solve)


def _by_all_steps(options, known, tangents, solve):
    cell, steps, h0 = known
    at = linearised(options, cell, steps._replace(kept=None), h0)
    moved = cast(tangents, accumulation_dtype(h0.dtype))
    dhs = solve(at, _sources(at, moved), moved.h0).astype(h0.dtype)
    return dhs[options.last], dhs


# With a window.
def _push_in_window(options, known, tangents):
    def solve(at, e, dh0):
        dh0 = jnp.zeros_like(known[2], e.dtype) if dh0 is None else dh0
        return window.tangent_states(at.J, e, dh0)

    return _by_all_steps(options, known, tangents, solve)


def _pull_in_window(options, known, cotangents, wanted):
    (_, steps, h0), (g_last, g) = known, cotangents
    moving = jax.tree.map(lambda w: w.update(dtype=accumulation_dtype(h0.dtype)), wanted)
    g_last = jnp.zeros_like(h0) if g_last is None else g_last
    g = jnp.zeros_like(steps.hs) if g is None else g
    push = partial(_push_in_window, options, known)
    return cast_like(jax.linear_transpose(push, moving)((g_last, g))[0], wanted)


def _plain_in_window(options, known, tangents):
    cell, (xs, drive, mask, _, hs, _), h0 = known
    constants = lax.stop_gradient((hs, h0))

    def recomputed(cell, xs, drive, h0, state):
        hs = window.recomputed(options, cell, (xs, drive, mask, state), h0, constants)
        return hs[options.last], hs

    if drive is None and tangents.drive is not None:
        drive = jnp.zeros_like(tangents.drive)
    state = None if tangents.state is None else jnp.zeros_like(tangents.state)
    dxs = Ids(None) if isinstance(xs, Ids) else tangents.xs  # pyright: ignore[reportArgumentType]
    leaves, tree = jax.tree.flatten((cell, xs, drive, h0, state))
    moved = tree.flatten_up_to((tangents.cell, dxs, *tangents[2:]))
    return jvp_of(lambda *leaves: recomputed(*jax.tree.unflatten(tree, leaves)), leaves, moved)[1]


# The public `bptt`, by the same rule.
@partial(jax.jit, static_argnames="options")
def bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, *, options: Options):
    """`CellGradients` for checked arguments."""
    arguments = Tangents(cell, None if isinstance(xs, Ids) else xs, drive, h0)
    cell, sequences, h0 = prepared(cell, xs, h0, lengths, mask, drive, options)
    sequences = clean(sequences, cell.U.shape[1])
    g = without_padding(dhs, sequences.mask).astype(h0.dtype)
    dh_last = jnp.zeros_like(h0) if dh_last is None else dh_last.astype(h0.dtype)
    if hs.shape[0] == 0:
        nothing = jax.tree.map(jnp.zeros_like, arguments)
        return CellGradients(nothing.cell, nothing.xs, dh_last, g, g)
    hs = masking.frozen_states(hs.astype(h0.dtype), h0, sequences.mask, options.reverse)
    values = cell, sequences, h0, hs, g, sharding.laid_out_like(dh_last, h0)
    cell, sequences, h0, hs, g, dh_last = sharding.varying_like(values, ())
    # δ is the gradient of a drive, even without one, and λ that of an addition to the states.
    dxs = None if isinstance(xs, Ids) else sequences.xs
    wanted = Tangents(cell, dxs, jnp.zeros_like(g), h0, jnp.zeros_like(g))
    push = partial(derivative(options, cell), (cell, sequences._replace(hs=hs), h0), like=(h0, g))
    (grads,) = jax.linear_transpose(push, wanted)((dh_last, g))
    return CellGradients(
        cell=cast_like(grads.cell, arguments.cell),
        xs=cast_like(grads.xs, arguments.xs),
        h0=grads.h0 if arguments.h0 is None else grads.h0.astype(arguments.h0.dtype),
        delta=grads.drive if arguments.drive is None else grads.drive.astype(arguments.drive.dtype),
        adjoint=grads.state,
    )

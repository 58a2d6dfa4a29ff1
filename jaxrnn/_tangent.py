"""The derivative of the recurrence, and its transpose, which is backpropagation through time.

Take the tangent of h_t = (1 − α) h_{t−1} + α φ(a_t),  a_t = U x_t + W h_{t−1} + b:

    dh_t = J_t dh_{t−1} + e_t,          J_t = (1 − α) I + α D_t W,   D_t = diag(φ'(a_t))
    e_t  = α D_t (dU x_t + U dx_t + dW h_{t−1} + db + ddrive_t) + dα (φ(a_t) − h_{t−1})

with dh_0 given. e is a few products over many steps at once, and what remains is a linear
recurrence, solved forward in time. The transpose of the whole is section 3.3: the same
recurrence transposed, backward in time, λ_t = g_t + J_{t+1}ᵀ λ_{t+1}, and then the products of e
transposed: one over those steps for the gradient of each parameter.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import _schedule
from jaxrnn._cell import Cell, Ids
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like
from jaxrnn._linear_map import LinearMap
from jaxrnn._padding import select
from jaxrnn._recurrence import (
    Jacobians,
    adjoint_states,
    apply_first,
    jacobians,
    previous,
    solve_linear,
    tangent_states,
)
from jaxrnn._segments import over_segments, starts
from jaxrnn._step import like, product


class Tangents(NamedTuple):
    """Of what the states depend on: tangents, gradients, or which of them are wanted.

    None for what does not move, or is not wanted.
    """

    cell: Cell
    xs: jax.Array | None
    drive: jax.Array | None
    h0: jax.Array | None


class Steps(NamedTuple):
    """What is known of each step."""

    xs: jax.Array | Ids
    drive: jax.Array | None
    mask: jax.Array | None
    hs: jax.Array  # frozen where the mask is False


class _At(NamedTuple):
    """The recurrence linearised at some steps."""

    cell: Cell
    steps: Steps
    h_prev: jax.Array
    J: Jacobians
    phi: jax.Array


def _linearised(cell: Cell, steps: Steps, h_before: jax.Array, reverse: bool) -> _At:
    h_prev = previous(steps.hs, h_before, reverse)
    J, phi = jacobians(cell, steps.xs, h_prev, steps.hs, steps.drive, steps.mask)
    return _At(cell, steps, h_prev, J, phi)


def _input_tangents(at: _At, tangents: Tangents) -> jax.Array:
    """dU x_t + U dx_t + dW h_{t−1} + db + ddrive_t: a few products over these steps at once."""
    dcell, dxs, ddrive, _ = tangents
    da = jnp.zeros_like(at.steps.hs, accumulation_dtype(at.steps.hs.dtype))
    if dcell.U is not None:
        da += _from_weights(dcell.U, at.steps.xs)
    if dcell.W is not None:
        da += product(at.h_prev, dcell.W.T)
    if dcell.b is not None:
        da += like(dcell.b, da)
    if dxs is not None:
        da += product(dxs, at.cell.U.T)
    return da if ddrive is None else da + ddrive


def _sources(at: _At, tangents: Tangents) -> jax.Array:
    """e of these steps."""
    e = at.J.scale(_input_tangents(at, tangents))
    if tangents.cell.leak is not None:
        e += like(tangents.cell.leak, e) * (at.phi - at.h_prev.astype(e.dtype))
    return select(at.steps.mask, e, 0)


def _leak_gradient(at: _At, leak: jax.Array, adjoint: jax.Array) -> jax.Array:
    """Σ λ_t (φ(a_t) − h_{t−1}), for all units or for each."""
    passed = select(at.steps.mask, adjoint * (at.phi - at.h_prev.astype(adjoint.dtype)), 0)
    return jnp.sum(passed, tuple(range(passed.ndim - 1)) if leak.ndim else None)


def _from_weights(dU, xs):
    if isinstance(xs, Ids):
        # A row of dUᵀ for each id; its transpose adds each delta to the row of its id.
        return dU.T.at[xs.ids].get(mode="fill", fill_value=0)
    return product(xs, dU.T)


def segment_gradient(
    cell: Cell,
    steps: Steps,
    h_before: jax.Array,
    g: jax.Array,
    from_later: jax.Array,
    wanted: Tangents,
    reverse: bool,
) -> Tangents:
    """Backpropagation through the steps of one segment: its share of each gradient.

    Args:
      cell: the `Cell`.
      steps: the segment's.
      h_before: the state before it, in scan order.
      g: ∂L/∂h_t at fixed later states, in the dtype of sums.
      from_later: what the later segments pass back to its last state.
      wanted: which gradients: those that are not None; of h0 it is that of h_before.
      reverse: whether time runs backward.

    Returns:
      The wanted gradients, in the dtype of sums; that of h0 in any case.
    """
    at = _linearised(cell, steps, h_before, reverse)
    leaky = cell.leak is not None
    dh_before, adjoint = adjoint_states(at.J, g, reverse, from_later, as_delta=not leaky)
    delta = select(steps.mask, at.J.scale(adjoint), 0) if leaky else adjoint
    moving = Tangents(
        cell=dataclasses.replace(_only(wanted.cell, cell), leak=None),
        xs=None if isinstance(steps.xs, Ids) else _only(wanted.xs, steps.xs),
        drive=_only(wanted.drive, delta),
        h0=None,
    )
    moving = cast(moving, delta.dtype)
    (found,) = jax.linear_transpose(partial(_input_tangents, at), moving)(delta)
    if cell.leak is not None and wanted.cell.leak is not None:
        leak = _leak_gradient(at, cell.leak, adjoint)
        found = found._replace(cell=dataclasses.replace(found.cell, leak=leak))
    return found._replace(h0=dh_before)


def _only(wanted, values):
    return jax.tree.map(
        lambda w, v: None if w is None else v, wanted, values, is_leaf=lambda w: w is None
    )


class _Known(NamedTuple):
    cell: Cell
    steps: Steps
    h0: jax.Array


def tangent_of_states(
    cell: Cell,
    steps: Steps,
    h0: jax.Array,
    tangents: Tangents,
    *,
    reverse: bool,
    time_axis: int = 0,
) -> jax.Array:
    """dh of all steps; linear in the tangents, and JAX may differentiate and transpose it.

    Time is axis number `time_axis` of steps, of tangents and of the result.
    """
    how = dict(reverse=reverse, time_axis=time_axis)
    run = LinearMap(partial(_forward, **how), partial(_backward, **how), partial(_plain, **how))
    return run(_Known(cell, steps, h0), tangents)


def _segments(known, reverse, time_axis) -> dict[str, Any]:
    _, steps, h0 = known
    length = _schedule.segment_length(steps.hs.shape[time_axis], h0.shape[:-1], h0.shape[-1])
    before = starts(steps.hs, h0, length, reverse, time_axis)
    return dict(before=before, length=length, time_axis=time_axis)


def _forward(known, tangents, *, reverse, time_axis):
    cell, steps, h0 = known
    dtype = steps.hs.dtype
    wide = accumulation_dtype(dtype)

    def segment(dh_before, now, h_before):
        steps, dxs, ddrive = now
        at = _linearised(cell, steps, h_before, reverse)
        given = cast(Tangents(tangents.cell, dxs, ddrive, None), wide)
        dhs = tangent_states(at.J, _sources(at, given), reverse, dh_before)
        return dhs[0 if reverse else -1], dhs.astype(dtype)

    dh0 = jnp.zeros_like(h0, wide) if tangents.h0 is None else tangents.h0.astype(wide)
    now = (steps, tangents.xs, tangents.drive)
    how = _segments(known, reverse, time_axis)
    return over_segments(segment, dh0, now, reverse=reverse, **how)[1]


def _backward(known, g, wanted, *, reverse, time_axis):
    cell, steps, h0 = known
    wide = accumulation_dtype(h0.dtype)

    def segment(carry, now, h_before):
        (steps, g), (from_later, sums) = now, carry
        g = g.astype(wide)
        share = segment_gradient(cell, steps, h_before, g, from_later, wanted, reverse)
        sums = jax.tree.map(jnp.add, sums, share.cell)
        outputs = cast_like((share.xs, share.drive), (wanted.xs, wanted.drive))
        return (share.h0, sums), outputs

    carry = cast(jax.tree.map(jnp.zeros_like, (h0, _only(wanted.cell, cell))), wide)
    how = _segments(known, reverse, time_axis)
    (dh0, sums), (dxs, ddrive) = over_segments(
        segment, carry, (steps, g), reverse=not reverse, **how
    )
    found = Tangents(sums, dxs, ddrive, None if wanted.h0 is None else dh0)
    return cast_like(found, wanted)


def _plain(known, tangents, *, reverse, time_axis):
    def front(tree):
        return jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), tree)

    cell, steps, h0 = known
    dtype = steps.hs.dtype
    steps, xs, drive = front((steps, tangents.xs, tangents.drive))
    at = _linearised(cell, steps, h0, reverse)
    given = cast(Tangents(tangents.cell, xs, drive, tangents.h0), accumulation_dtype(dtype))
    e = _sources(at, given)
    if given.h0 is not None:
        e = e.at[-1 if reverse else 0].add(apply_first(at.J, given.h0, reverse))
    dhs = solve_linear(at.J, e, reverse)
    return jnp.moveaxis(dhs.astype(dtype), 0, time_axis)

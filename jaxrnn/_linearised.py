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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _sharding
from jaxrnn._cell import Cell, Ids
from jaxrnn._dtypes import accumulation_dtype, cast
from jaxrnn._implementation import Loops
from jaxrnn._jacobians import Jacobians, jacobians, previous
from jaxrnn._padding import select
from jaxrnn._recurrence import adjoint_states
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
    cut: jax.Array | None
    hs: jax.Array  # frozen where the mask is False


class At(NamedTuple):
    """The recurrence linearised at some steps."""

    cell: Cell
    steps: Steps
    h_prev: jax.Array
    seen: jax.Array  # h_prev as a depends on it
    J: Jacobians
    phi: jax.Array


def linearised(cell: Cell, steps: Steps, h_before: jax.Array, loops: Loops) -> At:
    """The Jacobians of these steps, and what the tangents of the parameters are multiplied by."""
    xs, drive, mask, cut, hs = steps
    seen = h_prev = previous(hs, h_before, loops.reverse)
    if cut is not None:
        # Of the same value: a cut shows where JAX differentiates this.
        seen = jnp.where(cut[..., None], lax.stop_gradient(h_prev), h_prev)
    J, phi = jacobians(cell, xs, seen, hs, drive, mask, cut, loops)
    return At(cell, steps, h_prev, seen, J, phi)


def _input_tangents(at: At, tangents: Tangents) -> jax.Array:
    """dU x_t + U dx_t + dW h_{t−1} + db + ddrive_t: a few products over these steps at once."""
    dcell, dxs, ddrive, _ = tangents
    precision = at.J.loops.precision
    da = jnp.zeros_like(at.steps.hs, accumulation_dtype(at.steps.hs.dtype))
    if dcell.U is not None:
        da += _from_weights(dcell.U, at.steps.xs, precision)
    if dcell.W is not None:
        da += product(at.seen, dcell.W.T, precision)
    if dcell.b is not None:
        da += like(dcell.b, da)
    if dxs is not None:
        da += product(dxs, at.cell.U.T, precision)
    return da if ddrive is None else da + ddrive


def sources(at: At, tangents: Tangents) -> jax.Array:
    """e of these steps."""
    e = at.J.scale(_input_tangents(at, tangents))
    if tangents.cell.leak is not None:
        e += like(tangents.cell.leak, e) * (at.phi - at.h_prev.astype(e.dtype))
    return select(at.steps.mask, e, 0)


def _leak_gradient(at: At, leak: jax.Array, adjoint: jax.Array) -> jax.Array:
    """Σ λ_t (φ(a_t) − h_{t−1}), for all units or for each."""
    passed = select(at.steps.mask, adjoint * (at.phi - at.h_prev.astype(adjoint.dtype)), 0)
    return jnp.sum(passed, tuple(range(passed.ndim - 1)) if leak.ndim else None)


def _from_weights(dU, xs, precision):
    if isinstance(xs, Ids):
        # A row of dUᵀ for each id; its transpose adds each delta to the row of its id.
        laid_out = _sharding.of_rows(dU.T, xs.ids)
        return dU.T.at[xs.ids].get(mode="fill", fill_value=0, out_sharding=laid_out)
    return product(xs, dU.T, precision)


def segment_gradient(
    cell: Cell,
    steps: Steps,
    h_before: jax.Array,
    g: jax.Array | None,
    from_later: jax.Array,
    wanted: Tangents,
    loops: Loops,
) -> Tangents:
    """Backpropagation through the steps of one segment: its share of each gradient.

    Args:
      cell: the `Cell`.
      steps: the segment's.
      h_before: the state before it, in scan order.
      g: ∂L/∂h_t at fixed later states, in the dtype of sums; None for 0.
      from_later: what the later segments pass back to its last state.
      wanted: which gradients: those that are not None; of h0 it is that of h_before.
      loops: how the loops are run, which way time runs among it.

    Returns:
      The wanted gradients, in the dtype of sums; that of h0 in any case.
    """
    at = linearised(cell, steps, h_before, loops)
    leaky = cell.leak is not None
    dh_before, adjoint = adjoint_states(at.J, g, from_later, as_delta=not leaky)
    delta = select(steps.mask, at.J.scale(adjoint), 0) if leaky else adjoint
    moving = Tangents(
        cell=dataclasses.replace(only(wanted.cell, cell), leak=None),
        xs=None if isinstance(steps.xs, Ids) else only(wanted.xs, steps.xs),
        drive=only(wanted.drive, delta),
        h0=None,
    )
    moving = cast(moving, delta.dtype)
    (found,) = jax.linear_transpose(partial(_input_tangents, at), moving)(delta)
    if cell.leak is not None and wanted.cell.leak is not None:
        leak = _leak_gradient(at, cell.leak, adjoint)
        found = found._replace(cell=dataclasses.replace(found.cell, leak=leak))
    return found._replace(h0=dh_before)


def only(wanted, values):
    """The values in the places of what is wanted, None in the others."""
    return jax.tree.map(
        lambda w, v: None if w is None else v, wanted, values, is_leaf=lambda w: w is None
    )

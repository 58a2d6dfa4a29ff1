"""The two loops of the library; everything else is matrix products outside them.

1. The nonlinear recurrence, forward in time:  h_t = (1 − α) h_{t−1} + α φ(a_t).
2. The linear recurrence, which is its derivative:  y_t = e_t + J_t y_{t−1},

       J_t = ∂h_t/∂h_{t−1} = (1 − α) I + α diag(φ'(a_t)) W,

   solved forward (the tangent) or transposed, backward in time (the adjoint, which is BPTT).

Steps where the mask is False are frozen: h_t = h_{t−1} and J_t = I.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._activation import resolve, slope
from jaxrnn._cell import Cell, Ids
from jaxrnn._fold import foldable
from jaxrnn._step import advance, like, preactivation, product, row_weights


def select(mask: jax.Array | None, valid: jax.Array, frozen: jax.Array | float) -> jax.Array:
    """`valid` where the mask `[...]` holds, `frozen` elsewhere, for values `[..., H]`."""
    return valid if mask is None else jnp.where(mask[..., None], valid, frozen)


def previous(hs: jax.Array, h0: jax.Array, reverse: bool) -> jax.Array:
    """h_{t−1} of every step, h_0 at the first in scan order."""
    if reverse:
        return jnp.concatenate([hs[1:], h0[None]])
    return jnp.concatenate([h0[None], hs[:-1]])


def states(
    cell: Cell,
    xs: jax.Array | Ids,
    h0: jax.Array,
    drive: jax.Array | None,
    mask: jax.Array | None,
    reverse: bool,
) -> jax.Array:
    """h_t of every step, frozen where the mask is False."""
    activation = resolve(cell.activation)

    def loop(weights, sequences, h0):
        def body(h_prev, now):
            x, drive, mask = now
            a = preactivation(weights, x, h_prev, drive)
            h = select(mask, advance(activation, weights.leak, a, h_prev), h_prev)
            return h, h

        return lax.scan(body, h0, sequences, reverse=reverse)[1]

    return foldable(loop)(row_weights(cell, xs), (xs, drive, mask), h0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Jacobians:
    """J_t of every step (or of one), never formed: `basis` holds what diag(φ') comes from.

    `slope_of(basis)` is φ'(a): for the Elman cell the basis is h itself, so that beyond
    inputs and parameters only h is kept, and φ' is recomputed inside the loops.
    """

    W: jax.Array
    leak: jax.Array | None
    basis: jax.Array
    mask: jax.Array | None
    slope_of: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})

    def scale(self, v: jax.Array) -> jax.Array:
        """α φ'(a) v: carries a tangent of a to one of h, or an adjoint of h to delta."""
        v = self.slope_of(self.basis.astype(v.dtype)) * v
        return v if self.leak is None else like(self.leak, v) * v

    def keep(self, v: jax.Array) -> jax.Array | float:
        """(1 − α) v: what the leak lets pass."""
        return 0.0 if self.leak is None else (1 - like(self.leak, v)) * v


def _times(J: Jacobians, W_T: jax.Array, y: jax.Array) -> jax.Array:
    """J y, for one step or for all; the transpose of W is formed once, outside the loop."""
    return select(J.mask, J.scale(product(y, W_T)) + J.keep(y), y)


def transposed_times(J: Jacobians, adjoint: jax.Array) -> jax.Array:
    """Jᵀ λ, for one step or for all."""
    return select(J.mask, product(J.scale(adjoint), J.W) + J.keep(adjoint), adjoint)


def jacobians(
    cell: Cell,
    xs: jax.Array | Ids,
    h_prev: jax.Array,
    hs: jax.Array,
    drive: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[Jacobians, jax.Array]:
    """J_t of every step, and φ(a_t), which is h_t itself where there is no leak.

    With a leak φ(a_t) is recomputed: divided out of h_t it would be lost at α = 0.
    """
    activation = resolve(cell.activation)
    slope_of = activation.derivative_from_output
    if cell.leak is None and slope_of is not None:
        return Jacobians(cell.W, None, hs, mask, slope_of), hs
    a = preactivation(row_weights(cell, xs), xs, h_prev, drive)
    phi = activation.function(a)
    if slope_of is not None:
        return Jacobians(cell.W, cell.leak, phi, mask, slope_of), phi
    return Jacobians(cell.W, cell.leak, slope(activation, phi, a), mask, _identity), phi


def _identity(x: jax.Array) -> jax.Array:
    return x


def first_step(J: Jacobians, reverse: bool) -> Jacobians:
    """J of the first step in scan order."""
    t = -1 if reverse else 0
    mask = None if J.mask is None else J.mask[t]
    return Jacobians(J.W, J.leak, J.basis[t], mask, J.slope_of)


def tangent_states(J: Jacobians, e: jax.Array, reverse: bool) -> jax.Array:
    """Solve y_t = e_t + J_t y_{t−1}, y_0 = 0, forward in time."""

    def loop(weights, sequences, y):
        W, leak = weights
        W_T = W.T

        def body(y, now):
            basis, mask, e = now
            y = e + _times(Jacobians(W, leak, basis, mask, J.slope_of), W_T, y)
            return y, y

        return lax.scan(body, y, sequences, reverse=reverse)[1]

    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, e), jnp.zeros_like(e[0]))


def adjoint_states(J: Jacobians, g: jax.Array, reverse: bool) -> jax.Array:
    """Solve λ_t = g_t + J_{t+1}ᵀ λ_{t+1}, λ_{T+1} = 0, backward in time: this is BPTT.

    With g_t = ∂L/∂h_t at fixed later states, λ_t = dL/dh_t through all of them. It is the
    source's double sum (section 3.3) with the sum over t > k taken once for all k.
    """

    def loop(weights, sequences, from_later):
        W, leak = weights

        def body(from_later, now):
            basis, mask, g = now
            adjoint = g + from_later
            J_t = Jacobians(W, leak, basis, mask, J.slope_of)
            return transposed_times(J_t, adjoint), adjoint

        return lax.scan(body, from_later, sequences, reverse=not reverse)[1]

    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, g), jnp.zeros_like(g[0]))


def solve_linear(J: Jacobians, e: jax.Array, reverse: bool) -> jax.Array:
    """The y of y_t = e_t + J_t y_{t−1}, differentiable to every order.

    Over all steps it is the system (I − J S) y = e, S the shift by one step. JAX transposes
    the forward solve into the adjoint one. `matvec` runs only in second and higher orders,
    where JAX differentiates the system itself: two solves more, and products of all steps.
    """

    def matvec(y):
        return y - _times(J, J.W.T, previous(y, jnp.zeros_like(y[0]), reverse))

    return lax.custom_linear_solve(
        matvec,
        e,
        solve=lambda _, e: tangent_states(J, e, reverse),
        transpose_solve=lambda _, g: adjoint_states(J, g, reverse),
    )


def solve_transposed(J: Jacobians, g: jax.Array, reverse: bool) -> jax.Array:
    """The λ of λ_t = g_t + J_{t+1}ᵀ λ_{t+1}, by the same transposed solve, differentiable too."""
    (adjoint,) = jax.linear_transpose(lambda e: solve_linear(J, e, reverse), g)(g)
    return adjoint


def apply_first(J: Jacobians, y0: jax.Array, reverse: bool) -> jax.Array:
    """J_1 y_0, what a tangent of h_0 brings to the first step."""
    J = first_step(J, reverse)
    return _times(J, J.W.T, y0)

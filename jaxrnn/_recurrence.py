"""The linear recurrence: the derivative of the other one, and its transpose.

    y_t = e_t + J_t y_{t−1},      J_t = ∂h_t/∂h_{t−1} = (1 − α) I + α diag(φ'(a_t)) W,

solved forward (the tangent) or transposed, backward in time (the adjoint, which is BPTT). Steps
where the mask is False are frozen: J_t = I. Where a step is cut, a_t does not depend on h_{t−1}:
J_t = (1 − α) I.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._activation import resolve, slope
from jaxrnn._cell import Cell, Ids
from jaxrnn._fold import foldable
from jaxrnn._padding import select
from jaxrnn._step import (
    like,
    preactivation,
    product,
    repeated_product,
    row_weights,
)


def previous(hs: jax.Array, h0: jax.Array, reverse: bool) -> jax.Array:
    """h_{t−1} of every step, h_0 at the first in scan order."""
    if reverse:
        return jnp.concatenate([hs[1:], h0[None]])
    return jnp.concatenate([h0[None], hs[:-1]])


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
    cut: jax.Array | None
    slope_of: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})

    def scale(self, v: jax.Array) -> jax.Array:
        """α φ'(a) v: carries a tangent of a to one of h, or an adjoint of h to delta."""
        v = self.slope_of(self.basis.astype(v.dtype)) * v
        return v if self.leak is None else like(self.leak, v) * v

    def keep(self, v: jax.Array) -> jax.Array | float:
        """(1 − α) v: what the leak lets pass."""
        return 0.0 if self.leak is None else (1 - like(self.leak, v)) * v

    def through_W(self, v: jax.Array) -> jax.Array:
        """v, the product with W or its transpose; 0 where the step is cut."""
        return v if self.cut is None else jnp.where(self.cut[..., None], 0, v)


def times(J: Jacobians, y: jax.Array, W_times: Callable | None = None) -> jax.Array:
    """J y, for one step or for all."""
    W_times = W_times or partial(product, matrix=J.W.T)
    return select(J.mask, J.scale(J.through_W(W_times(y))) + J.keep(y), y)


def jacobians(
    cell: Cell,
    xs: jax.Array | Ids,
    h_prev: jax.Array,
    hs: jax.Array,
    drive: jax.Array | None,
    mask: jax.Array | None,
    cut: jax.Array | None,
) -> tuple[Jacobians, jax.Array]:
    """J_t of every step, and φ(a_t), which is h_t itself where there is no leak.

    With a leak φ(a_t) is recomputed: divided out of h_t it would be lost at α = 0.
    """
    activation = resolve(cell.activation)
    slope_of = activation.derivative_from_output
    if cell.leak is None and slope_of is not None:
        return Jacobians(cell.W, None, hs, mask, cut, slope_of), hs
    a = preactivation(row_weights(cell, xs), xs, h_prev, drive)
    phi = activation.function(a)
    if slope_of is not None:
        return Jacobians(cell.W, cell.leak, phi, mask, cut, slope_of), phi
    return Jacobians(cell.W, cell.leak, slope(activation, phi, a), mask, cut, _identity), phi


def _identity(x: jax.Array) -> jax.Array:
    return x


def tangent_states(
    J: Jacobians, e: jax.Array, reverse: bool, y0: jax.Array | None = None
) -> jax.Array:
    """Solve y_t = e_t + J_t y_{t−1} forward in time, y_0 = 0 unless given."""
    slope_of = J.slope_of

    def loop(weights, sequences, y0):
        W, leak = weights
        W_times = repeated_product(W.T, y0.shape[:-1])

        def body(y, now):
            basis, mask, cut, e = now
            y = e + times(Jacobians(W, leak, basis, mask, cut, slope_of), y, W_times)
            return y, y

        return None, lax.scan(body, y0, sequences, reverse=reverse)[1]

    y0 = jnp.zeros_like(e[0]) if y0 is None else y0
    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, J.cut, e), y0)[1]


def adjoint_states(
    J: Jacobians,
    g: jax.Array | None,
    reverse: bool,
    from_later: jax.Array,
    *,
    as_delta: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Solve λ_t = g_t + J_{t+1}ᵀ λ_{t+1} backward in time: this is BPTT.

    With g_t = ∂L/∂h_t at fixed later states, λ_t = dL/dh_t through all of them. It is the
    source's double sum (section 3.3) with the sum over t > k taken once for all k.

    Args:
      J: of the steps.
      g: `[T, *batch, H]`; None for 0.
      reverse: whether time runs backward.
      from_later: J_{T+1}ᵀ λ_{T+1}, `[*batch, H]`.
      as_delta: return δ_t = α D_t λ_t, 0 on frozen steps, in place of λ_t.

    Returns:
      (J_1ᵀ λ_1, which is dL/dh_0; λ or δ).
    """
    slope_of = J.slope_of

    def loop(weights, sequences, from_later):
        W, leak = weights
        W_T_times = repeated_product(W, from_later.shape[:-1])

        def body(from_later, now):
            basis, mask, cut, g = now
            J_t = Jacobians(W, leak, basis, mask, cut, slope_of)
            adjoint = from_later if g is None else g + from_later
            delta = J_t.scale(adjoint)
            passed = J_t.through_W(W_T_times(delta)) + J_t.keep(adjoint)
            from_here = select(mask, passed, adjoint)
            return from_here, select(mask, delta, 0) if as_delta else adjoint

        return lax.scan(body, from_later, sequences, reverse=not reverse)

    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, J.cut, g), from_later)


def solve_linear(J: Jacobians, e: jax.Array, reverse: bool) -> jax.Array:
    """The y of y_t = e_t + J_t y_{t−1}, differentiable to every order.

    Over all steps it is the system (I − J S) y = e, S the shift by one step. JAX transposes
    the forward solve into the adjoint one, and differentiates the system itself by `matvec`: two
    solves more, and products of all steps.
    """

    def matvec(y):
        return y - times(J, previous(y, jnp.zeros_like(y[0]), reverse))

    return lax.custom_linear_solve(
        matvec,
        e,
        solve=lambda _, e: tangent_states(J, e, reverse),
        transpose_solve=lambda _, g: adjoint_states(J, g, reverse, jnp.zeros_like(g[0]))[1],
    )


def apply_first(J: Jacobians, y0: jax.Array, reverse: bool) -> jax.Array:
    """J_1 y_0, what a tangent of h_0 brings to the first step in scan order."""
    basis, mask, cut = jax.tree.map(lambda s: s[-1 if reverse else 0], (J.basis, J.mask, J.cut))
    return times(Jacobians(J.W, J.leak, basis, mask, cut, J.slope_of), y0)

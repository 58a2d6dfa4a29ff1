"""J_t = ∂h_t/∂h_{t−1} of the steps of a recurrence, as what multiplies a vector by it.

    J_t = (1 − α) I + α diag(φ'(a_t)) W

Steps where the mask is False are frozen: J_t = I. Where a step is cut, a_t does not depend on
h_{t−1}: J_t = (1 − α) I.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from jaxrnn._activation import resolve, slope
from jaxrnn._cell import Cell, Ids
from jaxrnn._implementation import Loops
from jaxrnn._padding import select
from jaxrnn._step import like, preactivation, product, row_weights


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
    loops: Loops = field(metadata={"static": True})

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
    W_times = W_times or partial(product, matrix=J.W.T, precision=J.loops.precision)
    return select(J.mask, J.scale(J.through_W(W_times(y))) + J.keep(y), y)


def apply_first(J: Jacobians, y0: jax.Array) -> jax.Array:
    """J_1 y_0, what a tangent of h_0 brings to the first step in scan order."""
    first = -1 if J.loops.reverse else 0
    basis, mask, cut = jax.tree.map(lambda s: s[first], (J.basis, J.mask, J.cut))
    return times(Jacobians(J.W, J.leak, basis, mask, cut, J.slope_of, J.loops), y0)


def jacobians(
    cell: Cell,
    xs: jax.Array | Ids,
    h_prev: jax.Array,
    hs: jax.Array,
    drive: jax.Array | None,
    mask: jax.Array | None,
    cut: jax.Array | None,
    loops: Loops,
) -> tuple[Jacobians, jax.Array]:
    """J_t of every step, and φ(a_t), which is h_t itself where there is no leak.

    With a leak φ(a_t) is recomputed: divided out of h_t it would be lost at α = 0.
    """
    activation, slope_of = resolve(cell.activation), slope_from_basis(cell)
    from_output = slope_of is not _identity
    if cell.leak is None and from_output:
        return Jacobians(cell.W, None, hs, mask, cut, slope_of, loops), hs
    a = preactivation(row_weights(cell, xs, loops.precision), xs, h_prev, drive)
    phi = activation.function(a)
    basis = phi if from_output else slope(activation, phi, a)
    return Jacobians(cell.W, cell.leak, basis, mask, cut, slope_of, loops), phi


def slope_from_basis(cell: Cell) -> Callable[[jax.Array], jax.Array]:
    """φ' as the loops find it: from φ(a), or where that does not give it, from itself."""
    return resolve(cell.activation).derivative_from_output or _identity


def _identity(x: jax.Array) -> jax.Array:
    return x

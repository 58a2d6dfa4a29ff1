"""The linear recurrence by `jax.lax.associative_scan`, in a depth that grows as log T.

Two steps in a row, y ← J₁ y + e₁ and y ← J₂ y + e₂, are one: y ← J₂ J₁ y + (J₂ e₁ + e₂). So
products of Jacobians are formed, `[T, *batch, H, H]` of them, H times the work of the scan: for
small H, long T, and hardware that waits rather than works.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Source: Martin and Cundy 2018, "Parallelizing linear recurrent neural nets over sequence
# length"; Blelloch 1990, "Prefix sums and their applications".


def tangent_states(J: Any, e: jax.Array, y0: jax.Array) -> tuple[Any, jax.Array]:
    """(None, all y_t = e_t + J_t y_{t−1}), with e `[T, *batch, H]` and y_0 `[*batch, H]`."""
    matrices, options = _matrices(J, e.dtype), J.options
    e = e.at[options.first].add(_apply(matrices[options.first], y0, options.precision))
    return None, _solve(matrices, e, options.reverse, options.precision)


def adjoint_states(J: Any, g: Any, from_later: jax.Array, *, as_delta: bool) -> tuple:
    """(J_1ᵀ λ_1, all λ_t = g_t + J_{t+1}ᵀ λ_{t+1}), backward in time.

    g is `[T, *batch, H]`, or None for 0, and from_later J_{T+1}ᵀ λ_{T+1}, `[*batch, H]`. With
    `as_delta` δ_t = diag(p_t) λ_t, 0 on frozen steps, stands in place of λ_t.
    """
    matrices = jnp.swapaxes(_matrices(J, from_later.dtype), -1, -2)
    last, later = J.options.last, J.options.first
    # λ_t reads the Jacobian of the step after it.
    shifted = jnp.roll(matrices, 1 if J.options.reverse else -1, 0)
    g = jnp.zeros((matrices.shape[0], *from_later.shape), from_later.dtype) if g is None else g
    g = g.at[last].add(from_later)
    adjoint = _solve(shifted.at[last].set(0), g, not J.options.reverse, J.options.precision)
    dh_before = _apply(matrices[later], adjoint[later], J.options.precision)
    if not as_delta:
        return dh_before, adjoint
    delta = J.after_W(adjoint)
    return dh_before, delta if J.mask is None else jnp.where(J.mask[..., None], delta, 0)


def _matrices(J: Any, dtype: jnp.dtype) -> jax.Array:
    """J_t of every step, `[T, *batch, H, H]`."""
    basis = next(x for x in (J.p, J.q) if x is not None)
    ones = jnp.ones_like(basis, dtype)
    shape = (*basis.shape, J.W.shape[1])
    identity = jnp.broadcast_to(jnp.eye(J.W.shape[0], dtype=dtype), shape)
    W = jnp.broadcast_to(J.W.astype(dtype), shape)
    found = J.after_W(ones)[..., None] * W * J.before_W(ones)[..., None, :]
    if not (J.leak is None and J.k is None):
        found += jnp.asarray(J.beside_W(ones))[..., None] * identity
    return found if J.mask is None else jnp.where(J.mask[..., None, None], found, identity)


def _apply(matrix, y, precision):
    return jnp.einsum("...ij,...j->...i", matrix, y, precision=precision)


def _solve(matrices, sources, reverse, precision):
    def then(earlier, later):
        (A, a), (B, b) = earlier, later
        return jnp.matmul(B, A, precision=precision), _apply(B, a, precision) + b

    return lax.associative_scan(then, (matrices, sources), reverse=reverse)[1]

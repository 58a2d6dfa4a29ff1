"""The linear recurrence by `jax.lax.associative_scan`, in a depth that grows as log T.

Two steps y ← J₁ y + e₁ and y ← J₂ y + e₂ compose to y ← J₂ J₁ y + (J₂ e₁ + e₂). This forms
`[T, *batch, H, H]` products of Jacobians, H times the work of the scan. It is for small H, long T
and hardware that is idle in a scan. On two CPU cores it took 1.0 to 1.4 times as long as the scan
at H ≤ 2 and 2 to 7 times at H = 4 to 32 (T = 1,000 to 100,000). If a product of Jacobians over half
of the steps overflows, the result is NaN, even where the scan's is finite because the gradient lies
in directions that decay.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Source: Martin and Cundy 2018, "Parallelizing linear recurrent neural nets over sequence
# length"; Blelloch 1990, "Prefix sums and their applications".


def tangent_states(J: Any, e: jax.Array, y0: jax.Array) -> tuple[Any, jax.Array]:
    """(None, y_t = e_t + J_t y_{t−1} for all t), with e `[T, *batch, H]` and y_0 `[*batch, H]`."""
    matrices, options = _matrices(J, e.dtype), J.options
    e = e.at[options.first].add(_apply(matrices[options.first], y0, options.precision))
    return None, _solve(matrices, e, options.reverse, options.precision)


def adjoint_states(J: Any, g: Any, from_later: jax.Array, *, as_delta: bool) -> tuple:
    """(J_1ᵀ λ_1, λ_t = g_t + J_{t+1}ᵀ λ_{t+1} for all t), as in `jaxrnn._core.linear`."""
    matrices = jnp.swapaxes(_matrices(J, from_later.dtype), -1, -2)
    last, later = J.options.last, J.options.first
    # λ_t uses the Jacobian of step t + 1.
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
    jacobians = J.after_W(ones)[..., None] * W * J.before_W(ones)[..., None, :]
    if not (J.leak is None and J.k is None):
        jacobians += jnp.asarray(J.beside_W(ones))[..., None] * identity
    return jacobians if J.mask is None else jnp.where(J.mask[..., None, None], jacobians, identity)


def _apply(matrix, y, precision):
    return jnp.einsum("...ij,...j->...i", matrix, y, precision=precision)


def _solve(matrices, sources, reverse, precision):
    def then(earlier, later):
        (A, a), (B, b) = earlier, later
        return jnp.matmul(B, A, precision=precision), _apply(B, a, precision) + b

    return lax.associative_scan(then, (matrices, sources), reverse=reverse)[1]

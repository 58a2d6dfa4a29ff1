"""The arithmetic of one step: products, dtypes of sums, layouts.

The source writes column vectors, `U x + W h + b`. Here features are the last axis, so that one line
serves a vector and any batch: `W h` is `h @ W.T`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._jax import sharding
from jaxrnn._types import Cell, Ids


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which sums accumulate: float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wide(ids: jax.Array) -> jax.Array:
    """Ids or lengths in at least 32 bits, so that any size can be compared with them."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def result_dtype(*trees: object) -> jnp.dtype:
    """The dtype to which JAX promotes all float leaves; ids and masks are ignored."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.result_type(*leaves)


def cast(tree, dtype: jnp.dtype):
    """Cast every float leaf; ids and masks are unchanged."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def cast_like(tree, template):
    """Cast every leaf to the dtype of the same leaf of `template`."""
    return jax.tree.map(lambda x, t: x.astype(t.dtype), tree, template)


def product(y: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """y @ matrix in the matrix's dtype, accumulated in float32 or better."""
    accumulate = accumulation_dtype(matrix.dtype)
    contracted = (((y.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        y.astype(matrix.dtype), matrix, contracted,
        precision=precision, preferred_element_type=accumulate,
    )  # fmt: skip


def repeated_product(
    matrix: jax.Array, precision: Any, weights_left: bool
) -> Callable[[jax.Array], jax.Array]:
    """`product` with one matrix, for the steps of a loop; as M yᵀ if `weights_left`."""
    if not weights_left:
        return lambda y: product(y, matrix, precision)
    left, accumulate = matrix.T, accumulation_dtype(matrix.dtype)

    def run(y):
        contracted = (((1,), (y.ndim - 1,)), ((), ()))
        y = y.astype(left.dtype)
        columns = lax.dot_general(
            left, y, contracted, precision=precision, preferred_element_type=accumulate
        )
        # Without the barrier XLA swaps the operands back to save the small transpose.
        return jnp.moveaxis(lax.optimization_barrier(columns), 0, -1)

    return run


def sum_outer(delta: jax.Array, x: jax.Array, precision: Any) -> jax.Array:
    """Σ δ_t x_tᵀ over time and batch: one product."""
    axes, x = tuple(range(delta.ndim - 1)), x.astype(delta.dtype)
    laid_out = sharding.of_outer(delta, x)
    contracted = ((axes, axes), ((), ()))
    return lax.dot_general(delta, x, contracted, precision=precision, out_sharding=laid_out)


def like(value: jax.Array, a: jax.Array) -> jax.Array:
    """A bias or a leak broadcast to the dtype and shape of a; the transpose sums in that dtype."""
    return jnp.broadcast_to(value.astype(a.dtype), a.shape)


def summed(per_step: jax.Array, parameter: jax.Array) -> jax.Array:
    """The gradient of a parameter, `[H]` or a scalar: the sum of `per_step` over the other axes."""
    return jnp.sum(per_step, tuple(range(per_step.ndim - 1)) if parameter.ndim else None)


class RowWeights(NamedTuple):
    """A cell's weights, transposed for products with row vectors: once, not in every step.

    XLA's CPU backend multiplies by a stored transpose faster than by a transposed operand.
    """

    U_T: jax.Array  # [D, H]; for ids [D + 1, H], with b in each row and NaN in the last
    W_T: jax.Array  # [H, H]
    b: jax.Array | None
    precision: Any  # of the products, static


def row_weights(cell: Cell, xs: jax.Array | Ids, precision: Any = None) -> RowWeights:
    """Transpose a cell's weights, for float inputs or for ids."""
    U_T = cell.U.T
    if isinstance(xs, Ids):
        rows = U_T.astype(accumulation_dtype(U_T.dtype))
        rows = rows if cell.b is None else rows + like(cell.b, rows)
        with jax.debug_nans(False):  # the row of NaN is intended
            U_T = jnp.concatenate([rows, jnp.full_like(rows, jnp.nan, shape=(1, rows.shape[1]))])
    return RowWeights(U_T, cell.W.T, cell.b, precision)


def from_inputs(
    weights: RowWeights, x: jax.Array | Ids, drive: jax.Array | None = None
) -> jax.Array:
    """U x + b + drive, the part of a that needs no state, for one step or for all."""
    if isinstance(x, Ids):
        # After `safe_ids`: an invalid id is the row of NaN.
        laid_out = sharding.of_rows(weights.U_T, x.ids)
        a = weights.U_T.at[x.ids].get(mode="promise_in_bounds", out_sharding=laid_out)
        return a if drive is None else a + drive.astype(a.dtype)
    return shifted(weights, product(x, weights.U_T, weights.precision), drive)


def shifted(weights: RowWeights, a: jax.Array, drive: jax.Array | None) -> jax.Array:
    """a + b + drive; b and drive may be None."""
    a = a if weights.b is None else a + like(weights.b, a)
    return a if drive is None else a + drive.astype(a.dtype)


def preactivation(
    weights: RowWeights, x: jax.Array | Ids, s_prev: jax.Array, drive: jax.Array | None = None
) -> jax.Array:
    """a = W s_prev + U x + b + drive, for one step or, as two products, for many at once."""
    return product(s_prev, weights.W_T, weights.precision) + from_inputs(weights, x, drive)


def tangent_from_U(dU: jax.Array, xs: jax.Array | Ids, precision: Any) -> jax.Array:
    """dU x. Its transpose is Σ δ xᵀ; for ids, the sum of δ over the steps of each id."""
    if isinstance(xs, Ids):
        laid_out = sharding.of_rows(dU.T, xs.ids)
        return dU.T.at[xs.ids].get(mode="fill", fill_value=0, out_sharding=laid_out)
    return product(xs, dU.T, precision)


def safe_ids(ids: jax.Array, size: int) -> Ids:
    """Replace every invalid id by `size`, the row after the last."""
    ids = wide(ids)
    valid = (ids >= 0) & (ids < size)
    return Ids(jnp.where(valid, ids, 0).astype(jnp.int32) + jnp.where(valid, 0, size))

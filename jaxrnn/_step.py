"""One step of the recurrence, and the arithmetic it shares with the loops.

The source writes column vectors, `U x + W h + b`. Here features stand last, so that the same
line serves one vector and any batch: `W h` is written `h @ W.T`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _checks, _schedule, _sharding
from jaxrnn._activation import Activation, resolve
from jaxrnn._cell import Cell, Ids, Readout, check_cell, check_inputs, check_readout
from jaxrnn._dtypes import accumulation_dtype, cast, result_dtype, wide
from jaxrnn._precision import check_precision


def product(y: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """y @ matrix in the matrix's dtype, accumulated in float32 or better."""
    how: dict[str, Any] = dict(precision=precision)
    how["preferred_element_type"] = accumulation_dtype(matrix.dtype)
    return jnp.matmul(y.astype(matrix.dtype), matrix, **how)


def repeated_product(
    matrix: jax.Array, batch: tuple[int, ...], precision: Any = None
) -> Callable[[jax.Array], jax.Array]:
    """`product` by one matrix for the steps of a loop, in the faster orientation."""
    if not _schedule.puts_weights_left(batch, *matrix.shape):
        return lambda y: product(y, matrix, precision)
    left, accumulate = matrix.T, accumulation_dtype(matrix.dtype)

    def run(y):
        contracted = (((1,), (y.ndim - 1,)), ((), ()))
        y = y.astype(left.dtype)
        found = lax.dot_general(
            left, y, contracted, precision=precision, preferred_element_type=accumulate
        )
        # Without the barrier, XLA turns the product around to spare the small transpose.
        return jnp.moveaxis(lax.optimization_barrier(found), 0, -1)

    return run


class RowWeights(NamedTuple):
    """A cell's weights as the products with row vectors want them, formed once, not per step.

    XLA's CPU back end multiplies by a stored transpose faster than by a transposed operand.
    """

    U_T: jax.Array  # [D, H]; for ids [D + 1, H], with b in each row and NaN in the last
    W_T: jax.Array  # [H, H]
    b: jax.Array
    leak: jax.Array | None
    precision: Any  # of the products, static


def row_weights(cell: Cell, xs: jax.Array | Ids, precision: Any = None) -> RowWeights:
    """Transpose a cell's weights, for float inputs or for ids."""
    U_T = cell.U.T
    if isinstance(xs, Ids):
        accumulate = accumulation_dtype(U_T.dtype)
        rows = U_T.astype(accumulate) + cell.b.astype(accumulate)[None]
        U_T = jnp.concatenate([rows, jnp.full_like(rows, jnp.nan, shape=(1, rows.shape[1]))])
    return RowWeights(U_T, cell.W.T, cell.b, cell.leak, precision)


def from_inputs(
    weights: RowWeights, x: jax.Array | Ids, drive: jax.Array | None = None
) -> jax.Array:
    """U x + b + drive, the part of a that needs no state, for one step or for all."""
    if isinstance(x, Ids):
        # The ids have been made safe: an invalid one names the row of NaN.
        laid_out = _sharding.of_rows(weights.U_T, x.ids)
        a = weights.U_T.at[x.ids].get(mode="promise_in_bounds", out_sharding=laid_out)
    else:
        a = product(x, weights.U_T, weights.precision)
        a += like(weights.b, a)
    return a if drive is None else a + drive.astype(a.dtype)


def preactivation(
    weights: RowWeights, x: jax.Array | Ids, h_prev: jax.Array, drive: jax.Array | None = None
) -> jax.Array:
    """a = U x + W h_prev + b + drive, for one step or, as two GEMMs, for all steps at once."""
    return product(h_prev, weights.W_T, weights.precision) + from_inputs(weights, x, drive)


def advance(
    activation: Activation, leak: jax.Array | None, a: jax.Array, h_prev: jax.Array
) -> jax.Array:
    """h = (1 − α) h_prev + α φ(a), in the dtype of h_prev."""
    phi = activation.function(a)
    if leak is not None:
        alpha = like(leak, phi)
        phi = (1 - alpha) * h_prev.astype(phi.dtype) + alpha * phi
    return phi.astype(h_prev.dtype)


def like(value: jax.Array, a: jax.Array) -> jax.Array:
    """A bias or a leak with the dtype and shape of `a`; its transpose sums in that dtype."""
    return jnp.broadcast_to(value.astype(a.dtype), a.shape)


def safe_ids(ids: jax.Array, size: int) -> Ids:
    """Send every invalid id to the row behind the last."""
    ids = wide(ids)
    valid = (ids >= 0) & (ids < size)
    return Ids(jnp.where(valid, ids, 0).astype(jnp.int32) + jnp.where(valid, 0, size))


def step(cell: Cell, x: jax.Array | Ids, h: jax.Array) -> jax.Array:
    """One step of the recurrence, the hidden state that follows `h`.

    h_t = (1 − α) h_{t−1} + α φ(U x_t + W h_{t−1} + b)

    Args:
      cell: the `Cell`.
      x: the input x_t, `[*batch, D]`, or `Ids` of shape `[*batch]`.
      h: the state h_{t−1}, `[*batch, H]`.

    Returns:
      h_t, `[*batch, H]`, in the result dtype of cell, x and h.

    Raises:
      TypeError: a dtype that is not floating, or bare integers as x.
      ValueError: shapes that do not fit, or an invalid id.

    Source: section 2, equation 1.

    >>> import jax, jaxrnn
    >>> cell = jaxrnn.init_cell(jax.random.key(0), 4, 3)
    >>> jaxrnn.step(cell, jax.numpy.ones(4), jax.numpy.zeros(3)).shape
    (3,)
    """
    cell = check_cell("cell", cell)
    hidden_size, input_size = cell.U.shape
    x = check_inputs("x", x, input_size, time=False)
    if isinstance(x, Ids):
        _checks.in_range("x.ids", x.ids, input_size)
        batch, x = x.ids.shape, safe_ids(x.ids, input_size)
    else:
        batch = x.shape[:-1]
    h = _checks.floating("h", h, (*batch, hidden_size))
    return _step(*cast((cell, x, h), result_dtype(cell, x, h)))


# Compiled, so that the row of NaN for invalid ids is no array that jax_debug_nans could see.
@jax.jit
def _step(cell, x, h):
    a = preactivation(row_weights(cell, x), x, h)
    return advance(resolve(cell.activation), cell.leak, a, h)


def apply_readout(readout: Readout, hs: jax.Array, *, precision: Any = None) -> jax.Array:
    """The output before the softmax, the logits.

    Ω_t = V h_t + c

    Args:
      readout: the `Readout`.
      hs: states, `[..., H]`, usually `[T, *batch, H]`.
      precision: of the product, as `jax.numpy.matmul` takes it.

    Returns:
      Logits, `[..., K]`, in the result dtype of readout and hs.

    Raises:
      TypeError: a dtype that is not floating.
      ValueError: shapes that do not fit; a precision that is none.

    Numerics: the product accumulates in float32 or better.

    Source: section 2, equation 2.
    """
    check_precision(precision)
    readout = check_readout("readout", readout)
    hs = _checks.floating("hs", hs)
    if hs.ndim < 1 or hs.shape[-1] != readout.V.shape[1]:
        _checks.bad_value("hs", f"shape [..., {readout.V.shape[1]}]", list(hs.shape))
    dtype = result_dtype(readout, hs)
    readout, hs = cast((readout, hs), dtype)
    logits = product(hs, readout.V.T, precision)
    return (logits + like(readout.c, logits)).astype(dtype)

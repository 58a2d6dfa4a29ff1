"""The public unroll, and the one derivative rule of the library."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxrnn import _checks
from jaxrnn._cell import Cell, Ids, check_cell, check_inputs, leading_shape
from jaxrnn._dtypes import cast, result_dtype
from jaxrnn._fold import foldable
from jaxrnn._padding import check_valid, valid_steps, without_padding
from jaxrnn._states import states
from jaxrnn._step import preactivation, row_weights, safe_ids
from jaxrnn._tangent import Steps, Tangents, tangent_of_states


def unroll(
    cell: Cell,
    xs: jax.Array | Ids,
    h0: jax.Array | None = None,
    *,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The hidden states of whole sequences, final state first.

    h_t = (1 − α) h_{t−1} + α φ(U x_t + W h_{t−1} + b + drive_t),  t = 1 … T,  h_0 given
    (α = 1 without a leak)

    Differentiable in cell, xs, h0 and drive, in every mode and to every order; under vmap a
    mapped axis costs what a batch axis does.

    Args:
      cell: the `Cell`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: first state, `[*batch, H]`; zeros by default.
      lengths: integers `[*batch]`, 0 … T: how many steps of each sequence are valid.
      mask: bool `[T, *batch]`: which steps are valid, for gaps anywhere. Not with `lengths`.
      drive: added to the pre-activation, `[T, *batch, H]`: noise, a perturbation, an input
        computed elsewhere. Its gradient is delta.
      reverse: run from t = T down to 1; hs stays aligned with xs.

    Returns:
      (h_last, hs): the state after the last valid step (h0 where there is none),
      `[*batch, H]`, and the states of all steps, `[T, *batch, H]`, 0 on invalid steps. The
      dtype is what JAX promotes xs (not Ids), h0, cell and drive to.

    Raises:
      TypeError: a dtype of the wrong kind; bare integers as xs.
      ValueError: shapes that do not fit, lengths outside 0 … T, lengths and mask together,
        an invalid id whose value can be seen (under jit the state becomes NaN).

    Numerics: in bfloat16 and float16 products and pre-activations are float32, each state is
    rounded once. Invalid steps may hold NaN or inf, their cotangents too: neither reaches
    anything. phi' is found from the state (tanh: (1 − h)(1 + h)), or for a plain callable
    from the recomputed pre-activation.

    Cost: two products a step forward, that with U for all steps at once where it pays, and
    one a step backward; the gradient of each parameter is one product over many steps. Beyond
    inputs and parameters only hs is kept, and what a segment of the steps needs.
    Outside jit, checking ids and lengths that lie on a device waits for them.

    Source: section 2, equation 1; section 3.3 for its derivative.

    >>> import jax, jaxrnn
    >>> cell = jaxrnn.init_cell(jax.random.key(0), input_size=4, hidden_size=3)
    >>> h_last, hs = jaxrnn.unroll(cell, jax.numpy.ones((7, 2, 4)))
    >>> h_last.shape, hs.shape
    ((2, 3), (7, 2, 3))
    """
    args = check_sequences(cell, xs, h0, lengths, mask, drive)
    return _unroll(*args, reverse=bool(reverse))


def check_sequences(cell, xs, h0, lengths, mask, drive):
    """Require arguments of `unroll` that fit each other; return them with jax arrays."""
    cell = check_cell("cell", cell)
    hidden_size, input_size = cell.U.shape
    xs = check_inputs("xs", xs, input_size, time=True)
    time, *batch = leading_shape(xs)
    if h0 is not None:
        h0 = _checks.floating("h0", h0, (*batch, hidden_size))
    if drive is not None:
        drive = _checks.floating("drive", drive, (time, *batch, hidden_size))
    lengths, mask = check_valid(lengths, mask, (time, *batch))
    if isinstance(xs, Ids):
        _checks.in_range("xs.ids", xs.ids, input_size, valid_steps(lengths, mask, time))
    return cell, xs, h0, lengths, mask, drive


def prepare(cell, xs, h0, lengths, mask, drive):
    """One dtype, h_0, one mask, safe ids, and nothing but zeros on invalid steps."""
    dtype = result_dtype(cell, xs, h0, drive)
    if h0 is None:
        h0 = jnp.zeros((*leading_shape(xs)[1:], cell.W.shape[0]), dtype)
    cell, xs, h0, drive = cast((cell, xs, h0, drive), dtype)
    mask = valid_steps(lengths, mask, leading_shape(xs)[0])
    xs, drive = jax.tree.map(lambda x: without_padding(x, mask), (xs, drive))
    if isinstance(xs, Ids):
        xs = safe_ids(xs.ids, cell.U.shape[1])
    if leading_shape(xs)[0]:
        cell, h0 = spread(cell, xs, h0, drive)
    return cell, xs, h0, drive, mask


def spread(cell, xs, h0, drive):
    """The same values, placed as the states will be.

    Adding zeros gives h_0 the sharding of a state and, inside shard_map, gives h_0 and the
    cell the axes over which states vary: the loops keep what they start from, and JAX adds
    up the cell's gradient over those axes here, once. XLA removes all of it.
    """
    now = jax.tree.map(lambda s: s[0], (xs, drive))
    a = preactivation(row_weights(cell, xs), now[0], h0, now[1])
    h0 = h0 + jnp.zeros_like(a, h0.dtype)
    zero = jnp.zeros_like(jnp.sum(a), h0.dtype)
    return jax.tree.map(lambda leaf: leaf + zero, cell), h0


# Compiled once per shape: a scan called eagerly would be compiled at every call.
@partial(jax.jit, static_argnames="reverse")
def _unroll(cell, xs, h0, lengths, mask, drive, *, reverse):
    cell, xs, h0, drive, mask = prepare(cell, xs, h0, lengths, mask, drive)
    if leading_shape(xs)[0] == 0:
        return h0, jnp.zeros((0, *h0.shape), h0.dtype)
    hs = recurrence(cell, (xs, drive, mask), h0, reverse)
    return hs[0 if reverse else -1], without_padding(hs, mask)


def recurrence(cell, sequences, h0, reverse):
    """The states of all steps, frozen where the mask is False: what JAX differentiates."""
    return _recurrence_at(reverse, 0, 1)(cell, sequences, h0)[1]


def _recurrence_at(reverse, time_axis, side_by_side):
    def loop(cell, sequences, h0, time_axis, copies):
        return None, _states(reverse, time_axis, side_by_side * copies, cell, sequences, h0)

    return foldable(loop, time_axis)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _states(reverse, time_axis, copies, cell, sequences, h0):
    return states(cell, sequences, h0, reverse=reverse, time_axis=time_axis, copies=copies)


@partial(_states.defjvp, symbolic_zeros=True)
def _states_jvp(reverse, time_axis, copies, primals, tangents):
    _, hs = _recurrence_at(reverse, time_axis, copies)(*primals)
    cell, sequences, h0 = primals
    tangents = jax.tree.map(_none_if_zero, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    dcell, (dxs, ddrive, _), dh0 = tangents
    if isinstance(dxs, Ids):
        dxs = None
    how = dict(reverse=reverse, time_axis=time_axis)
    moving = Tangents(dcell, dxs, ddrive, dh0)
    xs, drive, mask = sequences
    steps = Steps(xs, drive, mask, hs)
    return hs, tangent_of_states(cell, steps, h0, moving, **how)


def _none_if_zero(tangent):
    is_zero = isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0
    return None if is_zero else tangent

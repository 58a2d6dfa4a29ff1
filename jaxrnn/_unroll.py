"""The public unroll, and the one derivative rule of the library."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxrnn import _checks
from jaxrnn._cell import Cell, Ids, check_cell, check_inputs, leading_shape
from jaxrnn._dtypes import accumulation_dtype, cast, result_dtype
from jaxrnn._padding import check_valid, valid_steps, without_padding
from jaxrnn._recurrence import (
    apply_first,
    jacobians,
    previous,
    select,
    solve_linear,
    states,
)
from jaxrnn._step import like, preactivation, product, row_weights, safe_ids


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

    Cost: two products a step forward and one a step backward; the gradient of each parameter
    is one matrix product over all steps, and beyond inputs and parameters only hs is kept.
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
        cell, h0 = _spread(cell, xs, h0, drive)
    return cell, xs, h0, drive, mask


def _spread(cell, xs, h0, drive):
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
    hs = _states(reverse, cell, xs, h0, drive, mask)
    return hs[0 if reverse else -1], without_padding(hs, mask)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _states(reverse, cell, xs, h0, drive, mask):
    return states(cell, xs, h0, drive, mask, reverse)


@partial(_states.defjvp, symbolic_zeros=True)
def _states_jvp(reverse, primals, tangents):
    # Take the tangent of h_t = (1 − α) h_{t−1} + α φ(a_t),  a_t = U x_t + W h_{t−1} + b:
    #
    #   dh_t = J_t dh_{t−1} + e_t,          J_t = (1 − α) I + α D_t W,   D_t = diag(φ'(a_t))
    #   e_t  = α D_t (dU x_t + U dx_t + dW h_{t−1} + db + ddrive_t) + dα (φ(a_t) − h_{t−1})
    #
    # with dh_0 given. e is a few products over all steps at once, and what remains is the
    # linear recurrence. JAX transposes both for the backward: the adjoint recursion, and then
    # one product over all steps for the gradient of each parameter (section 3.3).
    hs = _states(reverse, *primals)
    tangents = jax.tree.map(_none_if_zero, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    # Everything but the solves is recomputed in the backward: only hs is kept.
    tangent = jax.checkpoint(partial(_tangent, reverse), policy=_keep_solves)
    return hs, tangent(primals, hs, tangents)


def _none_if_zero(tangent):
    is_zero = isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0
    return None if is_zero else tangent


def _keep_solves(primitive, *_, **__):
    return primitive.name == "custom_linear_solve"


def _tangent(reverse, primals, hs, tangents):
    cell, xs, h0, drive, mask = primals
    dcell, dxs, dh0, ddrive, _ = tangents
    h_prev = previous(hs, h0, reverse)
    J, phi = jacobians(cell, xs, h_prev, hs, drive, mask)
    da = jnp.zeros(hs.shape, accumulation_dtype(hs.dtype))
    if dcell.U is not None:
        da += _input_tangent(dcell.U, xs)
    if dcell.W is not None:
        da += product(h_prev, dcell.W.T)
    if dcell.b is not None:
        da += like(dcell.b, da)
    if isinstance(dxs, jax.Array):
        da += product(dxs, cell.U.T)
    if ddrive is not None:
        da += ddrive.astype(da.dtype)
    e = J.scale(da)
    if dcell.leak is not None:
        e += like(dcell.leak, e) * (phi - h_prev.astype(e.dtype))
    e = select(mask, e, 0)
    if dh0 is not None:
        first = -1 if reverse else 0
        e = e.at[first].add(apply_first(J, dh0.astype(e.dtype), reverse))
    return solve_linear(J, e, reverse).astype(hs.dtype)


def _input_tangent(dU, xs):
    if isinstance(xs, Ids):
        # A row of dUᵀ for each id; its transpose adds each delta to the row of its id.
        rows = dU.T.astype(accumulation_dtype(dU.dtype))
        return rows.at[xs.ids].get(mode="fill", fill_value=0)
    return product(xs, dU.T)

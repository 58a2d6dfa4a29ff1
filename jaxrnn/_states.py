"""The nonlinear recurrence, forward in time:  h_t = (1 − α) h_{t−1} + α φ(a_t).

Steps where the mask is False are frozen: h_t = h_{t−1}.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _schedule
from jaxrnn._activation import resolve
from jaxrnn._cell import Cell, Ids, leading_shape
from jaxrnn._padding import select
from jaxrnn._step import advance, from_inputs, repeated_product, row_weights


def states(
    cell: Cell,
    sequences: tuple,
    h0: jax.Array,
    *,
    reverse: bool,
    time_axis: int = 0,
    copies: int = 1,
) -> jax.Array:
    """h_t of every step, frozen where the mask is False.

    Args:
      cell: the `Cell`.
      sequences: (xs, drive, mask), with time as axis number `time_axis` and batches around it.
      h0: h_0, `[*batch, H]`.
      reverse: whether time runs backward.
      time_axis: how many batch axes stand in front of time.
      copies: how many networks run side by side, if this is one of them.
    """
    xs, drive, mask = sequences
    activation = resolve(cell.activation)
    weights = row_weights(cell, xs)
    batch = h0.shape[:-1]
    time = leading_shape(xs)[time_axis]
    hidden_size, input_size = cell.U.shape
    sizes = (time, batch, input_size, hidden_size, copies)
    hoisted = not isinstance(xs, Ids) and _schedule.hoists_inputs(*sizes)
    if hoisted:
        xs, drive = from_inputs(weights, xs, drive), None
    from_state = repeated_product(weights.W_T, batch)

    def body(h_prev, now):
        x, drive, mask = now
        a = from_state(h_prev) + (x if hoisted else from_inputs(weights, x, drive))
        return select(mask, advance(activation, weights.leak, a, h_prev), h_prev)

    return _over_time(body, h0, (xs, drive, mask), time, reverse, time_axis)


def _over_time(body, h0, sequences, time, reverse, time_axis):
    if time_axis == 0:

        def step(h, now):
            h = body(h, now)
            return h, h

        return lax.scan(step, h0, sequences, reverse=reverse)[1]

    # Read and written in place, step by step: a scan would want time in front.
    def step_in_place(carry, t):
        h, hs = carry
        now = jax.tree.map(
            lambda s: lax.dynamic_index_in_dim(s, t, time_axis, keepdims=False), sequences
        )
        h = body(h, now)
        return (h, lax.dynamic_update_index_in_dim(hs, h, t, time_axis)), None

    hs = jnp.repeat(jnp.expand_dims(jnp.zeros_like(h0), time_axis), time, time_axis)
    return lax.scan(step_in_place, (h0, hs), jnp.arange(time), reverse=reverse)[0][1]

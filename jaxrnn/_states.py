"""The nonlinear recurrence, forward in time:  h_t = (1 − α) h_{t−1} + α φ(a_t).

Steps where the mask is False are frozen: h_t = h_{t−1}.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _schedule
from jaxrnn._activation import resolve
from jaxrnn._cell import Cell, Ids, leading_shape
from jaxrnn._implementation import Loops, choose, perform
from jaxrnn._kernels import run as kernels
from jaxrnn._padding import select, valid_steps, without_padding
from jaxrnn._step import advance, from_inputs, repeated_product, row_weights, safe_ids


class Sequences(NamedTuple):
    """What the recurrence reads, step by step: arrays with time as one axis, or None.

    Args:
      xs: inputs, or `Ids`.
      drive: added to a.
      mask: which steps are valid; on the others the state is frozen.
      cut: at which steps derivatives do not pass from a_t to h_{t−1}; of no effect on values.
    """

    xs: jax.Array | Ids
    drive: jax.Array | None
    mask: jax.Array | None
    cut: jax.Array | None


def prepared(
    sequences: Sequences, first: jax.Array | int, lengths: jax.Array | None, size: int
) -> Sequences:
    """Some steps as the loops want them, of which the first is number `first`.

    0 on invalid steps, so that what stands there meets no product; safe ids.
    """
    xs, drive, mask, cut = sequences
    if lengths is not None:
        mask = valid_steps(lengths, None, leading_shape(xs)[0], first)
    xs, drive = jax.tree.map(lambda x: without_padding(x, mask), (xs, drive))
    if isinstance(xs, Ids):
        xs = safe_ids(xs.ids, size)
    return Sequences(xs, drive, mask, cut)


def states(
    cell: Cell,
    sequences: Sequences,
    h0: jax.Array,
    *,
    loops: Loops,
    time_axis: int = 0,
    copies: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """(the last h_t in scan order, h_t of every step), frozen where the mask is False.

    Args:
      cell: the `Cell`.
      sequences: with time as axis number `time_axis` and batches around it.
      h0: h_0, `[*batch, H]`.
      loops: how the loops are run.
      time_axis: how many batch axes stand in front of time.
      copies: how many networks run side by side, if this is one of them.
    """
    activation = resolve(cell.activation)
    name = choose(loops, cell.W, h0.shape[:-1], activation.function)
    how: dict[str, Any] = dict(activation=activation, loops=loops, time_axis=time_axis)
    return perform(
        name,
        loops,
        (cell, sequences, h0),
        scan=partial(_scan, **how, copies=copies),
        kernel=partial(_kernel, **how, name=name),
    )


def _kernel(cell, sequences, h0, *, activation, loops, time_axis, name):
    xs, drive, mask, _ = sequences
    a = from_inputs(row_weights(cell, xs, loops.precision), xs, drive)
    a, mask = jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), (a, mask))
    h_last, hs = kernels.states(name, loops, cell.W, cell.leak, activation.function, a, mask, h0)
    return h_last, jnp.moveaxis(hs, 0, time_axis)


def _scan(cell, sequences, h0, *, activation, loops, time_axis, copies):
    xs, drive, mask, _ = sequences
    weights = row_weights(cell, xs, loops.precision)
    batch, time = h0.shape[:-1], leading_shape(xs)[time_axis]
    hidden_size, input_size = cell.U.shape
    sizes = (time, batch, input_size, hidden_size, copies)
    hoisted = not isinstance(xs, Ids) and _schedule.hoists_inputs(*sizes)
    if hoisted:
        xs, drive = from_inputs(weights, xs, drive), None
    from_state = repeated_product(weights.W_T, batch, loops.precision)

    def body(h_prev, now):
        x, drive, mask = now
        a = from_state(h_prev) + (x if hoisted else from_inputs(weights, x, drive))
        return select(mask, advance(activation, weights.leak, a, h_prev), h_prev)

    return _over_time(body, h0, (xs, drive, mask), time, loops.reverse, time_axis)


def _over_time(body, h0, sequences, time, reverse, time_axis):
    if time_axis == 0:

        def step(h, now):
            h = body(h, now)
            return h, h

        return lax.scan(step, h0, sequences, reverse=reverse)

    # Read and written in place, step by step: a scan would want time in front.
    def step_in_place(carry, t):
        h, hs = carry
        now = jax.tree.map(
            lambda s: lax.dynamic_index_in_dim(s, t, time_axis, keepdims=False), sequences
        )
        h = body(h, now)
        return (h, lax.dynamic_update_index_in_dim(hs, h, t, time_axis)), None

    hs = jnp.repeat(jnp.expand_dims(jnp.zeros_like(h0), time_axis), time, time_axis)
    return lax.scan(step_in_place, (h0, hs), jnp.arange(time), reverse=reverse)[0]

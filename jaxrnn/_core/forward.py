"""Loop 1, forward in time: the states.

    a_t = W g(h_{t−1}) + U x_t + b + drive_t,    h_t = f(a_t, h_{t−1})

Steps where the mask is False are frozen: h_t = h_{t−1}.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxrnn._backends import select
from jaxrnn._backends.kernels import run as kernels
from jaxrnn._base.arithmetic import from_inputs, repeated_product, row_weights, safe_ids
from jaxrnn._base.forms import function_of, output, update
from jaxrnn._base.masking import select as where_valid
from jaxrnn._base.masking import without_padding
from jaxrnn._base.options import Options
from jaxrnn._core import schedule
from jaxrnn._types import Cell, Ids, leading_shape


class Sequences(NamedTuple):
    """What the recurrence reads, step by step: arrays with time in front, or None.

    Args:
      xs: inputs, or `Ids`.
      drive: added to a.
      mask: which steps are valid; on the others the state is frozen.
      cut: at which steps derivatives do not pass from a_t to h_{t−1}; of no effect on values.
      hs: the states themselves, where they are known, frozen on invalid steps.
    """

    xs: jax.Array | Ids
    drive: jax.Array | None
    mask: jax.Array | None
    cut: jax.Array | None
    hs: Any = None


def clean(sequences: Sequences, input_size: int) -> Sequences:
    """0 on invalid steps, so that what is there meets no product, and safe ids."""
    given = sequences.xs, sequences.drive
    xs, drive = jax.tree.map(lambda x: without_padding(x, sequences.mask), given)
    xs = safe_ids(xs.ids, input_size) if isinstance(xs, Ids) else xs
    return sequences._replace(xs=xs, drive=drive)


def states(
    options: Options, cell: Cell, sequences: Sequences, h0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the last h_t in scan order, h_t of every step), frozen where the mask is False."""
    name = select.choose(options, cell.W, h0.shape[:-1], function_of(cell), cell.form)
    by = dict(scan=partial(_scan, options), kernel=partial(_kernel, options, name))
    return select.perform(name, options, (cell, sequences, h0), **by)


def _scan(options, cell, sequences, h0):
    xs, drive, mask, *_ = sequences
    weights, batch = row_weights(cell, xs, options.precision), h0.shape[:-1]
    sizes = leading_shape(xs)[0], batch, *cell.U.shape[::-1]
    hoisted = not isinstance(xs, Ids) and schedule.hoists_inputs(*sizes)
    if hoisted:
        xs, drive = from_inputs(weights, xs, drive), None
    left = schedule.puts_weights_left(batch, cell.W.shape[0])
    W_times = repeated_product(weights.W_T, options.precision, left)

    def step(h_prev, now):
        x, drive, mask = now
        a = W_times(output(cell, h_prev)) + (x if hoisted else from_inputs(weights, x, drive))
        h = where_valid(mask, update(cell, a, h_prev), h_prev)
        return h, h

    return lax.scan(step, h0, (xs, drive, mask), reverse=options.reverse)


def _kernel(options, name, cell, sequences, h0):
    xs, drive, mask, *_ = sequences
    a = from_inputs(row_weights(cell, xs, options.precision), xs, drive)
    return kernels.states(name, options, cell.W, cell.leak, function_of(cell), a, mask, h0)

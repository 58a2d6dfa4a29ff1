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
from jaxrnn._base import arithmetic
from jaxrnn._base.arithmetic import from_inputs, repeated_product, row_weights, safe_ids
from jaxrnn._base.forms import function_of, inner, kept, move, output
from jaxrnn._base.masking import select as where_valid
from jaxrnn._base.masking import without_padding
from jaxrnn._base.options import Options
from jaxrnn._core import schedule
from jaxrnn._types import Cell, Ids, leading_shape


class Sequences(NamedTuple):
    """What the recurrence reads at each step: arrays with a leading time axis, or None.

    Args:
      xs: inputs, or `Ids`.
      drive: added to a.
      mask: which steps are valid; the state is frozen on the others.
      cut: steps at which derivatives do not pass from a_t to h_{t−1}; values do not change.
      hs: the states, if known, frozen on invalid steps.
      kept: the residuals of the forward pass, see `forms.kept`.
    """

    xs: jax.Array | Ids
    drive: jax.Array | None
    mask: jax.Array | None
    cut: jax.Array | None
    hs: Any = None
    kept: Any = None


def clean(sequences: Sequences, input_size: int) -> Sequences:
    """Set inputs and drive to 0 on invalid steps, before any product, and make ids safe."""
    arrays = sequences.xs, sequences.drive
    xs, drive = jax.tree.map(lambda x: without_padding(x, sequences.mask), arrays)
    xs = safe_ids(xs.ids, input_size) if isinstance(xs, Ids) else xs
    return sequences._replace(xs=xs, drive=drive)


def states(
    options: Options, cell: Cell, sequences: Sequences, h0: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """(the last h_t in scan order, (hs, residuals)), frozen where the mask is False."""
    name = select.choose(options, cell.W, h0.shape[:-1], function_of(cell), cell.form)
    keep = name not in select.KERNELS
    by = dict(scan=partial(_scan, options, keep), kernel=partial(_kernel, options, name))
    return select.perform(name, options, (cell, sequences, h0), **by)


def _scan(options, keep, cell, sequences, h0):
    xs = sequences.xs
    weights, batch = row_weights(cell, xs, options.precision), h0.shape[:-1]
    sizes = leading_shape(xs)[0], batch, *cell.U.shape[::-1]
    hoisted = not isinstance(xs, Ids) and schedule.hoists_inputs(*sizes)
    if hoisted and not isinstance(xs, Ids):
        # b is added in the loop; added here it would cost one more array [T, B, H].
        xs = arithmetic.product(xs, weights.U_T, options.precision)
    of_x = partial(arithmetic.shifted if hoisted else from_inputs, weights)
    left = schedule.puts_weights_left(batch, cell.W.shape[0])
    W_times = repeated_product(weights.W_T, options.precision, left)

    def step(h_prev, inputs):
        x, drive, mask = inputs
        s_prev = output(cell, h_prev)
        a = W_times(s_prev) + of_x(x, drive)
        moved = inner(cell, a)
        h = where_valid(mask, move(cell, moved, h_prev), h_prev)
        beside = kept(cell, s_prev, a, moved) if keep else None
        return h, (h, arithmetic.cast(beside, h.dtype))

    steps = xs, sequences.drive, sequences.mask
    return lax.scan(step, h0, steps, reverse=options.reverse)


def _kernel(options, name, cell, sequences, h0):
    xs, drive, mask, *_ = sequences
    a = from_inputs(row_weights(cell, xs, options.precision), xs, drive)
    how = name, options, cell.W, cell.leak, function_of(cell)
    h_last, hs = kernels.states(*how, a, mask, h0)
    return h_last, (hs, None)

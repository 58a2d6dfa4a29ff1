"""The derivative of the states through their last few steps only.

With `window` = k, h_t depends on a_{t−k+1} … a_t, as if it were recomputed by k steps from a
constant h_{t−k}. All windows share the states, and so the Jacobians:

    y^1_t = e_t,      y^i_t = e_t + J_t y^{i−1}_{t−1},  y^i_0 = dh_0,      dh_t = y^k_t

This is the sum of section 3.3 over k ≥ t − window + 1. Each sweep i handles all steps at once.
Invalid steps are skipped.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxrnn._base.arithmetic import preactivation, row_weights
from jaxrnn._base.forms import output, update
from jaxrnn._base.masking import frozen_states, previous
from jaxrnn._base.options import Options
from jaxrnn._core.linear import Jacobians, times
from jaxrnn._types import Cell


def tangent_states(J: Jacobians, e: jax.Array, y0: jax.Array) -> jax.Array:
    """y^k of all steps. Cost: k products over all steps."""
    return _sweeps(e, lambda y: e + times(J, y), y0, J.mask, J.options)


def recomputed(
    options: Options, cell: Cell, steps, h0: jax.Array, constants: tuple[Any, Any]
) -> jax.Array:
    """The states, by the same sweeps in operations that JAX differentiates.

    `steps` are (xs, drive, mask, an addition to the state); `constants` are (hs, h_0).
    """
    xs, drive, mask, added = steps
    weights = row_weights(cell, xs, options.precision)

    def again(h_prev):
        a = preactivation(weights, xs, output(cell, h_prev), drive)
        h = update(cell, a, h_prev)
        return h if added is None else h + added.astype(h.dtype)

    return _sweeps(again(previous(*constants, options.reverse)), again, h0, mask, options)


def _sweeps(first: jax.Array, again: Callable, h0, mask, options: Options):
    """y^1 = first, then y ← again(y before each step); the last valid y on invalid steps."""
    # After T + 1 sweeps every window reaches h_0 and nothing changes. T may be symbolic.
    time, sweeps = first.shape[0], options.window or 1
    sweeps = min(sweeps, time + 1) if isinstance(time, int) else sweeps

    def body(y, _):
        before = frozen_states(y, h0, mask, options.reverse)
        return again(previous(before, h0, options.reverse)), None

    y, _ = lax.scan(body, first, length=sweeps - 1)
    return frozen_states(y, h0, mask, options.reverse)

"""The derivative of the states through their last few steps only.

With `window` = k, h_t depends on a_{t−k+1} … a_t: as if it were recomputed by k steps from an
h_{t−k} that does not move. All windows have the same states and so the same Jacobians:

    y^1_t = e_t,      y^i_t = e_t + J_t y^{i−1}_{t−1},  y^i_0 = dh_0,      dh_t = y^k_t

which is the sum of section 3.3 over k ≥ t − window + 1. A sweep takes all steps at once. Invalid
steps are as if they were not there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._activation import resolve
from jaxrnn._cell import Cell
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like
from jaxrnn._implementation import Loops
from jaxrnn._jacobians import previous, times
from jaxrnn._linear_map import LinearMap
from jaxrnn._linearised import Steps, Tangents, linearised, sources
from jaxrnn._padding import frozen_states
from jaxrnn._step import advance, preactivation, row_weights
from jaxrnn._tangent import Known, tangent_by_jax


def tangent_in_window(
    cell: Cell,
    steps: Steps,
    h0: jax.Array,
    tangents: Tangents,
    *,
    window: int,
    loops: Loops,
    time_axis: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """(dh_last, dh of all steps), each from its window; for the rest as `tangent_of_states`.

    Cost: a product over all steps for each step of the window.
    """

    def front(tree):
        return jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), tree)

    # After T + 1 sweeps nothing changes: h_0 is reached from all steps. T may be a symbol.
    time = steps.hs.shape[time_axis]
    sweeps = min(window, time + 1) if isinstance(time, int) else window
    how: dict[str, Any] = dict(sweeps=sweeps, loops=loops)
    run = LinearMap(partial(_forward, **how), partial(_transpose, **how), partial(_plain, **how))
    moving = tangents._replace(xs=front(tangents.xs), drive=front(tangents.drive))
    dhs = run(Known(cell, front(steps), h0), moving)
    return dhs[0 if loops.reverse else -1], jnp.moveaxis(dhs, 0, time_axis)


def _sweep(first, again, h0, mask, sweeps, reverse):
    """y^1 = first, then y ← again(y before each step), and the last valid y on every step."""

    def body(y, _):
        return again(previous(frozen_states(y, h0, mask, reverse), h0, reverse)), None

    y, _ = lax.scan(body, first, length=sweeps - 1)
    return frozen_states(y, h0, mask, reverse)


def _forward(known, tangents, *, sweeps, loops):
    cell, steps, h0 = known
    at = linearised(cell, steps, h0, loops)
    wide = accumulation_dtype(steps.hs.dtype)
    given = cast(tangents, wide)
    dh0 = jnp.zeros_like(h0, wide) if given.h0 is None else given.h0
    e = sources(at, given)
    dhs = _sweep(e, lambda y: e + times(at.J, y), dh0, steps.mask, sweeps, loops.reverse)
    return dhs.astype(steps.hs.dtype)


def _transpose(known, g, wanted, *, sweeps, loops):
    wide = accumulation_dtype(g.dtype)
    moving = jax.tree.map(lambda w: w.update(dtype=wide), wanted)
    tangent = partial(_forward, known, sweeps=sweeps, loops=loops)
    (found,) = jax.linear_transpose(tangent, moving)(g)
    return cast_like(found, wanted)


def _plain(known, tangents, *, sweeps, loops):
    mask, held = known.steps.mask, lax.stop_gradient((known.steps.hs, known.h0))
    activation = resolve(known.cell.activation)

    def recomputed(cell, xs, drive, h0):
        weights = row_weights(cell, xs, loops.precision)

        def again(h_prev):
            a = preactivation(weights, xs, h_prev, drive)
            return advance(activation, weights.leak, a, h_prev)

        first = again(previous(*held, loops.reverse))
        return _sweep(first, again, h0, mask, sweeps, loops.reverse)

    return tangent_by_jax(recomputed, known, tangents)

"""The derivative of the states of all steps as one linear map, with its transpose by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import _schedule
from jaxrnn._cell import Cell, Ids
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like
from jaxrnn._implementation import Loops, choose
from jaxrnn._jacobians import apply_first, slope_from_basis
from jaxrnn._linear_map import LinearMap
from jaxrnn._linearised import Steps, Tangents, linearised, only, segment_gradient, sources
from jaxrnn._primitive import jvp_of
from jaxrnn._recurrence import solve_linear, tangent_states
from jaxrnn._segments import over_segments, starts


class Known(NamedTuple):
    """Where the recurrence is linearised."""

    cell: Cell
    steps: Steps
    h0: jax.Array


def tangent_by_jax(f: Callable, known: Known, tangents: Tangents):
    """The tangent of `f(cell, xs, drive, h0)` as JAX finds it by itself."""
    cell, (xs, drive, *_), h0 = known
    dcell, dxs, ddrive, dh0 = tangents
    if drive is None and ddrive is not None:
        drive = jnp.zeros_like(ddrive)
    if isinstance(xs, Ids):
        dxs = Ids(None)  # pyright: ignore[reportArgumentType]
    leaves, tree = jax.tree.flatten((cell, xs, drive, h0))
    moved = tree.flatten_up_to((dcell, dxs, ddrive, dh0))
    return jvp_of(lambda *leaves: f(*jax.tree.unflatten(tree, leaves)), leaves, moved)[1]


def tangent_of_states(
    cell: Cell,
    steps: Steps,
    h0: jax.Array,
    tangents: Tangents,
    *,
    loops: Loops,
    time_axis: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """(dh_last, dh of all steps), for JAX to differentiate and transpose: linear in the tangents.

    Time is axis number `time_axis` of steps, of tangents and of the result.
    """

    def transpose(known, cotangents, wanted):
        g_last, g = cotangents
        return pull_back(known, g_last, g, wanted, loops=loops, time_axis=time_axis)

    def forward(known, tangents):
        dh_last, dhs = push_forward(known, tangents, loops=loops, time_axis=time_axis)
        return dh_last.astype(dhs.dtype), dhs

    run = LinearMap(forward, transpose, partial(_plain, loops=loops, time_axis=time_axis))
    return run(Known(cell, steps, h0), tangents)


def _segments(known, loops, time_axis) -> dict[str, Any]:
    cell, steps, h0 = known
    length, batch = steps.hs.shape[time_axis], h0.shape[:-1]
    if choose(loops, cell.W, batch, slope_from_basis(cell)) == "scan":
        length = _schedule.segment_length(length, batch, h0.shape[-1])
    before = starts(steps.hs, h0, length, loops.reverse, time_axis)
    return dict(before=before, length=length, time_axis=time_axis)


def push_forward(
    known: Known, tangents: Tangents, *, loops: Loops, time_axis: int = 0
) -> tuple[jax.Array, jax.Array]:
    """(dh_last in the dtype of sums, dh of all steps), segment by segment."""
    cell, steps, h0 = known
    dtype = steps.hs.dtype
    wide = accumulation_dtype(dtype)

    def segment(dh_before, now, h_before):
        steps, dxs, ddrive = now
        at = linearised(cell, steps, h_before, loops)
        given = cast(Tangents(tangents.cell, dxs, ddrive, None), wide)
        dhs = tangent_states(at.J, sources(at, given), dh_before)
        return dhs[0 if loops.reverse else -1], dhs.astype(dtype)

    dh0 = jnp.zeros_like(h0, wide) if tangents.h0 is None else tangents.h0.astype(wide)
    now = (steps, tangents.xs, tangents.drive)
    how = _segments(known, loops, time_axis)
    dh_last, dhs, _ = over_segments(segment, dh0, now, reverse=loops.reverse, **how)
    return dh_last, dhs


def pull_back(
    known: Known,
    g_last: jax.Array | None,
    g: jax.Array | None,
    wanted: Tangents,
    *,
    loops: Loops,
    time_axis: int = 0,
) -> Tangents:
    """The wanted gradients, segment by segment, where None is 0.

    g_last reaches the last state, g_t each of them, both at fixed later states.
    """
    cell, steps, h0 = known
    wide = accumulation_dtype(h0.dtype)

    def segment(carry, now, h_before):
        (steps, g), (from_later, sums) = now, carry
        g = None if g is None else g.astype(wide)
        share = segment_gradient(cell, steps, h_before, g, from_later, wanted, loops)
        sums = jax.tree.map(jnp.add, sums, share.cell)
        outputs = cast_like((share.xs, share.drive), (wanted.xs, wanted.drive))
        return (share.h0, sums), outputs

    sums = jax.tree.map(jnp.zeros_like, only(wanted.cell, cell))
    carry = cast((jnp.zeros_like(h0) if g_last is None else g_last, sums), wide)
    how = _segments(known, loops, time_axis)
    (dh0, sums), (dxs, ddrive), _ = over_segments(
        segment, carry, (steps, g), reverse=not loops.reverse, **how
    )
    found = Tangents(sums, dxs, ddrive, None if wanted.h0 is None else dh0)
    return cast_like(found, wanted)


def _plain(known, tangents, *, loops, time_axis):
    def front(tree):
        return jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), tree)

    cell, steps, h0 = known
    dtype = steps.hs.dtype
    steps, xs, drive = front((steps, tangents.xs, tangents.drive))
    at = linearised(cell, steps, h0, loops)
    given = cast(Tangents(tangents.cell, xs, drive, tangents.h0), accumulation_dtype(dtype))
    e = sources(at, given)
    if given.h0 is not None:
        e = e.at[-1 if loops.reverse else 0].add(apply_first(at.J, given.h0))
    dhs = solve_linear(at.J, e).astype(dtype)
    return dhs[0 if loops.reverse else -1], jnp.moveaxis(dhs, 0, time_axis)

"""The states with only every k-th one kept for the derivatives, the others computed again.

Of inputs, masks and lengths too nothing is prepared for more than one segment at a time, so
that what is needed beside them grows with the number of segments and with their length, not with
their product.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._cell import Cell, leading_shape
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like
from jaxrnn._fold import foldable
from jaxrnn._implementation import Loops
from jaxrnn._linear_map import LinearMap
from jaxrnn._linearised import Steps, only
from jaxrnn._padding import without_padding
from jaxrnn._rule import moving, recurrence
from jaxrnn._segments import offsets, over_segments
from jaxrnn._states import Sequences, prepared, states
from jaxrnn._tangent import Known, pull_back, push_forward, tangent_by_jax


class _How(NamedTuple):
    length: int
    loops: Loops
    time_axis: int = 0
    copies: int = 1

    def over(self, segment, carry, steps, before, transposed=False, **how):
        reverse = self.loops.reverse != transposed
        return over_segments(
            segment, carry, steps, before, self.length,
            reverse=reverse, time_axis=self.time_axis, **how,
        )  # fmt: skip


class Checkpoints(NamedTuple):
    """What a checkpointed forward pass returns."""

    h_last: jax.Array
    hs: jax.Array  # 0 on invalid steps
    starts: jax.Array  # the state before each segment, in the order of time: [segments, …]


def checkpointed(
    cell: Cell,
    sequences: Sequences,
    h0: jax.Array,
    lengths: jax.Array | None,
    *,
    length: int,
    loops: Loops,
) -> Checkpoints:
    """The states, whose derivatives of every order compute each segment again.

    Args:
      cell: the `Cell`.
      sequences: of one dtype, with time in front; on invalid steps anything.
      h0: the state before, `[*batch, H]`.
      lengths: as in `unroll`, in place of a mask.
      length: steps of a segment.
      loops: how the loops are run, which way time runs among it.
    """
    how = _How(length, loops)
    h_last, (hs, starts) = _foldable(_checkpointed, how)(cell, sequences, (h0, lengths))
    return Checkpoints(h_last, hs, starts)


def _foldable(run, how):
    def loop(cell, sequences, carry, time_axis, copies):
        here = how._replace(time_axis=time_axis, copies=how.copies * copies)
        h_last, hs, starts = run(here, cell, sequences, *carry)
        return h_last, (hs, starts)

    return foldable(loop, how.time_axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _checkpointed(how, cell, sequences, h0, lengths):
    # Foldable again: where each member has a cell of its own, JAX wants the mapped axis of these
    # outputs where that of the rule's is, and takes it for granted.
    h_last, (hs, starts) = _foldable(_forward_only, how)(cell, sequences, (h0, lengths))
    return h_last, hs, starts


def _forward_only(how, cell, sequences, h0, lengths):
    def segment(h, now, first):
        now = prepared(now, first, lengths, cell.U.shape[1])
        h, hs = states(cell, now, h, loops=how.loops, copies=how.copies)
        return h, without_padding(hs, now.mask)

    time = leading_shape(sequences.xs)[how.time_axis]
    before = offsets(time, how.length)
    h_last, hs, starts = how.over(segment, h0, sequences, before, keep=lambda h: h)
    return h_last, hs, jnp.moveaxis(starts, 0, how.time_axis)


@partial(_checkpointed.defjvp, symbolic_zeros=True)
def _checkpointed_jvp(how, primals, tangents):
    cell, sequences, h0, lengths = primals
    h_last, (hs, starts) = _foldable(_checkpointed, how)(cell, sequences, (h0, lengths))
    run = LinearMap(partial(_forward, how), partial(_transpose, how), partial(_plain, how))
    dh_last, dhs, dstarts = run((cell, sequences, h0, lengths, starts), moving(tangents[:3]))
    return (h_last, hs, starts), (dh_last, dhs, dstarts)


def _again(how, cell, lengths, now, before):
    """The steps of a segment, with their states."""
    first, h_before = before
    now = prepared(now, first, lengths, cell.U.shape[1])
    _, hs = states(cell, now, h_before, loops=how.loops, copies=how.copies)
    return Known(cell, Steps(*now, hs), h_before)


def _before(how, sequences, starts):
    time = leading_shape(sequences.xs)[how.time_axis]
    return offsets(time, how.length), jnp.moveaxis(starts, how.time_axis, 0)


def _forward(how, known, tangents):
    cell, sequences, h0, lengths, starts = known
    wide = accumulation_dtype(h0.dtype)

    def segment(dh_before, now, before):
        now, dxs, ddrive = now
        at = _again(how, cell, lengths, now, before)
        mask = at.steps.mask
        dxs, ddrive = jax.tree.map(lambda d: without_padding(d, mask), (dxs, ddrive))
        given = tangents._replace(xs=dxs, drive=ddrive, h0=dh_before)
        dh, dhs = push_forward(at, given, loops=how.loops)
        return dh, without_padding(dhs, mask)

    dh0 = jnp.zeros_like(h0, wide) if tangents.h0 is None else tangents.h0.astype(wide)
    steps = (sequences, tangents.xs, tangents.drive)
    dh_last, dhs, dstarts = how.over(
        segment, dh0, steps, _before(how, sequences, starts), keep=lambda dh: dh
    )
    dtype = h0.dtype
    return dh_last.astype(dtype), dhs, jnp.moveaxis(dstarts, 0, how.time_axis).astype(dtype)


def _transpose(how, known, cotangents, wanted):
    cell, sequences, h0, lengths, starts = known
    g_last, g, g_starts = cotangents
    wide = accumulation_dtype(h0.dtype)

    def segment(carry, now, before):
        (now, g), (from_later, sums), (before, g_start) = now, carry, before
        at = _again(how, cell, lengths, now, before)
        g = None if g is None else without_padding(g, at.steps.mask)
        asked = wanted._replace(cell=sums, h0=from_later)
        share = pull_back(at, from_later, g, asked, loops=how.loops)
        from_later = share.h0
        if g_start is not None:
            from_later += g_start.astype(wide)
        return (from_later, jax.tree.map(jnp.add, sums, share.cell)), (share.xs, share.drive)

    from_later = jnp.zeros_like(h0, wide) if g_last is None else g_last.astype(wide)
    sums = cast(jax.tree.map(jnp.zeros_like, only(wanted.cell, cell)), wide)
    if g_starts is not None:
        g_starts = jnp.moveaxis(g_starts, how.time_axis, 0)
    before = (_before(how, sequences, starts), g_starts)
    (dh0, sums), (dxs, ddrive), _ = how.over(
        segment, (from_later, sums), (sequences, g), before, transposed=True
    )
    found = wanted._replace(cell=sums, xs=dxs, drive=ddrive, h0=None if wanted.h0 is None else dh0)
    return cast_like(found, wanted)


def _plain(how, known, tangents):
    """By JAX, of a scan over segments: what it keeps of each is again its first state."""
    cell, sequences, h0, lengths, _ = known

    def front(tree):
        return jax.tree.map(lambda s: jnp.moveaxis(s, how.time_axis, 0), tree)

    sequences, (dxs, ddrive) = front((sequences, (tangents.xs, tangents.drive)))
    mask, cut = sequences.mask, sequences.cut

    def run(cell, xs, drive, h0):
        every = prepared(Sequences(xs, drive, mask, cut), 0, lengths, cell.U.shape[1])
        h_last, hs, starts = _scanned(how, cell, every, h0)
        return h_last, jnp.moveaxis(hs, 0, how.time_axis), jnp.moveaxis(starts, 0, how.time_axis)

    moved = tangents._replace(xs=dxs, drive=ddrive)
    return tangent_by_jax(run, Known(cell, sequences, h0), moved)


def _scanned(how, cell, sequences, h0):
    """The same as `_checkpointed`, of operations that JAX differentiates, with time in front."""

    @jax.checkpoint
    def segment(h, now):
        last, hs = recurrence(cell, now, h, loops=how.loops)
        return last, (without_padding(hs, now.mask), h)

    time = leading_shape(sequences.xs)[0]
    count, rest = divmod(time, how.length)
    whole = jax.tree.map(lambda s: s[: time - rest], sequences)
    whole = jax.tree.map(lambda s: s.reshape(count, how.length, *s.shape[1:]), whole)
    reverse = how.loops.reverse
    parts = []

    def run_rest(h):
        now = jax.tree.map(lambda s: s[time - rest :], sequences)
        h, (hs, start) = segment(h, now)
        parts.append((hs, start[None]))
        return h

    h = run_rest(h0) if rest and reverse else h0
    if count:
        h, (hs, starts) = lax.scan(segment, h, whole, reverse=reverse)
        parts.append((hs.reshape(time - rest, *hs.shape[2:]), starts))
    h = run_rest(h) if rest and not reverse else h
    if reverse:
        parts.reverse()
    hs, starts = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return h, hs, starts

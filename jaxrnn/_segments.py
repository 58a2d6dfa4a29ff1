"""Long sequences in segments: what a segment needs stays in cache, and is gone after it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def starts(
    hs: jax.Array, h0: jax.Array, length: int, reverse: bool, time_axis: int = 0
) -> jax.Array:
    """The state before each segment in scan order, `[segments, *batch, H]`."""
    time = hs.shape[time_axis]
    first, end = (length, time) if reverse else (length - 1, time - 1)
    between = lax.slice_in_dim(hs, min(first, end), end, length, time_axis)
    between = jnp.moveaxis(between, time_axis, 0)
    return jnp.concatenate([between, h0[None]] if reverse else [h0[None], between])


def over_segments(
    segment: Callable,
    carry,
    steps,
    before: jax.Array,
    length: int,
    *,
    reverse: bool,
    time_axis: int = 0,
) -> tuple:
    """Run `segment(carry, steps, before) -> (carry, outputs)` along the time axis.

    Nothing is copied: each segment is read, and its outputs are written, in place. So JAX is
    not to transpose this: a slice in the loop would become a sum of whole arrays.

    Args:
      segment: sees and returns time in front: `[length, …]`, of the last segment maybe less.
      carry: what goes from segment to segment.
      steps: a pytree of arrays with time as axis number `time_axis`.
      before: `[segments, …]`, of `starts`.
      length: steps of a segment.
      reverse: whether the last segment comes first.
      time_axis: how many batch axes stand in front of time.

    Returns:
      (carry, outputs), outputs a pytree with time as axis number `time_axis`.
    """
    time = jax.tree.leaves(steps)[0].shape[time_axis]

    def run(carry, start, size, before):
        now = steps
        if size < time:
            now = jax.tree.map(lambda s: lax.dynamic_slice_in_dim(s, start, size, time_axis), steps)
        now = jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), now)
        carry, outputs = segment(carry, now, before)
        return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), outputs)

    if length >= time:
        return run(carry, 0, time, before[0])
    count, rest = divmod(time, length)

    def write(out, y, start):
        return lax.dynamic_update_slice_in_dim(out, y, start, time_axis)

    def body(state, now):
        n, before = now
        carry, out = state
        carry, y = run(carry, n * length, length, before)
        return (carry, jax.tree.map(lambda out, y: write(out, y, n * length), out, y)), None

    if jax.typeof(jax.tree.leaves(steps)[0]).sharding.mesh.empty:
        _, shapes = jax.eval_shape(lambda c: run(c, 0, length, before[0]), carry)
        out = jax.tree.map(lambda y: jnp.zeros(_with(time, y.shape, time_axis), y.dtype), shapes)
    else:
        # Inside shard_map and under explicit sharding a type is more than shape and dtype: it
        # is taken from a segment that XLA removes again.
        after, first = run(carry, 0, length, before[0])
        carry = jax.tree.map(lambda c, a: c + jnp.zeros_like(a), carry, after)
        steps_of = jax.tree.map(lambda y: lax.slice_in_dim(y, 0, 1, axis=time_axis), first)
        out = jax.tree.map(lambda y: jnp.repeat(jnp.zeros_like(y), time, time_axis), steps_of)
    state = carry, out
    last = count * length
    if rest and reverse:
        carry, y = run(carry, last, rest, before[-1])
        state = carry, jax.tree.map(lambda out, y: write(out, y, last), out, y)
    state, _ = lax.scan(body, state, (jnp.arange(count), before[:count]), reverse=reverse)
    if rest and not reverse:
        carry, y = run(state[0], last, rest, before[-1])
        state = carry, jax.tree.map(lambda out, y: write(out, y, last), state[1], y)
    return state


def _with(size, shape, axis):
    return (*shape[:axis], size, *shape[axis + 1 :])

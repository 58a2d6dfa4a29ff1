"""Long sequences in segments: what a segment needs stays in cache, and is gone after it."""

from collections.abc import Callable
from typing import Any

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


def offsets(time: int, length: int) -> jax.Array:
    """The first step of each segment, `[segments]`."""
    return jnp.arange(0, max(time, 1), length, dtype=jnp.int32)


def over_segments(
    segment: Callable,
    carry,
    steps,
    before,
    length: int,
    *,
    reverse: bool,
    time_axis: int = 0,
    keep: Callable = lambda carry: (),
) -> tuple:
    """Run `segment(carry, steps, before) -> (carry, outputs)` along the time axis.

    Nothing is copied: each segment is read, and its outputs are written, in place. So JAX is
    not to transpose this: a slice in the loop would become a sum of whole arrays.

    Args:
      segment: sees and returns time in front: `[length, …]`, of the last segment maybe less.
      carry: what goes from segment to segment.
      steps: a pytree of arrays with time as axis number `time_axis`.
      before: a pytree of `[segments, …]`, of which each segment sees its own entry.
      length: steps of a segment.
      reverse: whether the last segment comes first.
      time_axis: how many batch axes stand in front of time.
      keep: what to keep of the carry that each segment begins with.

    Returns:
      (carry, outputs, kept): outputs a pytree with time as axis number `time_axis`, kept one of
      `[segments, …]`.
    """
    time = jax.tree.leaves(steps)[0].shape[time_axis]

    def run(carry, start, size, before):
        now = steps
        if size < time:
            now = jax.tree.map(lambda s: lax.dynamic_slice_in_dim(s, start, size, time_axis), steps)
        now = jax.tree.map(lambda s: jnp.moveaxis(s, time_axis, 0), now)
        carry, outputs = segment(carry, now, before)
        return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), outputs)

    def entry(n):
        return jax.tree.map(lambda b: b[n], before)

    if length >= time:
        return *run(carry, 0, time, entry(0)), jax.tree.map(lambda k: k[None], keep(carry))
    count, rest = divmod(time, length)

    def write(out, y, start):
        return lax.dynamic_update_slice_in_dim(out, y, start, time_axis)

    def body(state, now):
        n, before = now
        carry, out = state
        kept = keep(carry)
        carry, y = run(carry, n * length, length, before)
        return (carry, jax.tree.map(lambda out, y: write(out, y, n * length), out, y)), kept

    if jax.typeof(jax.tree.leaves(steps)[0]).sharding.mesh.empty:
        _, shapes = jax.eval_shape(lambda c: run(c, 0, length, entry(0)), carry)
        out = jax.tree.map(lambda y: jnp.zeros(_with(time, y.shape, time_axis), y.dtype), shapes)
    else:
        # Inside shard_map and under explicit sharding a type is more than shape and dtype: it
        # is taken from a segment that XLA removes again.
        after, first = run(carry, 0, length, entry(0))
        carry = jax.tree.map(lambda c, a: c + jnp.zeros_like(a), carry, after)
        steps_of = jax.tree.map(lambda y: lax.slice_in_dim(y, 0, 1, axis=time_axis), first)
        out = jax.tree.map(lambda y: jnp.repeat(jnp.zeros_like(y), time, time_axis), steps_of)
    state: Any = carry, out
    last = count * length

    def run_rest(state):
        carry, out = state
        kept = jax.tree.map(lambda k: k[None], keep(carry))
        carry, y = run(carry, last, rest, entry(-1))
        return (carry, jax.tree.map(lambda out, y: write(out, y, last), out, y)), kept

    kept_of_rest: Any = None
    if rest and reverse:
        state, kept_of_rest = run_rest(state)
    every = (jnp.arange(count), jax.tree.map(lambda b: b[:count], before))
    state, kept = lax.scan(body, state, every, reverse=reverse)
    if rest and not reverse:
        state, kept_of_rest = run_rest(state)
    if rest:
        kept = jax.tree.map(lambda k, r: jnp.concatenate([k, r]), kept, kept_of_rest)
    return *state, kept


def _with(size, shape, axis):
    return (*shape[:axis], size, *shape[axis + 1 :])

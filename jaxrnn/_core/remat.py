"""Time in segments: to save states only between them, or to keep their arrays in cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def recomputed(segment: Callable, carry, steps, length: int, *, reverse: bool) -> tuple:
    """A scan of `jax.checkpoint(segment)`: only the carries are saved, the rest is recomputed.

    Args:
      segment: (carry, steps, index of the first step) -> (carry, outputs), time first.
      carry: passed from segment to segment.
      steps: a pytree of `[T, …]`.
      length: steps in a segment; the last one may be shorter.
      reverse: run the last segment first.

    Returns:
      (carry, outputs of all steps).

    If `length` does not divide T, the steps of the full segments are copied once.
    """
    time = jax.tree.leaves(steps)[0].shape[0]
    count, rest = divmod(time, length)
    segment = jax.checkpoint(segment)
    whole = jax.tree.map(lambda s: s[: time - rest].reshape(count, length, *s.shape[1:]), steps)
    parts = []

    def run_rest(carry):
        last = jax.tree.map(lambda s: s[time - rest :], steps)
        carry, outputs = segment(carry, last, jnp.asarray(time - rest))
        parts.append(outputs)
        return carry

    carry = run_rest(carry) if rest and reverse else carry
    if count:
        firsts = jnp.arange(0, count * length, length)
        run = lambda carry, now: segment(carry, *now)  # noqa: E731
        carry, outputs = lax.scan(run, carry, (whole, firsts), reverse=reverse)
        parts.append(jax.tree.map(lambda y: y.reshape(time - rest, *y.shape[2:]), outputs))
    carry = run_rest(carry) if rest and not reverse else carry
    if len(parts) == 1:
        return carry, parts[0]
    parts = parts[::-1] if reverse else parts
    return carry, jax.tree.map(lambda *p: jnp.concatenate(p), *parts)


def over_segments(
    segment: Callable, carry, steps, length: int, like: Any, *, reverse: bool
) -> tuple[Any, Any]:
    """Run `segment` along time, reading its steps and writing its outputs in place.

    JAX must not transpose this: a slice in the loop would become a sum of whole arrays.

    `like` has arrays with the shapes and dtypes of the outputs of all steps; the rest is as in
    `recomputed`.
    """
    time = jax.tree.leaves(steps)[0].shape[0]
    if length >= time:
        return segment(carry, steps, 0)
    count, rest = divmod(time, length)

    def run(carry, start, size):
        part = jax.tree.map(lambda s: lax.dynamic_slice_in_dim(s, start, size), steps)
        return segment(carry, part, start)

    def write(state, start, size):
        carry, y = run(state[0], start, size)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return carry, jax.tree.map(put, state[1], y)

    if jax.typeof(jax.tree.leaves(steps)[0]).sharding.mesh.empty:
        out = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), like)
    else:
        # Inside shard_map and under explicit sharding a type is more than shape and dtype. It is
        # taken from a segment, which XLA removes.
        after, first = run(carry, 0, length)
        carry = jax.tree.map(lambda c, a: c + jnp.zeros_like(a), carry, after)
        out = jax.tree.map(lambda y: jnp.repeat(jnp.zeros_like(y[:1]), time, 0), first)
    state, last = (carry, out), count * length
    if rest and reverse:
        state = write(state, last, rest)
    body = lambda state, start: (write(state, start, length), None)  # noqa: E731
    state, _ = lax.scan(body, state, jnp.arange(count) * length, reverse=reverse)
    return write(state, last, rest) if rest and not reverse else state

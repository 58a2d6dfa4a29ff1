"""Which steps of a batch of sequences are valid, and where derivatives are cut.

A mask acts by selection, never by a product: 0 · NaN is NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._base.arithmetic import wide


def valid_steps(
    lengths: jax.Array | None, mask: jax.Array | None, time: int, first: jax.Array | int = 0
) -> jax.Array | None:
    """Bool `[T, *batch]`, or None where every step is valid, of T steps from the first on."""
    if lengths is None:
        return mask
    lengths = wide(lengths)
    t = lax.broadcasted_iota(lengths.dtype, (time, *lengths.shape), 0)
    t += jnp.asarray(first, lengths.dtype)
    return t < jnp.broadcast_to(lengths, t.shape)


def cut_steps(
    mask: jax.Array | None, steps: tuple[int, ...], every: int, reverse: bool
) -> jax.Array:
    """Bool `[T, *batch]`: before which steps truncated BPTT stops.

    Of the valid steps of each sequence, counted in scan order from 0, those whose number is a
    multiple of `every`, but for the first.
    """
    if mask is None:
        mask = jnp.ones(steps, bool)
    number = lax.cumsum(mask.astype(jnp.int32), 0, reverse=reverse) - 1
    return mask & (number > 0) & (number % every == 0)


def select(mask: jax.Array | None, valid: jax.Array, invalid: jax.Array | float) -> jax.Array:
    """`valid` where the mask `[...]` holds, `invalid` elsewhere, for values `[..., H]`."""
    return valid if mask is None else jnp.where(mask[..., None], valid, invalid)


def without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """0 on invalid steps, for values `[T, *batch, …]`, the last axes of which may be missing."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


def previous(hs: jax.Array, h0: jax.Array, reverse: bool) -> jax.Array:
    """h_{t−1} of every step, h_0 at the first in scan order."""
    if reverse:
        return jnp.concatenate([hs[1:], h0[None]])
    return jnp.concatenate([h0[None], hs[:-1]])


def frozen_states(hs: jax.Array, h0: jax.Array, mask: jax.Array | None, reverse: bool) -> jax.Array:
    """The states as the loop carries them: the last valid one on every invalid step."""
    if mask is None:
        return hs
    time = hs.shape[0]
    t = lax.broadcasted_iota(jnp.int32, mask.shape, 0)
    # Index 0 is h_0 where time runs forward, and index T is where it runs backward.
    if reverse:
        last = lax.cummin(jnp.where(mask, t, time), axis=0, reverse=True)
        candidates = jnp.concatenate([hs, h0[None]])
    else:
        last = lax.cummax(jnp.where(mask, t + 1, 0), axis=0)
        candidates = jnp.concatenate([h0[None], hs])
    return jnp.take_along_axis(candidates, last[..., None], axis=0, mode="promise_in_bounds")

"""Which steps of a batch of sequences are valid, and where derivatives are cut.

Masks select; they never multiply, because 0 · NaN is NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._base.arithmetic import wide


def valid_steps(
    lengths: jax.Array | None, mask: jax.Array | None, time: int, first: jax.Array | int = 0
) -> jax.Array | None:
    """Bool `[T, *batch]` for T steps from index `first` on; None if all are valid."""
    if lengths is None:
        return mask
    lengths = wide(lengths)
    t = lax.broadcasted_iota(lengths.dtype, (time, *lengths.shape), 0)
    t += jnp.asarray(first, lengths.dtype)
    return t < jnp.broadcast_to(lengths, t.shape)


def cut_steps(
    mask: jax.Array | None, steps: tuple[int, ...], every: int, reverse: bool
) -> jax.Array:
    """Bool `[T, *batch]`: the steps before which truncated BPTT cuts.

    These are the valid steps of a sequence, counted in scan order from 0, whose number is a
    positive multiple of `every`.
    """
    if mask is None:
        mask = jnp.ones(steps, bool)
    number = lax.cumsum(mask.astype(jnp.int32), 0, reverse=reverse) - 1
    return mask & (number > 0) & (number % every == 0)


def select(mask: jax.Array | None, valid: jax.Array, invalid: jax.Array | float) -> jax.Array:
    """`valid` where the mask `[...]` is True, else `invalid`, for values `[..., H]`."""
    return valid if mask is None else jnp.where(mask[..., None], valid, invalid)


def without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Set values `[T, *batch, …]` to 0 on invalid steps; x may lack the trailing axes."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


def previous(hs: jax.Array, h0: jax.Array, reverse: bool) -> jax.Array:
    """h_{t−1} of every step; h_0 at the first in scan order."""
    if reverse:
        return jnp.concatenate([hs[1:], h0[None]])
    return jnp.concatenate([h0[None], hs[:-1]])


def frozen_states(hs: jax.Array, h0: jax.Array, mask: jax.Array | None, reverse: bool) -> jax.Array:
    """The states as the loop carries them: on invalid steps the last valid state."""
    if mask is None:
        return hs
    time = hs.shape[0]
    t = lax.broadcasted_iota(jnp.int32, mask.shape, 0)
    # h_0 is candidate 0 if time runs forward, and candidate T if it runs backward.
    if reverse:
        last = lax.cummin(jnp.where(mask, t, time), axis=0, reverse=True)
        candidates = jnp.concatenate([hs, h0[None]])
    else:
        last = lax.cummax(jnp.where(mask, t + 1, 0), axis=0)
        candidates = jnp.concatenate([h0[None], hs])
    return jnp.take_along_axis(candidates, last[..., None], axis=0, mode="promise_in_bounds")

"""Which steps of a batch of sequences are valid: `lengths` and `mask`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxrnn import _checks
from jaxrnn._dtypes import wide


def check_valid(
    lengths, mask, steps: tuple[int, ...], hint: _checks.Hint = None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Require at most one of lengths `[*batch]` (0 … T) and mask `[T, *batch]`."""
    if lengths is not None and mask is not None:
        _checks.bad_value("lengths and mask", "at most one of them", "both")
    if mask is not None:
        mask = _checks.booleans("mask", mask, steps, _checks.swapped(steps))
    if lengths is not None:
        lengths = _checks.integers("lengths", lengths, steps[1:], hint)
        if not isinstance(lengths, Tracer):
            wrong = (np.asarray(lengths) < 0) | (np.asarray(lengths) > steps[0])
            if wrong.any():
                _checks.bad_value("lengths", f"0 to {steps[0]}", np.asarray(lengths)[wrong][0])
    return lengths, mask


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


def without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """0 on invalid steps, so that NaN there meets no product: 0 · NaN is NaN."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


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


def select(mask: jax.Array | None, valid: jax.Array, frozen: jax.Array | float) -> jax.Array:
    """`valid` where the mask `[...]` holds, `frozen` elsewhere, for values `[..., H]`."""
    return valid if mask is None else jnp.where(mask[..., None], valid, frozen)

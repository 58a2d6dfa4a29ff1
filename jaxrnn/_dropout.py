"""What one layer hands to the next, with some entries left out."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxrnn import _checks, _sharding


def check_dropout(rate: float, key: jax.Array | None) -> float:
    """Require a probability below 1, and a key where it is above 0."""
    rate = _checks.number("dropout", rate)
    if not 0 <= rate < 1:
        _checks.bad_value("dropout", "a number from 0 to below 1", rate)
    if rate and key is None:
        _checks.bad_value("key", "a JAX random key, with dropout above 0", None)
    if rate:
        _checks.random_key("key", key)
    return rate


def dropouts(rate: float, key: jax.Array | None, count: int) -> list[Callable]:
    """What each layer does to its inputs; the first does nothing."""
    if not rate or key is None:
        return [lambda y: y] * count

    def drop(y, key):
        kept = _sharding.laid_out_like(jax.random.bernoulli(key, 1 - rate, y.shape), y)
        return jnp.where(kept, y / jnp.asarray(1 - rate, y.dtype), jnp.zeros_like(y))

    keys = jax.random.split(key, count)
    return [lambda y: y, *(partial(drop, key=keys[n]) for n in range(1, count))]

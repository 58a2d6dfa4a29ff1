"""What a precision of products means to JAX."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn import _checks


def config_value(name: str) -> Any:
    """An option of JAX as it is now."""
    return getattr(jax.config, name)


def check_precision(precision: Any) -> None:
    """Require a precision of products."""
    if precision is None:
        return
    try:
        meaning(precision)
    except (TypeError, ValueError):
        expected = "None, 'default', 'high', 'highest' or what else jax.numpy.matmul takes"
        got = repr(precision) if isinstance(precision, str) else _checks.came(precision)
        _checks.bad_value("precision", expected, got)


def meaning(precision: Any) -> Any:
    """What JAX makes of a precision here and now: None, a pair, or an algorithm.

    Raises:
      ValueError, TypeError: it is none.
    """
    return _meaning(precision, config_value("jax_default_matmul_precision"))


@cache
def _meaning(precision: Any, default: str | None) -> Any:
    del default  # what None means
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    product = jax.make_jaxpr(lambda x: jnp.matmul(x, x, precision=precision))(x)
    (found,) = (e.params["precision"] for e in product.eqns if "precision" in e.params)
    return found

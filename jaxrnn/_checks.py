"""Argument validation: one place, one message form.

Every message reads "<argument>: expected <what>, got <what came>". Only public functions call
these, never constructors: pytree transformations build the dataclasses with anything.
"""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._dtypes import wide


class InputError(ValueError):
    """Bad input from outside the program: a file, a directory, an option. One line says it."""


def bad_value(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError of this library."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def bad_type(name: str, expected: str, got: object) -> NoReturn:
    """Raise the TypeError of this library."""
    raise TypeError(f"{name}: expected {expected}, got {got}")


def instance(name: str, value: object, kind: type) -> None:
    """Require an instance of `kind`."""
    if not isinstance(value, kind):
        bad_type(name, f"a jaxrnn.{kind.__name__}", type(value).__name__)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of a few names."""
    if value not in choices:
        bad_value(name, "one of " + ", ".join(map(repr, choices)), repr(value))


def positive(name: str, value: int) -> None:
    """Require a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        bad_type(name, "a whole number", type(value).__name__)
    if value < 1:
        bad_value(name, "at least 1", value)


def array(name: str, value: Any) -> jax.Array:
    """Make an array of anything array-like."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from error


def floating(name: str, value: Any, shape: tuple[int | None, ...] | None = None) -> jax.Array:
    """Make a float array; None in `shape` stands for any length."""
    result = array(name, value)
    if not jnp.issubdtype(result.dtype, jnp.floating):
        bad_type(name, "a floating dtype", result.dtype)
    return shaped(name, result, shape)


def floating_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Require a float dtype."""
    result = jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating):
        bad_type(name, "a floating dtype", result)
    return result


def integers(name: str, value: Any, shape: tuple[int | None, ...] | None = None) -> jax.Array:
    """Make an integer array."""
    result = array(name, value)
    if not jnp.issubdtype(result.dtype, jnp.integer):
        bad_type(name, "an integer dtype", result.dtype)
    return shaped(name, result, shape)


def booleans(name: str, value: Any, shape: tuple[int | None, ...] | None = None) -> jax.Array:
    """Make a boolean array."""
    result = array(name, value)
    if result.dtype != jnp.bool_:
        bad_type(name, "dtype bool", result.dtype)
    return shaped(name, result, shape)


def shaped(name: str, value: jax.Array, shape: tuple[int | None, ...] | None) -> jax.Array:
    """Require a shape; None in it stands for any length."""
    if shape is not None:
        fits = len(shape) == value.ndim and all(
            want is None or want == have for want, have in zip(shape, value.shape, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
            bad_value(name, f"shape {wanted}", list(value.shape))
    return value


def in_range(name: str, ids: jax.Array, size: int, where: jax.Array | None = None) -> None:
    """Require 0 <= ids < size wherever `where` holds; traced values cannot be looked at."""
    if any(isinstance(value, Tracer) for value in (ids, where)) or ids.size == 0:
        return
    values = np.asarray(wide(ids))
    wrong = (values < 0) | (values >= size)
    if where is not None:
        wrong &= np.broadcast_to(np.asarray(where), values.shape)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        bad_value(name, f"ids from 0 to {size - 1}", f"{values[index]} at index {index}")

"""Argument validation: one place, one message form.

Every message reads "<argument>: expected <what>, got <what came>". Only public functions call
these, never constructors: pytree transformations build the dataclasses with anything.
"""

from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._backends.select import meaning
from jaxrnn._base.arithmetic import wide

Shape: TypeAlias = tuple[int | None, ...]  # None stands for any length
Hint: TypeAlias = tuple[Shape, str] | None  # what to say of an array of that other shape


class InputError(ValueError):
    """Bad input from outside the program: a file, a directory, an option. One line says it."""


def bad_value(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError of this library."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def bad_type(name: str, expected: str, got: object) -> NoReturn:
    """Raise the TypeError of this library."""
    raise TypeError(f"{name}: expected {expected}, got {got}")


def came(value: object) -> str:
    """What came, in words."""
    if not isinstance(value, jax.Array | np.ndarray):
        return "None" if value is None else type(value).__name__
    traced = "traced " if isinstance(value, Tracer) else ""
    return f"{traced}{value.dtype} array of shape {list(value.shape)}"


def instance(name: str, value: object, kind: type) -> None:
    """Require an instance of `kind`."""
    if not isinstance(value, kind):
        bad_type(name, f"a jaxrnn.{kind.__name__}", came(value))


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of a few names."""
    if not isinstance(value, str) or value not in choices:
        bad_value(name, "one of " + ", ".join(map(repr, choices)), repr(value))


def boolean(name: str, value: object) -> bool:
    """Require True or False, known now."""
    if not isinstance(value, bool | np.bool_):
        bad_type(name, "a bool", came(value))
    return bool(value)


def whole(name: str, value: int, least: int = 0) -> None:
    """Require a whole number that is known now, and not below the least."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        bad_type(name, "a whole number", came(value))
    if value < least:
        bad_value(name, f"at least {least}", value)


def positive(name: str, value: int) -> None:
    """Require a whole number of at least 1."""
    whole(name, value, least=1)


def number(name: str, value: Any) -> float:
    """Require a real number that is known now."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (np.floating, np.integer))
    else:
        real = not isinstance(value, bool | complex | str | bytes)
    if not real or isinstance(value, Tracer) or np.ndim(value):
        bad_type(name, "a number", came(value))
    try:
        return float(value)
    except (TypeError, ValueError):
        bad_type(name, "a number", came(value))


def random_key(name: str, value: Any) -> None:
    """Require one JAX random key, of the typed kind or of the raw one."""
    raw = isinstance(value, jax.Array | np.ndarray) and value.dtype == np.uint32
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not (raw or typed):
        bad_type(name, "a JAX random key", came(value))
    if value.ndim != raw:
        bad_value(name, "one JAX random key", came(value))


def array(name: str, value: Any) -> jax.Array:
    """Make an array of anything array-like."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufcV":
        bad_type(name, "a numeric or boolean dtype", value.dtype)
    try:
        return jnp.asarray(_saturated(value))
    except (TypeError, ValueError, OverflowError) as error:
        what = came(value)
        if isinstance(value, list | tuple):
            what = f"a {what} that makes none"
        raise TypeError(f"{name}: expected an array, got {what}") from error


def _saturated(value: Any) -> Any:
    """Integers that JAX without 64 bits would wrap, an invalid id to a valid one."""
    if isinstance(value, np.ndarray | np.integer) and value.dtype.kind in "iu":
        kept = jax.dtypes.canonicalize_dtype(value.dtype)
        if kept != value.dtype:
            return value.clip(np.iinfo(kept).min, np.iinfo(kept).max)
    return value


def floating(name: str, value: Any, shape: Shape | None = None, hint: Hint = None) -> jax.Array:
    """Make a float array."""
    result = array(name, value)
    if not jnp.issubdtype(result.dtype, jnp.floating):
        bad_type(name, "a floating dtype", result.dtype)
    return shaped(name, result, shape, hint)


def floating_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Require a float dtype."""
    result = jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating):
        bad_type(name, "a floating dtype", result)
    return result


def integers(name: str, value: Any, shape: Shape | None = None, hint: Hint = None) -> jax.Array:
    """Make an integer array."""
    result = array(name, value)
    if not jnp.issubdtype(result.dtype, jnp.integer):
        bad_type(name, "an integer dtype", result.dtype)
    return shaped(name, result, shape, hint)


def booleans(name: str, value: Any, shape: Shape | None = None, hint: Hint = None) -> jax.Array:
    """Make a boolean array."""
    result = array(name, value)
    if result.dtype != jnp.bool_:
        bad_type(name, "dtype bool", result.dtype)
    return shaped(name, result, shape, hint)


def shaped(name: str, value: jax.Array, shape: Shape | None, hint: Hint = None) -> jax.Array:
    """Require a shape; where another came that the hint is for, say what may be meant."""
    if shape is not None and not _fits(value, shape):
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        got = str(list(value.shape))
        if hint is not None and _fits(value, hint[0]):
            got += f"; {hint[1]}"
        bad_value(name, f"shape {wanted}", got)
    return value


def _fits(value: jax.Array, shape: Shape) -> bool:
    return len(shape) == value.ndim and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )


def swapped(shape: Shape) -> Hint:
    """For an array `[T, *batch, ...]` that came as `[B, T, ...]`, or the others did."""
    if len(shape) < 2:
        return None
    said = "time and batch look swapped: time comes first in every argument"
    return (shape[1], shape[0], *shape[2:]), said


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


def precision(value: Any) -> None:
    """Require a precision of products."""
    if value is None:
        return
    try:
        meaning(value)
    except (TypeError, ValueError):
        expected = "None, 'default', 'high', 'highest' or what else jax.numpy.matmul takes"
        got = repr(value) if isinstance(value, str) else came(value)
        bad_value("precision", expected, got)

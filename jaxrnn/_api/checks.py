"""Argument validation: one place, one form of message.

Messages read "<argument>: expected <what>, got <what>". Public functions call these, constructors
do not, because JAX's transformations build the dataclasses from arbitrary objects.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._backends.select import canonical_precision
from jaxrnn._base.arithmetic import wide
from jaxrnn._types import Params

_passed: dict = {}  # checked types -> True, or the structure to make; small: keys hold closures
_array = jax.jit(jnp.asarray)  # several times as fast as without jit


def once(check: Callable, tree: Any, *how) -> Any:
    """`check(tree, *how)`, a tree of JAX arrays; skipped if the same types have passed it.

    The check may depend on dtypes, shapes and static fields, but not on values.
    """
    try:
        leaves, structure = jax.tree.flatten(tree)
        types = [(x.shape, x.dtype) if isinstance(x, jax.Array) else _type(x) for x in leaves]
        key = check, how, structure, tuple(types)
        ready = _passed.get(key)
    except TypeError:  # unhashable, or to be checked by value
        return check(tree, *how)
    if ready is None:
        tree = check(tree, *how)
        if len(_passed) >= 128:
            _passed.clear()
        checked = jax.tree.structure(tree)  # differs if a leaf was a pytree, as flax.nnx.Param is
        unchanged = checked == structure and all(isinstance(x, jax.Array) for x in leaves)
        _passed[key] = unchanged or checked
    elif ready is not True:
        tree = ready.unflatten([x if isinstance(x, jax.Array) else _array(x) for x in leaves])
    return tree


def _type(x) -> tuple:
    if type(x) is float or (type(x) is np.ndarray and x.dtype.kind == "f"):
        return type(x), np.shape(x), getattr(x, "dtype", None)
    raise TypeError


Shape: TypeAlias = tuple[int | None, ...]  # None: any length
Hint: TypeAlias = tuple[Shape, str] | None  # a likely wrong shape, and what to say about it


class InputError(ValueError):
    """Bad input from outside the program (a file, an option), described in one line."""


def bad_value(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def bad_type(name: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got {got}")


def bad_input(name: object, expected: str, got: object) -> NoReturn:
    raise InputError(f"{name}: expected {expected}, got {got}")


def describe(value: object) -> str:
    """A value's type, and an array's dtype and shape, in words."""
    if not isinstance(value, jax.Array | np.ndarray):
        return "None" if value is None else type(value).__name__
    traced = "traced " if isinstance(value, Tracer) else ""
    return f"{traced}{value.dtype} array of shape {list(value.shape)}"


def instance(name: str, value: object, kind: type, alternative: str = "") -> None:
    if not isinstance(value, kind):
        part = f"; take its {kind.__name__.lower()}" if isinstance(value, Params) else ""
        bad_type(name, f"a jaxrnn.{kind.__name__}{alternative}", describe(value) + part)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        bad_value(name, "one of " + ", ".join(map(repr, choices)), repr(value))


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        bad_type(name, "a bool", describe(value))
    return bool(value)


def whole(name: str, value: int, least: int = 0) -> None:
    """Require a concrete whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        bad_type(name, "a whole number", describe(value))
    if value < least:
        bad_value(name, f"at least {least}", value)


positive = partial(whole, least=1)


def number(name: str, value: Any) -> float:
    """Require a concrete real number."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (np.floating, np.integer))
    else:
        real = not isinstance(value, bool | complex | str | bytes)
    with suppress(TypeError, ValueError):
        if real and not isinstance(value, Tracer) and not np.ndim(value):
            return float(value)
    bad_type(name, "a number", describe(value))


def random_key(name: str, value: Any) -> None:
    """Require one JAX random key, typed or raw."""
    raw = isinstance(value, jax.Array | np.ndarray) and value.dtype == np.uint32
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not (raw or typed):
        bad_type(name, "a JAX random key", describe(value))
    shape: Any = None
    with suppress(TypeError, ValueError):  # a raw key has the shape of the default implementation
        shape = jax.random.wrap_key_data(jnp.asarray(value)).shape if raw else value.shape
    if shape != ():
        bad_value(name, "one JAX random key", describe(value))


def array(name: str, value: Any) -> jax.Array:
    """Convert anything array-like to a JAX array, or say why it cannot be converted."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray | np.generic):
        _numpy(name, value, value.dtype)
    try:
        if isinstance(value, np.ndarray | np.integer) and value.dtype.kind in "iu":
            # Without 64 bits JAX would wrap an invalid id around to a valid one.
            info = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
            value = value.clip(info.min, info.max) if info.dtype != value.dtype else value
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        raise TypeError(f"{name}: expected an array, got {_why_not(value, error)}") from error


def _numpy(name, value, dtype):
    if isinstance(value, np.ma.MaskedArray):
        bad_type(name, "an array", "a masked one; fill it first: value.filled(...)")
    if dtype.kind not in "biufcV" or issubclass(dtype.type, np.void):
        bad_type(name, "a numeric or boolean dtype", dtype)
    if not dtype.isnative:
        how = "value.astype(value.dtype.newbyteorder('='))"
        bad_type(name, "native byte order", f"{dtype}; convert it first: {how}")
    if dtype.kind in "fc" and dtype.itemsize > (8 if dtype.kind == "f" else 16):
        bad_type(name, "float64 or narrower", dtype)


def _why_not(value, error):
    """Describe a value that is not an array, with the reason if its type does not say it."""
    reason = str(error).split("\n")[0].rstrip(".")
    if isinstance(value, list | tuple):
        if re.search("inhomogeneous|different number|shapes that differ|same shape", reason):
            return f"a {describe(value)} whose entries have different shapes"
        reason = re.sub("^Value .* with dtype", "an entry of dtype", reason)
        reason = "a number is too large" if isinstance(error, OverflowError) else reason
        return f"a {describe(value)} that cannot become one: {reason}"
    if hasattr(value, "todense"):
        reason = "make it dense first: value.todense()"
    elif not hasattr(value, "__array__"):
        return describe(value)
    return f"{describe(value)}; {reason}"


def not_swapped(name: str, value: object, other: str, beside: object, kind: type) -> None:
    """Refuse two arguments if only the second is of the kind that the first should be."""
    if isinstance(beside, kind) and not isinstance(value, kind):
        got = f"{describe(value)}; {name} and {other} look swapped"
        bad_type(name, f"a jaxrnn.{kind.__name__}", got)


def shapes_not_swapped(name, value: Any, other, beside: Any, shape: Shape, of_other: Shape) -> None:
    """Refuse two arrays if each has the shape that the other should have."""
    shapes = getattr(value, "shape", None), getattr(beside, "shape", None)
    if shapes == (of_other, shape) and shape != of_other:
        got = f"{list(of_other)}; {name} and {other} look swapped"
        bad_value(name, f"shape {list(shape)}", got)


def _of_kind(kind, expected: str, name: str, value: Any, shape: Shape | None = None, hint=None):
    """Convert to an array, and require a kind of dtype and a shape."""
    result = array(name, value)
    if not jnp.issubdtype(result.dtype, kind):
        bad_type(name, expected, result.dtype)
    return shaped(name, result, shape, hint)


floating = partial(_of_kind, np.floating, "a floating dtype")
integers = partial(_of_kind, np.integer, "an integer dtype")
booleans = partial(_of_kind, np.bool_, "dtype bool")


def shaped(name: str, value: jax.Array, shape: Shape | None, hint: Hint = None) -> jax.Array:
    """Require a shape; add the hint to the message if its shape fits instead."""
    if shape is not None and not _fits(value, shape):
        expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        got = str(list(value.shape))
        if hint is not None and _fits(value, hint[0]):
            got += f"; {hint[1]}"
        bad_value(name, f"shape {expected}", got)
    return value


def _fits(value: jax.Array, shape: Shape) -> bool:
    pairs = zip(shape, value.shape, strict=False)
    return len(shape) == value.ndim and all(want is None or want == have for want, have in pairs)


def swapped(shape: Shape) -> Hint:
    """The hint for an array `[T, B, ...]` of shape `[B, T, ...]`, or the other way round."""
    if len(shape) < 2:
        return None
    hint = "time and batch look swapped: time comes first in every argument"
    return (shape[1], shape[0], *shape[2:]), hint


def in_range(name: str, ids: jax.Array, size: int, where: jax.Array | None = None) -> None:
    """Require 0 <= ids < size where `where` is True; traced values pass."""
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
    try:
        if value is not None:
            canonical_precision(value)
    except (TypeError, ValueError):
        expected = "None, 'default', 'high', 'highest' or another precision of jax.numpy.matmul"
        bad_value("precision", expected, repr(value) if isinstance(value, str) else describe(value))

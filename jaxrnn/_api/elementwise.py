"""That the functions of a cell are elementwise, which the derivation rests on.

The derivative of a function that mixes units is no diagonal, and would be wrong without a word. So
each is tried once, by values: where some units move, no other may.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxrnn._api import checks
from jaxrnn._base.arithmetic import accumulation_dtype
from jaxrnn._base.forms import NAMED, resolve
from jaxrnn._jax.error_checks import without_checks
from jaxrnn._types import Cell, Form

# What a mixes with others may show only where it is small, or large: a norm that is clipped, say.
SCALES = 1e-3, 1.0, -1.0, 30.0, 1e4, 1e8


def check_functions(prefix: str, cell: Cell) -> None:
    """Require an activation, or a form, of elementwise functions that fit the cell's arrays."""
    form, size = cell.form, cell.W.shape[0]
    dtype = accumulation_dtype(cell.W.dtype)
    size = size if isinstance(size, int) else 8  # a program exported for sizes to come
    if not isinstance(form, Form):
        return check_activation(cell.activation, size, dtype)
    theta = jax.tree.structure(cell.parameters)
    for which, function, states in (("update", form.update, 2), ("output", form.output, 1)):
        if function is not None:
            _check(f"{prefix}form.{which}", function, states, theta, size, dtype)


def check_activation(activation: Any, size: int, dtype: jnp.dtype) -> None:
    """Require a known name, or elementwise functions."""
    if isinstance(activation, str) and activation in NAMED:
        return
    others = "a jaxrnn.Activation or any elementwise callable (jax.nn.gelu, say)"
    if isinstance(activation, str):
        known = ", ".join(map(repr, NAMED))
        checks.bad_value("activation", f"one of {known}, {others}", repr(activation))
    resolved = resolve(activation)
    if not callable(resolved.function):
        checks.bad_type("activation", f"a name, {others}", checks.came(resolved.function))
    for function in (resolved.function, resolved.derivative_from_output):
        if function is not None:
            _check("activation", function, 1, None, size, dtype)


def _check(name, function, *how) -> None:
    if not callable(function):
        checks.bad_type(name, "a callable", checks.came(function))
    try:
        hash(function)
    except TypeError:
        got = f"a {type(function).__name__} that has no hash"
        checks.bad_type(name, "a callable that can be static under jit", got)
    _probe(name, function, *how)


@lru_cache(maxsize=256)
def _probe(name: str, function: Callable, states: int, theta: Any, size: int, dtype) -> None:
    """Refuse a function of so many states, and θ, that is not elementwise over them all."""
    said = getattr(function, "__name__", None) or repr(function)

    def refuse(why: str, error: Exception | None = None) -> NoReturn:
        expected = "an elementwise function of JAX arrays"
        raise ValueError(f"{name}: expected {expected}, got {said}, {why}") from error

    # Of each set some units move and the others do not: those with a bit in their number. Any two
    # units are told apart by one of them.
    units = np.arange(size)
    bits = range(max(size - 1, 1).bit_length())
    moving = np.stack([(units >> bit) % 2 == side for bit in bits for side in (0, 1)])
    moving = np.tile(moving, (len(SCALES), 1))
    generator, of_theta = np.random.default_rng(0), 0 if theta is None else theta.num_leaves
    value = np.tile(generator.uniform(0.5, 1.5, (states + of_theta, 1, size)), (len(moving), 1))
    value[:states] *= generator.choice([-1, 1], (states, 1, size))
    value[:states] *= np.repeat(SCALES, len(moving) // len(SCALES))[:, None]
    factor = np.repeat([-3, 1.5], [states, of_theta])[:, None, None]
    moved = np.where(moving, value * factor, value)

    def run(*leaves):
        rest = () if theta is None else (theta.unflatten(leaves[states:]),)
        return function(*leaves[:states], *rest)

    try:
        traced = jax.make_jaxpr(run)(*jnp.zeros_like(value, dtype))
    except Exception as error:
        refuse(f"which fails: {str(error).strip().splitlines()[0]}", error)
    if any(isinstance(constant, Tracer) for constant in traced.consts):
        refuse("which closes over a traced value: let it be one of the parameters of a Form")
    (out, *more) = traced.out_avals
    if more or out.shape != moving.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        made = ", ".join(map(str, traced.out_avals))
        refuse(f"which makes {made} of {traced.in_avals[0]}")
    if traced.effects:  # without what it checks, and prints
        traced = jax.make_jaxpr(without_checks(run))(*jnp.zeros_like(value, dtype))
    jaxpr = traced.jaxpr
    eqns = [eqn for eqn in jaxpr.eqns if eqn.outvars or not eqn.effects]
    quiet = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=eqns), traced.consts))
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        try:
            ys = [np.asarray(quiet(*jnp.asarray(x, dtype))[0]) for x in (value, moved)]
        except Exception as error:
            refuse(f"which fails: {str(error).strip().splitlines()[0]}", error)
    if not np.array_equal(*(np.where(moving, 0, y) for y in ys), equal_nan=True):
        refuse("in which one unit, or one sequence, depends on others")

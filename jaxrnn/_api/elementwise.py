"""Checks that the functions of a cell are elementwise, as the derivation requires.

A function that mixes units has a derivative that is not a diagonal, and gradients would be silently
wrong. So each function is tested once by values: if some units change, no other output may change.
The test changes half of the units at a time, at five scales from 0.001 to 10⁸ and with three
patterns of signs, evaluates the function at another shape, and compares its vjp with slopes times
cotangents. A function that mixes units only at other values passes. One that draws noise of the
shape of a is refused, because derivatives would draw it again; `drive` is for noise.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from traceback import format_exception_only
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, get_abstract_mesh, use_abstract_mesh

from jaxrnn._api import checks
from jaxrnn._base.arithmetic import accumulation_dtype
from jaxrnn._base.forms import NAMED
from jaxrnn._jax.error_checks import without_checks
from jaxrnn._record import by_name
from jaxrnn._types import Activation, Cell, Form

# Some functions mix units only at small or large values, such as a clipped norm.
SCALES = 1e-3, 1.0, 30.0, 1e4, 1e8


def check_functions(prefix: str, cell: Cell) -> None:
    """Require that the activation, or the form, consists of elementwise functions."""
    form, size = cell.form, cell.W.shape[0]
    dtype = accumulation_dtype(cell.W.dtype)
    size = size if isinstance(size, int) else 8  # symbolic, in an exported program
    if not isinstance(form, Form):
        return check_activation(cell.activation, size, dtype)
    theta = jax.tree.structure(cell.parameters)
    for which, function, states in (("update", form.update, 2), ("output", form.output, 1)):
        if function is not None or which == "update":
            _check(f"{prefix}form.{which}", function, states, theta, size, dtype)


def check_activation(activation: Any, size: int, dtype: jnp.dtype) -> None:
    """Require the name of an activation, or elementwise functions."""
    if isinstance(activation, str) and activation in NAMED:
        return
    others = "a jaxrnn.Activation or any elementwise callable (jax.nn.gelu, say)"
    if isinstance(activation, str):
        known = ", ".join(map(repr, NAMED))
        checks.bad_value("activation", f"one of {known}, {others}", repr(activation))
    if not isinstance(activation, Activation):
        if not callable(activation):
            checks.bad_type("activation", f"a name, {others}", checks.describe(activation))
        return _check("activation", activation, 1, None, size, dtype)
    for which in ("function", "derivative_from_output"):
        function = getattr(activation, which)
        if function is not None or which == "function":
            _check(f"activation.{which}", function, 1, None, size, dtype)


def _check(name, function, *how) -> None:
    if not callable(function):
        checks.bad_type(name, "a callable", checks.describe(function))
    try:
        hash(function)
    except TypeError:
        got = f"an unhashable {type(function).__name__}; a Form takes arrays as parameters"
        checks.bad_type(name, "a callable that can be static under jit", got)
    _probe(name, function, *how)


@lru_cache(maxsize=32)
def _probe(name: str, function: Callable, states: int, theta: Any, size: int, dtype) -> None:
    """Refuse a function of `states` states, and θ, that is not elementwise."""

    def run(*leaves):
        rest = () if theta is None else (theta.unflatten(leaves[states:]),)
        return function(*leaves[:states], *rest)

    cause = None
    try:
        mesh = get_abstract_mesh()  # inside shard_map only an empty mesh leads outside
        with eval_context(), use_abstract_mesh(AbstractMesh((), ()) if mesh.manual_axes else mesh):
            why = _fault(run, states, 0 if theta is None else theta.num_leaves, size, dtype)
    except Exception as error:
        why, cause = f"which fails: {format_exception_only(error)[0].splitlines()[0]}", error
    if why is not None:
        expected = "an elementwise function of JAX arrays, of jax.numpy say and not NumPy or math"
        raise ValueError(f"{name}: expected {expected}, got {by_name(function)}, {why}") from cause


def _fault(run: Callable, states: int, of_theta: int, size: int, dtype) -> str | None:
    """What is wrong with a function of `states` states and `of_theta` parameters, or None."""
    # One set of units for each bit of the unit's number: every two units differ in one of them.
    units, count = np.arange(size), states + of_theta
    bits = range(max(size - 1, 1).bit_length())
    moving = np.stack([(units >> bit) % 2 == side for bit in bits for side in (0, 1)])
    generator = np.random.default_rng(0)
    value = np.tile(generator.uniform(0.5, 1.5, (count, 1, size)), (len(moving), 1))
    mixed = np.where((units + np.arange(len(moving))[:, None]) % 2, -1, 1)
    is_state = (np.arange(count) < states)[:, None, None]

    def arrays(x):
        return [jnp.asarray(leaf, dtype) for leaf in x]

    traced, out = jax.make_jaxpr(run, return_shape=True)(*arrays(value))
    if any(isinstance(constant, Tracer) for constant in traced.consts):
        return "which closes over a traced value: let it be one of the parameters of a Form"
    if getattr(out, "shape", 0) != moving.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        known = hasattr(out, "shape") or isinstance(out, tuple)
        made = ", ".join(map(str, traced.out_avals)) if known else checks.describe(out)
        return f"which makes {made} of {traced.in_avals[0]}"
    quiet = _quiet(run, arrays(value))
    with jax.debug_nans(False), jax.debug_infs(False):
        for scale, sign in product(SCALES, (1, -1, mixed)):
            x = np.where(is_state, scale * sign * value, value)
            moved = np.where(moving, np.where(is_state, -7, 1.5) * x, x)
            ys = (np.where(moving, 0, quiet(*arrays(x))) for x in (x, moved))
            if not np.array_equal(*ys, equal_nan=True):
                return "in which one unit, or one sequence, depends on others"
        x = np.where(is_state, mixed * value, value)
        y = np.asarray(quiet(*arrays(x)))
        for rows in (0, np.arange(258).reshape(129, 2) % len(moving)):  # one, or many steps
            leaves = arrays(x[:, rows])
            quiet = _quiet(run, leaves)
            if not _agree(quiet(*leaves), y[rows]):
                return "in which a unit depends on the shape; for noise there is drive"
        # The vjp of an elementwise function multiplies cotangents by slopes: exactly, if they are
        # powers of two, here of both signs and in the range of narrow dtypes.
        few = re.search(r"\bf(16\[|[468]_)", str(traced.jaxpr))
        powers = generator.integers(*((-3, 8) if few else (-20, 20)), (129, 2, size))
        g = generator.choice([-1.0, 1.0], powers.shape) * 2.0**powers
        try:
            y, pull = jax.vjp(quiet, *leaves)
            pulled, slopes = pull(jnp.asarray(g, y.dtype)), pull(jnp.ones_like(y))
        except Exception:  # no derivative, or none in reverse mode
            return None
        if not all(_agree(np.asarray(v) / g, s) for v, s in zip(pulled, slopes, strict=True)):
            return "whose derivative is that of no elementwise function"
    return None


def _quiet(run: Callable, leaves: list) -> Callable:
    """The function for leaves of these shapes, without its checks and prints."""
    traced = jax.make_jaxpr(run)(*leaves)
    if traced.effects:
        traced = jax.make_jaxpr(without_checks(run))(*leaves)
    eqns = [eqn for eqn in traced.jaxpr.eqns if eqn.outvars or not eqn.effects]
    evaluate = jaxpr_as_fun(traced.replace(jaxpr=traced.jaxpr.replace(eqns=eqns)))
    return lambda *leaves: evaluate(*leaves)[0]


def _agree(x: Any, y: Any) -> bool:
    """Equality up to rounding, which differs between vector lengths."""
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    return np.allclose(x, y, rtol=1e-3, atol=1e-5, equal_nan=True)

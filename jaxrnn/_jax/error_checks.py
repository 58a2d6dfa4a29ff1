"""Rules of `jax.experimental.checkify` for the primitives of this package.

JAX has no public way to add such a rule, so its private table is used. If a later JAX moves the
table, checkify does not see errors inside these primitives; everything else still works.
"""

from collections.abc import Callable

from jax import lax
from jax.experimental import checkify
from jax.extend.core import Primitive

try:
    from jax._src.checkify import ErrorEffect, checkify_jaxpr, error_checks
except ImportError:
    ErrorEffect, checkify_jaxpr, error_checks = (), None, {}


def look_into(primitive: Primitive, program: Callable, unchecked: Callable) -> None:
    """Let checkify report the errors of `program(*leaves, **params)`, a jaxpr.

    The program runs beside the primitive, which still computes values and derivatives. If it
    contains a `checkify.check`, `unchecked(*leaves, **params)` takes the primitive's place.
    """

    def rule(*args, **params):
        # From jax 0.12 on, a context precedes the error.
        at = next(n for n, x in enumerate(args) if isinstance(x, frozenset))
        (*context, error), enabled, leaves = args[:at], args[at], args[at + 1 :]
        jaxpr, still = program(*leaves, **params), lax.stop_gradient(leaves)
        error, _ = checkify_jaxpr(*context, jaxpr, enabled, error, *still)  # pyright: ignore[reportOptionalCall]
        has_checks = any(isinstance(effect, ErrorEffect) for effect in jaxpr.effects)
        return error, (unchecked if has_checks else primitive.bind)(*leaves, **params)

    error_checks[primitive] = rule


def without_checks(function: Callable) -> Callable:
    """The function without its `checkify.check`s, which a compiled program cannot contain."""
    return lambda *args: checkify.checkify(function)(*args)[1]

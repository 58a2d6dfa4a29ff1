"""What `jax.experimental.checkify` finds in a primitive that stands for a program.

Without a rule it looks into none. JAX exports no way to add one: its table is taken from where it
lies. Should a later JAX have moved it, errors in these primitives go unseen, and all else is as it
was.
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
    """Have checkify find the errors of `program(*leaves, **params)`, a jaxpr.

    Values and derivatives are those of the primitive as ever; the program runs beside it. With a
    `checkify.check` in it, the primitive is bound by `unchecked(*leaves, **params)`.
    """

    def rule(*args, **params):
        # From jax 0.12 on there is a context in front of the error.
        at = next(n for n, x in enumerate(args) if isinstance(x, frozenset))
        (*context, error), enabled, leaves = args[:at], args[at], args[at + 1 :]
        jaxpr, still = program(*leaves, **params), lax.stop_gradient(leaves)
        error, _ = checkify_jaxpr(*context, jaxpr, enabled, error, *still)  # pyright: ignore[reportOptionalCall]
        has_checks = any(isinstance(effect, ErrorEffect) for effect in jaxpr.effects)
        return error, (unchecked if has_checks else primitive.bind)(*leaves, **params)

    error_checks[primitive] = rule


def without_checks(function: Callable) -> Callable:
    """The same without `checkify.check`, which no compiled program may contain."""
    return lambda *args: checkify.checkify(function)(*args)[1]

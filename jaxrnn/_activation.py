"""Elementwise nonlinearities, and how their derivatives are found."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrnn import _checks

Elementwise = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Activation:
    """A nonlinearity phi and, where there is one, phi' written with the output.

    Args:
      function: phi, elementwise, `a -> phi(a)`.
      derivative_from_output: `phi(a) -> phi'(a)`, elementwise, or None: then JAX
        differentiates `function` at the pre-activation, which is recomputed for it.

    Both are static under jit: two Activations are equal when their functions are, and a new
    lambda at every call compiles at every call. Neither may close over a traced value.
    """

    function: Elementwise
    derivative_from_output: Elementwise | None = None


# tanh' = (1 − h)(1 + h): where the unit saturates, 1 − h² would round h² first and then cancel.
NAMED = {
    "tanh": Activation(jnp.tanh, lambda h: (1 - h) * (1 + h)),
    "relu": Activation(jax.nn.relu, lambda h: (h > 0).astype(h.dtype)),
    "sigmoid": Activation(jax.nn.sigmoid, lambda h: h * (1 - h)),
    "identity": Activation(lambda a: a, jnp.ones_like),
}


def resolve(activation: "str | Activation | Elementwise") -> Activation:
    """Return the Activation behind a name, an Activation or a plain callable."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        _checks.one_of("activation", activation, tuple(NAMED))
        return NAMED[activation]
    if not callable(activation):
        _checks.bad_type(
            "activation", "a name, a jaxrnn.Activation or a callable", type(activation).__name__
        )
    return Activation(activation)


def check(activation: "str | Activation | Elementwise") -> None:
    """Require a known name, or callables of the pre-activation alone.

    A callable that closes over a traced value is refused: the derivative rule would take that
    value for a constant, and under jit the gradient by it would silently be 0.
    """
    resolved = resolve(activation)
    if isinstance(activation, str):
        return
    for function in (resolved.function, resolved.derivative_from_output):
        if function is None:
            continue
        if not callable(function):
            _checks.bad_type("activation", "callables in an Activation", type(function).__name__)
        constants = jax.make_jaxpr(function)(jnp.zeros((1, 1))).consts
        if any(isinstance(constant, Tracer) for constant in constants):
            _checks.bad_value(
                "activation", "a function of a alone", "one that closes over a traced value; "
                "make it a part of the cell or of the inputs",
            )  # fmt: skip


def slope(activation: Activation, output: jax.Array, preactivation: jax.Array) -> jax.Array:
    """phi'(a), from the output where it can, else from the pre-activation."""
    if activation.derivative_from_output is not None:
        return activation.derivative_from_output(output)
    return jax.jvp(activation.function, (preactivation,), (jnp.ones_like(preactivation),))[1]

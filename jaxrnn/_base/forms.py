"""The two forms of the equation, elementwise over units: f, g, and what φ' is found from.

    a_t = W s_{t−1} + U x_t + b + drive_t,    s_{t−1} = g(h_{t−1}),    h_t = f(a_t, h_{t−1})

    form      f(a, h)                 g(h)    ∂f/∂a        ∂f/∂h    g'
    rate      (1 − α) h + α φ(a)      h       α φ'(a)      1 − α    1
    voltage   (1 − α) h + α a         φ(h)    α            1 − α    φ'(h)

So φ' stands on one side of W or on the other, and the leak acts in the same way in both.
"""

import jax
import jax.numpy as jnp

from jaxrnn._base.arithmetic import accumulation_dtype, like
from jaxrnn._types import Activation, Cell, Elementwise

FORMS = ("rate", "voltage")

# tanh' = (1 − h)(1 + h): where the unit saturates, 1 − h² would round h² first and then cancel.
NAMED = {
    "tanh": Activation(jnp.tanh, lambda h: (1 - h) * (1 + h)),
    "relu": Activation(jax.nn.relu, lambda h: (h > 0).astype(h.dtype)),
    "sigmoid": Activation(jax.nn.sigmoid, lambda h: h * (1 - h)),
    "identity": Activation(lambda a: a, jnp.ones_like),
}


def resolve(activation: str | Activation | Elementwise) -> Activation:
    """The Activation behind a name, an Activation or a plain callable."""
    if isinstance(activation, str):
        return NAMED[activation]
    return activation if isinstance(activation, Activation) else Activation(activation)


def update(cell: Cell, a: jax.Array, h_prev: jax.Array) -> jax.Array:
    """h = f(a, h_prev), in the dtype of h_prev."""
    moved = resolve(cell.activation).function(a) if cell.form == "rate" else a
    if cell.leak is not None:
        alpha = like(cell.leak, moved)
        moved = (1 - alpha) * h_prev.astype(moved.dtype) + alpha * moved
    return moved.astype(h_prev.dtype)


def output(cell: Cell, h: jax.Array) -> jax.Array:
    """s = g(h), in the dtype of sums where it is computed: what W, a readout and a layer read."""
    if cell.form == "rate":
        return h
    return resolve(cell.activation).function(h.astype(accumulation_dtype(h.dtype)))


def slope_of(cell: Cell) -> Elementwise:
    """φ' from its basis, which is φ where that gives it, else φ' itself."""
    return resolve(cell.activation).derivative_from_output or identity


def slope_basis(cell: Cell, phi: jax.Array, argument: jax.Array) -> jax.Array:
    """What `slope_of` reads: φ at the argument, or φ' there by JAX."""
    activation = resolve(cell.activation)
    return phi if activation.derivative_from_output else slope(activation, phi, argument)


def slope(activation: Activation, phi: jax.Array, argument: jax.Array) -> jax.Array:
    """φ' at the argument, from φ there where it can."""
    if activation.derivative_from_output is not None:
        return activation.derivative_from_output(phi)
    return jax.jvp(activation.function, (argument,), (jnp.ones_like(argument),))[1]


def has_effects(cell: Cell) -> bool:
    """Whether φ prints, or calls back."""
    if isinstance(cell.activation, str):
        return False
    return bool(jax.make_jaxpr(resolve(cell.activation).function)(jnp.zeros((1, 1))).effects)


def identity(x: jax.Array) -> jax.Array:
    """φ' from itself."""
    return x

"""The forms of the equation, elementwise over units: f, g, and their derivatives.

    a_t = W s_{t−1} + U x_t + b + drive_t,    s_{t−1} = g(h_{t−1}; θ),    h_t = f(a_t, h_{t−1}; θ)

    form      f(a, h)                 g(h)    ∂f/∂a        ∂f/∂h    g'
    rate      (1 − α) h + α φ(a)      h       α φ'(a)      1 − α    1
    voltage   (1 − α) h + α a         φ(h)    α            1 − α    φ'(h)
    custom    any                     any     by JAX       by JAX   by JAX

The rate form has φ' on one side of W, the voltage form on the other; the leak is the same in both.
A new form is a `jaxrnn.Form`, with no change here. To build one in, follow "voltage" through this
file, `_core/derivative.py` (`linearised` has the slopes), `_core/linear.py` and `textbook.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn._base.arithmetic import accumulation_dtype, like
from jaxrnn._jax import sharding
from jaxrnn._types import Activation, Cell, Elementwise, Form

FORMS = ("rate", "voltage")

# tanh' = (1 − h)(1 + h): for a saturated unit, 1 − h² rounds h² and then cancels.
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


def is_custom(cell: Cell) -> bool:
    return isinstance(cell.form, Form)


def has_output(cell: Cell) -> bool:
    """Whether the output of a unit is not its state."""
    return _form(cell).output is not None if is_custom(cell) else cell.form == "voltage"


def _form(cell: Cell) -> Any:
    return cell.form


def function_of(cell: Cell) -> Elementwise:
    """φ; the identity for a custom form."""
    return identity if is_custom(cell) else resolve(cell.activation).function


def _for_units(cell: Cell, a: jax.Array) -> Any:
    """θ, broadcast to the shape, dtype and layout of a."""
    return jax.tree.map(lambda x: sharding.laid_out_like(like(x, a), a), cell.parameters)


def update(cell: Cell, a: jax.Array, h_prev: jax.Array) -> jax.Array:
    """h = f(a, h_prev), in the dtype of h_prev."""
    return move(cell, inner(cell, a), h_prev)


def inner(cell: Cell, a: jax.Array) -> jax.Array:
    """The target that a leaky unit moves towards: φ(a) in the rate form, a in the others."""
    return function_of(cell)(a) if cell.form == "rate" else a


def move(cell: Cell, moved: jax.Array, h_prev: jax.Array) -> jax.Array:
    """h, from the result of `inner`."""
    if is_custom(cell):
        h = _form(cell).update(moved, h_prev.astype(moved.dtype), _for_units(cell, moved))
        return h.astype(h_prev.dtype)
    if cell.leak is not None:
        alpha = like(cell.leak, moved)
        moved = (1 - alpha) * h_prev.astype(moved.dtype) + alpha * moved
    return moved.astype(h_prev.dtype)


def output(cell: Cell, h: jax.Array) -> jax.Array:
    """s = g(h), the input of W, the readout and the next layer; in the dtype of sums if not h."""
    if not has_output(cell):
        return h
    h = h.astype(accumulation_dtype(h.dtype))
    if is_custom(cell):
        return _form(cell).output(h, _for_units(cell, h))
    return function_of(cell)(h)


class Kept(NamedTuple):
    """Residuals of a step, saved by the forward pass for derivatives, beside the state.

    Args:
      s_prev: s_{t−1}.
      a: a_t, or φ(a_t) if φ' is a function of it; None in the voltage form.
      on: for relu, whether a_t > 0, so that φ(a) is dropped unless the leak has a gradient.
    """

    s_prev: jax.Array
    a: Any = None
    on: Any = None


def kept(cell: Cell, s_prev: jax.Array, a: jax.Array, moved: jax.Array) -> Kept | None:
    """The residuals of a step; None if the states suffice: φ' from φ, and no leak."""
    if cell.form == "voltage":
        return Kept(s_prev)
    if slope_of(cell) is identity:
        return Kept(s_prev, a)
    on = moved > 0 if resolve(cell.activation) is NAMED["relu"] else None
    return None if cell.leak is None else Kept(s_prev, moved, on)


def update_derivatives(cell: Cell, a: jax.Array, h_prev: jax.Array) -> tuple:
    """(∂f/∂a, ∂f/∂h, ∂f/∂θ) of a custom form, for each unit, in the dtype of a."""
    return derivatives(_form(cell).update, a, h_prev.astype(a.dtype), _for_units(cell, a))


def output_derivatives(cell: Cell, h: jax.Array) -> tuple:
    """(g', ∂g/∂θ) for each unit, in the dtype of h; (None, None) where s is h."""
    if not has_output(cell):
        return None, None
    if is_custom(cell):
        return derivatives(_form(cell).output, h, _for_units(cell, h))
    return slope(resolve(cell.activation), output(cell, h), h), None


def derivatives(function: Callable, *args) -> tuple:
    """The derivatives of an elementwise function in each argument.

    In reverse mode, so that a `custom_vjp` (a surrogate gradient) is used; in forward mode where
    the function has no reverse mode.
    """
    try:
        y, pull = jax.vjp(function, *args)
        return pull(sharding.varying_like(jnp.ones_like(y), y))
    except ValueError as error:
        if "Reverse-mode" not in str(error):  # a loop of unknown length
            raise
        leaves, tree = jax.tree.flatten(args)
        by = [[jnp.full_like(x, n == m) for m, x in enumerate(leaves)] for n in range(len(leaves))]
        return tree.unflatten(jax.jvp(function, args, tree.unflatten(t))[1] for t in by)


def slope_of(cell: Cell) -> Elementwise:
    """φ' as a function of `slope_basis`."""
    if is_custom(cell):
        return identity
    return resolve(cell.activation).derivative_from_output or identity


def slope_basis(cell: Cell, phi: jax.Array, argument: jax.Array) -> jax.Array:
    """The argument of `slope_of`: φ if it determines φ', else φ' itself."""
    activation = resolve(cell.activation)
    return phi if activation.derivative_from_output else slope(activation, phi, argument)


def slope(activation: Activation, phi: jax.Array, argument: jax.Array) -> jax.Array:
    """φ' at the argument, from φ if that determines it."""
    if activation.derivative_from_output is not None:
        return activation.derivative_from_output(phi)
    return derivatives(activation.function, argument)[0]


def has_effects(cell: Cell) -> bool:
    """Whether φ, f or g has effects: prints, callbacks."""
    if isinstance(cell.activation, str) and not is_custom(cell):
        return False
    h = jnp.zeros((1, cell.W.shape[0]), accumulation_dtype(cell.W.dtype))
    run = lambda cell, h: (update(cell, h, h), output(cell, h))  # noqa: E731
    return bool(jax.make_jaxpr(run)(cell, h).effects)


def identity(x: jax.Array) -> jax.Array:
    return x

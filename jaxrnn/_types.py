"""A network's parameters and inputs, as pytrees of arrays.

Constructors check nothing: JAX's transformations build these dataclasses from arbitrary objects.

Axes: T time, B batch, D input, H hidden, K output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax

from jaxrnn._record import Record, by_name, pytree

Elementwise = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Activation:
    """A nonlinearity φ and, optionally, φ' as a function of the output.

    Worth it where φ' is cheaper from φ(a) than from a, as for tanh: a is then not recomputed.

    Args:
      function: φ, elementwise, `a -> φ(a)`.
      derivative_from_output: `φ(a) -> φ'(a)`, elementwise. If None, JAX differentiates `function`
        at a, which is recomputed.

    Both are static under jit: Activations are equal if their functions are, so a new lambda in
    every call compiles in every call. Neither may close over a traced value (a ValueError); other
    values are read once. What is to be learned belongs to the `parameters` of a `Form`.
    """

    function: Elementwise
    derivative_from_output: Elementwise | None = None

    def __repr__(self) -> str:
        return _of_functions("Activation", self.function, self.derivative_from_output)


@dataclass(frozen=True)
class Form:
    """A custom equation of the units, around the same product with W.

    a_t = W s_{t−1} + U x_t + b + drive_t,   h_t = f(a_t, h_{t−1}; θ),   s_t = g(h_t; θ)

    For equations other than "rate" and "voltage": a φ with learned parameters, a time constant and
    a threshold per unit, a residual network. Lengths, memory options, stacks, `bptt`,
    `loss_and_grads`, `textbook` and all transformations take such a cell.

    Args:
      update: f, `(a, h, parameters) -> h`, elementwise.
      output: g, `(h, parameters) -> s`, elementwise; None for s = h.

    Both get a, h and each leaf of the cell's `parameters` broadcast to one shape, `[..., H]`, for
    one step or many. They may depend on `a.shape[-1]` but on no other axis. JAX differentiates them
    in reverse mode, so a `custom_vjp` (a surrogate gradient) is respected. They are static, as in
    `Activation`; what is learned or traced belongs to `parameters`, scalars or `[H]`. A function
    that mixes units (a softmax, a norm) is a ValueError: its derivative is not a diagonal.

    modReLU (Arjovsky, Shah and Bengio 2016) with a learned bias, and a leaky unit with a learned
    time constant and threshold:

    >>> import jax, jaxrnn
    >>> modrelu = jaxrnn.Form(lambda a, h, bias: jax.numpy.sign(a) * jax.nn.relu(abs(a) + bias))
    >>> leaky = jaxrnn.Form(
    ...     update=lambda a, v, p: v + (a - v) / p["tau"],
    ...     output=lambda v, p: jax.nn.relu(v - p["threshold"]),
    ... )
    >>> p = {"tau": jax.numpy.full(16, 5.0), "threshold": jax.numpy.zeros(16)}
    >>> cell = jaxrnn.init_cell(jax.random.key(0), 3, 16, form=leaky, parameters=p)
    """

    update: Callable[[jax.Array, jax.Array, Any], jax.Array]
    output: Callable[[jax.Array, Any], jax.Array] | None = None

    def __repr__(self) -> str:
        return _of_functions("Form", self.update, self.output)


def _of_functions(name, *functions):
    return f"{name}({', '.join(by_name(f) for f in functions if f is not None)})"


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Cell(Record):
    """One recurrent layer.

    rate:     h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + U x_t + b)
    voltage:  h_t = (1 − α) h_{t−1} + α (W φ(h_{t−1}) + U x_t + b)

    α = 1 by default; the rate form is then the Elman network. The state of the rate form is the
    output of the units, that of the voltage form their input, and φ(h) their output. Both are the
    same network in different variables: machine learning mostly uses the rate form, neuroscience
    both. A custom `Form` is another equation.

    Args:
      U: input weights, `[H, D]`. D = 0 is a network without inputs.
      W: recurrent weights, `[H, H]`.
      b: bias, `[H]`, or None.
      leak: α, scalar or `[H]`; None is α = 1. It must be None with a custom form.
      activation: φ: "tanh", "relu", "sigmoid", "identity", an `Activation`, or an elementwise
        callable. Static under jit. A custom form ignores it.
      form: "rate", "voltage" or a `Form`. Static under jit.
      parameters: θ of a custom form: a pytree of floats, scalars or `[H]`; otherwise None.

    The leak is a parameter, so an optimiser trains it, without constraints. To freeze it, use
    `optax.masked`, or `jax.lax.stop_gradient(leak)` in the loss. To keep it in (0, 1), train a
    logit and build the cell with `jax.nn.sigmoid(logit)`. W is an array: for an antisymmetric
    network (Chang et al. 2019) build the cell from `W - W.T`.

    A pytree of its arrays, which can be copied, pickled and compared (`==` compares all values, so
    they must not be traced). Functions in `activation` or `form` compare by identity and pickle by
    name, so lambdas and jitted functions such as `jnp.tanh` do not pickle, and `jax.export` takes
    only named activations and forms. Source: section 2, equation 1, the rate form with α = 1.
    """

    U: jax.Array
    W: jax.Array
    b: jax.Array | None
    leak: jax.Array | None = None
    activation: str | Activation | Elementwise = field(default="tanh", metadata={"static": True})
    form: str | Form = field(default="rate", metadata={"static": True})
    parameters: Any = None

    def _parts(self):
        omitted = "activation=" if isinstance(self.form, Form) else "form='rate'"
        return (part for part in super()._parts() if not part.startswith(omitted))


# A cell, or a stack of layers, each a cell or a pair (forward, backward).
Cells: TypeAlias = "Cell | tuple[Cell | tuple[Cell, Cell], ...]"


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Readout(Record):
    """The output layer Ω_t = V s_t + c, where s is the cell's output: h, φ(h) or g(h) by form.

    Args:
      V: output weights, `[K, H]`.
      c: bias, `[K]`.

    Source: section 2, equation 2.
    """

    V: jax.Array
    c: jax.Array


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Params(Record):
    """All parameters of a network: the recurrent layers and the readout.

    Args:
      cell: a `Cell`, or a tuple of layers as in `unroll_layers`.
      readout: a `Readout`.
    """

    cell: Any  # Cells; Any spares every use a narrowing
    readout: Readout


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Ids(Record):
    """Inputs as ids, in place of the one-hot rows that they stand for.

    For text and other symbols: U x_t is then a column of U, and no product is computed.

    Args:
      ids: integers, `[T, *batch]` (`[*batch]` for one step), 0 ≤ id < D. An invalid id is a
        ValueError if its value is known; under jit, where it is not, the state becomes NaN.
    """

    ids: jax.Array


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class CellGradients(Record):
    """The gradients of a loss in everything that the states depend on, from `bptt`.

    Args:
      cell: a `Cell` of gradients.
      xs: dL/dx_t, `[T, *batch, D]`; None for `Ids`.
      h0: dL/dh_0, `[*batch, H]`.
      delta: δ_t = dL/da_t, `[T, *batch, H]`, a_t the pre-activation; also the gradient of `drive`.
      adjoint: λ_t = dL/dh_t, `[T, *batch, H]`, through all later states; 0 on invalid steps.
    """

    cell: Cell
    xs: jax.Array | None
    h0: jax.Array
    delta: jax.Array
    adjoint: jax.Array


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Gradients(Record):
    """The gradients of the network's loss, and its final state, from `loss_and_grads`.

    Args:
      params: a `Params` of gradients.
      h0: dL/dh_0, `[*batch, H]`; for a stack, in the structure of its cells.
      h_last: the final state itself, not a gradient, in the same structure.
    """

    params: Params
    h0: Any
    h_last: Any


def directions(layer: Cell | tuple[Cell, ...]) -> tuple[Cell, ...]:
    return (layer,) if isinstance(layer, Cell) else layer


def first_cell(cells: Any) -> Cell:
    """One of the cells that read the inputs."""
    return cells if isinstance(cells, Cell) else first_cell(cells[0])


def output_size(cells: Any) -> int:
    """The size of the last layer's output."""
    last = cells if isinstance(cells, Cell) else cells[-1]
    return sum(cell.W.shape[0] for cell in directions(last))


def leading_shape(xs: jax.Array | Ids) -> tuple[int, ...]:
    """All axes but the features: `[T, *batch]`."""
    return xs.ids.shape if isinstance(xs, Ids) else xs.shape[:-1]

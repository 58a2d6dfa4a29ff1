"""A network's parameters and inputs, as pytrees of arrays.

Nothing is checked here: transformations of JAX build these dataclasses with anything in them.

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
    """A nonlinearity φ and, where there is one, φ' written with the output.

    Worth it where φ' costs less from φ(a) than from a: then nothing is formed again.

    Args:
      function: φ, elementwise, `a -> φ(a)`.
      derivative_from_output: `φ(a) -> φ'(a)`, elementwise, or None: then JAX differentiates
        `function` at its argument, which is computed again for it.

    Both are static under jit: two Activations are equal when their functions are, and a new
    lambda at every call compiles at every call. None may hold a traced value, or change what it
    closes over: what a function held when it was first used stays, and has no gradient later.
    What is differentiated is one of the `parameters` of a `Form`.
    """

    function: Elementwise
    derivative_from_output: Elementwise | None = None

    def __repr__(self) -> str:
        """The functions by name."""
        return _of_functions("Activation", self.function, self.derivative_from_output)


@dataclass(frozen=True)
class Form:
    """A custom equation of the units, around the same product with W.

    a_t = W s_{t−1} + U x_t + b + drive_t,   h_t = f(a_t, h_{t−1}; θ),   s_t = g(h_t; θ)

    For what "rate" and "voltage" do not say: a φ with learned parameters (modReLU), a time
    constant and a threshold of each unit, a residual network.

    Args:
      update: f, `(a, h, parameters) -> h`, elementwise.
      output: g, `(h, parameters) -> s`, elementwise; None where s = h.

    Both get arrays of one shape, `[..., H]`, for one step or for many: a, h and each leaf of the
    cell's `parameters`. They may look at `a.shape[-1]`, at no other axis. JAX differentiates them
    unit by unit, in reverse mode, where each derivative must be a slope times the cotangent. They
    are static as in `Activation`; what is learned, or traced, goes to the cell as `parameters`.

    >>> import jax, jaxrnn
    >>> modrelu = jaxrnn.Form(lambda a, h, bias: jax.numpy.sign(a) * jax.nn.relu(abs(a) + bias))
    """

    update: Callable[[jax.Array, jax.Array, Any], jax.Array]
    output: Callable[[jax.Array, Any], jax.Array] | None = None

    def __repr__(self) -> str:
        """The functions by name."""
        return _of_functions("Form", self.update, self.output)


def _of_functions(name, *functions):
    return f"{name}({', '.join(by_name(f) for f in functions if f is not None)})"


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Cell(Record):
    """One recurrent layer.

    rate:     h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + U x_t + b)
    voltage:  h_t = (1 − α) h_{t−1} + α (W φ(h_{t−1}) + U x_t + b)

    In both α = 1 by default: the rate form is then the Elman network. The rate form carries what
    units put out, the voltage form what they take in; its output is φ(h). Machine learning mostly
    writes the former, neuroscience both; they are one network in other variables. A custom `Form`
    writes another equation.

    Args:
      U: input weights, `[H, D]`. D = 0 is a network without inputs.
      W: recurrent weights, `[H, H]`.
      b: bias, `[H]`; None for none.
      leak: α, scalar or `[H]`; None is α = 1, and with a custom form it has to be None.
      activation: φ: "tanh", "relu", "sigmoid", "identity", an `Activation`, or an elementwise
        callable. Static under jit, and it travels with the cell; a custom form ignores it.
      form: "rate", "voltage" or a `Form`. Static likewise.
      parameters: θ of a custom form: a pytree of floats, scalars or `[H]`; None without one.

    A leak is a parameter like the others, so an optimiser trains it, unconstrained. To keep it,
    mask it out (`optax.masked`) or write `jax.lax.stop_gradient(leak)` in the loss; to keep it in
    (0, 1), train a logit and build the cell with `jax.nn.sigmoid(logit)`.

    A pytree of its arrays. It can be copied, pickled and compared (`==` looks at all values; traced
    ones cannot be compared). Functions in `activation` or `form` are compared by identity, and
    pickled by name: lambdas are not, nor those that JAX has compiled, as `jnp.tanh`. `jax.export`
    takes names alone. Source: section 2, equation 1, the rate form with α = 1.
    """

    U: jax.Array
    W: jax.Array
    b: jax.Array | None
    leak: jax.Array | None = None
    activation: str | Activation | Elementwise = field(default="tanh", metadata={"static": True})
    form: str | Form = field(default="rate", metadata={"static": True})
    parameters: Any = None

    def _parts(self):
        left_out = "activation=" if isinstance(self.form, Form) else "form='rate'"
        return (part for part in super()._parts() if not part.startswith(left_out))


# A cell; or a stack of layers, each a cell or a pair of them that read in both directions.
Cells: TypeAlias = "Cell | tuple[Cell | tuple[Cell, Cell], ...]"


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Readout(Record):
    """The output layer Ω_t = V s_t + c, of the cell's output s: h, φ(h) or g(h) by its form.

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
    """All parameters of the network: the recurrent layer or layers, and the output layer.

    Args:
      cell: a `Cell`, or a tuple of layers as in `unroll_layers`, the first of which reads the
        inputs and the last of which the readout reads.
      readout: a `Readout`.
    """

    cell: Any  # Cells: a union would have every reader narrow it
    readout: Readout


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Ids(Record):
    """Inputs given as ids that stand for one-hot rows, which are never expanded.

    For text and any other symbols: x_t costs one row to read in place of a product.

    Args:
      ids: integers, `[T, *batch]` (`[*batch]` for one step), 0 ≤ id < D. U x_t is then a
        column of U. An invalid id is a ValueError where its value can be seen; under jit,
        where it cannot, the state becomes NaN.
    """

    ids: jax.Array


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class CellGradients(Record):
    """What `bptt` returns: dL/d… of everything that the states depend on.

    Args:
      cell: a `Cell` of gradients.
      xs: dL/dx_t, `[T, *batch, D]`; None for `Ids`.
      h0: dL/dh_0, `[*batch, H]`.
      delta: δ_t = dL/da_t, `[T, *batch, H]`, a_t the pre-activation; the gradient of `drive` too.
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
    """What `loss_and_grads` returns beside the loss.

    Args:
      params: a `Params` of gradients.
      h0: dL/dh_0, `[*batch, H]`; of a stack in the structure of its cells.
      h_last: the final state itself (no gradient), likewise, to go on from.
    """

    params: Params
    h0: Any
    h_last: Any


def directions(layer: Cell | tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The cells of one layer."""
    return (layer,) if isinstance(layer, Cell) else layer


def first_cell(cells: Any) -> Cell:
    """A cell that reads the inputs."""
    return cells if isinstance(cells, Cell) else first_cell(cells[0])


def output_size(cells: Any) -> int:
    """H of the last layer."""
    last = cells if isinstance(cells, Cell) else cells[-1]
    return sum(cell.W.shape[0] for cell in directions(last))


def leading_shape(xs: jax.Array | Ids) -> tuple[int, ...]:
    """All axes but the features: `[T, *batch]`."""
    return xs.ids.shape if isinstance(xs, Ids) else xs.shape[:-1]

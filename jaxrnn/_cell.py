"""The network's parameters and inputs as pytrees, and what a public function asks of them.

Axes: T time, B batch, D input, H hidden, K output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxrnn import _checks
from jaxrnn._activation import Activation, check


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Cell:
    """The recurrent layer h_t = (1 − α) h_{t−1} + α φ(U x_t + W h_{t−1} + b), α = 1 by default.

    Args:
      U: input weights, `[H, D]`.
      W: recurrent weights, `[H, H]`.
      b: bias, `[H]`.
      leak: α of the firing-rate form, scalar or `[H]`; None is the Elman network, α = 1.
      activation: φ: "tanh", "relu", "sigmoid", "identity", an `Activation`, or an elementwise
        callable. Static under jit, and it travels with the cell.

    A pytree of its arrays. Source: section 2, equation 1.
    """

    U: jax.Array
    W: jax.Array
    b: jax.Array
    leak: jax.Array | None = None
    activation: str | Activation | Callable[[jax.Array], jax.Array] = field(
        default="tanh", metadata={"static": True}
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Readout:
    """The output layer Ω_t = V h_t + c.

    Args:
      V: output weights, `[K, H]`.
      c: bias, `[K]`.

    Source: section 2, equation 2.
    """

    V: jax.Array
    c: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Params:
    """All parameters of the network: the recurrent layer and the output layer.

    Args:
      cell: a `Cell`.
      readout: a `Readout`.
    """

    cell: Cell
    readout: Readout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Ids:
    """Inputs given as ids that stand for one-hot rows, which are never expanded.

    Args:
      ids: integers, `[T, *batch]` (`[*batch]` for one step), 0 ≤ id < D. U x_t is then a
        column of U. An invalid id is a ValueError where its value can be seen; under jit,
        where it cannot, the state becomes NaN.
    """

    ids: jax.Array


def check_cell(name: str, cell: Cell) -> Cell:
    """Require a Cell of fitting float arrays; return it with jax arrays."""
    _checks.instance(name, cell, Cell)
    U = _checks.floating(f"{name}.U", cell.U, (None, None))
    size = U.shape[0]
    W = _checks.floating(f"{name}.W", cell.W, (size, size))
    b = _checks.floating(f"{name}.b", cell.b, (size,))
    leak = cell.leak
    if leak is not None:
        leak = _checks.floating(f"{name}.leak", leak)
        if leak.shape not in ((), (size,)):
            _checks.bad_value(f"{name}.leak", f"shape [] or [{size}]", list(leak.shape))
    check(cell.activation)
    return Cell(U, W, b, leak, cell.activation)


def check_readout(name: str, readout: Readout, hidden_size: int | None = None) -> Readout:
    """Require a Readout of fitting float arrays, and return it with jax arrays."""
    _checks.instance(name, readout, Readout)
    V = _checks.floating(f"{name}.V", readout.V, (None, hidden_size))
    return Readout(V, _checks.floating(f"{name}.c", readout.c, (V.shape[0],)))


def check_params(params: Params) -> Params:
    """Require a Cell and a Readout that fit each other."""
    _checks.instance("params", params, Params)
    cell = check_cell("params.cell", params.cell)
    return Params(cell, check_readout("params.readout", params.readout, cell.W.shape[0]))


def check_inputs(name: str, xs: jax.Array | Ids, input_size: int, time: bool) -> jax.Array | Ids:
    """Require floats `[T, *batch, D]` or Ids `[T, *batch]`; without T where `time` is false."""
    axes = "T, *batch" if time else "*batch"
    if isinstance(xs, Ids):
        ids = _checks.integers(f"{name}.ids", xs.ids)
        if ids.ndim < time:
            _checks.bad_value(f"{name}.ids", f"shape [{axes}]", list(ids.shape))
        return Ids(ids)
    value = _checks.array(name, xs)
    if jnp.issubdtype(value.dtype, jnp.integer):
        _checks.bad_type(name, "floats, or ids wrapped as jaxrnn.Ids(ids)", f"bare {value.dtype}")
    value = _checks.floating(name, value)
    if value.ndim < 1 + time or value.shape[-1] != input_size:
        _checks.bad_value(name, f"shape [{axes}, {input_size}]", list(value.shape))
    return value


def leading_shape(xs: jax.Array | Ids) -> tuple[int, ...]:
    """All axes but the features: `[T, *batch]`."""
    return xs.ids.shape if isinstance(xs, Ids) else xs.shape[:-1]

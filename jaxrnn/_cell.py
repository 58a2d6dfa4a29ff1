"""The network's parameters and inputs as pytrees, and what a public function asks of them.

Axes: T time, B batch, D input, H hidden, K output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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


# A cell; or a stack of layers, each a cell or a pair of them that read in both directions.
Cells: TypeAlias = "Cell | tuple[Cell | tuple[Cell, Cell], ...]"


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
    """All parameters of the network: the recurrent layer or layers, and the output layer.

    Args:
      cell: a `Cell`, or a tuple of layers as in `unroll_layers`, the first of which reads the
        inputs and the last of which the readout reads.
      readout: a `Readout`.
    """

    cell: Any  # Cells: a union would have every reader narrow it
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
    if isinstance(cell, tuple | list):
        expected = "a jaxrnn.Cell (a stack goes to unroll_layers)"
        _checks.bad_type(name, expected, _checks.came(cell))
    _check_instance(name, cell, Cell)
    U = _checks.floating(f"{name}.U", cell.U, (None, None))
    size = U.shape[0]
    W = _checks.floating(f"{name}.W", cell.W, (size, size))
    b = _checks.floating(f"{name}.b", cell.b, (size,))
    leak = cell.leak
    if leak is not None:
        leak = check_leak(f"{name}.leak", leak, size)
    check(cell.activation)
    return Cell(U, W, b, leak, cell.activation)


def _check_instance(name: str, value: object, kind: type, *, alternative: str = "") -> None:
    if not isinstance(value, kind):
        part = f"; take its {kind.__name__.lower()}" if isinstance(value, Params) else ""
        expected = f"a jaxrnn.{kind.__name__}{alternative}"
        _checks.bad_type(name, expected, _checks.came(value) + part)


def check_leak(name: str, leak: Any, hidden_size: int) -> jax.Array:
    """Require a float, for all units or for each."""
    leak = _checks.floating(name, leak)
    if leak.shape not in ((), (hidden_size,)):
        _checks.bad_value(name, f"shape [] or [{hidden_size}]", list(leak.shape))
    return leak


def check_readout(name: str, readout: Readout, hidden_size: int | None = None) -> Readout:
    """Require a Readout of fitting float arrays, and return it with jax arrays."""
    _check_instance(name, readout, Readout)
    V = _checks.floating(f"{name}.V", readout.V, (None, hidden_size))
    return Readout(V, _checks.floating(f"{name}.c", readout.c, (V.shape[0],)))


def directions(layer: Cell | tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The cells of one layer."""
    return (layer,) if isinstance(layer, Cell) else layer


def first_cell(cells: Cells) -> Cell:
    """A cell that reads the inputs."""
    while not isinstance(cells, Cell):
        cells = cells[0]  # pyright: ignore[reportAssignmentType]
    return cells


def check_cells(name: str, cells: Cells) -> Cells:
    """Require a Cell, or layers each of which takes what the one before it puts out."""
    if not isinstance(cells, tuple | list):
        _check_instance(name, cells, Cell, alternative=" or a tuple of layers")
        return check_cell(name, cells)
    if not cells:
        _checks.bad_value(name, "at least one layer", "none")
    layers: list[Any] = []
    size = None
    for n, layer in enumerate(cells):
        which = f"{name}[{n}]"
        names = [which]
        if isinstance(layer, tuple | list):
            if len(layer) != 2:
                came = f"{len(layer)} entries"
                _checks.bad_value(which, "a jaxrnn.Cell or a pair (forward, backward)", came)
            names = [f"{which}[0]", f"{which}[1]"]
            for of_cell, cell in zip(names, layer, strict=True):
                _check_instance(of_cell, cell, Cell)
            layer = tuple(map(check_cell, names, layer))
        else:
            _check_instance(which, layer, Cell, alternative=" or a pair (forward, backward)")
            layer = check_cell(which, layer)
        for of_cell, cell in zip(names, directions(layer), strict=True):
            size = cell.U.shape[1] if size is None else size
            _checks.shaped(f"{of_cell}.U", cell.U, (None, size))
        size = sum(cell.W.shape[0] for cell in directions(layer))
        layers.append(layer)
    return tuple(layers)


def check_forward(name: str, cells: Cells) -> None:
    """Require layers none of which reads from the end."""
    for n, layer in enumerate(cells if isinstance(cells, tuple) else ()):
        if not isinstance(layer, Cell):
            _checks.bad_type(f"{name}[{n}]", "a Cell, which reads forward", "a pair of them")


def output_size(cells: Cells) -> int:
    """H of the last layer."""
    last = cells if isinstance(cells, Cell) else cells[-1]
    return sum(cell.W.shape[0] for cell in directions(last))


def check_params(params: Params) -> Params:
    """Require a Readout that fits the cell, or the last layer of a stack."""
    _checks.instance("params", params, Params)
    cell = check_cells("params.cell", params.cell)
    return Params(cell, check_readout("params.readout", params.readout, output_size(cell)))


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

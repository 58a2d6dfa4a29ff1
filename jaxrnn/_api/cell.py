"""Cells and parameters: what a public function asks of them, and random ones for real use."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.nn import initializers

from jaxrnn._api import checks
from jaxrnn._base.arithmetic import accumulation_dtype
from jaxrnn._base.forms import FORMS, NAMED, resolve
from jaxrnn._types import (
    Activation,
    Cell,
    Cells,
    Ids,
    Params,
    Readout,
    directions,
    output_size,
)

RECURRENT = ("orthogonal", "identity", "normal", "uniform")


def init_cell(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    *,
    recurrent: str = "orthogonal",
    gain: float = 1.0,
    activation="tanh",
    leak: float | jax.Array | None = None,
    form: str = "rate",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cell:
    """A cell with random weights.

    Args:
      key: a JAX random key.
      input_size: D; 0 for a network without inputs.
      hidden_size: H.
      recurrent: how W is drawn, each times `gain`:
        "orthogonal", uniformly among orthogonal matrices: norms are kept over many steps;
        "identity", for relu (Le, Jaitly and Hinton 2015, arXiv:1504.00941);
        "normal", N(0, 1/H), whose spectral radius is near `gain`: the random networks of
        computational neuroscience, chaotic beyond 1 (Sompolinsky et al. 1988);
        "uniform", between ±1/√H, with U drawn so too, as torch draws them.
      gain: factor on W.
      activation: kept on the cell; see `Cell`.
      leak: kept on the cell as an array of `dtype`; scalar or `[H]`.
      form: kept on the cell, "rate" or "voltage".
      dtype: of all arrays.

    Returns:
      A `Cell`: U has variance 1/D (LeCun) unless `recurrent` is "uniform", b is 0.

    Raises:
      TypeError, ValueError: a hidden size below 1, an unknown `recurrent`, `activation` or `form`,
        a leak of another shape.
    """
    checks.random_key("key", key)
    checks.whole("input_size", input_size)
    checks.positive("hidden_size", hidden_size)
    checks.one_of("recurrent", recurrent, RECURRENT)
    check_activation(activation)
    checks.one_of("form", form, FORMS)
    dtype = checks.floating_dtype("dtype", dtype)
    if leak is not None:
        leak = check_leak("leak", leak, hidden_size).astype(dtype)
    key_U, key_W = jax.random.split(key)
    square = (hidden_size, hidden_size)
    bound = hidden_size**-0.5
    U_init = initializers.lecun_normal(in_axis=1, out_axis=0)
    if input_size == 0:
        U_init = lambda _, shape, dtype: jnp.zeros(shape, dtype)  # noqa: E731
    elif recurrent == "uniform":
        U_init = _uniform(bound)
    W_init = {
        "orthogonal": initializers.orthogonal(),
        "identity": lambda _, shape, dtype: jnp.eye(shape[0], dtype=dtype),
        "normal": initializers.normal(bound),
        "uniform": _uniform(bound),
    }[recurrent]
    drawn = accumulation_dtype(dtype)
    return Cell(
        U_init(key_U, (hidden_size, input_size), drawn).astype(dtype),
        (jnp.asarray(gain, drawn) * W_init(key_W, square, drawn)).astype(dtype),
        jnp.zeros(hidden_size, dtype),
        leak,
        activation,
        form,
    )


def init_params(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    output_size: int,
    *,
    layers: int = 1,
    recurrent: str = "orthogonal",
    gain: float = 1.0,
    activation="tanh",
    leak: float | jax.Array | None = None,
    form: str = "rate",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Params:
    """A cell, or a stack of them, and a readout with random weights.

    Args:
      key: a JAX random key.
      input_size: D.
      hidden_size: H.
      output_size: K.
      layers: how many cells of that hidden size; from two on they are a tuple.
      recurrent, gain, activation, leak, form: as in `init_cell`.
      dtype: of all arrays.

    Returns:
      `Params`: the cell of `init_cell`; V has variance 1/H (LeCun), c is 0.

    Raises:
      TypeError, ValueError: as `init_cell`.
    """
    checks.random_key("key", key)
    checks.positive("output_size", output_size)
    checks.positive("layers", layers)
    dtype = checks.floating_dtype("dtype", dtype)
    key_cell, key_V = jax.random.split(key)
    how: dict[str, Any] = dict(
        recurrent=recurrent, gain=gain, activation=activation, leak=leak, form=form, dtype=dtype
    )
    cell: Cells = init_cell(key_cell, input_size, hidden_size, **how)
    if layers > 1:
        keys = jax.random.split(key_cell, layers)[1:]
        cell = cell, *(init_cell(key, hidden_size, hidden_size, **how) for key in keys)
    V_init = initializers.lecun_normal(in_axis=1, out_axis=0)
    V = V_init(key_V, (output_size, hidden_size), accumulation_dtype(dtype)).astype(dtype)
    return Params(cell, Readout(V, jnp.zeros(output_size, dtype)))


def _uniform(bound: float):
    def draw(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


# What a public function asks of them.


def check_activation(activation: Any) -> None:
    """Require a known name, or callables of the pre-activation alone.

    A callable that closes over a traced value is refused: the derivative rule would take that
    value for a constant, and under jit the gradient by it would silently be 0.
    """
    if isinstance(activation, str):
        checks.one_of("activation", activation, tuple(NAMED))
        return
    known = isinstance(activation, Activation) or callable(activation)
    if not known:
        expected = "a name, a jaxrnn.Activation or a callable"
        checks.bad_type("activation", expected, type(activation).__name__)
    resolved: Activation = resolve(activation)  # pyright: ignore[reportArgumentType]
    for function in (resolved.function, resolved.derivative_from_output):
        if function is None:
            continue
        if not callable(function):
            checks.bad_type("activation", "callables in an Activation", type(function).__name__)
        constants = jax.make_jaxpr(function)(jnp.zeros((1, 1))).consts
        if any(isinstance(constant, Tracer) for constant in constants):
            checks.bad_value(
                "activation", "a function of a alone", "one that closes over a traced value; "
                "make it a part of the cell or of the inputs",
            )  # fmt: skip


def check_cell(name: str, cell: Cell) -> Cell:
    """Require a Cell of fitting float arrays; return it with jax arrays."""
    if isinstance(cell, tuple | list):
        expected = "a jaxrnn.Cell (a stack goes to unroll_layers)"
        checks.bad_type(name, expected, checks.came(cell))
    _check_instance(name, cell, Cell)
    U = checks.floating(f"{name}.U", cell.U, (None, None))
    size = U.shape[0]
    W = checks.floating(f"{name}.W", cell.W, (size, size))
    b, leak = cell.b, cell.leak
    if b is not None:
        b = checks.floating(f"{name}.b", b, (size,))
    if leak is not None:
        leak = check_leak(f"{name}.leak", leak, size)
    check_activation(cell.activation)
    checks.one_of(f"{name}.form", cell.form, FORMS)
    return Cell(U, W, b, leak, cell.activation, cell.form)


def _check_instance(name: str, value: object, kind: type, *, alternative: str = "") -> None:
    if not isinstance(value, kind):
        part = f"; take its {kind.__name__.lower()}" if isinstance(value, Params) else ""
        expected = f"a jaxrnn.{kind.__name__}{alternative}"
        checks.bad_type(name, expected, checks.came(value) + part)


def check_leak(name: str, leak: Any, hidden_size: int) -> jax.Array:
    """Require a float, for all units or for each."""
    leak = checks.floating(name, leak)
    if leak.shape not in ((), (hidden_size,)):
        checks.bad_value(name, f"shape [] or [{hidden_size}]", list(leak.shape))
    return leak


def check_readout(name: str, readout: Readout, hidden_size: int | None = None) -> Readout:
    """Require a Readout of fitting float arrays, and return it with jax arrays."""
    _check_instance(name, readout, Readout)
    V = checks.floating(f"{name}.V", readout.V, (None, hidden_size))
    return Readout(V, checks.floating(f"{name}.c", readout.c, (V.shape[0],)))


def check_cells(name: str, cells: Cells) -> Cells:
    """Require a Cell, or layers each of which takes what the one before it puts out."""
    if not isinstance(cells, tuple | list):
        _check_instance(name, cells, Cell, alternative=" or a tuple of layers")
        return check_cell(name, cells)
    if not cells:
        checks.bad_value(name, "at least one layer", "none")
    layers: list[Any] = []
    size = None
    for n, layer in enumerate(cells):
        which = f"{name}[{n}]"
        names = [which]
        if isinstance(layer, tuple | list):
            if len(layer) != 2:
                came = f"{len(layer)} entries"
                checks.bad_value(which, "a jaxrnn.Cell or a pair (forward, backward)", came)
            names = [f"{which}[0]", f"{which}[1]"]
            for of_cell, cell in zip(names, layer, strict=True):
                _check_instance(of_cell, cell, Cell)
            layer = tuple(map(check_cell, names, layer))
        else:
            _check_instance(which, layer, Cell, alternative=" or a pair (forward, backward)")
            layer = check_cell(which, layer)
        for of_cell, cell in zip(names, directions(layer), strict=True):
            size = cell.U.shape[1] if size is None else size
            checks.shaped(f"{of_cell}.U", cell.U, (None, size))
        size = sum(cell.W.shape[0] for cell in directions(layer))
        layers.append(layer)
    return tuple(layers)


def check_forward(name: str, cells: Cells) -> None:
    """Require layers none of which reads from the end."""
    for n, layer in enumerate(cells if isinstance(cells, tuple) else ()):
        if not isinstance(layer, Cell):
            checks.bad_type(f"{name}[{n}]", "a Cell, which reads forward", "a pair of them")


def check_params(params: Params) -> Params:
    """Require a Readout that fits the cell, or the last layer of a stack."""
    checks.instance("params", params, Params)
    cell = check_cells("params.cell", params.cell)
    return Params(cell, check_readout("params.readout", params.readout, output_size(cell)))


def check_inputs(name: str, xs: jax.Array | Ids, input_size: int, time: bool) -> jax.Array | Ids:
    """Require floats `[T, *batch, D]` or Ids `[T, *batch]`; without T where `time` is false."""
    axes = "T, *batch" if time else "*batch"
    if isinstance(xs, Ids):
        ids = checks.integers(f"{name}.ids", xs.ids)
        if ids.ndim < time:
            checks.bad_value(f"{name}.ids", f"shape [{axes}]", list(ids.shape))
        return Ids(ids)
    value = checks.array(name, xs)
    if jnp.issubdtype(value.dtype, jnp.integer):
        checks.bad_type(name, "floats, or ids wrapped as jaxrnn.Ids(ids)", f"bare {value.dtype}")
    value = checks.floating(name, value)
    if value.ndim < 1 + time or value.shape[-1] != input_size:
        checks.bad_value(name, f"shape [{axes}, {input_size}]", list(value.shape))
    return value


def check_last_axis(name: str, value: Any, size: int) -> jax.Array:
    """Require floats `[..., size]`."""
    value = checks.floating(name, value)
    if value.ndim < 1 or value.shape[-1] != size:
        checks.bad_value(name, f"shape [..., {size}]", list(value.shape))
    return value

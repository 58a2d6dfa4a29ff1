"""Cells and parameters: random initialisation, and checks."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxrnn._api import checks
from jaxrnn._api.elementwise import check_functions
from jaxrnn._base.arithmetic import accumulation_dtype, cast
from jaxrnn._base.forms import FORMS
from jaxrnn._record import by_name
from jaxrnn._types import Cell, Cells, Form, Ids, Params, Readout, output_size

LECUN = initializers.lecun_normal(in_axis=1, out_axis=0)
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
    form: str | Form = "rate",
    parameters: Any = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cell:
    """A cell with random weights.

    For training, or for a random network as it is. For weights that exist, call `Cell`.

    Args:
      key: a JAX random key.
      input_size: D; 0 for a network without inputs.
      hidden_size: H.
      recurrent: the distribution of W, before `gain`:
        "orthogonal", uniform over orthogonal matrices, which preserve norms over many steps;
        "identity", for relu (Le, Jaitly and Hinton 2015, arXiv:1504.00941);
        "normal", N(0, 1/H), with a spectral radius near `gain`: the random networks of
        computational neuroscience, chaotic above 1 (Sompolinsky et al. 1988);
        "uniform", between ±1/√H, and U too, as in torch.
      gain: factor on W.
      activation, leak, form, parameters: as in `Cell`; leak and parameters are cast to `dtype`.
      dtype: of all arrays.

    Returns:
      A `Cell`: U has variance 1/D (LeCun) unless `recurrent` is "uniform"; b is 0.

    Raises:
      TypeError, ValueError: a hidden size below 1, an unknown `recurrent`, `activation` or `form`,
        a leak or parameters of a wrong shape, functions that are not elementwise.
    """
    checks.random_key("key", key)
    checks.whole("input_size", input_size)
    checks.positive("hidden_size", hidden_size)
    checks.one_of("recurrent", recurrent, RECURRENT)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        checks.bad_type("dtype", "a floating dtype", dtype)
    key_U, key_W = jax.random.split(key)
    bound = hidden_size**-0.5
    uniform = partial(jax.random.uniform, minval=-bound, maxval=bound)
    W_init = {
        "orthogonal": initializers.orthogonal(),
        "identity": lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype),
        "normal": initializers.normal(bound),
        "uniform": uniform,
    }[recurrent]
    lecun = LECUN if input_size else initializers.zeros
    U_init = uniform if recurrent == "uniform" else lecun
    drawn = accumulation_dtype(dtype)
    U = U_init(key_U, (hidden_size, input_size), drawn).astype(dtype)
    W = jnp.asarray(gain, drawn) * W_init(key_W, (hidden_size, hidden_size), drawn)
    W, b = W.astype(dtype), jnp.zeros(hidden_size, dtype)
    how: Any = leak, activation, form, parameters
    return cast(check_form("", Cell(U, W, b, *how)), dtype)


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
    form: str | Form = "rate",
    parameters: Any = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Params:
    """A cell or a stack of cells, and a readout, with random weights.

    For classification at every step, with `loss_and_grads`, `generate` and `train`.

    Args:
      key, input_size, hidden_size: as in `init_cell`.
      output_size: K.
      recurrent, gain, activation, leak, form, parameters, dtype: as in `init_cell`.
      layers: the number of cells; two or more are a tuple.

    Returns:
      `Params`: cells as from `init_cell`; V has variance 1/H (LeCun), c is 0.

    Raises:
      TypeError, ValueError: as `init_cell`.
    """
    checks.random_key("key", key)
    checks.positive("output_size", output_size)
    checks.positive("layers", layers)
    key_cell, key_V, *keys = jax.random.split(key, 1 + layers)
    dtype = jnp.dtype(dtype)
    how: dict[str, Any] = dict(
        recurrent=recurrent, gain=gain, activation=activation, leak=leak, form=form,
        parameters=parameters, dtype=dtype,
    )  # fmt: skip
    cell: Cells = init_cell(key_cell, input_size, hidden_size, **how)
    if layers > 1:
        cell = cell, *(init_cell(key, hidden_size, hidden_size, **how) for key in keys)
    V = LECUN(key_V, (output_size, hidden_size), accumulation_dtype(dtype)).astype(dtype)
    return Params(cell, Readout(V, jnp.zeros(output_size, dtype)))


def check_cell(name: str, cell: Cell, input_size: int | None = None) -> Cell:
    """Require a Cell of float arrays whose shapes agree; return it with JAX arrays."""
    stack = isinstance(cell, tuple | list)
    checks.instance(name, cell, Cell, " (a stack goes to unroll_layers)" if stack else "")
    return checks.once(_fitting, cell, name, input_size)


def _fitting(cell: Cell, name: str, input_size: int | None) -> Cell:
    U = checks.floating(f"{name}.U", cell.U, (None, input_size))
    size = U.shape[0]
    W = checks.floating(f"{name}.W", cell.W, (size, size))
    b = None if cell.b is None else checks.floating(f"{name}.b", cell.b, (size,))
    return check_form(f"{name}.", replace(cell, U=U, W=W, b=b))


def check_form(prefix: str, cell: Cell) -> Cell:
    """Require a valid form, with an activation and a leak or with parameters."""
    form, leak, parameters, size = cell.form, cell.leak, cell.parameters, cell.W.shape[0]
    if isinstance(form, Form):
        if leak is not None:
            expected = "None with a custom form, which has parameters instead"
            checks.bad_value(f"{prefix}leak", expected, checks.describe(leak))
    elif not isinstance(form, str) or form not in FORMS:
        expected = "one of " + ", ".join(map(repr, FORMS)) + ", or a jaxrnn.Form"
        hint = f"; jaxrnn.Form({by_name(form)}) makes one" if callable(form) else ""
        checks.bad_value(f"{prefix}form", expected, by_name(form) + hint)
    elif parameters is not None:
        expected = f"None with form={form!r}: a custom jaxrnn.Form has them"
        checks.bad_value(f"{prefix}parameters", expected, checks.describe(parameters))

    def for_units(name, path, value):
        name = prefix + name + jax.tree_util.keystr(path)
        value = checks.floating(name, value)
        if value.shape not in ((), (size,)):
            checks.bad_value(name, f"shape [] or [{size}]", list(value.shape))
        return value

    leak = None if leak is None else for_units("leak", (), leak)
    parameters = jax.tree_util.tree_map_with_path(partial(for_units, "parameters"), parameters)
    cell = replace(cell, leak=leak, parameters=parameters)
    check_functions(prefix, cell)
    return cell


def check_readout(name: str, readout: Readout, hidden_size: int | None = None) -> Readout:
    checks.instance(name, readout, Readout)
    V = checks.floating(f"{name}.V", readout.V, (None, hidden_size))
    return Readout(V, checks.floating(f"{name}.c", readout.c, (V.shape[0],)))


def check_cells(name: str, cells: Cells) -> Cells:
    """Require a Cell, or layers each of which takes the outputs of the one before."""
    if not isinstance(cells, tuple | list):
        checks.instance(name, cells, Cell, " or a tuple of layers")
        return check_cell(name, cells)
    if not cells:
        checks.bad_value(name, "at least one layer", "none")
    layers: list[Any] = []
    size, alternative = None, " or a pair (forward, backward)"
    for n, layer in enumerate(cells):
        which = f"{name}[{n}]"
        if not isinstance(layer, tuple | list):
            checks.instance(which, layer, Cell, alternative)
            layers.append(check_cell(which, layer, size))
        elif len(layer) != 2:
            checks.bad_value(which, f"a jaxrnn.Cell{alternative}", f"{len(layer)} entries")
        else:
            for m, cell in enumerate(layer):
                checks.instance(f"{which}[{m}]", cell, Cell)
            forward = check_cell(f"{which}[0]", layer[0], size)
            layers.append((forward, check_cell(f"{which}[1]", layer[1], forward.U.shape[1])))
        size = output_size(layers)
    return tuple(layers)


def check_forward(name: str, cells: Cells) -> None:
    """Require a stack without pairs."""
    for n, layer in enumerate(cells if isinstance(cells, tuple) else ()):
        if not isinstance(layer, Cell):
            checks.bad_type(f"{name}[{n}]", "a Cell, which reads forward", "a pair of them")


def check_params(params: Params) -> Params:
    """Require Params whose readout fits the last layer."""
    checks.instance("params", params, Params)
    cell = check_cells("params.cell", params.cell)
    return Params(cell, check_readout("params.readout", params.readout, output_size(cell)))


def check_inputs(name: str, xs: jax.Array | Ids, input_size: int, time: bool) -> jax.Array | Ids:
    """Require floats `[T, *batch, D]` or Ids `[T, *batch]`, without T if `time` is False."""
    axes = "T, *batch" if time else "*batch"
    if isinstance(xs, Ids):
        ids = checks.integers(f"{name}.ids", xs.ids)
        if ids.ndim < time:
            checks.bad_value(f"{name}.ids", f"shape [{axes}]", list(ids.shape))
        return Ids(ids)
    value = checks.array(name, xs)
    if jnp.issubdtype(value.dtype, jnp.integer):
        checks.bad_type(name, "floats, or ids wrapped as jaxrnn.Ids(ids)", f"bare {value.dtype}")
    return check_last_axis(name, value, input_size, axes, 1 + time)


def check_last_axis(name: str, value: Any, size: int, axes="...", least: int = 1) -> jax.Array:
    """Require floats `[..., size]` with at least `least` axes."""
    value = checks.floating(name, value)
    if value.ndim < least or value.shape[-1] != size:
        checks.bad_value(name, f"shape [{axes}, {size}]", list(value.shape))
    return value

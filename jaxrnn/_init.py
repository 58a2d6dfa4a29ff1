"""Initial parameters for real use, from the initialisers of `jax.nn`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxrnn import _checks
from jaxrnn._activation import check
from jaxrnn._cell import Cell, Cells, Params, Readout, check_leak
from jaxrnn._dtypes import accumulation_dtype

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
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cell:
    """A cell with random weights.

    Args:
      key: a JAX random key.
      input_size: D.
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
      dtype: of all arrays.

    Returns:
      A `Cell`: U has variance 1/D (LeCun) unless `recurrent` is "uniform", b is 0.

    Raises:
      TypeError, ValueError: a size below 1, an unknown `recurrent` or `activation`, a leak of
        another shape.
    """
    _checks.random_key("key", key)
    _checks.positive("input_size", input_size)
    _checks.positive("hidden_size", hidden_size)
    _checks.one_of("recurrent", recurrent, RECURRENT)
    check(activation)
    dtype = _checks.floating_dtype("dtype", dtype)
    if leak is not None:
        leak = check_leak("leak", leak, hidden_size).astype(dtype)
    key_U, key_W = jax.random.split(key)
    square = (hidden_size, hidden_size)
    bound = hidden_size**-0.5
    U_init = initializers.lecun_normal(in_axis=1, out_axis=0)
    if recurrent == "uniform":
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
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Params:
    """A cell, or a stack of them, and a readout with random weights.

    Args:
      key: a JAX random key.
      input_size: D.
      hidden_size: H.
      output_size: K.
      layers: how many cells of that hidden size; from two on they are a tuple.
      recurrent: see `init_cell`.
      gain: see `init_cell`.
      activation: see `init_cell`.
      leak: see `init_cell`.
      dtype: of all arrays.

    Returns:
      `Params`: the cell of `init_cell`; V has variance 1/H (LeCun), c is 0.

    Raises:
      TypeError, ValueError: as `init_cell`.
    """
    _checks.random_key("key", key)
    _checks.positive("output_size", output_size)
    _checks.positive("layers", layers)
    dtype = _checks.floating_dtype("dtype", dtype)
    key_cell, key_V = jax.random.split(key)
    how: dict[str, Any] = dict(
        recurrent=recurrent, gain=gain, activation=activation, leak=leak, dtype=dtype
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

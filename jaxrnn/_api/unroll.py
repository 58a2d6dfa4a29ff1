"""The states of whole sequences, and one step of them."""

from functools import partial
from typing import Any

import jax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_inputs, check_last_axis
from jaxrnn._api.sequences import check_options, check_sequences
from jaxrnn._base.arithmetic import safe_ids
from jaxrnn._core import derivative, layers
from jaxrnn._types import Cell, Ids, leading_shape


def unroll(
    cell: Cell,
    xs: jax.Array | Ids,
    h0: jax.Array | None = None,
    *,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: jax.Array | None = None,
    reverse: bool = False,
    checkpoint_every: int | str | None = None,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The hidden states of whole sequences, final state first.

    rate:     h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + U x_t + b + drive_t)
    voltage:  h_t = (1 − α) h_{t−1} + α (W φ(h_{t−1}) + U x_t + b + drive_t)
    custom:   h_t = f(W g(h_{t−1}) + U x_t + b + drive_t, h_{t−1})

    for t = 1 … T, h_0 given, α = 1 without a leak. What units put out where that is not h, φ(h) or
    g(h), is `outputs(cell, hs)`. One wants it where the inputs are known in advance: `step` is for
    those that depend on the states, `unroll_layers` for outputs of one layer or several.

    Differentiable in cell, xs, h0 and drive, in every mode and to every order; under vmap a
    mapped axis costs what a batch axis does. A φ, f or g with a `jax.custom_vjp` alone
    (surrogate gradients) has all of the first order, and of the second those by reverse mode over
    reverse mode: JAX has no forward mode for it.

    Args:
      cell: the `Cell`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: first state, `[*batch, H]`; zeros by default.
      lengths: integers `[*batch]`, 0 … T: how many steps of each sequence are valid.
      mask: bool `[T, *batch]`: which steps are valid, for gaps anywhere. Not with `lengths`.
      drive: added to the pre-activation, `[T, *batch, H]`: noise, a perturbation, an input
        computed elsewhere. Its gradient is delta.
      reverse: run from t = T down to 1, each sequence from its own length down; hs stays
        aligned with xs.
      checkpoint_every: keep only every k-th state for the derivatives, and compute the others
        again, to every order: k ≥ 1, or "sqrt" for about √T. Not with `window`. See the table.
      truncate: truncated BPTT: no derivative passes from a_{mk+1} to h_{mk}, m ≥ 1, k ≥ 1; a
        leak and h_0 stay connected. Steps are counted as they are read, invalid ones not. See
        the table.
      window: derivatives of h_t reach a_{t−k+1} … a_t, k ≥ 1, as if h_t were recomputed by k
        whole steps, leak included, from an h_{t−k} that does not move: the sum of 3.3 cut off
        at k terms. Steps are counted likewise. Not with `truncate`. See the table.
      implementation: by what the loops over time are run, forward and in all derivatives. "scan":
        `jax.lax.scan`. "mosaic_gpu", "pallas_tpu": one kernel for all steps, W kept on the chip;
        tanh, relu, sigmoid, identity in the rate form. "associative": derivatives by products of
        Jacobians, in logarithmic depth and memory for T · B · H² numbers; forward a scan.
        "auto": a kernel where it was measured to be exact and faster on the device, else the scan.
      precision: of every product, as `jax.numpy.matmul` takes it; None is JAX's default.

    Returns:
      (h_last, hs): the state after the last valid step (h0 where there is none),
      `[*batch, H]`, and the states of all steps, `[T, *batch, H]`, 0 on invalid steps. The
      dtype is what JAX promotes xs (not Ids), h0, cell and drive to.

    Raises:
      TypeError: a dtype of the wrong kind; bare integers as xs.
      ValueError: shapes that do not fit, lengths outside 0 … T, two options that exclude each
        other, an invalid id whose value can be seen (under jit the state becomes NaN),
        `checkpoint_every` where T is symbolic.
      NotImplementedError: the implementation asked for cannot run this; it says why.

    Numerics: in bfloat16 and float16 products and pre-activations are float32, each state is
    rounded once. Invalid steps may hold NaN or inf, their cotangents too: neither reaches
    anything. phi' is found from the state (tanh: (1 − h)(1 + h)), or for a plain callable
    from the recomputed pre-activation.
    Cost: two products a step forward, that with U for all steps at once where it pays, and
    one a step backward; the gradient of each parameter is one product over many steps. Beyond
    inputs and parameters only hs is kept, and what a segment of the steps needs. With
    `checkpoint_every` the backward runs the forward again; with `window` = k it takes a product
    over all steps k times.
    Outside jit, checking ids and lengths that lie on a device waits for them.
    Source: section 2, equation 1; section 3.3 for its derivative.

    How far derivatives reach; values are the same in every row:

    | | a gradient is | it keeps | and takes |
    |---|---|---|---|
    | none of these | exact | T states | |
    | `checkpoint_every=k` | exact | T/k + k states, if only h_last is used | one more forward |
    | `truncate=k` | cut through W at every k-th step, not through the leak | T states | |
    | `window=k` | each h_t through its own last k steps | T states | k products of all steps |
    | chunks of k steps, h0 = `stop_gradient(h_last)` | cut at every k-th step | k states | |

    Without a leak `truncate=k` and chunks are the same; with one, or where a custom f reads h, a
    cut stops W alone, and 1 − α of each adjoint passes it. So `truncate=1` with a leak is the
    eligibility trace of RFLO (Murray 2019, eLife 8:e43299), and `window=1` the immediate gradient,
    by the last step alone. One wants `checkpoint_every` for memory, `truncate` and chunks for texts
    without end, `window` where every step shall be treated alike.

    >>> import jax, jaxrnn
    >>> cell = jaxrnn.init_cell(jax.random.key(0), input_size=4, hidden_size=3)
    >>> h_last, hs = jaxrnn.unroll(cell, jax.numpy.ones((7, 2, 4)))
    >>> h_last.shape, hs.shape
    ((2, 3), (7, 2, 3))
    """
    checks.not_swapped("cell", cell, "xs", xs, Cell)
    args = check_sequences(check_cell("cell", cell), xs, h0, lengths, mask, drive)
    how = reverse, checkpoint_every, truncate, window, implementation, precision
    return derivative.unroll(*args, options=check_options(args, *how))


def step(cell: Cell, x: jax.Array | Ids, h: jax.Array, *, precision: Any = None) -> jax.Array:
    """One step of the recurrence of `unroll`, without a drive: the hidden state that follows `h`.

    One wants it where inputs depend on the states: an agent in an environment, a sampler. Its
    derivative is JAX's.

    Args:
      cell: the `Cell`.
      x: the input x_t, `[*batch, D]`, or `Ids` of shape `[*batch]`.
      h: the state h_{t−1}, `[*batch, H]`.
      precision: of the products, as `jax.numpy.matmul` takes it.

    Returns:
      h_t, `[*batch, H]`, in the result dtype of cell, x and h.

    Raises:
      TypeError, ValueError: as `unroll`.

    Source: section 2, equation 1.

    >>> import jax, jaxrnn
    >>> cell = jaxrnn.init_cell(jax.random.key(0), 4, 3)
    >>> jaxrnn.step(cell, jax.numpy.ones(4), jax.numpy.zeros(3)).shape
    (3,)
    """
    if precision is not None:
        checks.precision(precision)
    cell, x, h = checks.once(_check_step, (cell, x, h))
    if isinstance(x, Ids):
        checks.in_range("x.ids", x.ids, cell.U.shape[1])
    return _step(cell, x, h, precision=precision)


def _check_step(given: tuple) -> tuple:
    cell, x, h = given
    checks.not_swapped("cell", cell, "x", x, Cell)
    cell = check_cell("cell", cell)
    hidden_size, input_size = cell.U.shape
    batch = getattr(x, "shape", ())[:-1]
    checks.shapes_not_swapped("x", x, "h", h, (*batch, input_size), (*batch, hidden_size))
    x = check_inputs("x", x, input_size, time=False)
    return cell, x, checks.floating("h", h, (*leading_shape(x), hidden_size))


# Compiled, so that the row of NaN for invalid ids is no array that jax_debug_nans could see.
@partial(jax.jit, static_argnames="precision")
def _step(cell, x, h, *, precision):
    if isinstance(x, Ids):
        x = safe_ids(x.ids, cell.U.shape[1])
    return layers.step(cell, x, h, precision)[0]


def outputs(cell: Cell, hs: jax.Array) -> jax.Array:
    """What the units put out, given the states that `unroll` returns.

    s_t = h_t in the rate form, φ(h_t) in the voltage form, g(h_t) in a custom one: what W and a
    readout multiply: rates to plot, or to put a loss on.

    Args:
      cell: the `Cell`.
      hs: states, `[..., H]`.

    Returns:
      Outputs, `[..., H]`, in the dtype of hs. On invalid steps hs is 0 and this φ(0); the outputs
      of `unroll_layers` are 0 there.

    Raises:
      TypeError, ValueError: a dtype that is not floating; states of another size.
    """
    checks.not_swapped("cell", cell, "hs", hs, Cell)
    cell = check_cell("cell", cell)
    return layers.outputs(cell, check_last_axis("hs", hs, cell.W.shape[0]))

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

    for t = 1 … T, with α = 1 without a leak. The outputs, where they are not h, are
    `outputs(cell, hs)`. Use `unroll` if all inputs are known in advance, `step` if they depend on
    the states, `unroll_layers` for the outputs of one or more layers.

    Differentiable in cell, xs, h0 and drive, in every mode and to every order. Under vmap a mapped
    axis costs as much as a batch axis; map axis 1 to avoid a transposed copy. Inputs shared by the
    mapped calls are copied. A φ, f or g with only a `jax.custom_vjp` (a surrogate gradient) has
    first-order derivatives, and second-order ones in reverse over reverse mode.

    Args:
      cell: the `Cell`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: first state, `[*batch, H]`; zeros by default.
      lengths: integers `[*batch]`, 0 … T: how many steps of each sequence are valid. Under jit a
        length above T counts as T.
      mask: bool `[T, *batch]`: which steps are valid, for gaps anywhere. Not with `lengths`.
      drive: added to the pre-activation, `[T, *batch, H]`: noise, a perturbation, an input
        computed elsewhere. Its gradient is δ.
      reverse: run from t = T down to 1, each sequence from its own length down; hs stays
        aligned with xs.
      checkpoint_every: to bound memory, save only every k-th state and recompute the others, at
        every order: k ≥ 1, or "sqrt": a divisor of T between √T and 2 √T, if there is one. If k
        does not divide T, inputs are copied once. Not with `window`. See the tables.
      truncate: truncated BPTT: no derivative passes from a_{mk+1} to h_{mk}, m ≥ 1, k ≥ 1; the
        leak and h_0 stay connected. Steps count in scan order, without invalid ones.
      window: derivatives of h_t reach a_{t−k+1} … a_t, k ≥ 1, as if h_t were recomputed by k
        steps, with the leak, from a constant h_{t−k}: the last k terms of the sum of 3.3. Steps
        count as for `truncate`, which it excludes.
      implementation: how the loops over time run, forward and in all derivatives. "scan":
        `jax.lax.scan`. "mosaic_gpu" (Hopper GPUs), "pallas_tpu": one kernel for all steps, with W
        on the chip; tanh, relu, sigmoid, identity in the rate form; see `_backends/select.py`.
        "associative": derivatives by products of Jacobians, in logarithmic depth, with T · B · H²
        numbers; forward a scan. "auto": a kernel if it was measured to be exact and faster on the
        device, which is not yet so anywhere; else the scan.
      precision: of every product, as in `jax.numpy.matmul`; None is JAX's default.

    Returns:
      (h_last, hs): the state after the last valid step (h0 if there is none), `[*batch, H]`, and
      the states of all steps, `[T, *batch, H]`, 0 on invalid steps. The dtype is what JAX promotes
      xs (not Ids), h0, cell and drive to.

    Raises:
      TypeError: a dtype of the wrong kind; bare integers as xs.
      ValueError: shapes that do not fit, lengths outside 0 … T, options that exclude each other, an
        invalid id of known value (under jit the state becomes NaN), `checkpoint_every` with a
        symbolic T.
      NotImplementedError: the implementation cannot run this; the message says why.

    Numerics: in bfloat16 and float16, products and pre-activations are float32 and each state is
    rounded once. NaN and inf on invalid steps, in inputs or cotangents, reach nothing. φ' is
    computed from the state (tanh: (1 − h)(1 + h)), or for a plain callable from the recomputed a.
    Cost: two products a step forward (the one with U for all steps at once if that is faster) and
    one backward, then one product over many steps for each parameter. Beyond inputs and parameters
    only hs is saved; higher orders save some more arrays of all steps.
    Outside jit, checking ids and lengths waits for the device.
    Source: section 2, equation 1; section 3.3 for its derivative.

    How far derivatives reach. Values are the same in every row.

    | | gradients are | saved | extra time |
    |---|---|---|---|
    | none of these | exact | T states | |
    | `checkpoint_every=k` | exact | T/k + k states, if only h_last is used | one forward |
    | `truncate=k` | cut through W at every k-th step, not through the leak | T states | |
    | `window=k` | of each h_t through its last k steps | T states | k products over all steps |
    | chunks of k steps, h0 = `stop_gradient(h_last)` | cut at every k-th step | k states | |

    Megabytes of temporaries for a gradient of h_last (float32, B = 8, D = 4, H = 32), by T:

    | | 1,000 | 10,000 | 100,000 |
    |---|---|---|---|
    | a differentiated scan | 3.1 | 31 | 307 |
    | `unroll` | 3.1 | 14 | 106 |
    | `checkpoint_every="sqrt"`, 1.3 to 1.8 times as long | 0.16 | 0.43 | 1.5 |

    Use `checkpoint_every` to save memory, `truncate` or chunks for endless text, and `window` to
    treat all steps alike. Without a leak `truncate=k` and chunks are the same; with one, or if a
    custom f reads h, a cut stops only W, and 1 − α of each adjoint passes. So `truncate=1` with a
    leak is the eligibility trace of RFLO (Murray 2019, eLife 8:e43299), and `window=1` the
    immediate gradient.

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
    """One step of the recurrence of `unroll`, without a drive: the state that follows `h`.

    For inputs that depend on the states: an agent in an environment, a sampler.

    Args:
      cell: the `Cell`.
      x: the input x_t, `[*batch, D]`, or `Ids` of shape `[*batch]`.
      h: the state h_{t−1}, `[*batch, H]`.
      precision: of the products, as in `jax.numpy.matmul`.

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


def _check_step(arguments: tuple) -> tuple:
    cell, x, h = arguments
    checks.not_swapped("cell", cell, "x", x, Cell)
    cell = check_cell("cell", cell)
    hidden_size, input_size = cell.U.shape
    batch = getattr(x, "shape", ())[:-1]
    checks.shapes_not_swapped("x", x, "h", h, (*batch, input_size), (*batch, hidden_size))
    x = check_inputs("x", x, input_size, time=False)
    return cell, x, checks.floating("h", h, (*leading_shape(x), hidden_size))


# Jitted, so that jax_debug_nans does not see the row of NaN for invalid ids.
@partial(jax.jit, static_argnames="precision")
def _step(cell, x, h, *, precision):
    if isinstance(x, Ids):
        x = safe_ids(x.ids, cell.U.shape[1])
    return layers.step(cell, x, h, precision)[0]


def outputs(cell: Cell, hs: jax.Array) -> jax.Array:
    """The outputs of the units, which W and a readout multiply, for the states from `unroll`.

    s_t = h_t in the rate form, φ(h_t) in the voltage form, g(h_t) in a custom one: firing rates to
    plot, or for a loss.

    Args:
      cell: the `Cell`.
      hs: states, `[..., H]`.

    Returns:
      Outputs, `[..., H]`, in the dtype of hs. On invalid steps, where hs is 0, they are φ(0); those
      of `unroll_layers` are 0.

    Raises:
      TypeError, ValueError: a dtype that is not floating; states of another size.
    """
    checks.not_swapped("cell", cell, "hs", hs, Cell)
    cell = check_cell("cell", cell)
    return layers.outputs(cell, check_last_axis("hs", hs, cell.W.shape[0]))

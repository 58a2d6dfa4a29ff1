"""The public unroll: arguments checked and made ready for the loops."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import _checks, _sharding
from jaxrnn._activation import resolve
from jaxrnn._cell import Cell, Ids, check_cell, check_inputs, leading_shape
from jaxrnn._checkpointed import checkpointed
from jaxrnn._dtypes import cast, result_dtype
from jaxrnn._implementation import KERNELS, Loops, check_loops, choose
from jaxrnn._jacobians import slope_from_basis
from jaxrnn._padding import check_valid, cut_steps, select, valid_steps, without_padding
from jaxrnn._rule import recurrence
from jaxrnn._states import Sequences, prepared
from jaxrnn._step import preactivation, row_weights, safe_ids


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

    h_t = (1 − α) h_{t−1} + α φ(U x_t + W h_{t−1} + b + drive_t),  t = 1 … T,  h_0 given
    (α = 1 without a leak)

    Differentiable in cell, xs, h0 and drive, in every mode and to every order; under vmap a
    mapped axis costs what a batch axis does.

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
        again, to every order: k ≥ 1, or "sqrt" for about √T. Where only h_last is used, a
        gradient then needs memory for T/k + k steps. Not with `window`.
      truncate: truncated BPTT: no derivative passes from a_{mk+1} to h_{mk}, m ≥ 1, k ≥ 1; a
        leak and h_0 stay connected. Steps are counted as they are read, invalid ones not.
      window: derivatives of h_t reach a_{t−k+1} … a_t, k ≥ 1, as if h_t were recomputed by k
        steps from an h_{t−k} that does not move: the sum of 3.3 cut off at k terms. Steps are
        counted likewise. Not with `truncate`.
      implementation: by what the loops over time are run, forward and in all derivatives. "scan":
        `jax.lax.scan`. "mosaic_gpu", "pallas_tpu": one kernel for all steps, W kept on the chip;
        tanh, relu, sigmoid, identity. "associative": derivatives by products of Jacobians, in
        logarithmic depth and memory for T · B · H² numbers; forward a scan.
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

    >>> import jax, jaxrnn
    >>> cell = jaxrnn.init_cell(jax.random.key(0), input_size=4, hidden_size=3)
    >>> h_last, hs = jaxrnn.unroll(cell, jax.numpy.ones((7, 2, 4)))
    >>> h_last.shape, hs.shape
    ((2, 3), (7, 2, 3))
    """
    args = check_sequences(cell, xs, h0, lengths, mask, drive)
    how = check_how(args, reverse, checkpoint_every, truncate, window, implementation, precision)
    return _unroll(*args, how=how)


class How(NamedTuple):
    """What does not depend on values: how the loops are run, and how far derivatives reach."""

    loops: Loops
    checkpoint_every: int | None
    truncate: int | None
    window: int | None

    def options(self) -> dict[str, Any]:
        """The same as `unroll` takes it."""
        _, *names = self._fields
        reverse, implementation, precision, _ = self.loops
        runs = dict(reverse=reverse, implementation=implementation, precision=precision)
        return runs | {name: getattr(self, name) for name in names}


def check_how(
    args, reverse, checkpoint_every, truncate, window, implementation="auto", precision=None
) -> How:
    """Require options that go together and with args; "sqrt" becomes a number of steps."""
    time = leading_shape(args[1])[0]
    if checkpoint_every is not None and not isinstance(time, int):
        _checks.bad_value("checkpoint_every", "None where T is symbolic", repr(checkpoint_every))
    if isinstance(checkpoint_every, str):
        if checkpoint_every != "sqrt":
            expected = "None, a whole number or 'sqrt'"
            _checks.bad_value("checkpoint_every", expected, repr(checkpoint_every))
        checkpoint_every = math.isqrt(max(time - 1, 0)) + 1
    given = {"checkpoint_every": checkpoint_every, "truncate": truncate, "window": window}
    given = {name: value for name, value in given.items() if value is not None}
    # From T on all numbers mean the same, but for a window, which then still reaches h_0.
    most = 1 + (time if isinstance(time, int) else 2**30)
    for name, value in given.items():
        _checks.positive(name, value)
        given[name] = min(int(value), most)
    for other in ("truncate", "checkpoint_every"):
        if "window" in given and other in given:
            _checks.bad_value(f"{other} and window", "at most one of them", "both")
    loops = check_loops(time, reverse, implementation, precision)
    if implementation in KERNELS:
        _check_kernel(loops, *args)
    return How(loops, *(given.get(name) for name in How._fields[1:]))


def _check_kernel(loops, cells, xs, *arrays):
    """Require a kernel that runs each of the cells."""
    dtype, (_, *batch) = result_dtype(cells, xs, arrays), leading_shape(xs)
    for cell in jax.tree.leaves(cells, is_leaf=lambda leaf: isinstance(leaf, Cell)):
        W = jax.ShapeDtypeStruct(cell.W.shape, dtype)
        for function in (resolve(cell.activation).function, slope_from_basis(cell)):
            choose(loops, W, tuple(batch), function)


def check_sequences(cell, xs, h0, lengths, mask, drive):
    """Require arguments of `unroll` that fit each other; return them with jax arrays."""
    cell = check_cell("cell", cell)
    hidden_size, input_size = cell.U.shape
    xs = check_inputs("xs", xs, input_size, time=True)
    time, *batch = leading_shape(xs)
    if h0 is not None:
        hint = batch_first(xs, hidden_size)
        h0 = _checks.floating("h0", h0, (*batch, hidden_size), hint)
    if drive is not None:
        shape = time, *batch, hidden_size
        drive = _checks.floating("drive", drive, shape, _checks.swapped(shape))
    lengths, mask = check_valid(lengths, mask, (time, *batch), batch_first(xs))
    if isinstance(xs, Ids):
        _checks.in_range("xs.ids", xs.ids, input_size, valid_steps(lengths, mask, time))
    return cell, xs, h0, lengths, mask, drive


def batch_first(xs: jax.Array | Ids, *features: int) -> _checks.Hint:
    """For an array `[*batch, *features]`: it would fit if xs had its first two axes swapped."""
    name, array = ("xs.ids", xs.ids) if isinstance(xs, Ids) else ("xs", xs)
    time, *batch = leading_shape(xs)
    said = f"{name} {list(array.shape)} looks batch-first: time comes first here"
    return ((time, *batch[1:], *features), said) if batch else None


def together(
    cell, xs, h0, lengths, mask, drive, how: How
) -> tuple[Cell, Sequences, jax.Array, jax.Array | None]:
    """One dtype, a state to start from, and the steps that are cut.

    Returns:
      cell, sequences, h0, lengths; on invalid steps anything, and no mask for lengths.
    """
    dtype = result_dtype(cell, xs, h0, drive)
    steps = leading_shape(xs)
    if h0 is None:
        h0 = jnp.zeros((*steps[1:], cell.W.shape[0]), dtype)
    cell, xs, h0, drive = cast((cell, xs, h0, drive), dtype)
    cut = None
    if how.truncate is not None:
        valid = valid_steps(lengths, mask, steps[0])
        cut = cut_steps(valid, steps, how.truncate, how.loops.reverse)
    if steps[0]:
        valid = mask if lengths is None else lengths[None] > 0
        cell, xs, h0, drive = spread(cell, xs, h0, drive, valid, how.loops)
    return cell, Sequences(xs, drive, mask, cut), h0, lengths


def spread(cell, xs, h0, drive, mask, loops):
    """The same values, placed as the states will be.

    Adding zeros gives h_0 the sharding of a state and, inside shard_map, gives all of them the
    axes over which states vary: the loops keep what they start from, and where JAX differentiates
    this, it adds up the gradients over those axes here, once. XLA removes all of it.
    """
    xs, drive = _sharding.varying_like((xs, drive), (cell, h0, mask))
    now, drive_now = jax.tree.map(lambda s: s[0], (xs, drive))
    now = safe_ids(now.ids, cell.U.shape[1]) if isinstance(now, Ids) else now
    a = preactivation(row_weights(cell, xs, loops.precision), now, h0, drive_now)
    a = select(None if mask is None else mask[0], a, 0)
    h0 = h0 + jnp.zeros_like(a, h0.dtype)
    zero = jnp.zeros_like(jnp.sum(a), h0.dtype)
    return jax.tree.map(lambda leaf: leaf + zero, cell), xs, h0, drive


# Compiled once per shape: a scan called eagerly would be compiled at every call.
@partial(jax.jit, static_argnames="how")
def _unroll(cell, xs, h0, lengths, mask, drive, *, how):
    cell, sequences, h0, lengths = together(cell, xs, h0, lengths, mask, drive, how)
    loops = how.loops
    if leading_shape(xs)[0] == 0:
        return h0, jnp.zeros((0, *h0.shape), h0.dtype)
    if how.checkpoint_every is not None:
        length = how.checkpoint_every
        found = checkpointed(cell, sequences, h0, lengths, length=length, loops=loops)
        return found.h_last, found.hs
    sequences = prepared(sequences, 0, lengths, cell.U.shape[1])
    h_last, hs = recurrence(cell, sequences, h0, loops=loops, window=how.window)
    return h_last, without_padding(hs, sequences.mask)

"""Backpropagation through time by hand."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn import _checks, _sharding
from jaxrnn._cell import Cell, Ids, leading_shape
from jaxrnn._dtypes import cast_like
from jaxrnn._linearised import Steps, Tangents
from jaxrnn._padding import frozen_states, without_padding
from jaxrnn._states import prepared
from jaxrnn._tangent import tangent_of_states
from jaxrnn._unroll import check_how, check_sequences, spread, together
from jaxrnn._window import tangent_in_window


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class CellGradients:
    """What `bptt` returns: dL/d… of everything that the states depend on.

    Args:
      cell: a `Cell` of gradients.
      xs: dL/dx_t, `[T, *batch, D]`; None for `Ids`.
      h0: dL/dh_0, `[*batch, H]`.
      delta: dL/da_t, `[T, *batch, H]`, a_t the pre-activation; the gradient of `drive` too.
    """

    cell: Cell
    xs: jax.Array | None
    h0: jax.Array
    delta: jax.Array


def bptt(
    cell: Cell,
    xs: jax.Array | Ids,
    h0: jax.Array | None,
    hs: jax.Array,
    dhs: jax.Array,
    *,
    dh_last: jax.Array | None = None,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: jax.Array | None = None,
    reverse: bool = False,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> CellGradients:
    """The gradients of a loss that depends on the states, by backpropagation through time.

    λ_t = g_t + J_{t+1}ᵀ λ_{t+1},  λ_{T+1} = 0        (λ_t = dL/dh_t, g_t = dhs_t)
    δ_t = α D_t λ_t                                  (δ_t = dL/da_t, D_t = diag(φ'(a_t)))
    dL/dU = Σ δ_t x_tᵀ,  dL/dW = Σ δ_t h_{t−1}ᵀ,  dL/db = Σ δ_t
    dL/dx_t = Uᵀ δ_t,    dL/dh_0 = J_1ᵀ λ_1,      dL/dα = Σ λ_t (φ(a_t) − h_{t−1})

    Args:
      cell: the `Cell` of the unroll.
      xs: its inputs.
      h0: its first state; None for zeros.
      hs: the states that it returned, `[T, *batch, H]`.
      dhs: ∂L/∂h_t at fixed later states, `[T, *batch, H]`; ignored on invalid steps.
      dh_last: ∂L/∂h_last, `[*batch, H]`; None for zeros.
      lengths: as in `unroll`.
      mask: as in `unroll`.
      drive: as in `unroll`.
      reverse: as in `unroll`.
      truncate: as in `unroll`.
      window: as in `unroll`.
      implementation: as in `unroll`.
      precision: as in `unroll`.

    Returns:
      `CellGradients`, each in the dtype of what it is the gradient of.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll`.

    Numerics: the adjoint is float32 or better; so are all sums.

    Inside shard_map each device returns its own share of every gradient.

    Cost: one product a step; then one product over many steps for each of U, W and xs.

    Source: section 3.3, with (ŷ_t − y_t) where the source prints (y_t − ŷ_t), and with the
    Jacobian of H units, diag(1 − h²) W, where it prints that of one.
    """
    args = check_sequences(cell, xs, h0, lengths, mask, drive)
    cell, xs, h0, lengths, mask, drive = args
    shape = (*leading_shape(xs), cell.W.shape[0])
    hs = _checks.floating("hs", hs, shape, _checks.swapped(shape))
    dhs = _checks.floating("dhs", dhs, shape, _checks.swapped(shape))
    if dh_last is not None:
        dh_last = _checks.floating("dh_last", dh_last, shape[1:])
    how = check_how(args, reverse, None, truncate, window, implementation, precision)
    return _bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, how=how)


# Compiled once per shape, as the unroll is.
@partial(jax.jit, static_argnames="how")
def _bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, *, how):
    given, loops = Tangents(cell, None if isinstance(xs, Ids) else xs, drive, h0), how.loops
    cell, sequences, h0, lengths = together(cell, xs, h0, lengths, mask, drive, how)
    sequences = prepared(sequences, 0, lengths, cell.U.shape[1])
    xs, mask = sequences.xs, sequences.mask
    g = without_padding(dhs, mask).astype(h0.dtype)
    if dh_last is None:
        dh_last = jnp.zeros_like(h0)
    if hs.shape[0] == 0:
        nothing = jax.tree.map(jnp.zeros_like, given)
        return CellGradients(nothing.cell, nothing.xs, dh_last.astype(h0.dtype), g)
    hs = frozen_states(hs.astype(h0.dtype), h0, mask, loops.reverse)
    cell, xs, h0, g = spread(cell, xs, h0, g, mask, loops)
    steps = Steps(xs, _sharding.varying_like(sequences.drive, h0), mask, sequences.cut, hs)
    # δ is the gradient of a drive, whether there is one or not.
    wanted = Tangents(cell, None if isinstance(xs, Ids) else xs, jnp.zeros_like(g), h0)
    tangent = partial(tangent_of_states, cell, steps, h0, loops=loops)
    if how.window is not None:
        tangent = partial(tangent_in_window, cell, steps, h0, loops=loops, window=how.window)
    dh_last = dh_last.astype(h0.dtype) + jnp.zeros_like(h0)  # placed as h_0 is
    (found,) = jax.linear_transpose(tangent, wanted)((dh_last, g))
    return CellGradients(
        cell=cast_like(found.cell, given.cell),
        xs=cast_like(found.xs, given.xs),
        h0=found.h0 if given.h0 is None else found.h0.astype(given.h0.dtype),
        delta=found.drive if given.drive is None else found.drive.astype(given.drive.dtype),
    )

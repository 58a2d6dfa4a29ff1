"""Backpropagation through time by hand, and the source's gradients of its loss."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxrnn import _checks
from jaxrnn._cell import Cell, Ids, Params, Readout, check_params, leading_shape
from jaxrnn._dtypes import accumulation_dtype, cast_like
from jaxrnn._loss import check_targets, cross_entropy, output_error
from jaxrnn._padding import frozen_states, valid_steps, without_padding
from jaxrnn._recurrence import (
    first_step,
    jacobians,
    previous,
    select,
    solve_transposed,
    transposed_times,
)
from jaxrnn._step import apply_readout, product
from jaxrnn._unroll import check_sequences, prepare, unroll


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Gradients:
    """What `loss_and_grads` returns beside the loss.

    Args:
      params: a `Params` of gradients.
      h0: dL/dh_0, `[*batch, H]`.
      h_last: the final state itself (no gradient), `[*batch, H]`, to go on from.
    """

    params: Params
    h0: jax.Array
    h_last: jax.Array


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

    Returns:
      `CellGradients`, each in the dtype of what it is the gradient of.

    Raises:
      TypeError, ValueError: as `unroll`.

    Numerics: the adjoint is float32 or better; so are all sums.

    Cost: one product a step; then one product over all steps for each of U, W and xs.

    Source: section 3.3, with (ŷ_t − y_t) where the source prints (y_t − ŷ_t), and with the
    Jacobian of H units, diag(1 − h²) W, where it prints that of one.
    """
    cell, xs, h0, lengths, mask, drive = check_sequences(cell, xs, h0, lengths, mask, drive)
    shape = (*leading_shape(xs), cell.W.shape[0])
    hs = _checks.floating("hs", hs, shape)
    dhs = _checks.floating("dhs", dhs, shape)
    if dh_last is not None:
        dh_last = _checks.floating("dh_last", dh_last, shape[1:])
    return _bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, reverse=bool(reverse))


# Compiled once per shape, as the unroll is.
@partial(jax.jit, static_argnames="reverse")
def _bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, *, reverse):
    inputs = None if isinstance(xs, Ids) else xs
    given_cell, given_h0, given_drive = cell, h0, drive
    cell, xs, h0, drive, mask = prepare(cell, xs, h0, lengths, mask, drive)
    dh_first, cell_gradient, delta = _adjoint(cell, xs, h0, hs, dhs, dh_last, drive, mask, reverse)
    return CellGradients(
        cell=cast_like(cell_gradient, given_cell),
        xs=None if inputs is None else product(delta, cell.U).astype(inputs.dtype),
        h0=dh_first.astype(h0.dtype if given_h0 is None else given_h0.dtype),
        delta=delta.astype(h0.dtype if given_drive is None else given_drive.dtype),
    )


def _adjoint(cell, xs, h0, hs, dhs, dh_last, drive, mask, reverse):
    """dL/dh_0, the gradients of the cell and delta, all in the dtype of sums."""
    g = without_padding(dhs, mask).astype(accumulation_dtype(h0.dtype))
    dh_last = jnp.zeros_like(h0, g.dtype) if dh_last is None else dh_last.astype(g.dtype)
    if hs.shape[0] == 0:
        return dh_last, jax.tree.map(jnp.zeros_like, cell), g
    hs = frozen_states(hs.astype(h0.dtype), h0, mask, reverse)
    h_prev = previous(hs, h0, reverse)
    J, phi = jacobians(cell, xs, h_prev, hs, drive, mask)
    adjoint = solve_transposed(J, g.at[0 if reverse else -1].add(dh_last), reverse)
    delta = select(mask, J.scale(adjoint), 0)  # δ_t = α D_t λ_t
    dh_first = transposed_times(first_step(J, reverse), adjoint[-1 if reverse else 0])
    time_and_batch = tuple(range(delta.ndim - 1))
    leak = None
    if cell.leak is not None:
        passed = select(mask, adjoint * (phi - h_prev.astype(phi.dtype)), 0)
        leak = jnp.sum(passed, time_and_batch if cell.leak.ndim else None)
    gradient = Cell(
        U=_input_gradient(delta, xs, cell.U.shape),
        W=_sum_outer(delta, h_prev),
        b=jnp.sum(delta, time_and_batch),
        leak=leak,
        activation=cell.activation,
    )
    return dh_first, gradient, delta


def _sum_outer(delta, x):
    """Σ δ_t x_tᵀ over time and batch: one product."""
    axes = tuple(range(delta.ndim - 1))
    return jnp.tensordot(delta, x.astype(delta.dtype), (axes, axes))


def _input_gradient(delta, xs, shape):
    if isinstance(xs, Ids):
        # x_t is a one-hot row: each δ_t is added to the column of its id.
        columns = jnp.zeros(shape[::-1], delta.dtype)
        return columns.at[xs.ids].add(delta, mode="drop").T
    return _sum_outer(delta, xs)


def loss_and_grads(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    h0: jax.Array | None = None,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, Gradients]:
    """The summed cross-entropy of the network and its gradients, all of section 3 by hand.

    L = Σ_t L_t,  ∂L/∂Ω_t = ŷ_t − y_t,  dL/dV = Σ (ŷ_t − y_t) h_tᵀ,  dL/dc = Σ (ŷ_t − y_t),
    g_t = Vᵀ (ŷ_t − y_t), and the rest as in `bptt`.

    Args:
      params: the `Params`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      targets: integer ids `[T, *batch]`, or one-hot floats `[T, *batch, K]`.
      h0: first state, `[*batch, H]`; zeros by default.
      lengths: as in `unroll`; invalid steps have no loss.
      mask: as in `unroll`; invalid steps have no loss.
      drive: as in `unroll`.
      reverse: as in `unroll`.

    Returns:
      (loss, `Gradients`): the loss in nats, a scalar summed over steps and batch; the
      gradients of params and h0, and the final state to go on from.

    Raises:
      TypeError, ValueError: as `unroll` and `cross_entropy`.

    Numerics: the loss is float32 or better.

    Source: sections 3.1 to 3.3. The upper limits S and T printed there are both the length.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init_params(jax.random.key(0), 4, 8, 4)
    >>> xs, targets = jaxrnn.Ids(jax.numpy.array([0, 1, 2, 2])), jax.numpy.array([1, 2, 2, 3])
    >>> loss, gradients = jaxrnn.loss_and_grads(params, xs, targets)
    >>> loss.shape, gradients.params.cell.W.shape, gradients.h_last.shape
    ((), (8, 8), (8,))
    """
    params = check_params(params)
    cell, xs, h0, lengths, mask, drive = check_sequences(params.cell, xs, h0, lengths, mask, drive)
    steps = leading_shape(xs)
    valid = valid_steps(lengths, mask, steps[0])
    targets = check_targets(targets, (*steps, params.readout.V.shape[0]), valid)
    params = Params(cell, params.readout)
    return _loss_and_grads(params, targets, xs, h0, lengths, mask, drive, reverse=bool(reverse))


@partial(jax.jit, static_argnames="reverse")
def _loss_and_grads(params, targets, xs, h0, lengths, mask, drive, *, reverse):
    cell, readout = params.cell, params.readout
    how = dict(lengths=lengths, mask=mask, drive=drive, reverse=reverse)
    h_last, hs = unroll(cell, xs, h0, **how)
    logits = apply_readout(readout, hs)
    valid = valid_steps(lengths, mask, hs.shape[0])
    loss = jnp.sum(cross_entropy(logits, targets, where=valid))

    error = output_error(logits, targets, valid)  # ŷ_t − y_t (3.1)
    gradients = bptt(cell, xs, h0, hs, product(error, readout.V), **how)  # g_t = Vᵀ error (3.3)
    # dL/dV = Σ error h_tᵀ, dL/dc = Σ error (3.2)
    readout = Readout(V=_sum_outer(error, hs), c=jnp.sum(error, tuple(range(error.ndim - 1))))
    params = Params(gradients.cell, cast_like(readout, params.readout))
    return loss, Gradients(params, gradients.h0, h_last)

"""Backpropagation through time by hand, and the source's gradients of its loss."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxrnn import _checks, _schedule
from jaxrnn._cell import Cell, Ids, Params, Readout, check_params, leading_shape
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like
from jaxrnn._loss import check_targets, cross_entropy, output_error
from jaxrnn._padding import frozen_states, valid_steps, without_padding
from jaxrnn._segments import over_segments, starts
from jaxrnn._step import apply_readout, product
from jaxrnn._tangent import Steps, Tangents, segment_gradient, tangent_of_states
from jaxrnn._unroll import check_sequences, prepare, recurrence, spread


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

    Cost: one product a step; then one product over many steps for each of U, W and xs.

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
    given = Tangents(cell, None if isinstance(xs, Ids) else xs, drive, h0)
    cell, xs, h0, drive, mask = prepare(cell, xs, h0, lengths, mask, drive)
    g = without_padding(dhs, mask).astype(h0.dtype)
    if dh_last is None:
        dh_last = jnp.zeros_like(h0)
    if hs.shape[0] == 0:
        nothing = jax.tree.map(jnp.zeros_like, given)
        return CellGradients(nothing.cell, nothing.xs, dh_last.astype(h0.dtype), g)
    steps = Steps(xs, drive, mask, frozen_states(hs.astype(h0.dtype), h0, mask, reverse))
    g = g.at[0 if reverse else -1].add(dh_last.astype(g.dtype))
    cell, h0 = spread(cell, xs, h0, g)
    # δ is the gradient of a drive, whether there is one or not.
    wanted = Tangents(cell, None if isinstance(xs, Ids) else xs, jnp.zeros_like(g), h0)
    tangent = partial(tangent_of_states, cell, steps, h0, reverse=reverse)
    (found,) = jax.linear_transpose(tangent, wanted)(g)
    return CellGradients(
        cell=cast_like(found.cell, given.cell),
        xs=cast_like(found.xs, given.xs),
        h0=found.h0 if given.h0 is None else found.h0.astype(given.h0.dtype),
        delta=found.drive if given.drive is None else found.drive.astype(given.drive.dtype),
    )


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

    Cost: logits, errors and cotangents exist for a segment of the steps at a time; hs is kept.

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
    given_h0 = h0
    cell, xs, h0, drive, mask = prepare(params.cell, xs, h0, lengths, mask, drive)
    if leading_shape(xs)[0]:
        ids = jnp.issubdtype(targets.dtype, jnp.integer)
        like_errors = targets[..., None] if ids else targets[..., :1]
        cell, h0 = spread(cell, xs, h0, like_errors.astype(h0.dtype))
    wide = accumulation_dtype(h0.dtype)
    sums = cast(jax.tree.map(jnp.zeros_like, Params(cell, params.readout)), wide)
    from_later, loss = jnp.zeros_like(h0, wide), jnp.zeros((), wide)
    h_last = h0
    if leading_shape(xs)[0]:
        hs = recurrence(cell, (xs, drive, mask), h0, reverse)
        h_last = hs[0 if reverse else -1]

        def segment(carry, now, h_before):
            steps, targets = now
            from_later, sums, loss = carry
            logits = apply_readout(params.readout, steps.hs)
            loss += jnp.sum(cross_entropy(logits, targets, where=steps.mask))
            error = output_error(logits, targets, steps.mask)  # ŷ_t − y_t (3.1)
            # dL/dV = Σ error h_tᵀ, dL/dc = Σ error (3.2)
            V, c = _sum_outer(error, steps.hs), jnp.sum(error, tuple(range(error.ndim - 1)))
            g = product(error, params.readout.V)  # g_t = Vᵀ error (3.3)
            wanted = Tangents(sums.cell, None, None, h0)
            g = g.astype(wide)
            found = segment_gradient(cell, steps, h_before, g, from_later, wanted, reverse)
            shares = Params(found.cell, Readout(V, c))
            return (found.h0, jax.tree.map(jnp.add, sums, shares), loss), ()

        longest = max(hs.shape[-1], params.readout.V.shape[0])
        length = _schedule.segment_length(hs.shape[0], h0.shape[:-1], longest)
        before = starts(hs, h0, length, reverse)
        now, carry = (Steps(xs, drive, mask, hs), targets), (from_later, sums, loss)
        carry, _ = over_segments(segment, carry, now, before, length, reverse=not reverse)
        from_later, sums, loss = carry
    dh0 = from_later.astype(h0.dtype if given_h0 is None else given_h0.dtype)
    return loss, Gradients(cast_like(sums, params), dh0, h_last)


def _sum_outer(delta, x):
    """Σ δ_t x_tᵀ over time and batch: one product."""
    axes = tuple(range(delta.ndim - 1))
    return jnp.tensordot(delta, x.astype(delta.dtype), (axes, axes))

"""The source's loss and its gradients by hand, all of section 3."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _schedule, _sharding
from jaxrnn._cell import Cell, Ids, Params, Readout, check_params, leading_shape
from jaxrnn._checkpointed import checkpointed
from jaxrnn._dtypes import accumulation_dtype, cast, cast_like, result_dtype, wide
from jaxrnn._implementation import choose
from jaxrnn._jacobians import slope_from_basis
from jaxrnn._layers import check_layers, first_states, unroll_layers
from jaxrnn._linearised import Steps, Tangents, segment_gradient
from jaxrnn._loss import check_targets, cross_entropy, output_error
from jaxrnn._padding import valid_steps
from jaxrnn._rule import recurrence
from jaxrnn._segments import offsets, over_segments, starts
from jaxrnn._states import prepared
from jaxrnn._step import apply_readout, product
from jaxrnn._unroll import check_how, check_sequences, spread, together


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Gradients:
    """What `loss_and_grads` returns beside the loss.

    Args:
      params: a `Params` of gradients.
      h0: dL/dh_0, `[*batch, H]`; of a stack in the structure of its cells.
      h_last: the final state itself (no gradient), likewise, to go on from.
    """

    params: Params
    h0: Any
    h_last: Any


def loss_and_grads(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    h0: Any = None,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: Any = None,
    reverse: bool = False,
    checkpoint_every: int | str | None = None,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> tuple[jax.Array, Gradients]:
    """The summed cross-entropy of the network and its gradients, all of section 3 by hand.

    L = Σ_t L_t,  ∂L/∂Ω_t = ŷ_t − y_t,  dL/dV = Σ (ŷ_t − y_t) h_tᵀ,  dL/dc = Σ (ŷ_t − y_t),
    g_t = Vᵀ (ŷ_t − y_t), and the rest as in `bptt`.

    Args:
      params: the `Params`, of one cell or of a stack, through which `unroll_layers` goes.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      targets: integer ids `[T, *batch]`, or one-hot floats `[T, *batch, K]`.
      h0: first state, `[*batch, H]`, of a stack in the structure of its cells; zeros by default.
      lengths: as in `unroll`; invalid steps have no loss.
      mask: as in `unroll`; invalid steps have no loss.
      drive: as in `unroll`, or in `unroll_layers`.
      reverse: as in `unroll`.
      checkpoint_every: as in `unroll`: only every k-th state is kept, and readout and loss are
        formed for k steps at a time.
      truncate: as in `unroll`.
      window: as in `unroll`.
      implementation: as in `unroll`.
      precision: as in `unroll`; of the products with V too.

    Returns:
      (loss, `Gradients`): the loss in nats, a scalar summed over steps and batch; the
      gradients of params and h0, and the final state to go on from.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll` and `cross_entropy`.

    Numerics: the loss is float32 or better.

    Inside shard_map each device returns its own share of the loss and of every gradient.

    Cost: logits, errors and cotangents exist for a segment of the steps at a time; hs is kept, but
      for `checkpoint_every`. JAX can differentiate this again, with arrays of all steps.
      Of a stack without `checkpoint_every`, and with `window`, they exist for all steps; with it,
      where no layer is a pair and nothing is truncated, the states between layers too exist for
      k steps at a time.

    Source: sections 3.1 to 3.3. The upper limits S and T printed there are both the length.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init_params(jax.random.key(0), 4, 8, 4)
    >>> xs, targets = jaxrnn.Ids(jax.numpy.array([0, 1, 2, 2])), jax.numpy.array([1, 2, 2, 3])
    >>> loss, gradients = jaxrnn.loss_and_grads(params, xs, targets)
    >>> loss.shape, gradients.params.cell.W.shape, gradients.h_last.shape
    ((), (8, 8), (8,))
    """
    params = check_params(params)
    cell = params.cell
    check = check_sequences if isinstance(cell, Cell) else check_layers
    args = check(cell, xs, h0, lengths, mask, drive)
    cell, xs, h0, lengths, mask, drive = args
    how = check_how(args, reverse, checkpoint_every, truncate, window, implementation, precision)
    steps = leading_shape(xs)
    valid = valid_steps(lengths, mask, steps[0])
    targets = check_targets(targets, (*steps, params.readout.V.shape[0]), valid)
    run = _in_segments if isinstance(cell, Cell) and window is None else _by_layers
    return run(Params(cell, params.readout), targets, xs, h0, lengths, mask, drive, how=how)


@partial(jax.jit, static_argnames="how")
def _in_segments(params, targets, xs, h0, lengths, mask, drive, *, how):
    given_h0, loops = h0, how.loops
    cell, sequences, h0, lengths = together(params.cell, xs, h0, lengths, mask, drive, how)
    if leading_shape(xs)[0]:
        ids = jnp.issubdtype(targets.dtype, jnp.integer)
        like_errors = targets[..., None] if ids else targets[..., :1]
        cell, _, h0, _ = spread(cell, xs, h0, like_errors.astype(h0.dtype), None, loops)
    wide = accumulation_dtype(h0.dtype)
    sums = cast(jax.tree.map(jnp.zeros_like, Params(cell, params.readout)), wide)
    carry = jnp.zeros_like(h0, wide), sums, jnp.zeros((), wide)
    h_last = h0
    if leading_shape(xs)[0]:
        h_last, steps, before, length = _run(params, cell, sequences, h0, lengths, how)

        def segment(carry, now, before):
            (now, targets), (first, h_before) = now, before
            if how.checkpoint_every is not None:
                # By the rule: JAX may differentiate this, and the loop itself knows no cuts.
                now = prepared(now, first, lengths, cell.U.shape[1])
                now = Steps(*now, recurrence(cell, now, h_before, loops=loops)[1])
            from_later, sums, loss = carry
            share, V_and_c, g = _output(params.readout, now.hs, targets, now.mask, loops)
            wanted = Tangents(sums.cell, None, None, h0)
            g = g.astype(wide)
            found = segment_gradient(cell, now, h_before, g, from_later, wanted, loops)
            shares = Params(found.cell, V_and_c)
            return (found.h0, jax.tree.map(jnp.add, sums, shares), loss + share), ()

        carry, *_ = over_segments(
            segment, carry, (steps, targets), before, length, reverse=not loops.reverse
        )
    from_later, sums, loss = carry
    dh0 = from_later.astype(h0.dtype if given_h0 is None else given_h0.dtype)
    return loss, Gradients(cast_like(sums, params), dh0, h_last)


def _run(params, cell, sequences, h0, lengths, how):
    """Forward: the last state, what each segment reads, and (its first step, the state before)."""
    time = leading_shape(sequences.xs)[0]
    length = how.checkpoint_every
    if length is not None:
        kept = checkpointed(cell, sequences, h0, lengths, length=length, loops=how.loops)
        return kept.h_last, sequences, (offsets(time, length), kept.starts), length
    sequences = prepared(sequences, 0, lengths, cell.U.shape[1])
    h_last, hs = recurrence(cell, sequences, h0, loops=how.loops)
    length, batch, longest = time, h0.shape[:-1], max(hs.shape[-1], params.readout.V.shape[0])
    if choose(how.loops, cell.W, batch, slope_from_basis(cell)) == "scan":
        length = _schedule.segment_length(time, batch, longest)
    before = None, starts(hs, h0, length, how.loops.reverse)
    return h_last, Steps(*sequences, hs), before, length


def _output(readout, hs, targets, mask, loops):
    """The loss of some steps, dL/dV and dL/dc, and g_t."""
    precision = loops.precision
    logits = apply_readout(readout, hs, precision=precision)
    loss = jnp.sum(cross_entropy(logits, targets, where=mask))
    error = output_error(logits, targets, mask)  # ŷ_t − y_t (3.1)
    # dL/dV = Σ error h_tᵀ, dL/dc = Σ error (3.2)
    V, c = _sum_outer(error, hs, precision), jnp.sum(error, tuple(range(error.ndim - 1)))
    return loss, Readout(V, c), product(error, readout.V, precision)  # g_t = Vᵀ error (3.3)


@partial(jax.jit, static_argnames="how")
def _by_layers(params, targets, xs, h0, lengths, mask, drive, *, how):
    """Through `unroll_layers`, whose derivative rule is the same backpropagation."""
    (time, *batch), length, cells = leading_shape(xs), how.checkpoint_every, params.cell
    # Cuts are counted over all steps, and a pair reads from both ends.
    if length is None or how.truncate is not None or any(isinstance(c, tuple) for c in cells):
        length = time
    else:
        how = how._replace(checkpoint_every=None)

    def states(cells, h, now, first):
        xs, mask, drive = now
        left = None if lengths is None else jnp.clip(wide(lengths) - first, 0, leading_shape(xs)[0])
        return unroll_layers(cells, xs, h, lengths=left, mask=mask, drive=drive, **how.options())

    def back(carry, now, before):
        (now, targets), (first, h_before) = now, before
        from_later, sums, loss = carry
        (h_after, hs), pull = jax.vjp(lambda c, h: states(c, h, now, first), cells, h_before)
        left = None if lengths is None else wide(lengths) - first
        valid = valid_steps(left, now[1], hs.shape[0])
        share, readout, g = _output(params.readout, hs, targets, valid, how.loops)
        dcell, from_later = pull((from_later, g.astype(hs.dtype)))
        found = cast_like(Params(dcell, readout), sums)
        return (from_later, jax.tree.map(jnp.add, sums, found), loss + share), h_after

    # As in `spread`, and of the dtype of the states: by one step, which XLA removes.
    steps, given_h0, h0 = (xs, mask, drive), h0, first_states(cells, tuple(batch), h0)
    cells, h0 = _sharding.varying_like((cells, h0), (steps, targets, lengths))
    after, hs = states(cells, h0, jax.tree.map(lambda s: s[:1], steps), 0)
    h0 = jax.tree.map(lambda h, a: h.astype(a.dtype) + jnp.zeros_like(a), h0, after)
    sums = jax.tree.map(lambda p: jnp.zeros_like(p, accumulation_dtype(p.dtype)), params)
    loss = jnp.zeros((), accumulation_dtype(result_dtype(params.readout, hs)))
    carry = jax.tree.map(jnp.zeros_like, h0), sums, loss
    if length >= time:
        carry, h_last = back(carry, (steps, targets), (0, h0))
    else:
        firsts = offsets(time, length)
        h_last, _, kept = over_segments(
            lambda h, now, first: (states(cells, h, now, first)[0], ()),
            h0, steps, firsts, length, reverse=how.loops.reverse, keep=lambda h: h,
        )  # fmt: skip
        carry, *_ = over_segments(
            lambda *a: (back(*a)[0], ()),
            carry, (steps, targets), (firsts, kept), length, reverse=not how.loops.reverse,
        )  # fmt: skip
    dh0, sums, loss = carry
    dh0 = jax.tree.map(_like_given, given_h0, dh0, is_leaf=lambda h: h is None)
    return loss, Gradients(cast_like(sums, params), dh0, h_last)


def _like_given(h0, dh0):
    return dh0 if h0 is None else dh0.astype(h0.dtype)


def _sum_outer(delta, x, precision):
    """Σ δ_t x_tᵀ over time and batch: one product."""
    axes, x = tuple(range(delta.ndim - 1)), x.astype(delta.dtype)
    laid_out = _sharding.of_outer(delta, x)
    contracted = ((axes, axes), ((), ()))
    return lax.dot_general(delta, x, contracted, precision=precision, out_sharding=laid_out)

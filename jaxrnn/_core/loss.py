"""The readout, the loss, and all gradients of section 3 by hand."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrnn._base import arithmetic
from jaxrnn._base.arithmetic import accumulation_dtype, cast, cast_like, product, result_dtype
from jaxrnn._base.forms import output, output_derivatives
from jaxrnn._base.masking import cut_steps, valid_steps, without_padding
from jaxrnn._base.options import Options
from jaxrnn._core import derivative, layers, remat
from jaxrnn._core.forward import clean
from jaxrnn._jax import sharding
from jaxrnn._types import Cell, Gradients, Params, Readout, leading_shape


def logits(readout: Readout, s: jax.Array, precision=None) -> jax.Array:
    """Ω = V s + c, in the result dtype."""
    dtype = result_dtype(readout, s)
    readout, s = cast((readout, s), dtype)
    Omega = product(s, readout.V.T, precision)
    return (Omega + arithmetic.like(readout.c, Omega)).astype(dtype)


def cross_entropy(logits, targets, where=None):
    """L_t of each step; 0 where `where` is False, whatever the logits and targets."""
    logits = logits.astype(accumulation_dtype(logits.dtype))
    # Masked before the logarithm too, so that a NaN on a masked step has no gradient.
    logits, targets = (without_padding(x, where) for x in (logits, targets))
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets, inside = _inside(targets, logits.shape[-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(inside, targets, 0)
        )
        with jax.debug_nans(False):  # the NaN of an invalid id is intended
            losses = jnp.where(inside, losses, jnp.nan)
    else:
        y, log_p = targets.astype(logits.dtype), jax.nn.log_softmax(logits)
        # 0 ln 0 = 0: a class with logit −∞ and target 0 costs nothing.
        log_p = jnp.where((y == 0) & (log_p == -jnp.inf), 0, log_p)
        losses = -jnp.sum(y * log_p, axis=-1)
    return without_padding(losses, where)


def output_error(logits, targets, where=None):
    """∂L_t/∂Ω_t = ŷ_t − y_t, the softmax gradient of section 3.1; 0 where `where` is False.

    For a target row that sums to s it is s ŷ_t − y_t.
    """
    logits = logits.astype(accumulation_dtype(logits.dtype))
    logits, targets = (without_padding(x, where) for x in (logits, targets))
    y_hat = jax.nn.softmax(logits)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets, inside = _inside(targets, logits.shape[-1])
        # one_hot is a comparison, which XLA fuses: no rows are stored.
        error = y_hat - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        with jax.debug_nans(False):
            error = jnp.where(inside[..., None], error, jnp.nan)
    else:
        y = targets.astype(logits.dtype)
        error = y_hat * jnp.sum(y, axis=-1, keepdims=True) - y
    return without_padding(error, where)


def _inside(targets, size):
    targets = arithmetic.wide(targets)
    return targets, (targets >= 0) & (targets < size)


def loss_and_grads(params, targets, xs, h0, lengths, mask, drive, *, options: Options):
    """(loss, `Gradients`) for checked arguments."""
    plain = options.window is None and options.checkpoint_every is None
    run = _by_hand if plain and isinstance(params.cell, Cell) else _by_layers
    return run(params, targets, xs, h0, lengths, mask, drive, options=options)


@partial(jax.jit, static_argnames="options")
def _by_hand(params, targets, xs, h0, lengths, mask, drive, *, options):
    """For one cell: loss and backpropagation, one segment after the other."""
    h0_arg, precision = h0, options.precision
    cell, sequences, h0 = derivative.prepared(params.cell, xs, h0, lengths, mask, drive, options)
    cell, h0 = sharding.varying_like((cell, h0), targets)
    wide, readout = accumulation_dtype(h0.dtype), params.readout
    dtype = accumulation_dtype(result_dtype(readout, h0))  # of the error
    zeros = jax.tree.map(jnp.zeros_like, Params(cast(cell, wide), cast(readout, dtype)))
    carry = jnp.zeros_like(h0, wide), zeros, jnp.zeros((), dtype)
    h_last = h0
    if leading_shape(xs)[0]:
        sequences = clean(sequences, cell.U.shape[1])
        h_last, (hs, kept) = derivative.states(cell, sequences, h0, options)
        sequences = sequences._replace(hs=hs, kept=kept)
        if kept is not None:
            sequences = sequences._replace(kept=derivative.residuals(options, cell, sequences, h0))
        known = cell, sequences, h0
        length = derivative.segment_length(options, cell, hs, h0, params.readout.V.shape[0])

        def segment(carry, part, start):
            (part, targets), (from_later, sums, loss) = part, carry
            h_before = derivative.state_before(options, known, start, part)
            s = output(cell, part.hs)
            Omega = logits(params.readout, s.astype(h0.dtype), precision)
            loss += jnp.sum(cross_entropy(Omega, targets, part.mask))
            error = output_error(Omega, targets, part.mask)  # ŷ_t − y_t (3.1)
            # dL/dV = Σ error s_tᵀ, dL/dc = Σ error (3.2)
            V = arithmetic.sum_outer(error, s, precision)
            c = jnp.sum(error, tuple(range(error.ndim - 1)))
            g = product(error, params.readout.V, precision).astype(wide)  # Vᵀ error (3.3)
            q, by_theta = jax.tree.map(
                partial(without_padding, mask=part.mask),
                output_derivatives(cell, part.hs.astype(wide)),
            )
            if by_theta is not None:
                parameters = jax.tree.map(
                    lambda total, slope: total + arithmetic.summed(g * slope, total),
                    sums.cell.parameters, by_theta,
                )  # fmt: skip
                sums = replace(sums, cell=replace(sums.cell, parameters=parameters))
            g = g if q is None else g * q
            wanted = derivative.Tangents(sums.cell, None, None, h0)
            grad = derivative.segment_gradient(options, cell, part, h_before, g, from_later, wanted)
            share = Params(grad.cell, Readout(V, c))
            return (grad.h0, jax.tree.map(jnp.add, sums, share), loss), ()

        steps = known[1], targets
        back = not options.reverse
        carry, _ = remat.over_segments(segment, carry, steps, length, (), reverse=back)
    dh0, sums, loss = carry
    dh0 = dh0.astype(h0.dtype if h0_arg is None else h0_arg.dtype)
    return loss, Gradients(cast_like(sums, params), dh0, h_last)


@partial(jax.jit, static_argnames="options")
def _by_layers(params, targets, xs, h0, lengths, mask, drive, *, options):
    """For a stack, a window or checkpoints: by `jax.vjp`, through the same derivative rule.

    With `checkpoint_every` = k, layers, readout and loss are computed for k steps at a time.
    """
    cells, time, h0_arg, length = params.cell, leading_shape(xs)[0], h0, options.checkpoint_every
    mask, cut = valid_steps(lengths, mask, time), None
    pairs = not isinstance(cells, Cell) and tuple in map(type, cells)  # read from both ends
    if length is None or pairs:
        length = time
    else:
        if options.truncate is not None:  # counted over all steps
            cut = cut_steps(mask, leading_shape(xs), options.truncate, options.reverse)
        options = options._replace(checkpoint_every=None, truncate=None)

    def run(cells, h, part):
        xs, mask, drive, cut = part
        return layers.unroll(cells, xs, h, None, mask, drive, cut, options=options)

    h0 = layers.first_states(cells, leading_shape(xs)[1:], h0)
    part = xs, mask, drive, cut
    params, h0 = sharding.varying_like((params, h0), (part, targets))
    first = jax.tree.map(lambda s: s[:1], part)
    traced, (after, ys) = jax.make_jaxpr(run, return_shape=True)(cells, h0, first)
    types = jax.tree.unflatten(jax.tree.structure((after, ys)), traced.out_avals)
    dtype = accumulation_dtype(result_dtype(params.readout, ys))
    if time:
        # A scan's carry keeps its type, so h_0 gets that of the states.
        h0 = jax.tree.map(sharding.laid_out_like, cast_like(h0, after), types[0])

    def segment(params, carry, part, first=0):
        del first
        (h, loss), (part, targets) = carry, part
        h, ys = run(cast_like(params.cell, cells), cast_like(h, after), part)
        Omega = logits(cast_like(params.readout, original.readout), ys, options.precision)
        loss += jnp.sum(cross_entropy(Omega, targets, part[1])).astype(dtype)
        return (_wide(h), loss), ()

    def total(params, h):
        carry = h, sharding.varying_like(jnp.zeros((), dtype), (h, targets))
        of_params, every = partial(segment, params), (part, targets)
        if length >= time:
            (h, loss), _ = of_params(carry, every)
        else:
            how = dict(reverse=options.reverse)
            (h, loss), _ = remat.recomputed(of_params, carry, every, length, **how)
        return loss, cast_like(h, after)

    # In the dtype of sums, so that the gradients of segments accumulate in it.
    original = params
    loss, pull, h_last = jax.vjp(total, _wide(params), _wide(h0), has_aux=True)
    dparams, dh0 = pull(jnp.ones_like(loss))
    dh0 = cast_like(dh0, _with_default(h0_arg, after))
    return loss, Gradients(cast_like(dparams, params), dh0, h_last)


def _with_default(tree, default):
    if isinstance(default, tuple) and tree is not None:
        return tuple(map(_with_default, tree, default))
    return default if tree is None else tree


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), tree)

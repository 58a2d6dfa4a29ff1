"""vmap of a loop over time without its price: a mapped axis becomes part of the batch.

JAX's own batching of a scan puts the new axis in front of time and transposes whole
`[T, B, H]` arrays to get there, and under vmap a derivative rule is batched operation by
operation. A loop wrapped here takes the axis as one more batch axis, before it is
differentiated: what follows, the choice of how to run it and its derivatives, sees one larger
batch. `jax.custom_batching.custom_vmap` has no reverse mode and returns the mapped axis in
front, so this is a primitive of its own.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxrnn._primitive import jvp_of, make_primitive, run

_loop_p = make_primitive("recurrence")


def foldable(loop: Callable, time_axis: int | None = None) -> Callable:
    """Give `loop(weights, sequences, carry) -> (carry, states)` a batching rule of its own.

    Under vmap with shared weights, the mapped axis joins the batch; with weights of their own,
    each member runs the loop, and axes mapped later still join its batch.

    Args:
      loop: sequences are a pytree of `[*front, T, *members, *batch, …]`, carry is one of
        `[*front, *members, *batch, …]`, or None as a result, and states are like sequences.
        `front` are batch axes too; for each vmap over parameters, members pair with an axis
        of the weights.
      time_axis: how many front axes there are, to which more may come; the loop is told them as
        `time_axis=`, and how many members run side by side as `copies=`. None where time
        stands in front whatever comes, and the loop is told nothing.

    Returns:
      The same function, with the same derivatives.
    """

    def folded(weights, sequences, carry):
        leaves, tree = jax.tree.flatten((weights, sequences, carry))
        out, shape = _bind(leaves, loop, tree, 0, time_axis or 0, time_axis is None)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return folded


def _bind(leaves, loop, tree, members, time_axis, fixed):
    told = {} if fixed else dict(time_axis=time_axis, copies=1)

    def flat(*leaves):
        return loop(*jax.tree.unflatten(tree, leaves), **told)

    call, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    how = dict(loop=loop, tree=tree, members=members, time_axis=time_axis, fixed=fixed)
    return _loop_p.bind(*leaves, call=call, **how), shape


def _differentiate(primals, tangents, *, call, **_):
    # As if the loop stood here itself: its own rule decides, with zeros it can see.
    return jvp_of(partial(run, call=call), primals, tangents)


ad.primitive_jvps[_loop_p] = _differentiate


def _fold(leaves, axes, *, call, loop, tree, members, time_axis, fixed):
    del call  # of the shapes before
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    of_weights, of_sequences, _ = (part.num_leaves for part in tree.children())
    sequence_axes = {a for a in axes[of_weights : of_weights + of_sequences] if a is not None}
    own_weights = any(a is not None for a in axes[:of_weights])
    # What lies in front of time stays there: to move it would transpose whole arrays. One
    # sequence is moved for nothing.
    in_front = bool(sequence_axes) and max(sequence_axes) <= time_axis and size != 1
    # Members join what is in front, if anything is: there a mapped loop returns its own axis,
    # and a custom_jvp needs that of the value and of the tangent to agree.
    members_in_front = own_weights and time_axis > 0
    if members_in_front:
        carry_to = sequence_to = 0
    elif own_weights or fixed or not in_front:
        carry_to = time_axis + (0 if own_weights else members)
        sequence_to = carry_to + 1
    else:
        carry_to = sequence_to = 0
        time_axis += 1

    def placed(n, x, axis):
        if n < of_weights:
            return x
        to = sequence_to if n < of_weights + of_sequences else carry_to
        if axis is not None:
            return jnp.moveaxis(x, axis, to)
        shape = (*x.shape[:to], size, *x.shape[to:])
        return jnp.broadcast_to(jnp.expand_dims(x, to), shape)

    leaves = [placed(n, x, a) for n, (x, a) in enumerate(zip(leaves, axes, strict=True))]
    if own_weights:
        weights_axes = jax.tree.unflatten(tree, axes)[0]
        one = loop if fixed else partial(loop, time_axis=time_axis, copies=size)
        every = (weights_axes, sequence_to, carry_to)
        out = (carry_to, sequence_to)
        loop = jax.vmap(one, in_axes=every, out_axes=out, axis_size=size)
        members += not members_in_front
        time_axis += members_in_front
        fixed = True
    out, (carry, _) = _bind(leaves, loop, tree, members, time_axis, fixed)
    carried = len(jax.tree.leaves(carry))
    return out, [carry_to] * carried + [sequence_to] * (len(out) - carried)


batching.primitive_batchers[_loop_p] = _fold

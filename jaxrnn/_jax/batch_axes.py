"""A loop over time with a custom derivative, whose mapped axes become batch axes.

JAX batches a scan by putting the new axis in front of time, which transposes whole `[T, B, H]`
arrays, and it batches a derivative rule operation by operation. Here a mapped axis joins the batch
before the loop is differentiated, so the choice of implementation and the derivative see one larger
batch. `jax.custom_batching.custom_vmap` has no reverse mode, and `jax.custom_jvp` traces the loop
again for it, so this is a primitive.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxrnn._jax.error_checks import look_into, without_checks
from jaxrnn._jax.primitive import is_zero, jvp_of, make_primitive, run

_loop_p = make_primitive("recurrence")

# How many members with their own weights are batched in the loop that is being traced.
member_count: ContextVar[int] = ContextVar("member_count", default=1)


def run_loop(
    loop: Callable,
    weights: Any,
    sequences: Any,
    carry: Any,
    tangent: Callable | None = None,
    members: int = 0,
) -> tuple[Any, Any]:
    """Run `loop(weights, sequences, carry) -> (carry, states)`.

    Under vmap with shared weights the mapped axis joins the batch. Under vmap over weights the loop
    is vmapped over the members, and axes mapped later still join the batch.

    Args:
      loop: the function to run.
      weights: a pytree.
      sequences: a pytree of `[T, *members, *batch, …]`, with a member axis for each vmap over
        weights; states likewise.
      carry: a pytree of `[*members, *batch, …]`; as a result it may be None.
      tangent: `tangent(arguments, results, tangents) -> tangents of the results`, where
        arguments and tangents are (weights, sequences, carry), None for constants. If None, JAX
        differentiates the loop.
      members: the number of vmaps over weights so far.
    """
    leaves, tree = jax.tree.flatten((weights, sequences, carry))

    def flat(*leaves):
        return loop(*jax.tree.unflatten(tree, leaves))

    with jax.disable_jit(False):  # without jit, lax.scan would be traced step by step
        call, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    out_tree = jax.tree.structure(shape)
    how = dict(loop=loop, tangent=tangent, tree=tree, out_tree=out_tree, members=members)
    return jax.tree.unflatten(out_tree, _loop_p.bind(*leaves, call=call, **how))


@_loop_p.def_impl
def _run(*leaves, call, loop, tree, **_):
    # An evaluated jaxpr is not checked for NaN, and under disable_jit it should run step by step.
    if any(getattr(jax.config, name) for name in ("jax_debug_nans", "jax_disable_jit")):
        return jax.tree.leaves(loop(*jax.tree.unflatten(tree, leaves)))
    return run(*leaves, call=call)


def _unchecked(*leaves, loop, tangent, tree, members, **_):
    loop, tangent = without_checks(loop), tangent and without_checks(tangent)
    weights, sequences, carry = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(run_loop(loop, weights, sequences, carry, tangent, members))


look_into(_loop_p, lambda *_, call, **__: call, _unchecked)


def _differentiate(primals, tangents, *, call, loop, tangent, tree, out_tree, members):
    if tangent is None:
        return jvp_of(partial(_run, call=call, loop=loop, tree=tree), primals, tangents)
    how = dict(loop=loop, tangent=tangent, tree=tree, out_tree=out_tree, members=members)
    out = _loop_p.bind(*primals, call=call, **how)
    moved = [None if is_zero(t) else t for t in tangents]
    of_results = tangent(
        jax.tree.unflatten(tree, primals),
        jax.tree.unflatten(out_tree, out),
        jax.tree.unflatten(tree, moved),
    )
    out_tangents = out_tree.flatten_up_to(of_results)
    zero = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [z if t is None else t for t, z in zip(out_tangents, zero, strict=True)]


ad.primitive_jvps[_loop_p] = _differentiate


def _fold(leaves, axes, *, call, loop, tangent, tree, out_tree, members):
    del call, out_tree  # of the unbatched shapes
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    of_weights, of_sequences, _ = (part.num_leaves for part in tree.children())
    own_weights = any(a is not None for a in axes[:of_weights])
    in_carry = 0 if own_weights else members
    in_sequence = in_carry + 1

    def placed(n, x, axis):
        if n < of_weights:
            return x
        to = in_sequence if n < of_weights + of_sequences else in_carry
        if axis is not None:
            return jnp.moveaxis(x, axis, to)
        shape = (*x.shape[:to], size, *x.shape[to:])
        return jnp.broadcast_to(jnp.expand_dims(x, to), shape)

    leaves = [placed(n, x, a) for n, (x, a) in enumerate(zip(leaves, axes, strict=True))]
    if own_weights:
        of_each = jax.tree.unflatten(tree, axes)[0], in_sequence, in_carry
        results = in_carry, in_sequence
        each = partial(jax.vmap, out_axes=results, axis_size=size)
        if tangent is not None:
            tangent = each(tangent, in_axes=(of_each, results, of_each))
        loop = each(partial(_as_member, size, loop), in_axes=of_each)
        members += 1
    weights, sequences, carry = jax.tree.unflatten(tree, leaves)
    carry, states = run_loop(loop, weights, sequences, carry, tangent, members)
    out_axes = [in_carry] * len(jax.tree.leaves(carry))
    out_axes += [in_sequence] * len(jax.tree.leaves(states))
    return jax.tree.leaves((carry, states)), out_axes


def _as_member(size, loop, *arguments):
    token = member_count.set(size * member_count.get())
    try:
        return loop(*arguments)
    finally:
        member_count.reset(token)


batching.primitive_batchers[_loop_p] = _fold

"""vmap of a loop over time without its price: a mapped axis becomes part of the batch.

JAX's own batching of a scan puts the new axis in front of time and transposes whole
`[T, B, H]` arrays to get there. The loops wrapped here take the axis behind time instead, as a
batch axis, and so cost what the native batch costs. They stand only where JAX never
differentiates (a primal, a solve), so it is no loss that `custom_vmap` has no derivative rule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def foldable(loop: Callable, members: int = 0) -> Callable:
    """Wrap `loop(weights, sequences, carry) -> states` with a batching rule of its own.

    Args:
      loop: sequences are a pytree of `[T, *members, *batch, …]`, carry is `[*members, *batch, H]`,
        and states are `[T, *members, *batch, H]`.
      members: how many axes behind time pair with axes of the weights, one for each `vmap`
        over parameters.

    Returns:
      The same function. Under vmap with shared weights, the axis joins the batch; with weights
      of their own, each member runs the loop, and axes mapped later still join its batch.
    """

    @custom_vmap
    def run(weights, sequences, carry):
        return loop(weights, sequences, carry)

    @run.def_vmap
    def _rule(size, mapped, weights, sequences, carry):
        weights_mapped, sequences_mapped, carry_mapped = mapped
        own_weights = any(jax.tree.leaves(weights_mapped))
        axis = 0 if own_weights else members

        def place(behind_time):
            to = axis + behind_time

            def placed(x, is_mapped):
                if is_mapped:
                    return jnp.moveaxis(x, 0, to)
                shape = (*x.shape[:to], size, *x.shape[to:])
                return jnp.broadcast_to(jnp.expand_dims(x, to), shape)

            return placed

        sequences = jax.tree.map(place(1), sequences, sequences_mapped)
        carry = jax.tree.map(place(0), carry, carry_mapped)
        if own_weights:
            weights_axes = jax.tree.map(lambda m: 0 if m else None, weights_mapped)
            each = jax.vmap(loop, in_axes=(weights_axes, 1, 0), out_axes=1, axis_size=size)
            states = foldable(each, members + 1)(weights, sequences, carry)
        else:
            states = run(weights, sequences, carry)
        return jnp.moveaxis(states, axis + 1, 0), True

    return run

"""Where arrays lie under explicit sharding, and over which axes they vary inside shard_map."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def _spec(x: jax.Array) -> tuple | None:
    sharding = jax.typeof(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return tuple(sharding.spec) if explicit else None


def of_rows(table: jax.Array, ids: jax.Array) -> P | None:
    """For `table[ids]`: as the ids, and along a row as the table."""
    specs = _spec(ids), _spec(table)
    if specs == (None, None):
        return None
    return P(*(specs[0] or (None,) * ids.ndim), (specs[1] or (None,))[-1])


def of_outer(left: jax.Array, right: jax.Array) -> P | None:
    """For a product summed over all but the last axis of both."""
    specs = _spec(left), _spec(right)
    return None if specs == (None, None) else P(*((s or (None,))[-1] for s in specs))


def laid_out_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """x, placed as y is."""
    return x if _spec(y) is None else jax.sharding.reshard(x, jax.typeof(y).sharding)


def varying_like(tree, over):
    """The same values, which inside shard_map vary over all axes over which `over` does."""
    leaves = jax.tree.leaves((tree, over))
    if all(jax.typeof(x).sharding.mesh.empty for x in leaves):
        return tree
    zero = jnp.zeros((), jnp.float32)
    for x in leaves:
        zero += jnp.sum(jnp.zeros_like(x, jnp.float32))

    def vary(x):
        return x + zero.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(vary, tree)

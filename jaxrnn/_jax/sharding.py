"""Placement of arrays under explicit sharding, and the axes they vary over inside shard_map."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def _spec(x: jax.Array | ShapedArray) -> tuple | None:
    sharding = _type(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return tuple(sharding.spec) if explicit else None


def of_rows(table: jax.Array, ids: jax.Array) -> P | None:
    """The sharding of `table[ids]`: that of ids, then that of a row."""
    specs = _spec(ids), _spec(table)
    if specs == (None, None):
        return None
    return P(*(specs[0] or (None,) * ids.ndim), (specs[1] or (None,))[-1])


def of_outer(left: jax.Array, right: jax.Array) -> P | None:
    """The sharding of a product summed over all but the last axis of both."""
    specs = _spec(left), _spec(right)
    return None if specs == (None, None) else P(*((s or (None,))[-1] for s in specs))


def _type(x: jax.Array | ShapedArray) -> ShapedArray:
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


def laid_out_like(x: jax.Array, y: jax.Array | ShapedArray) -> jax.Array:
    """x with the sharding of y, an array or its type."""
    return x if _spec(y) is None else jax.sharding.reshard(x, _type(y).sharding)


def laid_out_as_state(h: jax.Array, first: jax.Array, U: jax.Array) -> jax.Array:
    """h `[*batch, H]`, with the batch sharded as in `first` and H as the rows of U."""
    specs = [_spec(x) for x in (h, first, U)]
    if specs == [None, None, None]:
        return h
    batch = h.ndim - 1
    own, of_batch, of_rows = (s or () for s in specs)
    want = (*(of_batch + (None,) * batch)[:batch], (of_rows or (None,))[0])
    own = own or (None,) * h.ndim
    return jax.sharding.reshard(h, P(*(w or o for w, o in zip(want, own, strict=True))))


def _varies_over(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def varying_like(tree, over):
    """The tree, varying inside shard_map over all axes that `over` varies over.

    Its transpose sums gradients over those axes, once.
    """
    leaves = jax.tree.leaves((tree, over))
    axes = frozenset().union(*map(_varies_over, leaves))
    if not axes:
        return tree

    def vary(x):
        missing = tuple(sorted(axes - _varies_over(x)))
        if not missing or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return lax.pcast(x, missing, to="varying")

    return jax.tree.map(vary, tree)

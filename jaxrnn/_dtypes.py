"""Which dtype a result has, and in which dtype sums are formed."""

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of sums: float32 for the half precisions, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wide(ids: jax.Array) -> jax.Array:
    """Ids or lengths in at least 32 bits: a narrow dtype cannot hold the size they are held to."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def result_dtype(*trees: object) -> jnp.dtype:
    """What JAX promotes all float leaves to; ids and masks do not count."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.result_type(*leaves)


def cast(tree, dtype: jnp.dtype):
    """Every float leaf in one dtype; ids and masks as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def cast_like(tree, template):
    """Every leaf in the dtype of the leaf of `template` that stands in its place."""
    return jax.tree.map(lambda x, t: x.astype(t.dtype), tree, template)

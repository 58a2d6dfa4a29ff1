"""jaxrnn itself: the native batch, and the single sequence under `jax.vmap`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import jaxrnn
from benchmarks.subjects import Layer, only_plain
from benchmarks.workloads import Network


def batched(network: Network, implementation: str = "auto") -> Layer:
    """The batch as `jaxrnn.unroll` takes it, time first."""
    return _layer(network, partial(_outputs, network, implementation))


def mapped(network: Network, axis: int = 0) -> Layer:
    """`jax.vmap` of one sequence, the batch in front of time or behind it."""
    only_plain(network)
    one = partial(_outputs, network, "auto")
    unroll = jax.vmap(one, in_axes=(None, axis), out_axes=axis)
    return _layer(network, unroll, batch_first=axis == 0)


def _layer(network, unroll, batch_first=False):
    def load(U, W, b):
        return jaxrnn.Cell(U, W, b, activation=network.activation, form=network.form)

    def unload(cell):
        return cell.U, cell.W, cell.b

    return Layer(unroll, load, unload, batch_first, takes_ids=True)


def _outputs(network, implementation, cells, xs, lengths=None):
    def leaky(cell):
        return replace(cell, leak=jnp.asarray(network.leak, cell.U.dtype))

    if jnp.issubdtype(xs.dtype, jnp.integer):
        xs = jaxrnn.Ids(xs)
    if network.leak is not None:
        cells = jax.tree.map(leaky, cells, is_leaf=lambda part: isinstance(part, jaxrnn.Cell))
    if network.bidirectional:
        return jaxrnn.bidirectional(*cells, xs)[1]
    if network.layers > 1:
        return jaxrnn.unroll_layers(cells, xs)[1]
    options = {"checkpoint_every": "sqrt" if network.remat else None}
    if lengths is not None:
        options["lengths"] = lengths
    h_last, hs = jaxrnn.unroll(cells, xs, implementation=implementation, **options)
    return h_last if network.last else hs

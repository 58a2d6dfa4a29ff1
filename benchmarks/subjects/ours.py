"""jaxrnn itself: the native batch, and the single sequence under `jax.vmap`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import jaxrnn
from benchmarks.subjects import JaxSubject


def native(activation: str = "tanh") -> JaxSubject:
    """The batch as `jaxrnn.unroll` takes it, time first."""
    name = "jaxrnn" if activation == "tanh" else f"jaxrnn, {activation}"
    return _subject(name, _states, activation, of=None if activation != "tanh" else _of)


def run_by(implementation: str) -> JaxSubject:
    """The batch, its loops run by what `jaxrnn.unroll` calls so."""
    unroll = partial(_states, implementation=implementation)
    return _subject(f"jaxrnn, {implementation}", unroll)


def mapped() -> JaxSubject:
    """`jax.vmap` of one sequence, the batch in front."""
    return _subject("jaxrnn, vmap", jax.vmap(_states, in_axes=(None, 0)), batch_first=True)


def mapped_axis_1() -> JaxSubject:
    """`jax.vmap` of one sequence, on arrays with time in front."""
    unroll = jax.vmap(_states, in_axes=(None, 1), out_axes=1)
    return _subject("jaxrnn, vmap axis 1", unroll)


def _of(network):
    return _subject("jaxrnn", partial(_outputs, network), network.activation, form=network.form)


def _subject(name, unroll, activation="tanh", form="rate", batch_first=False, of=None):
    def load(U, W, b):
        return jaxrnn.Cell(*map(jnp.asarray, (U, W, b)), activation=activation, form=form)

    return JaxSubject(
        name=name,
        package="jaxrnn",
        unroll=unroll,
        load=load,
        unload=lambda cell: (cell.U, cell.W, cell.b),
        batch_first=batch_first,
        takes_ids=True,
        activation=activation,
        of=of,
    )


def _states(cell, xs, implementation="auto"):
    if jnp.issubdtype(xs.dtype, jnp.integer):
        xs = jaxrnn.Ids(xs)
    return jaxrnn.unroll(cell, xs, implementation=implementation)[1]


def _outputs(network, cells, xs, lengths=None):
    def leaky(cell):
        return replace(cell, leak=jnp.asarray(network.leak, cell.U.dtype))

    if network.leak is not None:
        cells = jax.tree.map(leaky, cells, is_leaf=lambda part: isinstance(part, jaxrnn.Cell))
    if network.bidirectional:
        return jaxrnn.bidirectional(*cells, xs)[1]
    if network.layers > 1:
        return jaxrnn.unroll_layers(cells, xs)[1]
    every = "sqrt" if network.remat else None
    h_last, hs = jaxrnn.unroll(cells, xs, lengths=lengths, checkpoint_every=every)
    return h_last if network.last else hs

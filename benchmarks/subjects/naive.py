"""A scan as a competent user writes it, differentiated by JAX."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.networks import ONE_LAYER
from benchmarks.subjects import JaxSubject

PHI = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Weights(NamedTuple):
    """Of h_t = φ(U x_t + W h_{t−1} + b).

    Args:
      U: `[H, D]`.
      W: `[H, H]`.
      b: `[H]`.
    """

    U: jax.Array
    W: jax.Array
    b: jax.Array


def batched(activation: str = "tanh") -> JaxSubject:
    """A scan over `[T, B, D]`."""
    name = "naive scan" if activation == "tanh" else f"naive scan, {activation}"
    unroll = _scan(PHI[activation])
    return _subject(name, unroll, activation, of=None if activation != "tanh" else _of)


def mapped() -> JaxSubject:
    """`jax.vmap` of the scan over `[T, D]`, the batch in front."""
    unroll = jax.vmap(_scan(jnp.tanh), in_axes=(None, 0))
    return _subject("naive scan, vmap", unroll, batch_first=True)


def unrolled(steps: int = 8) -> JaxSubject:
    """The scan with so many steps in each turn of the loop."""
    return _subject(f"naive scan, unroll {steps}", _scan(jnp.tanh, steps=steps))


def _of(network):
    unroll = _scan(PHI[network.activation], network)
    return _subject("naive scan", unroll, network.activation)


def _subject(name, unroll, activation="tanh", batch_first=False, of=None):
    return JaxSubject(
        name=name,
        package="jax",
        unroll=unroll,
        load=lambda U, W, b: Weights(*map(jnp.asarray, (U, W, b))),
        unload=tuple,
        batch_first=batch_first,
        takes_ids=True,
        activation=activation,
        of=of,
    )


def _scan(phi, network=ONE_LAYER, steps=1):
    def unroll(weights, xs, lengths=None):
        if network.bidirectional:
            forward, backward = weights
            hs, hs_back = layer(forward, xs)[1], layer(backward, xs, reverse=True)[1]
            return jnp.concatenate([hs, hs_back], -1)
        if network.layers > 1:
            for each in weights:
                xs = layer(each, xs)[1]
            return xs
        h, hs = layer(weights, xs, lengths)
        return h if network.last else hs

    def layer(weights, xs, lengths=None, reverse=False) -> Any:
        ids = jnp.issubdtype(xs.dtype, jnp.integer)

        def following(h, x):
            inputs = weights.U.T[x] if ids else x @ weights.U.T
            if network.form == "voltage":
                new = inputs + phi(h) @ weights.W.T + weights.b
            else:
                new = phi(inputs + h @ weights.W.T + weights.b)
            return new if network.leak is None else (1 - network.leak) * h + network.leak * new

        def step(h, x):
            h = following(h, x)
            return h, None if network.last else h

        def step_to_the_end(h, t_and_x):
            t, x = t_and_x
            new, valid = following(h, x), (t < lengths)[:, None]
            return jnp.where(valid, new, h), jnp.where(valid, new, 0)

        batch = xs.shape[1:] if ids else xs.shape[1:-1]
        h0 = jnp.zeros((*batch, weights.b.size), weights.b.dtype)
        if lengths is not None:
            return jax.lax.scan(step_to_the_end, h0, (jnp.arange(len(xs)), xs))
        if network.remat:
            return _checkpointed(step, h0, xs)
        return jax.lax.scan(step, h0, xs, unroll=steps, reverse=reverse)

    return unroll


def _checkpointed(step, h0, xs):
    """A scan over √T segments, of each of which the gradient keeps the first state alone."""
    segments = xs.reshape(-1, math.isqrt(len(xs)), *xs.shape[1:])
    segment = jax.checkpoint(lambda h, xs: jax.lax.scan(step, h, xs))
    h, hs = jax.lax.scan(segment, h0, segments)
    return h, None if hs is None else hs.reshape(len(xs), *hs.shape[2:])

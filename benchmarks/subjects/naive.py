"""A scan as a competent user writes it, differentiated by JAX."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.subjects import Layer
from benchmarks.workloads import Network

PHI = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Weights(NamedTuple):
    """Of h_t = φ(U x_t + W h_{t−1} + b): `[H, D]`, `[H, H]` and `[H]`."""

    U: jax.Array
    W: jax.Array
    b: jax.Array


def batched(network: Network, phi: Callable | None = None) -> Layer:
    """A scan over `[T, B, D]`."""
    phi = phi or PHI[network.activation]

    def unroll(weights, xs, lengths=None):
        if network.bidirectional:
            ahead, back = weights
            both = scan(ahead, xs)[1], scan(back, xs, reverse=True)[1]
            return jnp.concatenate(both, -1)
        if network.layers > 1:
            for each in weights:
                xs = scan(each, xs)[1]
            return xs
        h, hs = scan(weights, xs, lengths)
        return h if network.last else hs

    def scan(weights, xs, lengths=None, reverse=False) -> Any:
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

        def step_until_the_end(h, t_and_x):
            t, x = t_and_x
            new, valid = following(h, x), (t < lengths)[:, None]
            return jnp.where(valid, new, h), jnp.where(valid, new, 0)

        batch = xs.shape[1:] if ids else xs.shape[1:-1]
        h0 = jnp.zeros((*batch, weights.b.size), weights.b.dtype)
        if lengths is not None:
            return jax.lax.scan(step_until_the_end, h0, (jnp.arange(len(xs)), xs))
        if network.remat:
            return _checkpointed(step, h0, xs)
        return jax.lax.scan(step, h0, xs, reverse=reverse)

    return Layer(unroll, Weights, tuple, takes_ids=True)


def _checkpointed(step, h0, xs):
    """A scan over √T segments, of each of which the gradient keeps the first state alone."""
    segments = xs.reshape(-1, math.isqrt(len(xs)), *xs.shape[1:])
    segment = jax.checkpoint(lambda h, xs: jax.lax.scan(step, h, xs))
    h, hs = jax.lax.scan(segment, h0, segments)
    return h, None if hs is None else hs.reshape(len(xs), *hs.shape[2:])

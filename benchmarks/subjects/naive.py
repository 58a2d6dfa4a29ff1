"""A scan as a competent user writes it, differentiated by JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    return _subject(name, _scan(PHI[activation]), activation=activation)


def mapped() -> JaxSubject:
    """`jax.vmap` of the scan over `[T, D]`, the batch in front."""
    unroll = jax.vmap(_scan(jnp.tanh), in_axes=(None, 0))
    return _subject("naive scan, vmap", unroll, batch_first=True)


def unrolled(steps: int = 8) -> JaxSubject:
    """The scan with so many steps in each turn of the loop."""
    return _subject(f"naive scan, unroll {steps}", _scan(jnp.tanh, steps))


def _subject(name, unroll, activation="tanh", batch_first=False):
    return JaxSubject(
        name=name,
        package="jax",
        unroll=unroll,
        load=lambda U, W, b: Weights(*map(jnp.asarray, (U, W, b))),
        unload=tuple,
        batch_first=batch_first,
        takes_ids=True,
        activation=activation,
    )


def _scan(phi, steps=1):
    def unroll(weights, xs):
        ids = jnp.issubdtype(xs.dtype, jnp.integer)

        def step(h, x):
            inputs = weights.U.T[x] if ids else x @ weights.U.T
            h = phi(inputs + h @ weights.W.T + weights.b)
            return h, h

        batch = xs.shape[1:] if ids else xs.shape[1:-1]
        h0 = jnp.zeros((*batch, weights.b.size), weights.b.dtype)
        return jax.lax.scan(step, h0, xs, unroll=steps)[1]

    return unroll

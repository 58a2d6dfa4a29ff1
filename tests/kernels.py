"""What tests of kernels share: inputs of one loop, and the same loop as a scan."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn._backends.kernels import loops
from jaxrnn._base.forms import NAMED


def draw(loop, T, M, B, H, dtype, *, leak=False, valid=False, cut=False, seed=0, streams=None):
    """Arrays for a loop: W of spectral norm below 1, states and cotangents of order 1."""
    rng = np.random.default_rng(seed)
    count = {"jaxrnn_states": 1, "jaxrnn_tangent": 2, "jaxrnn_adjoint": 2}[loop.name]
    count = count if streams is None else streams

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    matrix = jnp.asarray(0.9 * np.linalg.qr(rng.standard_normal((M, H, H)))[0], dtype)
    v0, c0 = normal(M, B, H).astype(dtype), normal(M, B, H)
    if loop.name != "jaxrnn_adjoint":
        c0 = v0.astype(jnp.float32)
    read = [normal(T, M, B, H) for _ in range(count)]
    if loop.name != "jaxrnn_states":
        # The basis: states, as they lie in memory.
        read[0] = jnp.tanh(read[0]).astype(dtype)
    if valid:
        valid = jnp.asarray(rng.random((T, M, B)) < 0.7, jnp.float32)
    if cut:
        cut = jnp.asarray(rng.random((T, M, B)) < 0.3, jnp.float32)
    flags = loops.Flags(valid if valid is not False else None, cut if cut is not False else None)
    leak = jnp.asarray(rng.random((M, H)), jnp.float32) if leak else None
    return loops.Arrays(matrix, v0, c0, tuple(read), flags, leak)


def every_loop(dtype, activation="tanh"):
    """The three, the adjoint in both of its forms."""
    phi, slope = NAMED[activation].function, NAMED[activation].derivative_from_output
    yield loops.states(phi, dtype)
    yield loops.tangent(slope, dtype)
    yield loops.adjoint(slope, dtype, False)
    yield loops.adjoint(slope, dtype, True)


def tf32(x):
    """The nearest TF32: ten bits of mantissa."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def scanned(loop, arrays, *, reverse, precision=None, factor=lambda x: x):
    """(out `[T, M, B, H]`, end or None): what a kernel is to compute, step by step.

    `factor` rounds both factors of a product.
    """
    matrix, v0, c0, streams, flags, leak = arrays
    leak = None if leak is None else jnp.broadcast_to(leak[:, None], c0.shape)

    def product(v):
        return jnp.einsum(
            "mbk,mhk->mbh", factor(v), factor(matrix), preferred_element_type=jnp.float32,
            precision=precision,
        )  # fmt: skip

    def body(state, now):
        (v, c), (streams, flags) = state, now
        tiles = jax.tree.map(lambda f: jnp.broadcast_to(f[..., None], c.shape), flags)
        out, v, c = loop.step(product(v), c, streams, tiles, leak)
        return (v, c), out

    (v, c), out = lax.scan(body, (v0, c0), (streams, flags), reverse=reverse)
    return out, None if loop.finish is None else loop.finish(product(v), c)

"""What the tests share: a naive network, random cases, and one notion of agreement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxrnn

FUNCTIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid,
             "identity": lambda a: a}  # fmt: skip

# Errors are relative to the largest entry of each array. A sum of n rounded terms errs by at
# most n·eps of that, and the cases here sum up to T·B·H ≈ 1,000 terms, through T ≤ 50
# Jacobians of norm ≤ 1: 4,500 eps in float64 is 1e-12; float32 likewise, with √n for n.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def naive_unroll(cell, xs, h0):
    """The recurrence as a plain scan, for `jax.grad` to differentiate."""
    phi = cell.activation if callable(cell.activation) else FUNCTIONS[cell.activation]

    def body(h, x):
        a = x @ cell.U.T + h @ cell.W.T
        new = phi(a + jnp.broadcast_to(cell.b, a.shape))
        if cell.leak is not None:
            leak = jnp.broadcast_to(cell.leak, new.shape)
            new = (1 - leak) * h + leak * new
        return new, new

    return lax.scan(body, h0, xs)


def random_case(seed=0, T=6, batch=(3,), D=4, H=5, K=3, dtype=jnp.float64, **cell):
    """Params, xs, h0 and ids as targets."""
    keys = jax.random.split(jax.random.key(seed), 6)
    params = jaxrnn.init_params(keys[0], D, H, K, gain=0.9, dtype=dtype)
    b = jax.random.normal(keys[1], (H,), dtype) / 3
    c = jax.random.normal(keys[2], (K,), dtype) / 3
    params = jaxrnn.Params(
        dataclasses.replace(params.cell, b=b, **cell),
        dataclasses.replace(params.readout, c=c),
    )
    xs = jax.random.normal(keys[3], (T, *batch, D), dtype)
    h0 = jax.random.normal(keys[4], (*batch, H), dtype) / 2
    return params, xs, h0, jax.random.randint(keys[5], (T, *batch), 0, K)


def weights(shape, seed=9, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def error(actual, expected):
    """The largest difference, relative to the largest entry of each expected leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    worst = 0.0
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, (a.shape, e.shape)
        if a.size:
            scale = np.abs(e).max()
            difference = np.abs(a - e).max() / (scale if scale > 0 else 1)
            worst = max(worst, difference) if np.isfinite(difference) else np.inf
    return worst


def assert_close(actual, expected, tolerance=TOLERANCE["float64"]):
    found = error(actual, expected)
    assert found <= tolerance, f"relative error {found:.1e} > {tolerance:.1e}"

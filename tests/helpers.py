"""What the tests share: a naive network, random cases, and one notion of agreement."""

import itertools
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxrnn

FUNCTIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid,
             "identity": lambda a: a}  # fmt: skip

# What conftest.py sets in XLA_FLAGS to compile faster, set back to what a user has.
AS_A_USER = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_backend_extra_options": "",
    "xla_cpu_parallel_codegen_split_count": 32,
}

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
    """Params, xs, h0 and ids as targets. Drawn by NumPy: JAX would compile every draw."""
    generator = np.random.default_rng(seed)

    def draw(shape, scale):
        return jnp.asarray(scale * generator.standard_normal(shape), dtype)

    # 0.9 times an orthogonal matrix: its spectral norm is below 1, and so are all Jacobians'.
    W = jnp.asarray(0.9 * np.linalg.qr(generator.standard_normal((H, H)))[0], dtype)
    cell = jaxrnn.Cell(draw((H, D), D**-0.5), W, draw(H, 1 / 3), **cell)
    params = jaxrnn.Params(cell, jaxrnn.Readout(draw((K, H), H**-0.5), draw(K, 1 / 3)))
    xs, h0 = draw((T, *batch, D), 1), draw((*batch, H), 1 / 2)
    return params, xs, h0, jnp.asarray(generator.integers(0, K, (T, *batch)))


def weights(shape, seed=9, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def compile_as_user(lowered):
    """A lowered program, compiled with XLA's own options: for claims about memory and HLO."""
    return lowered.compile(compiler_options=AS_A_USER)


def temporaries(f, *args):
    """Bytes that a program compiled for these arguments, or their shapes, needs beside them."""
    lowered = jax.jit(f).lower(*args)
    return compile_as_user(lowered).memory_analysis().temp_size_in_bytes


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


def rare(*values, **how):
    """A case that rarely tells more than the others do: it runs behind `full`."""
    return pytest.param(*values, marks=pytest.mark.full, **how)


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def pairs_of(values):
    return set(itertools.combinations(enumerate(values), 2))


def pairwise(factors):
    """Few choices in which every pair of values of two factors occurs."""
    left = set().union(*map(pairs_of, itertools.product(*factors.values())))

    def brought(value, others):
        return len(left & {tuple(sorted([value, other])) for other in others})

    while left:
        # A pair that is left, and of each other factor the value that brings most new pairs.
        chosen = set(min(left))
        for i, values in enumerate(factors.values()):
            if i not in dict(chosen):
                chosen.add(max(((i, v) for v in values), key=partial(brought, others=chosen)))
        values = [value for _, value in sorted(chosen)]
        left -= pairs_of(values)
        yield dict(zip(factors, values, strict=True))


def split_at_marks(text, name):
    """(before, the table between the two marks of that name, after) of tests/README.md."""
    before, rest = text.split(f"<!-- {name} -->\n")
    table, after = rest.split(f"\n<!-- /{name} -->")
    return before, table, after


def write_table(path, name, table):
    """Puts a table between the two marks of that name."""
    path = pathlib.Path(path)
    before, _, after = split_at_marks(path.read_text(), name)
    path.write_text(f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}")

"""Many threads at once, from cold caches: the same numbers as alone, and no error."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_case

import jaxrnn
from jaxrnn import train
from jaxrnn._api import elementwise

THREADS = 8
K, B, T = 4, 3, 6


@pytest.fixture(autouse=True)
def _switch_often():
    """Threads take turns at nearly every instruction, and nothing is compiled yet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    elementwise._probe.cache_clear()
    jax.clear_caches()
    yield
    sys.setswitchinterval(interval)


def at_once(*functions):
    """The results of these functions, each called in several threads at one moment."""
    barrier = threading.Barrier(THREADS)

    def call(n):
        barrier.wait()
        return functions[n % len(functions)]()

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(call, range(THREADS)))
    return [results[n :: len(functions)] for n in range(len(functions))]


def assert_as_alone(*functions):
    together = at_once(*functions)
    assert sum(map(len, together)) == THREADS
    for function, results in zip(functions, together, strict=True):
        alone = function()
        for result in results:
            jax.tree.map(np.testing.assert_array_equal, result, alone)


def test_unroll_and_its_derivatives_in_threads_are_as_alone():
    params, xs, h0, _ = random_case(H=K)

    def loss(cell):
        h_last, hs = jaxrnn.unroll(cell, xs, h0)
        return jnp.sum(h_last) + jnp.sum(hs**2)

    assert_as_alone(
        lambda: jaxrnn.unroll(params.cell, xs, h0),
        lambda: jax.grad(loss)(params.cell),
        lambda: jax.jvp(jax.grad(loss), (params.cell,), (params.cell,))[1],
        lambda: jax.vmap(lambda x, h: jaxrnn.unroll(params.cell, x, h)[0], (1, 0))(xs, h0),
    )


def test_one_jitted_function_in_threads_is_as_alone():
    params, xs, h0, targets = random_case(H=K)
    both = jax.jit(jaxrnn.loss_and_grads)
    last = jax.jit(lambda cell: jaxrnn.unroll(cell, xs, h0)[0])
    assert_as_alone(lambda: both(params, xs, targets, h0=h0), lambda: last(params.cell))


def test_the_first_use_of_custom_functions_in_threads_is_as_alone():
    """All are tried by values before they are used."""
    _, xs, h0, _ = random_case(H=K)
    softplus = jaxrnn.Activation(jax.nn.softplus)
    gated = jaxrnn.Form(lambda a, h, p: h + p * jnp.tanh(a), lambda h, p: p * h)
    cells = [
        random_case(H=K, activation=lambda a: jnp.sin(a))[0].cell,
        random_case(H=K, activation=softplus)[0].cell,
        random_case(H=K, form=gated, parameters=jnp.ones(K))[0].cell,
    ]
    mixing = random_case(H=K, activation=lambda a: jax.nn.softmax(a))[0].cell

    def refused():
        with pytest.raises(ValueError, match="expected an elementwise function"):
            jaxrnn.unroll(mixing, xs, h0)

    assert_as_alone(*(lambda cell=cell: jaxrnn.unroll(cell, xs, h0) for cell in cells), refused)


@pytest.mark.parametrize("make", [train.make_update, train.make_checked_update])
def test_one_update_of_many_runs_in_threads_is_as_alone(make):
    """A state is its own thread's; the update is shared."""
    optimizer = optax.sgd(0.1)
    update = make(optimizer)
    ids = np.random.default_rng(0).integers(0, K, (2, 12, T, B))

    def run(seed):
        params = jaxrnn.init_params(jax.random.key(seed), K, 5, K, dtype=jnp.float64)
        state, outputs = train.init_state(params, optimizer, B), []
        for inputs, targets in zip(*ids, strict=True):
            state, output = update(state, inputs, targets)
            outputs.append(output)
        return jax.device_get((state, outputs))

    assert_as_alone(*(lambda seed=seed: run(seed) for seed in range(4)))


@pytest.mark.full
def test_threads_in_development_mode():
    """All of the above with Python's own checks, and every warning an error."""
    here = Path(__file__)
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-q", "-p",
               "no:cacheprovider", here]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=here.parent.parent,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr

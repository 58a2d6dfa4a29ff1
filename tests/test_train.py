"""The update, the windows, evaluation and generation, as functions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, naive_unroll

import jaxrnn
from jaxrnn import train
from jaxrnn.text import generate, stream_ids, streams

T, B, D, H, K = 5, 3, 7, 6, 4


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    """optax multiplies floats by its integer step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def params():
    return jaxrnn.init_params(jax.random.key(0), D, H, K, dtype=jnp.float64)


def window(seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, D, (T, B)), generator.integers(0, K, (T, B))


def mean_loss(params, inputs, targets, h0):
    xs = jax.nn.one_hot(inputs, D, dtype=jnp.float64)
    _, hs = naive_unroll(params.cell, xs, h0)
    logits = jnp.einsum("tbi,ki->tbk", hs, params.readout.V)
    logits += jnp.broadcast_to(params.readout.c, logits.shape)
    log_likelihood = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_likelihood, jnp.asarray(targets)[..., None], axis=-1)
    return -jnp.mean(chosen)


def test_sgd_is_the_sources_update(params):
    state = train.init_state(params, optax.sgd(0.1), B)
    new, loss = train.make_update(optax.sgd(0.1))(state, *window())
    expected, gradient = jax.value_and_grad(mean_loss)(params, *window(), jnp.zeros((B, H)))
    by_hand = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert_close((loss, new.params), (expected, by_hand))
    assert new.step == 1


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "clipped lion": optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-2)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer_sees_the_mean_gradient_and_the_carried_state(params, optimizer):
    update, state = train.make_update(optimizer), train.init_state(params, optimizer, B)
    expected, kept, h = params, optimizer.init(params), jnp.zeros((B, H))
    for seed in range(3):
        inputs, targets = window(seed)
        state, _ = update(state, inputs, targets)
        gradient = jax.grad(mean_loss)(expected, inputs, targets, h)
        h, _ = naive_unroll(expected.cell, jax.nn.one_hot(inputs, D, dtype=jnp.float64), h)
        change, kept = optimizer.update(gradient, kept, expected)
        expected = optax.apply_updates(expected, change)
    # Adam's 1/√v takes relative errors of small gradients up: three updates, two digits.
    assert_close((state.params, state.h), (expected, h), 1e-10)
    assert not np.any(train.start_over(state).h)


def test_inputs_are_ids_and_stay_so(params):
    """No array has a one-hot axis: its size D is no other size here."""
    update = train.make_update(optax.sgd(0.1))
    jaxpr = jax.make_jaxpr(update)(train.init_state(params, optax.sgd(0.1), B), *window())
    text = str(jaxpr)
    assert f"f64[{H},{D}]" in text  # U
    assert f"{T},{B},{D}]" not in text and f"{B},{D}]" not in text


def test_windows_read_the_streams_and_start_over():
    inputs, targets = streams(np.arange(30), 2)  # 14 steps a stream
    reader = train.windows(inputs, targets, 5)
    seen = [next(reader) for _ in range(4)]
    assert [first for _, _, first in seen] == [True, False, True, False]
    np.testing.assert_array_equal(seen[1][0], inputs[5:10])
    np.testing.assert_array_equal(seen[1][1], inputs[5:10] + 1)
    np.testing.assert_array_equal(seen[2][0], seen[0][0])
    with pytest.raises(ValueError, match="inputs: expected at least 15 steps, got 14"):
        next(train.windows(inputs, targets, 15))


def test_evaluation_does_not_depend_on_its_windows(params):
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, D, (17, 2)), generator.integers(0, K, (17, 2))
    whole = train.evaluate(params, inputs, targets)
    np.testing.assert_allclose(
        whole, mean_loss(params, inputs, targets, jnp.zeros((2, H))), rtol=1e-12
    )
    in_parts = train.evaluate(params, inputs, targets, seq_length=5)
    np.testing.assert_allclose(in_parts, whole, rtol=1e-12)
    with pytest.raises(ValueError, match="targets: expected at least one"):
        train.evaluate(params, inputs[:0], targets[:0])


def test_a_short_cycle_is_learned():
    ids = np.array([0, 1, 2, 1, 0, 3] * 40)
    optimizer = optax.adam(1e-2)
    params = jaxrnn.init_params(jax.random.key(0), 4, 16, 4)
    state, update = train.init_state(params, optimizer, 4), train.make_update(optimizer)
    reader = train.windows(*streams(ids, 4), 12)
    for _ in range(200):
        inputs, targets, first = next(reader)
        state, loss = update(train.start_over(state) if first else state, inputs, targets)
    # Only the character after the first, 0 or 1, is uncertain, and only at a fresh start.
    assert loss < 0.02
    drawn = generate(state.params, jax.random.key(1), jnp.array([0, 1, 2]), 12, 0)
    np.testing.assert_array_equal(drawn, [1, 0, 3, 0, 1, 2] * 2)


def test_generation_follows_the_softmax():
    params = jaxrnn.init_params(jax.random.key(3), 4, 8, 4)
    prompt = jnp.array([1, 2, 0])
    h, _ = jaxrnn.unroll(params.cell, jaxrnn.Ids(prompt))
    logits = jaxrnn.apply_readout(params.readout, h)
    keys = jax.random.split(jax.random.key(0), 4000)
    for temperature in (0.5, 2.0):
        first = jax.vmap(lambda key, t=temperature: generate(params, key, prompt, 1, t))(keys)
        share = np.bincount(np.ravel(first), minlength=4) / len(keys)
        # Five standard deviations of a share of 4,000 draws, at most √(1/4 / 4000) = 0.008 each.
        np.testing.assert_allclose(
            share, jax.nn.softmax(logits / jnp.float32(temperature)), atol=0.04
        )


def test_greedy_generation_is_step_by_step_argmax():
    params = jaxrnn.init_params(jax.random.key(3), 4, 8, 4)
    drawn = generate(params, jax.random.key(0), jnp.array([1]), 6, 0)
    h, expected = jaxrnn.step(params.cell, jaxrnn.Ids(jnp.array(1)), jnp.zeros(8, jnp.float32)), []
    for _ in range(6):
        expected.append(int(jnp.argmax(jaxrnn.apply_readout(params.readout, h))))
        h = jaxrnn.step(params.cell, jaxrnn.Ids(jnp.array(expected[-1])), h)
    np.testing.assert_array_equal(drawn, expected)
    same = [generate(params, jax.random.key(5), jnp.array([1]), 20) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert generate(params, jax.random.key(0), jnp.array([1]), 0).shape == (0,)


@pytest.mark.parametrize(("how", "message"), [
    ({"prompt": jnp.zeros(0, jnp.int32)}, "prompt: expected at least one id"),
    ({"prompt": jnp.array([4])}, "prompt: expected ids from 0 to 3, got 4"),
    ({"length": -1}, "length: expected at least 0, got -1"),
    ({"temperature": -0.5}, "temperature: expected 0, or a finite number .* got -0.5"),
    ({"temperature": 1e-39}, "temperature: expected 0, or a finite number of at least 1.2e-38"),
    ({"temperature": float("nan")}, "temperature: expected 0, or a finite number"),
])  # fmt: skip
def test_generation_refuses(how, message):
    params = jaxrnn.init_params(jax.random.key(3), 4, 8, 4)
    args = {"prompt": jnp.array([1]), "length": 2, "temperature": 1.0, **how}
    with pytest.raises(ValueError, match=message):
        generate(params, jax.random.key(0), **args)


@pytest.mark.parametrize("sizes", [(2, 9), (5, 3)])
def test_generation_needs_as_many_outputs_as_inputs(sizes):
    params = jaxrnn.init_params(jax.random.key(3), sizes[0], 8, sizes[1])
    message = f"^params: expected as many outputs as inputs, got {sizes[1]} and {sizes[0]}$"
    with pytest.raises(ValueError, match=message):
        generate(params, jax.random.key(0), jnp.array([1]), 2)


IDS = np.zeros((6, 2), int)


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda p: train.start_over(p), TypeError, "state: expected a jaxrnn.TrainState, got Params"),
    (lambda p: train.evaluate(3, IDS, IDS), TypeError, "params: expected a jaxrnn.Params, got int"),
    (lambda p: train.evaluate(p, IDS[:, 0], IDS[:, 0]), ValueError,
     r"inputs: expected shape \[L, B\], got \[6\]"),
    (lambda p: train.evaluate(p, IDS, IDS[1:]), ValueError,
     r"targets: expected shape \[6, 2\], got \[5, 2\]"),
    (lambda p: train.evaluate(p, IDS, IDS, seq_length=0), ValueError,
     "seq_length: expected at least 1, got 0"),
    (lambda p: next(train.windows(IDS, IDS[1:], 2)), ValueError,
     r"targets: expected shape \[6, 2\], got \[5, 2\]"),
    (lambda p: next(train.windows(IDS.tolist(), IDS.tolist(), 7)), ValueError,
     "inputs: expected at least 7 steps, got 6"),
])  # fmt: skip
def test_bad_calls_are_one_line(params, call, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        call(params)


def noisy(params, h, inputs, targets, key):
    h, hs = jaxrnn.unroll_layers(params.cell, jaxrnn.Ids(inputs), h, dropout=0.5, key=key)
    return jnp.sum(jaxrnn.cross_entropy(jaxrnn.apply_readout(params.readout, hs), targets)), h


@pytest.mark.parametrize("make", [train.make_update, train.make_checked_update])
@pytest.mark.parametrize("devices", [1, 2])
def test_every_key_is_used_once(make, devices):
    with jax.debug_key_reuse(True):
        params = jaxrnn.init_params(jax.random.key(0), D, H, K, layers=2, dtype=jnp.float64)
        # Noise for the optimiser from a key that is no more than a part of its state.
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(1)), optax.sgd(0.1))
        state = train.init_state(params, optimizer, 2, jax.random.key(2))
        axes = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(axes,))
        update = make(optimizer, noisy, mesh=mesh)
        inputs, targets = (ids[:, :2] for ids in window())
        for _ in range(3):
            state, _ = update(state, inputs, targets)
        jax.lax.scan(lambda s, _: update(s, inputs, targets), state, length=2)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_every_key_of_generation_is_used_once(temperature):
    with jax.debug_key_reuse(True):
        params = jaxrnn.init_params(jax.random.key(0), K, H, K)
        prompt = np.array([1, 2])
        generate(params, jax.random.key(1), prompt, 5, temperature)
        list(stream_ids(params, jax.random.key(1), prompt, 5, temperature, block=2))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_an_update_consumes_nothing_that_the_caller_holds(make):
    params = jaxrnn.init_params(jax.random.key(0), D, H, K, layers=2, dtype=jnp.float64)
    keys = make(1), make(2)
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, keys[0]), optax.sgd(0.1))
    if make is jax.random.PRNGKey:
        optimizer = optax.sgd(0.1)  # optax takes typed keys only
    state = train.init_state(params, optimizer, B, keys[1])
    state, _ = train.make_update(optimizer, noisy)(state, *window())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, keys)))
    assert state.key == keys[1] if make is jax.random.key else (state.key == keys[1]).all()


def of_dtypes(cell, **dtypes):
    return replace(cell, **{name: getattr(cell, name).astype(d) for name, d in dtypes.items()})


def mixed_cells():
    cell = jaxrnn.init_cell(jax.random.key(0), D, H, leak=0.5)
    above = jaxrnn.init_cell(jax.random.key(1), H, H)
    half = of_dtypes(cell, U="bfloat16", W="bfloat16", b="bfloat16", leak="bfloat16")
    return {
        "bias": (of_dtypes(half, b="float32"), "float32"),
        "leak": (of_dtypes(half, leak="float64"), "float64"),
        "inputs": (of_dtypes(half, U="float32"), "float32"),
        "voltage": (replace(of_dtypes(half, b="float32"), form="voltage"), "float32"),
        "parameters": (
            replace(
                of_dtypes(half, leak="float32"), leak=None, parameters=jnp.ones(H),
                form=jaxrnn.Form(lambda a, h, theta: h + theta * jnp.tanh(a)),
            ),
            "float64",
        ),
        "stack": ((half, above), ("bfloat16", "float32")),
        "stack the other way": ((cell, of_dtypes(above, W="bfloat16")), ("float32", "float32")),
        "stack of three": (
            (half, above, of_dtypes(above, b="float64")), ("bfloat16", "float32", "float64")
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", mixed_cells())
def test_states_have_their_dtype_from_the_first_step_on(name):
    cells, dtypes = mixed_cells()[name]
    params = jaxrnn.Params(cells, jaxrnn.Readout(jnp.ones((K, H), "float32"), jnp.ones(K)))
    optimizer = optax.sgd(0.01)
    state, update = train.init_state(params, optimizer, B), train.make_update(optimizer)
    assert jax.tree.map(lambda h: str(h.dtype), state.h) == dtypes
    types = jax.eval_shape(update, state, *window())[0]
    assert jax.tree.map(lambda x: x.dtype, types) == jax.tree.map(lambda x: x.dtype, state)
    for _ in range(2):
        state, _ = update(state, *window())
    assert update._cache_size() == 1
    inputs, targets = window()
    whole = train.evaluate(params, inputs, targets)
    np.testing.assert_allclose(train.evaluate(params, inputs, targets, seq_length=2), whole, 1e-6)

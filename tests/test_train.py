"""The update, the windows, evaluation and generation, as functions."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_close, naive_unroll

import jaxrnn
from jaxrnn import train
from jaxrnn.text import generate, stream_ids, streams

T, B, D, H, K = 5, 3, 7, 6, 4
FULL = pytest.mark.full


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    """optax multiplies floats by its integer step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
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


slope = jax.jit(jax.value_and_grad(mean_loss))


def test_sgd_is_the_sources_update(params):
    state = train.init_state(params, optax.sgd(0.1), B)
    new, loss = train.make_update(optax.sgd(0.1))(state, *window())
    expected, gradient = slope(params, *window(), jnp.zeros((B, H)))
    by_hand = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert_close((loss, new.params), (expected, by_hand))
    assert new.step == 1


def test_an_optimizer_sees_the_mean_gradient_of_the_carried_state(params):
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adagrad(1e-2))
    update, state = train.make_update(optimizer), train.init_state(params, optimizer, B)
    expected, kept, h = params, optimizer.init(params), jnp.zeros((B, H))
    for seed in range(3):
        inputs, targets = window(seed)
        state, _ = update(state, inputs, targets)
        _, gradient = slope(expected, inputs, targets, h)
        h, _ = naive_unroll(expected.cell, jax.nn.one_hot(inputs, D, dtype=jnp.float64), h)
        change, kept = optimizer.update(gradient, kept, expected)
        expected = optax.apply_updates(expected, change)
    assert_close((state.params, state.h), (expected, h))
    assert not np.any(train.start_over(state).h)


def test_an_update_makes_no_one_hot_rows(params):
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
def test_bad_arguments_of_generation_are_named(how, message):
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
def test_bad_arguments_are_one_line(params, call, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        call(params)


def drawing(params, h, inputs, targets, key):
    """One step, which compiles fast, and noise."""
    loss, h = small_loss(params, h, inputs, targets, key)
    return loss + jnp.sum(jax.random.normal(key, h.shape, h.dtype)), h


def noisy(params, h, inputs, targets, key):
    h, hs = jaxrnn.unroll_layers(params.cell, jaxrnn.Ids(inputs), h, dropout=0.5, key=key)
    return jnp.sum(jaxrnn.cross_entropy(jaxrnn.apply_readout(params.readout, hs), targets)), h


@pytest.mark.parametrize(("make", "devices"), [
    pytest.param(train.make_update, 1, marks=FULL), (train.make_checked_update, 2),
    pytest.param(train.make_checked_update, 1, marks=FULL),
    pytest.param(train.make_update, 2, marks=FULL),
])  # fmt: skip
def test_every_key_is_used_once(make, devices):
    with jax.debug_key_reuse(True), jax.numpy_rank_promotion("allow"):
        params = jaxrnn.init_params(jax.random.key(0), D, H, K, dtype=jnp.float64)
        # Noise for the optimiser from a key that is no more than a part of its state.
        optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(1)), optax.sgd(0.1))
        state = train.init_state(params, optimizer, 2, jax.random.key(2))
        axes = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(axes,))
        update = make(optimizer, drawing, mesh=mesh)
        inputs, targets = (ids[:, :2] for ids in window())
        seen = []
        for _ in range(2):
            seen.append(np.asarray(jax.random.key_data(state.optimizer_state[0].rng_key)))
            state, _ = update(state, inputs, targets)
        assert np.any(seen[0] != seen[1])


@FULL
def test_every_key_of_a_scan_is_used_once(params):
    with jax.debug_key_reuse(True), jax.numpy_rank_promotion("allow"):
        update = train.make_update(optax.sgd(0.1), drawing)
        state = train.init_state(params, optax.sgd(0.1), B, jax.random.key(2))
        state, losses = jax.lax.scan(lambda s, _: update(s, *window()), state, length=3)
    assert len(set(losses.tolist())) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_every_key_of_generation_is_used_once(temperature):
    with jax.debug_key_reuse(True):
        params = jaxrnn.init_params(jax.random.key(0), K, H, K)
        prompt = np.array([1, 2])
        generate(params, jax.random.key(1), prompt, 5, temperature)
        list(stream_ids(params, jax.random.key(1), prompt, 5, temperature, block=2))


def held_by_an_optimizer(held):
    """An optimiser whose state is what it holds itself, and the parameters twice."""

    def init(params):
        return held, params, params

    return optax.GradientTransformation(init, lambda g, state, params=None: (g, (held, params, g)))


@pytest.mark.parametrize(("make", "make_key"), [
    (train.make_checked_update, jax.random.PRNGKey),
    pytest.param(train.make_update, jax.random.key, marks=FULL),
])  # fmt: skip
def test_an_update_consumes_nothing_that_the_caller_holds(make, make_key):
    params = jaxrnn.init_params(jax.random.key(0), D, H, K, layers=2, dtype=jnp.float64)
    key, held = make_key(2), (jnp.full((), 0.1), jnp.ones((H, D)), make_key(3))
    rate = optax.inject_hyperparams(optax.sgd)(learning_rate=held[0])
    optimizer = optax.chain(held_by_an_optimizer(held), rate, optax.contrib.prodigy())
    h = tuple([jnp.zeros((B, H))] * 2)
    update = make(optimizer, noisy)
    for how in ({"batch_size": B}, {"h": h}):
        state, again = (train.init_state(params, optimizer, key=key, **how) for _ in range(2))
        for _ in range(3):
            state, _ = update(train.start_over(state), *window())
        update(again, *window())
        assert again.step.is_deleted()  # which it is to consume
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, key, held, h)))
    assert np.all(state.key == key)


def addresses(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def test_no_two_arrays_of_a_state_are_one():
    params = jaxrnn.init_params(jax.random.key(0), D, H, H, dtype=jnp.float64)
    twice = replace(params, readout=jaxrnn.Readout(params.cell.W, params.cell.b))
    key, h, held = jax.random.key(1), jnp.zeros((B, H)), (jnp.ones(3), jax.random.key(2))
    aligned = np.zeros(64 + B * H)
    aligned = aligned[-aligned.ctypes.data % 64 // 8 :][: B * H].reshape(B, H)
    state = train.init_state(twice, held_by_an_optimizer(held), key=key, h=(h, h, aligned))
    found = [addresses(x) for x in jax.tree.leaves((state, params, key, h, held))]
    found.append({aligned.ctypes.data})
    assert len(set().union(*found)) == len(found)


SGD = optax.sgd(0.1)


def by_axes(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


# What they take, where that is more than defaults or a learning rate.
ARGUMENTS = {
    "MultiSteps": (SGD, 2), "adaptive_grad_clip": (0.1,), "apply_if_finite": (SGD, 3),
    "add_noise": (0.1, 0.5, jax.random.key(3)), "clip": (1.0,), "clip_by_block_rms": (1.0,),
    "clip_by_global_norm": (1.0,), "conditionally_mask": (SGD, lambda step, **_: step > 0),
    "chain": (SGD,), "conditionally_transform": (SGD, lambda step, **_: step > 0),
    "differentially_private_aggregate": (1.0, 0.1, jax.random.key(4)), "dpsgd": (0.1, 1.0, 0.1, 5),
    "ema": (0.9,), "flatten": (SGD,), "freeze": (False,), "lookahead": (SGD, 2, 0.5),
    "inject_hyperparams": (SGD,), "inject_stateful_hyperparams": (SGD,), "masked": (SGD, True),
    "measure_with_ema": (optax.global_norm, 0.9), "mechanize": (SGD,), "named_chain": (("a", SGD),),
    "multi_transform": ({"matrix": SGD, "vector": optax.adam(0.1)}, by_axes),
    "partition": ({"matrix": SGD, "vector": optax.adam(0.1)}, by_axes), "sam": (SGD, SGD),
    "scale": (0.1,), "scale_by_backtracking_linesearch": (5,), "scale_by_zoom_linesearch": (5,),
    "scale_by_schedule": (lambda n: 0.1,), "schedule_free": (SGD, 0.1),
    "snapshot": ("norm", optax.global_norm), "split_real_and_imaginary": (SGD,),
    "stateless": (lambda updates, params: updates,), "trace": (0.9,),
    "stateless_with_tree_map": (lambda g, p: g,), "with_extra_args_support": (SGD,),
}  # fmt: skip
# These need gradients of each example, other parameters or a tree without None; or make a number
# of the updates.
REFUSED = {"differentially_private_aggregate", "dpsgd", "lookahead", "galore", "scale_by_galore",
           "scale_by_muon", "measure_with_ema"}  # fmt: skip


def of_optax():
    """Every function that makes an optimiser, by name."""
    for module, name in ((m, n) for m in (optax, optax.contrib) for n in dir(m)):
        function = getattr(module, name)
        if name == "MultiSteps" or (
            inspect.isfunction(function) and not name.startswith("_")
            and "GradientTransformation" in str(inspect.signature(function).return_annotation)
        ):  # fmt: skip
            yield name, function


def construct(name, function):
    if name == "selective_transform":
        return function(SGD, freeze_mask=False)
    if name.startswith("inject_"):
        return function(optax.sgd)(learning_rate=0.1)
    if name == "noisy_sgd":
        return function(0.1, key=jax.random.key(3))
    parameters = inspect.signature(function).parameters
    takes_rate = "learning_rate" in parameters and parameters["learning_rate"].default is not None
    return function(*ARGUMENTS.get(name, (0.01,) if takes_rate else ()))


def small_loss(params, h, inputs, targets, key):
    """One step, so that it compiles fast, which reads all parameters."""
    h = jnp.tanh(h @ params.cell.W.T + params.cell.U.T[inputs[-1]] + params.cell.b)
    logits = h @ params.readout.V.T + params.readout.c
    return jnp.sum(jaxrnn.cross_entropy(logits, targets[-1])), h


def two_updates(optimizer, make, loss=small_loss):
    params = jaxrnn.init_params(jax.random.key(0), D, H, K, dtype=jnp.float64)
    state, update = train.init_state(params, optimizer, B), make(optimizer, loss)
    with jax.numpy_rank_promotion("allow"):
        for seed in range(2):
            before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
            state, said = update(state, *window(seed))
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        assert update._cache_size() <= 2  # of weak types the second time
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    assert said.finite if make is train.make_checked_update else np.isfinite(said)
    return state


USUAL = {"adam", "adamw", "MultiSteps", "masked", "named_chain", "apply_if_finite", "lookahead",
         "scale_by_muon"}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "function", "make"), [
    pytest.param(name, function, make, marks=() if checked and name in USUAL else FULL,
                 id=f"{name}-{make.__name__}")
    for name, function in of_optax() for checked, make in enumerate(
        [train.make_update, train.make_checked_update])
])  # fmt: skip
def test_every_optimizer_of_optax_updates_or_is_refused_in_one_line(name, function, make):
    optimizer = construct(name, function)
    if name in REFUSED:
        with pytest.raises((TypeError, ValueError), match=r"^optimizer: expected .*, got ") as e:
            two_updates(optimizer, make)
        assert "\n" not in str(e.value)
    else:
        two_updates(optimizer, make)


# What asks for more than the gradient, with the network itself and a plain update.
ASKING = {
    "polyak_sgd": optax.polyak_sgd(), "momo": optax.contrib.momo(), "lbfgs": optax.lbfgs(),
    "plateau": optax.chain(SGD, optax.contrib.reduce_on_plateau()),
    "sophia": optax.chain(optax.clip(1.0), optax.contrib.sophia(0.01)),
    "sam": optax.contrib.sam(SGD, SGD, sync_period=2, opaque_mode=True),
    "chained sam": optax.chain(optax.clip(1.0), optax.contrib.sam(SGD, SGD, sync_period=2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("polyak_sgd", "plateau", "sam") else FULL)
    for name in ASKING
])  # fmt: skip
def test_optimizers_that_need_the_loss_get_it(name):
    two_updates(ASKING[name], train.make_update, None)


@pytest.mark.parametrize("loss", [None, noisy])
@pytest.mark.parametrize("devices", [1, 2])
def test_loss_and_gradient_of_an_optimizer_are_of_the_mean(params, loss, devices):
    seen = {}

    def update(gradient, state, params, **extra):
        seen.update(extra)
        found = [extra["value_fn"](params), jax.grad(extra["value_fn"])(params),
                 extra["grad_fn"](params, 0), extra["grad"]]  # fmt: skip
        return jax.tree.map(jnp.zeros_like, gradient), (*found, extra["value"])

    optimizer = optax.GradientTransformationExtraArgs(
        lambda p: (jnp.zeros(()), p, p, p, jnp.zeros(())), update
    )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.debug_key_reuse(True):
        state = train.init_state(params, optimizer, 2, jax.random.key(0))
        ids = [x[:, :2] for x in window()]
        state, loss = train.make_update(optimizer, loss, mesh=mesh)(state, *ids)
    value, gradient, other, grad, given = state.optimizer_state
    assert_close((value, gradient, other), (loss, grad, grad))
    assert given == loss


class NoOptimizer:
    """As torch has them."""

    def step(self):
        pass


@pytest.mark.parametrize(("optimizer", "got"), [
    (None, "None"), ("adam", "str"), (optax.adam, r"function; call it: adam\(\.\.\.\)"),
    (NoOptimizer(), "NoOptimizer"), (optax.MultiSteps, "type; call it: MultiSteps.*"),
    (lambda g: g, "function.*"), (0.1, "float"), ([optax.sgd(0.1)], "list"),
])  # fmt: skip
@pytest.mark.parametrize("use", [
    train.make_update, train.make_checked_update,
    lambda o: train.init_state(jaxrnn.init_params(jax.random.key(0), D, H, K), o, B),
])  # fmt: skip
def test_make_update_rejects_what_is_no_optimizer(optimizer, got, use):
    message = f"^optimizer: expected an optax.GradientTransformation, got {got}$"
    with pytest.raises(TypeError, match=message):
        use(optimizer)


def test_init_state_rejects_an_optimizer_state_without_arrays(params):
    optimizer = optax.GradientTransformation(lambda params: "text", lambda g, s, p=None: (g, s))
    with pytest.raises(TypeError, match=r"^optimizer: expected one for these parameters, got"):
        train.init_state(params, optimizer, B)


def with_entry(ids, value):
    ids = ids.copy()
    ids[2, 1] = value
    return ids


GOOD = np.zeros((T, B), int)
BAD_IDS = {
    "beyond": (with_entry(GOOD, D), GOOD, f"inputs: expected ids from 0 to {D - 1}, got {D} at"),
    "below": (with_entry(GOOD, -1), GOOD, r"inputs: expected .*, got -1 at index \(2, 1\)"),
    "targets beyond": (GOOD, with_entry(GOOD, K), f"targets: expected ids from 0 to {K - 1}, got"),
    "targets below": (GOOD, with_entry(GOOD, -1), "targets: expected ids from 0 to"),
    "narrow": (with_entry(GOOD.astype(np.int8), -1), GOOD, "inputs: expected ids .*, got -1 at"),
    "unsigned": (with_entry(GOOD.astype(np.uint8), 255), GOOD, "inputs: expected .*, got 255 at"),
    "wrapped": (with_entry(GOOD, 2**32), GOOD, "inputs: expected ids from 0 to .*, got 4294967296"),
    "lists": (with_entry(GOOD, D).tolist(), GOOD.tolist(), "inputs: expected ids from 0 to"),
    "floats": (GOOD + 0.5, GOOD, "inputs: expected an integer dtype, got float64"),
    "bools": (GOOD, GOOD == 0, "targets: expected an integer dtype, got bool"),
    "strings": (GOOD.astype(str), GOOD, "inputs: expected a numeric"),
    "ragged": ([[0, 1], [1]], GOOD, "inputs: expected an array, got a list"),
    "none": (None, GOOD, "inputs: expected an array, got None"),
    "masked": (np.ma.masked_array(GOOD), GOOD, "inputs: expected an array, got a masked"),
    "one-hot": (GOOD, np.eye(K)[GOOD], "targets: expected an integer dtype"),
}
BAD_SHAPES = {
    "targets": (GOOD, GOOD[1:], rf"targets: expected shape \[{T}, {B}\], got \[{T - 1}, {B}\]"),
    "batch": (GOOD[:, :2], GOOD[:, :2], rf"inputs: expected shape \[any, {B}\], got \[{T}, 2\]"),
    "swapped": (GOOD.T, GOOD.T, "inputs: expected shape .*; time comes first"),
    "axes": (GOOD[:, 0], GOOD[:, 0], "inputs: expected shape"),
    "no step": (GOOD[:0], GOOD[:0], "inputs: expected at least one step"),
}


@pytest.mark.parametrize("make", [train.make_update, train.make_checked_update])
@pytest.mark.parametrize("case", [*BAD_IDS, *BAD_SHAPES])
def test_update_rejects_bad_ids_and_shapes(params, case, make):
    inputs, targets, message = {**BAD_IDS, **BAD_SHAPES}[case]
    optimizer = optax.sgd(0.1)
    state, update = train.init_state(params, optimizer, B), make(optimizer)
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as error:
        update(state, inputs, targets)
    assert "\n" not in str(error.value)
    if case in BAD_SHAPES:
        with pytest.raises(ValueError, match=f"^{message}"):
            update(state, jnp.asarray(inputs), jnp.asarray(targets))
    assert not state.step.is_deleted()


@pytest.mark.parametrize("case", BAD_IDS)
@pytest.mark.parametrize("seq_length", [2, 100])
def test_evaluate_rejects_bad_ids(params, case, seq_length):
    inputs, targets, message = BAD_IDS[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message.split(':')[0]}: expected"):
        train.evaluate(params, inputs, targets, seq_length=seq_length)


def test_ids_on_a_device_are_not_checked(params):
    optimizer = optax.sgd(0.1)
    state, update = train.init_state(params, optimizer, B), train.make_update(optimizer)
    state, _ = update(state, GOOD.tolist(), GOOD[:, ::-1])
    assert np.isnan(update(state, jnp.asarray(with_entry(GOOD, D)), GOOD)[1])

    # A custom loss takes anything.
    def loss(params, h, inputs, targets, key):
        return jnp.sum(params["w"]) * jnp.sum(inputs["x"]) + jnp.sum(targets), h

    state = train.init_state({"w": jnp.ones(2)}, optimizer, h=jnp.zeros(3))
    _, value = train.make_update(optimizer, loss)(state, {"x": np.full(3, -0.5)}, np.full(4, -7))
    np.testing.assert_allclose(value, (-3 - 28) / 4)


@pytest.mark.parametrize(("style", "implementation"), [
    ("raw", "rbg"), ("typed", "threefry2x32"), ("custom", "rbg"),
    *(pytest.param(*each, marks=FULL) for each in
      (("raw", "threefry2x32"), ("typed", "rbg"), ("custom", "threefry2x32"))),
])  # fmt: skip
def test_keys_of_every_kind_are_accepted(params, style, implementation):
    optimizer = optax.sgd(0.1)
    with jax.default_prng_impl(implementation), jax.enable_custom_prng(style == "custom"):
        key = jax.random.key(0) if style == "typed" else jax.random.PRNGKey(0)
        two = jaxrnn.init_params(jax.random.key(1), D, H, K, layers=2, dtype=jnp.float64)
        state = train.init_state(two, optimizer, B, key)
        state, loss = train.make_update(optimizer, noisy)(state, *window())
        assert np.isfinite(loss) and np.all(state.key == key)


@pytest.mark.parametrize("make", [train.make_update, train.make_checked_update])
def test_a_raw_key_of_another_kind_is_refused_where_it_is_used(params, make):
    optimizer = optax.sgd(0.1)
    with jax.default_prng_impl("rbg"):
        state = train.init_state(params, optimizer, B, jax.random.PRNGKey(0))
    copy = jax.tree.map(jnp.array, state)
    state, _ = make(optimizer)(state, *window())
    assert state.key.shape == (4,)
    with pytest.raises(
        ValueError, match=r"^state.key: expected one .*, got traced uint32 .* \[4\]"
    ):
        make(optimizer, noisy)(copy, *window())


@pytest.mark.parametrize(("key", "kind", "got"), [
    (np.zeros(3, np.uint32), ValueError, r"uint32 array of shape \[3\]"), (7, TypeError, "int"),
    (np.zeros(4, np.uint32), ValueError, r"uint32 array of shape \[4\]"),
    (jax.random.split(jax.random.key(0), 2), ValueError, r"key<fry> array of shape \[2\]"),
    (np.zeros(2), TypeError, r"float64 array of shape \[2\]"), ([0, 1], TypeError, "list"),
])  # fmt: skip
def test_init_state_rejects_what_is_no_key(params, key, kind, got):
    with pytest.raises(kind, match=f"^key: expected (one|a) JAX random key.*, got {got}$"):
        train.init_state(params, optax.sgd(0.1), B, key)


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


def mixed_state(name):
    cells, dtypes = mixed_cells()[name]
    params = jaxrnn.Params(cells, jaxrnn.Readout(jnp.ones((K, H), "float32"), jnp.ones(K)))
    optimizer = optax.sgd(0.01)
    return train.init_state(params, optimizer, B), train.make_update(optimizer), dtypes


@pytest.mark.parametrize("name", mixed_cells())
def test_states_have_their_dtype_from_the_first_step_on(name):
    state, update, dtypes = mixed_state(name)
    assert jax.tree.map(lambda h: str(h.dtype), state.h) == dtypes
    types = jax.eval_shape(update, state, *window())[0]
    assert jax.tree.map(lambda x: x.dtype, types) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize("name", ["parameters", "stack of three"])
def test_mixed_dtypes_need_one_program_and_are_evaluated_in_parts(name):
    state, update, _ = mixed_state(name)
    for _ in range(2):
        state, _ = update(state, *window())
    assert update._cache_size() == 1
    inputs, targets = window()
    whole = train.evaluate(state.params, inputs, targets)
    parts = train.evaluate(state.params, inputs, targets, seq_length=2)
    np.testing.assert_allclose(parts, whole, 1e-6)

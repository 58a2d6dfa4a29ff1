"""A run whose batch and hidden units are split over devices: the same numbers, few words."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, compile_as_user

import jaxrnn
from jaxrnn import train
from jaxrnn._api.checks import InputError
from jaxrnn._app.devices import DATA, MODEL, Placement
from jaxrnn._app.run import Config, initial_state, make_optimizer
from jaxrnn._core.schedule import hoists_inputs, segment_length

K, H, B, T = 5, 8, 8, 6
FULL = pytest.mark.full


def some(product, *default):
    """Cases of which only these are run by default."""
    return [pytest.param(*case, marks=() if case in default else FULL) for case in product]


# (data, model, layers)
MESHES = some(
    [(*mesh, layers) for mesh in ((2, 1), (4, 1), (1, 2), (2, 2), (1, 4)) for layers in (1, 2)],
    (4, 1, 1), (2, 2, 2), (1, 4, 1),
)  # fmt: skip


@pytest.fixture
def place(monkeypatch):
    """A `Placement` over so many of the devices: place(data, model, batch_size, hidden_size)."""
    devices = jax.devices()

    def place(data, model, batch_size=B, hidden_size=H):
        monkeypatch.setattr(jax, "devices", lambda: devices[: data * model])
        placement = Placement(batch_size, hidden_size, model)
        assert dict(placement.mesh.shape) == {DATA: data, MODEL: model}
        assert placement.devices == data * model
        return placement

    return place


@pytest.fixture
def as_users_have_it():
    """Float32, and the promotion that optax's Adam needs."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def make_state(optimizer, layers=1, dtype=jnp.float64):
    params = jaxrnn.init_params(jax.random.key(0), K, H, K, layers=layers, dtype=dtype)
    return train.init_state(params, optimizer, B)


def shards(x):
    return [shard.data.shape for shard in x.addressable_shards]


def test_a_placement_splits_batch_and_units(place):
    placement = place(2, 2)
    state = placement.put_state(make_state(optax.adam(1e-3), layers=2))
    cells = state.params.cell
    for tree in (state.params, state.optimizer_state[0].mu, state.optimizer_state[0].nu):
        assert shards(tree.cell[0].U) == [(H // 2, K)] * 4
        assert shards(tree.cell[1].U) == shards(tree.cell[1].W) == [(H // 2, H)] * 4
        assert shards(tree.cell[0].b) == [(H // 2,)] * 4
        assert shards(tree.readout.V) == [(K, H // 2)] * 4
        assert shards(tree.readout.c) == [(K,)] * 4
    assert [shards(h) for h in state.h] == [[(B // 2, H // 2)] * 4] * len(cells)
    assert shards(state.step) == [()] * 4
    ids = placement.split(np.zeros((T, B), np.uint8), 1)
    assert ids.dtype == np.int32 and shards(ids) == [(T, B // 2)] * 4
    # Of a batch that cannot be split each has all.
    assert shards(placement.split(np.zeros((T, 3), np.uint8), 1)) == [(T, 3)] * 4


@pytest.mark.parametrize(("batch_size", "data"), [(8, 4), (6, 2), (5, 1)])
def test_the_batch_is_split_over_as_many_devices_as_divide_it(batch_size, data):
    assert Placement(batch_size, H).devices == data


def test_units_that_cannot_be_split_are_one_line(monkeypatch):
    with pytest.raises(InputError, match="--model-devices: expected a divisor of the 4 devices"):
        Placement(B, 9, 3)
    with pytest.raises(InputError, match="expected a divisor of --hidden-size 9, got 2"):
        Placement(B, 9, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"--batch-size: expected a multiple of 4, .* got 6"):
        Placement(6, H)


def trained(state, optimizer, placement=None, steps=20, loss=None):
    """Parameters and losses after some checked updates."""
    ids = np.random.default_rng(0).integers(0, K, (steps, 2, T, B)).astype(np.uint8)
    mesh, losses = placement and placement.mesh, []
    update = train.make_checked_update(optimizer, loss, mesh=mesh)
    if placement is not None:
        state, split = placement.put_state(state), placement.split
    else:

        def split(x, axis):
            return x.astype(np.int32)

    for inputs, targets in ids:
        state, figures = update(state, split(inputs, 1), split(targets, 1))
        losses.append(figures.loss)
    return jax.device_get((state.params, state.h, losses))


@pytest.fixture(scope="module")
def whole():
    """What one device makes of it, once for each kind."""
    made = {}

    def whole(name, layers):
        if (name, layers) not in made:
            optimizer = getattr(optax, name)(0.1 if name == "sgd" else 1e-3)
            made[name, layers] = optimizer, trained(make_state(optimizer, layers), optimizer)
        return made[name, layers]

    return whole


@pytest.mark.parametrize(("data", "model", "layers"), MESHES)
def test_split_training_is_the_same_training(data, model, layers, place, whole):
    optimizer, expected = whole("sgd", layers)
    found = trained(make_state(optimizer, layers), optimizer, place(data, model))
    # Other orders of sums of T·B = 48 terms, eps 2e-16, that 20 steps of rate 0.1 hand on.
    assert_close(found, expected, 1e-12)


def test_split_training_with_adam_is_the_same_training(place, whole):
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        optimizer, expected = whole("adam", 1)
        found = trained(make_state(optimizer), optimizer, place(2, 2))
    # An update is lr·m / (√v + 1e-8): what is wrong in a gradient, 48 eps, at most 1e8 fold.
    assert_close(found, expected, 20 * 1e-3 * 48 * 2.2e-16 * 1e8)


def custom_loss(params, h, inputs, targets, key):
    h, hs = jaxrnn.unroll_layers(params.cell, jaxrnn.Ids(inputs), h)
    logits = jaxrnn.apply_readout(params.readout, hs)
    return jnp.sum(jaxrnn.cross_entropy(logits, targets)), h


@pytest.mark.parametrize(("data", "model"), some([(4, 1), (2, 2)], (2, 2)))
def test_a_custom_loss_is_split_likewise(data, model, place, whole):
    optimizer, expected = whole("sgd", 2)
    found = trained(make_state(optimizer, 2), optimizer, place(data, model), loss=custom_loss)
    assert_close(found, expected, 1e-12)


def test_each_device_draws_by_itself(place):
    """Of noise that would be the same on two devices nothing would be left."""
    placement = place(2, 1)
    state = make_state(optax.sgd(0.0))

    def loss(params, h, inputs, targets, key):
        noise = jax.random.normal(key, (inputs.shape[1],))
        sign = jnp.where(jax.lax.axis_index(DATA) == 0, 1.0, -1.0)
        return jnp.sum(params.cell.b) * 0 + jnp.sum(noise * sign), h

    update = train.make_checked_update(optax.sgd(0.0), loss, mesh=placement.mesh)
    key = jax.random.key_data(jax.random.key(1))
    state = placement.put_state(train.init_state(state.params, optax.sgd(0.0), B, key))
    ids = placement.split(np.zeros((T, B), np.uint8), 1)
    assert abs(update(state, ids, ids)[1].loss) > 1e-3


def test_a_mesh_without_the_axis_is_one_line():
    mesh = jax.make_mesh((2,), ("batch",))
    with pytest.raises(ValueError, match=r"^mesh: expected an axis 'data', got \['batch'\]"):
        train.make_update(optax.sgd(0.1), mesh=mesh)


def test_a_mesh_may_have_any_kind_of_axis_and_must_divide_the_batch():
    """JAX's default kind too, which its own splitting by hand would refuse."""
    optimizer, kinds = optax.sgd(0.1), (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto)
    ids = np.random.default_rng(0).integers(0, K, (2, T, B))
    found = []
    for kind in kinds:
        update = train.make_update(optimizer, mesh=jax.make_mesh((4,), ("data",), (kind,)))
        found.append(jax.device_get(update(make_state(optimizer, 1), *ids)))
    assert_close(found[0], found[1], 0)
    with pytest.raises(ValueError, match=r"^inputs: expected a batch that the 4 devices of the "):
        state = train.init_state(make_state(optimizer, 1).params, optimizer, 6)
        update(state, *ids[:, :, :6])


@pytest.mark.parametrize("streams", [8, 2, 1])
def test_split_evaluation_is_the_same_evaluation(streams, place):
    params = make_state(optax.sgd(0.1)).params
    ids = np.random.default_rng(0).integers(0, K, (2, train.EVALUATION_WINDOW + 7, streams))
    placement = place(2, 2)
    state = placement.put_state(make_state(optax.sgd(0.1)))
    found = train.evaluate(state.params, *ids, put=placement.split)
    assert found == pytest.approx(train.evaluate(params, *ids), rel=1e-13)


@pytest.mark.usefixtures("as_users_have_it")
def test_an_evaluation_of_many_windows_comes_to_an_end(place):
    """With as many under way at once XLA's CPU would wait for itself, and abort the process."""
    placement = place(4, 1, 64, 64)
    state = placement.put_state(initial_state(Config(hidden_size=64), K))
    ids = np.random.default_rng(0).integers(0, K, (2, 6400, 64)).astype(np.uint8)
    found = train.evaluate(state.params, *ids, seq_length=64, put=placement.split)
    assert found == pytest.approx(math.log(K), rel=0.5)


# A plain loop in a process of its own, which can be killed: without waiting XLA's CPU hangs. Of a
# mesh, and of arrays that were merely placed on several devices.
LOOP = """
from dataclasses import replace
import jax, jax.numpy as jnp, optax
import jaxrnn
from jaxrnn import train
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def put(x, *axes):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
optimizer = optax.sgd(0.1)
for each in (mesh, None):
    state = train.init_state(jaxrnn.init_params(jax.random.key(0), 5, 8, 5), optimizer, 8)
    state = replace(jax.tree.map(put, state), h=put(state.h, "data"))
    ids = put(jnp.zeros((4, 8), int), None, "data")
    update = train.make_update(optimizer, mesh=each)
    for _ in range(1000):
        state, _ = update(state, ids, ids)
    print(state.step)
"""


def test_a_plain_loop_of_many_updates_comes_to_an_end():
    run = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "1000\n1000\n"), run.stderr


@pytest.mark.parametrize("case", ["whole", "split"])
def test_an_infinite_state_on_one_device_stops_the_update(case, place):
    """The loss does not read it, nor does a gradient: only h is infinite."""
    placement = place(4, 1)

    def loss(params, h, inputs, targets, key):
        h = jnp.where(inputs[-1][:, None] == 1, jnp.inf, h)
        return jnp.sum(params.cell.b) + jnp.sum(params.readout.c) * 0, h

    optimizer = optax.sgd(0.1)
    state, ids = make_state(optimizer), np.zeros((T, B), np.int32)
    kept, mesh = jax.device_get(state.params), None
    ids[-1, 5] = 1
    if case == "split":
        state, mesh = placement.put_state(state), placement.mesh
        ids = placement.split(ids, 1)
    new, figures = train.make_checked_update(optimizer, loss, mesh=mesh)(state, ids, ids)
    assert np.isfinite(figures.loss) and not figures.finite
    assert_close(jax.device_get(new.params), kept, 0)
    assert not np.any(new.h)


# What goes between devices, read from the optimised program.

COLLECTIVE = re.compile(
    r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
)
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%?[\w.\-]+)")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


def collectives(text):
    """Each as (how many loops it is in, its kind, its arrays, their bytes)."""
    blocks, entry = {}, None
    for block in text.split("\n\n"):
        if head := re.match(r"\s*(ENTRY )?%?([\w.\-]+) \(.*\{$", block, re.MULTILINE):
            blocks[head[2]] = block.splitlines()
            entry = head[2] if head[1] else entry
    found = []

    def walk(name, depth):
        for line in blocks[name]:
            if match := COLLECTIVE.search(line):
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                sizes = [BYTES[t] * math.prod(map(int, filter(None, dims.split(","))))
                         for t, dims in arrays]  # fmt: skip
                found.append((depth, match[2], len(arrays), sum(sizes)))
            for called in CALLED.findall(line):
                walk(called.lstrip("%"), depth + (" while(" in line))

    walk(entry, 0)
    return found


def collectives_of_an_update(placement, layers=1, hidden_size=H, batch_size=B, seq_length=T):
    """And the bytes of all parameters."""
    config = Config(layers=layers, hidden_size=hidden_size, batch_size=batch_size)
    mesh = placement.mesh
    state = placement.put_state(initial_state(config, K))
    ids = placement.split(np.zeros((seq_length, batch_size), np.uint8), 1)
    update = train.make_checked_update(make_optimizer(config), mesh=mesh)
    text = compile_as_user(update.lower(state, ids, ids)).as_text()
    return collectives(text), sum(x.nbytes for x in jax.tree.leaves(state.params))


def test_collectives_are_found_in_a_program(place):
    mesh = place(4, 1).mesh
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(DATA))
    x = jax.device_put(jnp.ones((8, 3)), split)

    def f(x):
        def body(total, _):
            return total + jnp.sum(x * total), None

        return jax.lax.scan(body, jnp.ones(()), None, 5)[0]

    assert collectives(compile_as_user(jax.jit(f).lower(x)).as_text()) == [(1, "all-reduce", 1, 8)]


# Hidden size, batch, steps: one piece, and what each device takes in several segments.
LENGTHS = {"short": (H, B, T), "segments": (64, 64, 1024)}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("layers", "length"),
    some([(layers, length) for layers in (1, 2) for length in LENGTHS],
         (1, "short"), (2, "segments")),
)  # fmt: skip
def test_one_all_reduce_carries_all_gradients(layers, length, place):
    """Of a batch that is split: after all loops, with the loss and what is not finite in h."""
    hidden_size, batch_size, steps = LENGTHS[length]
    placement = place(4, 1, batch_size, hidden_size)
    segment = segment_length(steps, (batch_size // 4,), hidden_size, hidden_size)
    assert (segment < steps) == (length == "segments")
    found, parameters = collectives_of_an_update(placement, layers, hidden_size, batch_size, steps)
    arrays = 3 * layers + 2 + 2  # and the loss and a count
    assert found == [(0, "all-reduce", arrays, parameters + 8)]


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("data", "model", "layers", "hidden_size"),
    some([(*mesh, *size) for mesh in ((2, 2), (1, 4)) for size in ((1, 16), (2, 16), (2, 8))],
         (2, 2, 1, 16), (1, 4, 2, 8)),
)  # fmt: skip
def test_a_step_of_split_units_gathers_once_and_sums_once(data, model, layers, hidden_size, place):
    """All of h is gathered in each step forward, an adjoint summed in each step back."""
    placement = place(data, model, B, hidden_size)
    found, parameters = collectives_of_an_update(placement, layers, hidden_size)
    state = 4 * B // data * hidden_size
    # Where U x is formed in the loop, what comes from the layer below is gathered there as well.
    hoisted = hoists_inputs(T, (B // data,), hidden_size, hidden_size)
    gathers = layers if hoisted else 2 * layers - 1
    expected = [(1, "all-gather", 1, state)] * gathers + [(1, "all-reduce", 1, state)] * layers
    assert sorted(entry for entry in found if entry[0]) == expected
    # Outside: hs, logits, adjoints of a stack, norms; and the gradients, of a split batch.
    if data > 1:
        c, loss, count = 4 * K, 4, 4
        gradients = (parameters - c) // model + c + loss + count
        assert (0, "all-reduce", 3 * layers + 4, gradients) in found


@pytest.mark.parametrize(
    "chosen", ["", pytest.param("--xla_force_host_platform_device_count=3", marks=FULL)]
)
def test_cores_are_devices_unless_their_number_is_chosen(chosen):
    code = (
        "from jaxrnn._app import devices; devices.use_cores();"
        "import jax; print(len(jax.devices())); devices.use_cores()"
    )
    environment = {**os.environ, "XLA_FLAGS": chosen, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(found) == (3 if chosen else cores)

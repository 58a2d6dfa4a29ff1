import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import curvature, programs, reference
from benchmarks.checks import Checker
from benchmarks.measures import BACKWARD, FORWARD, HVP, JVP, MEASURES
from benchmarks.networks import ONE_LAYER, Network
from benchmarks.side import NotOfferedError
from benchmarks.subjects import naive, registry, sharded
from benchmarks.subjects.registry import JAX_SUBJECTS, TORCH_SUBJECTS
from benchmarks.tangents import direction
from benchmarks.workloads import Data, Workload, draw

TINY = Workload("tiny", T=5, B=2, D=3, H=4)
IDS = Workload("tiny, ids", T=5, B=2, D=3, H=4, ids=True)
MEMBERS = Workload("tiny, members", T=5, B=2, D=3, H=4, members=3)
PLAIN = [name for name, entry in JAX_SUBJECTS.items() if not entry.variant]
CASES = [
    *((name, TINY) for name in PLAIN),
    *((name, MEMBERS) for name in PLAIN if "relu" not in name),
    # To all others ids are one-hot rows.
    *((name, IDS) for name in PLAIN if JAX_SUBJECTS[name].package in ("jax", "jaxrnn")),
]
PEERS = [name for name in PLAIN if JAX_SUBJECTS[name].package not in ("jax", "jaxrnn")]
SHARDED = [name for name, entry in JAX_SUBJECTS.items() if entry.variant == registry.TWO_DEVICES]


@pytest.fixture(autouse=True)
def _lax_promotion():
    """Other libraries are not written for the strict settings of this suite."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def make(name):
    try:
        subject = JAX_SUBJECTS[name].make()
    except ImportError as error:
        pytest.skip(str(error))
    assert (subject.name, subject.package) == (name, JAX_SUBJECTS[name].package)
    return subject


def computed(subject, workload, data):
    """(hs, dU, dW, db, dxs) as the harness finds them, with dxs of the one-hot rows for ids."""

    def swap(array):
        return jnp.swapaxes(array, -3, -2) if subject.batch_first else array

    unroll, weights = subject.unroll, (data.U, data.W, data.b)
    if workload.members:
        members = [subject.load(*member) for member in zip(*weights, strict=True)]
        weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        unroll = jax.vmap(unroll, (0, None))
    else:
        weights = subject.load(*weights)
    xs, g = swap(jnp.asarray(data.xs)), swap(jnp.asarray(data.g))
    if workload.ids and subject.takes_ids:
        xs = jnp.asarray(data.ids.T if subject.batch_first else data.ids)

    def loss(weights, xs):
        hs = unroll(weights, xs)
        return jnp.sum(hs * g), hs

    both = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)
    (gradient, dxs), hs = jax.jit(both)(weights, xs)
    dxs = swap(dxs) if dxs.ndim == 3 else None
    found = swap(hs), *subject.unload(gradient), dxs
    return tuple(None if array is None else np.asarray(array) for array in found)


def expected(data, activation):
    network = Network(activation)
    return reference.states(data, network), *reference.gradients(data, network)


@pytest.mark.parametrize(("name", "workload"), CASES, ids=lambda part: getattr(part, "name", part))
def test_jax_subject_is_the_network(name, workload):
    subject, data = make(name), draw(workload)
    found, right = computed(subject, workload, data), expected(data, subject.activation)
    assert reference.mismatch(found, right, workload, "float32") is None


@pytest.mark.parametrize("name", SHARDED)
def test_batch_is_split_over_devices(name):
    devices = len(jax.devices())
    workload = Workload("split", T=5, B=2 * devices, D=3, H=4)
    subject, data = make(name), draw(workload)
    found, right = computed(subject, workload, data), expected(data, "tanh")
    assert reference.mismatch(found, right, workload, "float32") is None
    weights = subject.load(data.U, data.W, data.b)
    assert jax.jit(subject.unroll)(weights, data.xs).sharding.num_devices == devices


def test_every_entry_has_its_name():
    for name, (package, variant, _) in JAX_SUBJECTS.items():
        if package in ("jax", "jaxrnn"):
            subject = make(name)
            assert (subject.name, subject.package, subject.variant) == (name, package, variant)
    assert all(name == options.name for name, options in TORCH_SUBJECTS.items())


@pytest.mark.skipif(len(jax.devices()) == 1, reason="one device")
@pytest.mark.parametrize("batch", [1, 5])
def test_batch_that_does_not_split_is_named(batch):
    devices, data = len(jax.devices()), draw(TINY)
    subject = sharded.split_batch(naive.batched(), "split", "")
    with pytest.raises(ValueError, match=f"batch of {batch} does not split over {devices} devices"):
        subject.unroll(subject.load(data.U, data.W, data.b), jnp.zeros((5, batch, 3)))


# torch's own forward mode runs through torch.jit, which says so.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("workload", [TINY, IDS, MEMBERS], ids=lambda w: w.name)
def test_torch_is_the_network(workload):
    pytest.importorskip("torch")
    from benchmarks.subjects import torch_rnn

    data = draw(workload)
    built = torch_rnn.build(workload, data, TORCH_SUBJECTS["torch"])
    right = expected(data, "tanh")
    assert reference.mismatch(built.results(), right, workload, "float32") is None
    assert set(built.measures) == set(MEASURES)
    # The default direction is the weights and inputs themselves.
    direction = (data.U, data.W, data.b, None if workload.ids else data.xs)
    _, tangent = built.unload(JVP, built.measures[JVP]())
    slope = reference.directional_derivative(right[1:], direction)
    np.testing.assert_allclose(np.sum(tangent * data.g), slope, rtol=1e-5)
    moved = [gradients_at(scale, data)[:3] for scale in (1 + 1e-4, 1 - 1e-4)]
    product = built.unload(HVP, built.measures[HVP]())
    for plus, minus, array in zip(*moved, product, strict=True):
        np.testing.assert_allclose(array, (plus - minus) / 2e-4, rtol=1e-4, atol=1e-5)
    assert len(built.unload(BACKWARD, built.measures[BACKWARD]())) == (3 if workload.ids else 4)


def gradients_at(scale, data):
    """The reference's, at so many times the weights."""
    U, W, b = (scale * array.astype(np.float64) for array in (data.U, data.W, data.b))
    return reference.gradients(Data(U, W, b, data.xs, data.g, data.ids), ONE_LAYER)


@pytest.mark.parametrize("workload", [TINY, IDS, MEMBERS], ids=lambda w: w.name)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_reference_gradient_is_the_slope(workload, activation):
    data, step, network = draw(workload), 1e-6, Network(activation)
    rng = np.random.default_rng(2)
    arrays = [np.asarray(a, np.float64) for a in (data.U, data.W, data.b, data.xs)]
    direction = [rng.standard_normal(a.shape) for a in arrays]
    if workload.ids:
        direction[3][:] = 0

    def loss(by):
        moved = [a + by * d for a, d in zip(arrays, direction, strict=True)]
        return np.sum(reference.states(Data(*moved, data.g, data.ids), network) * data.g)

    found = reference.directional_derivative(reference.gradients(data, network), direction)
    np.testing.assert_allclose(found, (loss(step) - loss(-step)) / (2 * step), rtol=1e-7)


def test_reference_takes_the_side_of_the_kink_that_it_is_given():
    data, network = draw(TINY), Network("relu")
    off = reference.slopes(data, network, np.zeros((TINY.T, TINY.B, TINY.H)))
    assert not any(np.any(array) for array in reference.gradients(data, network, off))


EVERY_NETWORK = {
    "tanh": Network(),
    "relu": Network("relu"),
    "rate, tanh": Network(leak=0.2),
    "rate, relu": Network("relu", leak=0.2),
    "voltage, tanh": Network(leak=0.2, form="voltage"),
    "voltage, relu": Network("relu", leak=0.2, form="voltage"),
    "voltage without leak": Network(form="voltage"),
    "lengths": Network(lengths=True),
    "lengths, leak": Network(leak=0.2, lengths=True),
    "stack": Network(layers=3),
    "leaky stack": Network(leak=0.2, layers=2),
    "bidirectional": Network(bidirectional=True),
    "remat": Network(remat=True),
    "last": Network(last=True),
}


def by_jax(name, network, measure, dtype="float64"):
    """A subject's result in the layout of Data, and the numbers."""
    workload = Workload("small", T=9, B=4, D=3, H=5, network=network)
    subject, data = make(name).on(network), draw(workload)
    program = programs.make(subject, workload, measure, programs.arguments(subject, data, dtype))
    result = jax.jit(program.function)(*program.args)
    return programs.unloaded(subject, workload, measure, result), data


@pytest.mark.parametrize("network", EVERY_NETWORK.values(), ids=EVERY_NETWORK)
@pytest.mark.parametrize("name", ["naive scan", "jaxrnn"])
def test_every_network_is_the_reference_in_float64(name, network):
    (hs,), data = by_jax(name, network, FORWARD)
    gradients, _ = by_jax(name, network, BACKWARD)
    right = reference.states(data, network), *reference.gradients(data, network)
    assert len(gradients) == 3 * network.cells + 1
    for found, expected in zip((hs, *gradients), right, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    if network.lengths:
        past = np.arange(len(data.xs))[:, None] >= data.lengths
        assert past.any() and not hs[past].any()


@pytest.mark.parametrize("name", ["naive scan", "jaxrnn"])
def test_hessian_of_the_last_state_is_the_reference(name):
    network = EVERY_NETWORK["last"]
    found, data = by_jax(name, network, HVP)
    hs = reference.states(data, ONE_LAYER)
    right = curvature.tangents(data, direction(data), hs)
    for array, expected in zip(found, right.gradients, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_relu_and_say_what_they_lack(name):
    network = Network("relu")
    workload = Workload("small", T=9, B=4, D=3, H=5, network=network)
    subject, data = make(name).on(network), draw(workload)
    found = computed(subject, workload, data)
    assert reference.mismatch(found, expected(data, "relu"), workload, "float32") is None
    with pytest.raises(NotOfferedError):
        make(name).on(Network(leak=0.2))


def test_a_subject_of_one_layer_says_so():
    with pytest.raises(NotOfferedError, match="one tanh layer only"):
        make("jaxrnn, vmap").on(Network(layers=2))
    assert make("naive scan, small loops").on(Network(layers=2)).variant == registry.SMALL_LOOPS


@pytest.mark.parametrize(
    "wrong", [dict(layers=2, form="voltage"), dict(layers=2, bidirectional=True),
              dict(last=True, lengths=True), dict(layers=2, last=True)],
    ids=str,
)  # fmt: skip
def test_networks_that_no_row_has_are_refused(wrong):
    with pytest.raises(ValueError):
        Network(**wrong)


def test_a_unit_at_the_kink_may_be_on_either_side():
    """Beside a state that is kept, the states do not tell on which side it was."""
    network = Network("relu", leak=0.2)
    workload = Workload("small", T=9, B=4, D=3, H=5, network=network)
    data = draw(workload)
    data.xs[0, 0], data.b[2] = 0, 1e-9  # a of the first step: next to nothing
    checker = Checker(workload, data, direction(data))
    hs = reference.states(data, network)
    slopes = reference.slopes(data, network, hs)
    assert slopes[0, 0, 2] == 1
    at_the_kink, elsewhere = slopes.copy(), slopes.copy()
    at_the_kink[0, 0, 2] = 0
    elsewhere[4, 1, 3] = 1 - elsewhere[4, 1, 3]
    both = np.where(at_the_kink != slopes, at_the_kink, elsewhere)
    for given, right in ((slopes, True), (at_the_kink, True), (elsewhere, False), (both, False)):
        gradients = reference.gradients(data, network, given)
        wrong = checker.wrong(BACKWARD, "relu", gradients, hs)
        assert (wrong is None) is right


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda data: Data(data.U, data.W.T, data.b, data.xs, data.g), "hs"),
        (lambda data: Data(data.U, data.W, data.b, data.xs, data.g[::-1]), "dU"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_formula_is_reported(wrong, named, dtype):
    data = draw(TINY)
    found = computed(naive.batched(), TINY, wrong(data))
    line = reference.mismatch(found, expected(data, "tanh"), TINY, dtype)
    assert line.startswith(f"{named} is off by ")


def test_missing_or_invalid_result_is_reported():
    hs, dU, dW, db, dxs = right = expected(draw(TINY), "tanh")
    assert reference.mismatch(right, right, TINY, "float64") is None
    nan = np.where(db == db.max(), np.nan, db)
    assert "db is off by nan" in reference.mismatch((hs, dU, dW, nan, dxs), right, TINY, "float32")
    line = reference.mismatch((hs, dU.T, dW, db, dxs), right, TINY, "float32")
    assert line == "dU has shape [3, 4], not [4, 3]"
    assert "dxs" in reference.mismatch((hs, dU, dW, db, None), right, TINY, "float32")
    assert reference.mismatch((hs, dU, dW, db, None), right, IDS, "float32") is None

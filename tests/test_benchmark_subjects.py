"""What is measured: the reference, and every subject beside it."""

from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
import pytest
from helpers import assert_close

from benchmarks.reference import Reference
from benchmarks.subjects import NotOfferedError, registry
from benchmarks.subjects.registry import ON_CPU, TORCH, TWO_DEVICES, Subject
from benchmarks.worker import Bench
from benchmarks.workloads import (
    BACKWARD,
    BACKWARD_ALONE,
    FORWARD,
    HVP,
    Network,
    Workload,
    direction,
    draw,
)

TINY = Workload("tiny", T=5, B=2, D=3, H=4)
WORKLOADS = (TINY, replace(TINY, ids=True), replace(TINY, members=3))
SOME = [TINY, *(pytest.param(workload, marks=pytest.mark.full) for workload in WORKLOADS[1:])]
NETWORKS = (
    Network(leak=0.2),
    Network("relu", 0.2),
    Network("relu", 0.2, "voltage"),
    Network(lengths=True),
    Network(layers=2),
    Network(bidirectional=True),
    Network(last=True),
    Network(remat=True),
)
PLAIN = [s for s in ON_CPU if s.make and s.kind != TWO_DEVICES]
TWINS = [s for s in ON_CPU if s.name in (registry.OURS, registry.NAIVE)]


@pytest.fixture(autouse=True)
def _jax_as_users_have_it():
    """Other libraries are not written for the strict settings of this suite."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@lru_cache
def drawn(workload):
    data, tangent = draw(workload), direction(draw(workload))
    return data, tangent, Reference(workload, data, tangent, workload.dtype or "float32", False)


def errors(subject, workload, measure):
    """How far a subject is off, and what is wrong with it."""
    data, tangent, of = drawn(workload)
    if subject.relu:
        workload = replace(workload, network=replace(workload.network, activation="relu"))
    try:
        side = Bench(subject.kind).side
        prepared = side.prepare(subject, workload, measure, data, tangent)
    except ImportError as error:
        pytest.skip(str(error))
    return of.compare(measure, workload.network.activation, prepared.arrays())


@pytest.mark.parametrize("workload", SOME, ids=["plain", "ids", "members"])
@pytest.mark.parametrize("subject", PLAIN, ids=lambda subject: subject.name)
def test_every_subject_agrees_with_the_reference(subject, workload):
    for measure in (FORWARD, BACKWARD):
        assert errors(subject, workload, measure)[1] is None


@pytest.mark.parametrize("network", NETWORKS, ids=repr)
@pytest.mark.parametrize("subject", TWINS, ids=lambda subject: subject.name)
def test_jaxrnn_and_the_naive_scan_have_every_network(subject, network):
    workload = replace(TINY, T=9, network=network)
    for measure in (FORWARD, BACKWARD):
        found, wrong = errors(subject, workload, measure)
        assert wrong is None and len(found) == (1 if measure == FORWARD else 3 * network.cells + 1)


@pytest.mark.parametrize("subject", TWINS, ids=lambda subject: subject.name)
def test_second_derivatives_and_the_backward_pass_alone(subject):
    for workload in (replace(TINY, members=3), replace(TINY, network=Network(last=True))):
        assert errors(subject, workload, HVP)[1] is None
    assert errors(subject, TINY, BACKWARD_ALONE)[1] is None
    assert errors(subject, replace(TINY, dtype="bfloat16"), BACKWARD)[1] is None


@pytest.mark.parametrize("workload", SOME, ids=["plain", "ids", "members"])
def test_torch_agrees_with_the_reference(workload):
    pytest.importorskip("torch")
    subject = Subject("torch", "torch", kind=TORCH)
    for measure in (FORWARD, BACKWARD):
        assert errors(subject, workload, measure)[1] is None
    with pytest.raises(NotOfferedError):
        errors(subject, replace(TINY, network=Network(leak=0.2)), FORWARD)


def test_two_devices_split_the_batch():
    devices = len(jax.devices())
    for subject in (subject for subject in ON_CPU if subject.kind == TWO_DEVICES):
        assert errors(subject, replace(TINY, B=2 * devices), BACKWARD)[1] is None
        if devices > 1:
            with pytest.raises(NotOfferedError, match="does not split"):
                errors(subject, replace(TINY, B=devices + 1), BACKWARD)


def test_networks_that_a_library_lacks_are_not_offered():
    peers = [s for s in PLAIN if s.package not in ("jax", "jaxrnn")]
    for subject in peers:
        with pytest.raises(NotOfferedError, match="one layer without options"):
            errors(subject, replace(TINY, network=Network(layers=2)), FORWARD)


def unrolled(data, network):
    """The states by the formula of `Network`, and where relu has its kink."""
    (U, W, b), h, hs = data.cells[0], 0.0, []
    phi = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0)}[network.activation]
    leak, voltage = network.leak or 1.0, network.form == "voltage"
    for x in data.xs:
        a = x @ U.T + (phi(h) if voltage else h) @ W.T + b if len(hs) else x @ U.T + b
        h = (1 - leak) * h + leak * (a if voltage else phi(a))
        hs.append(h)
    return np.stack(hs)


def reference_of(workload, data=None):
    data = draw(workload) if data is None else data
    return Reference(workload, data, direction(data), "float32", False)


@pytest.mark.parametrize("network", [Network(), *NETWORKS[:3]], ids=repr)
def test_the_reference_is_the_formula(network):
    of = reference_of(replace(TINY, network=network))
    (U, W, b), xs, g = of.data.cells[0], of.data.xs, of.data.g

    def loss(by):
        pairs = zip((U, W, b), of.tangent.cells[0], strict=True)
        moved = tuple(x.astype(float) + by * dx for x, dx in pairs)
        return np.sum(unrolled(replace(of.data, cells=(moved,), xs=xs.astype(float)), network) * g)

    states = unrolled(replace(of.data, xs=xs.astype(float)), network)
    assert_close(of.arrays(FORWARD, network)["hs"], states, 1e-12)
    found = of.arrays(BACKWARD, network)
    pairs = zip(("dU", "dW", "db"), of.tangent.cells[0], strict=True)
    along = sum(float(np.vdot(found[name], dx)) for name, dx in pairs)
    assert along == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


def test_wrong_results_are_off():
    of = reference_of(TINY)
    right = of.arrays(FORWARD, Network())
    assert of.compare(FORWARD, "tanh", right) == ({"hs": 0.0}, None)
    for wrong in (1.001 * right["hs"], right["hs"] * np.nan):
        assert of.compare(FORWARD, "tanh", {"hs": wrong})[1].startswith("hs is off by")
    assert "hs has shape [4, 2, 4]" in of.compare(FORWARD, "tanh", {"hs": right["hs"][1:]})[1]
    assert "hs has shape None" in of.compare(FORWARD, "tanh", {})[1]


def test_either_side_of_a_kink_is_right():
    """A pre-activation of relu that is 0 but for rounding may fall to either side."""
    relu = replace(TINY, B=1, network=Network("relu"))
    data = draw(relu)
    U, W, _ = data.cells[0]
    b = -(U @ data.xs[0, 0]).astype(np.float32)  # a_1 = 0 but for rounding
    of = reference_of(relu, replace(data, cells=((U, W, b),)))
    sides = [of.arrays(BACKWARD, relu.network, kink) for kink in (1e-6, -1e-6)]
    assert np.max(np.abs(sides[0]["db"] - sides[1]["db"])) > 0.01
    for side in sides:
        assert of.compare(BACKWARD, "relu", side)[1] is None


def test_few_sequences_stand_for_all():
    few = Workload("few", 3, 16, 4, 5, distinct=4)
    data, every = draw(few), replace(few, distinct=0)
    assert len(np.unique(data.xs[0, :, 0])) == 4
    part, whole = (reference_of(w, data).arrays(BACKWARD, Network()) for w in (few, every))
    for name in ("dU", "dW", "db"):
        assert_close(part[name], whole[name], 1e-9)
    assert_close(part["dxs"], whole["dxs"][:, few.compared], 1e-9)


def test_drawn_numbers_are_rounded_to_the_dtype():
    for dtype in ("bfloat16", "float16"):
        data, full = draw(TINY, dtype), draw(TINY)
        for array, unrounded in zip((*data.cells[0], data.xs), (*full.cells[0], full.xs)):  # noqa: B905
            again = np.asarray(jax.numpy.asarray(unrounded).astype(dtype).astype("float32"))
            assert (array == again).all() and not (array == unrounded).all()


def test_products_with_tf32_stay_within_the_tolerance():
    workload = Workload("tf32", 64, 4, 64, 128)

    def cut(x):
        """As a tensor core reads a float32: the last 13 bits are ignored."""
        return (x.astype(np.float32).view(np.int32) & ~np.int32(0x1FFF)).view(np.float32)

    data = draw(workload)
    (U, W, b), h, hs = data.cells[0], np.zeros((4, 128)), []
    for x in data.xs:
        h = np.tanh(cut(x) @ cut(U).T + cut(h) @ cut(W).T + b)
        hs.append(h)
    found = {"hs": np.stack(hs).astype(np.float64)}
    assert (
        Reference(workload, data, data, "float32", True).compare(FORWARD, "tanh", found)[1] is None
    )
    assert (
        Reference(workload, data, data, "float32", False).compare(FORWARD, "tanh", found)[1]
        is not None
    )


def test_every_subject_is_listed_once():
    for device, subjects in registry.SUBJECTS.items():
        names = [subject.name for subject in subjects]
        assert len(names) == len(set(names)), device

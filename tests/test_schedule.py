"""However the loops are run, the results are the same: every choice, forced at a small size."""

import dataclasses
from functools import cache, partial

import forms
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, naive_unroll, random_case, weights

import jaxrnn
from jaxrnn._core import schedule

T = 7
CHOICES = {
    "inputs before the loop": {"hoists_inputs": True},
    "inputs in the loop": {"hoists_inputs": False},
    "weights on the left": {"puts_weights_left": True},
    "segments of 2 and a rest": {"segment_length": 2},
    "segments of 3 and a rest, weights on the left": {
        "segment_length": 3, "puts_weights_left": True, "hoists_inputs": True,
    },
}  # fmt: skip


def under(choice, monkeypatch):
    for rule, answer in CHOICES[choice].items():
        monkeypatch.setattr(schedule, rule, lambda *shape, answer=answer: answer)
    jax.clear_caches()  # what was traced under another choice


@pytest.fixture(params=CHOICES)
def chosen(request, monkeypatch):
    under(request.param, monkeypatch)
    yield
    jax.clear_caches()


@pytest.fixture
def in_pairs(monkeypatch):
    monkeypatch.setattr(schedule, "segment_length", lambda *shape: 2)
    jax.clear_caches()
    yield
    jax.clear_caches()


def loss(unroll, **how):
    def run(cell, xs, h0, drive):
        h_last, hs = unroll(cell, xs, h0, drive=drive, **how)
        return jnp.sum(jnp.sin(hs) * weights(hs.shape)) + jnp.sum(jnp.cos(h_last))

    return run


def case(**cell):
    params, xs, h0, targets = random_case(**{"T": T, **cell})
    return params, xs, h0, 0.3 * weights((T, 3, 5), seed=3), targets


def naive(cell, xs, h0, drive, mask=None, reverse=False):
    return forms.naive(cell, xs, h0, drive=drive, valid=mask, reverse=reverse)


MASK = jnp.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 0, 0]]) == 1
VARIANTS = {
    "plain": ({}, {}),
    "mask": ({}, {"mask": MASK}),
    "reverse": ({}, {"reverse": True}),
    "leak, mask and reverse": ({"leak": jnp.asarray(0.6)}, {"mask": MASK, "reverse": True}),
}


RARE = [pytest.param(name, marks=pytest.mark.full) for name in ("mask", "reverse")]


@cache
def expected_gradients(variant):
    cell, how = VARIANTS[variant]
    params, xs, h0, drive, _ = case(**cell)
    return jax.jit(jax.value_and_grad(loss(naive, **how), (0, 1, 2, 3)))(params.cell, xs, h0, drive)


@pytest.mark.parametrize("variant", ["plain", "leak, mask and reverse", *RARE])
def test_gradients_do_not_depend_on_the_schedule(chosen, variant):
    cell, how = VARIANTS[variant]
    params, xs, h0, drive, _ = case(**cell)
    gradient = jax.jit(jax.value_and_grad(loss(jaxrnn.unroll, **how), (0, 1, 2, 3)))
    assert_close(gradient(params.cell, xs, h0, drive), expected_gradients(variant))


def test_gradients_of_ids_under_every_choice(chosen):
    params, _, h0, drive, targets = case()
    args = params.cell, jaxrnn.Ids(targets), h0, drive
    found = jax.jit(jax.grad(loss(jaxrnn.unroll), (0, 2)))(*args)
    assert_close(found, jax.jit(jax.grad(loss(naive), (0, 2)))(*args))


@cache
def expected_by_hand():
    params, xs, h0, drive, targets = case()

    def by_jax(params, h0):
        hs = naive(params.cell, xs, h0, drive, MASK)[1]
        logits = jaxrnn.apply_readout(params.readout, hs)
        return jnp.sum(jaxrnn.cross_entropy(logits, targets, where=MASK))

    def pulled(*args):
        hs, pull = jax.vjp(lambda *args: naive(*args)[1], *args)
        return hs, pull(weights(hs.shape))

    args = params.cell, xs, h0, drive
    return jax.jit(jax.value_and_grad(by_jax, (0, 1)))(params, h0), jax.jit(pulled)(*args)


def test_gradients_by_hand_under_every_choice(chosen):
    params, xs, h0, drive, targets = case()
    (expected, (of_params, of_h0)), (hs, pulled) = expected_by_hand()
    loss, found = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, mask=MASK, drive=drive)
    assert_close((loss, found.params, found.h0), (expected, of_params, of_h0))
    by_hand = jaxrnn.bptt(params.cell, xs, h0, hs, weights(hs.shape), drive=drive)
    assert_close((by_hand.cell, by_hand.xs, by_hand.h0, by_hand.delta), pulled)


AXES = {"in front": ((0, 0), 0), "in place": ((1, 0), 1), "last": ((2, 1), 2)}
MAPPED = [*zip(CHOICES, ("in front", "in place", "last", "last", "in front"), strict=True)]
MAPPED += [
    pytest.param(choice, axes, marks=pytest.mark.full)
    for choice in CHOICES for axes in AXES if (choice, axes) not in MAPPED
]  # fmt: skip


@pytest.mark.parametrize(("choice", "where"), MAPPED)
def test_gradients_of_vmap_under_every_choice(monkeypatch, choice, where):
    params, xs, h0, _, _ = case()
    axes, out = AXES[where]
    xs, h0 = jnp.moveaxis(xs, 1, axes[0]), jnp.moveaxis(h0, 0, axes[1])

    def gradient(unroll):
        def of(cell, xs, h0):
            hs = jax.vmap(lambda x, h: unroll(cell, x, h)[1], axes, out)(xs, h0)
            return jnp.sum(jnp.sin(hs) * weights(hs.shape))

        return jax.jit(jax.grad(of, (0, 1, 2)))(params.cell, xs, h0)

    under(choice, monkeypatch)
    assert_close(gradient(jaxrnn.unroll), gradient(naive_unroll))
    jax.clear_caches()


@cache
def expected_tangents():
    params, xs, h0, drive, _ = case(leak=jnp.asarray(0.6))
    args = params.cell, xs, h0, drive
    return jax.jit(lambda *args: jax.jvp(partial(naive, mask=MASK), args, turned(args)))(*args)


def turned(args):
    return jax.tree.map(jnp.cos, args)


def test_forward_mode_under_every_choice(chosen):
    params, xs, h0, drive, _ = case(leak=jnp.asarray(0.6))
    args = params.cell, xs, h0, drive

    def states(cell, xs, h0, drive):
        return jaxrnn.unroll(cell, xs, h0, drive=drive, mask=MASK)

    found = jax.jit(lambda *args: jax.jvp(states, args, turned(args)))(*args)
    assert_close(found, expected_tangents())


# What JAX does with the linear map itself, which differentiates by hand in segments.
TRANSFORMS = {
    "gradients of each sequence": lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 1)),
    "one direction, each sequence": lambda f: jax.vmap(
        lambda cell, x: jax.jvp(f, (cell, x), (cell, x)), (None, 1)
    ),
    "directions shared by the sequences": lambda f: jax.vmap(
        lambda cell, x: jax.jvp(lambda cell: f(cell, x), (cell,), (cell,)), (None, 1)
    ),
    "transpose of linearize": lambda f: (
        lambda cell, xs: jax.linear_transpose(jax.linearize(f, cell, xs[:, 0])[1], cell, xs[:, 0])(
            1.0
        )
    ),
    "transpose of linearize, of some only": lambda f: (
        lambda cell, xs: jax.vjp(lambda x: jax.jvp(f, (cell, xs[:, 0]), (cell, x))[1], xs[:, 0])[1](
            1.0
        )
    ),
    "jacobian, forward": lambda f: lambda cell, xs: jax.jacfwd(f)(cell, xs[:, 0]),
    "forward over reverse": lambda f: (
        lambda cell, xs: jax.jvp(jax.grad(f), (cell, xs[:, 0]), (cell, xs[:, 1]))
    ),
    "reverse over reverse, each sequence": lambda f: jax.vmap(
        jax.grad(lambda cell, x: sum(map(jnp.sum, jax.tree.leaves(jax.grad(f)(cell, x))))),
        (None, 1),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transformations_in_segments(in_pairs, transform):
    params, xs, _, _, _ = case()

    def of(unroll):
        def scalar(cell, x):
            hs = unroll(cell, x, jnp.zeros(5))[1]
            return jnp.sum(jnp.sin(hs) * weights(hs.shape))

        return scalar

    found = jax.jit(transform(of(jaxrnn.unroll)))(params.cell, xs)
    assert_close(found, jax.jit(transform(of(naive_unroll)))(params.cell, xs), 6e-12)


def nested(unroll, *axes):
    """vmaps from the outermost inward: over members, or over data at that axis of xs."""
    f = unroll
    for axis in reversed(axes):
        f = jax.vmap(f, (0, None, None) if axis == "members" else (None, axis, 0))
    return f


@pytest.mark.parametrize(
    "axes", [("members",), ("members", 1), (0, "members", 0), (0, 1)] + [
        pytest.param(axes, marks=pytest.mark.full) for axes in (
            ("members", 0), (0, "members"), ("members", "members", 0), (0, 0),
        )
    ], ids=str,
)  # fmt: skip
def test_gradients_of_members_and_batches_in_segments(in_pairs, axes):
    # All sizes are the same: an axis taken for another shows in the values alone.
    params, _, _, _ = random_case(D=4, H=5)
    batch = (3,) * sum(axis != "members" for axis in axes)
    xs, h0 = weights((*batch, 3, 4), seed=1), weights((*batch, 5), seed=2)
    if 1 in axes:
        xs = jnp.moveaxis(xs, len(batch) - 1, len(batch))
    cells = params.cell
    for _ in range(axes.count("members")):
        cells = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, -x]), cells)

    def value_and_gradient(unroll):
        def of(cells, xs, h0):
            return sum(jnp.sum(jnp.sin(out) * weights(out.shape))
                       for out in nested(unroll, *axes)(cells, xs, h0))  # fmt: skip

        return jax.jit(jax.value_and_grad(of, (0, 1, 2)))(cells, xs, h0)

    assert_close(value_and_gradient(jaxrnn.unroll), value_and_gradient(naive_unroll))


def test_derivatives_in_segments_inside_shard_map(in_pairs):
    params, xs, h0, targets = random_case(T=T, batch=(4,))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    parts = (P(), P(None, "data"), P("data"))

    def total(cell, xs, h0):
        return jax.lax.psum(jnp.sum(jnp.square(jaxrnn.unroll(cell, xs, h0)[1])), "data")

    split = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=parts, out_specs=P()))

    def whole(cell, xs, h0):
        return jnp.sum(jnp.square(naive_unroll(cell, xs, h0)[1]))

    args = (params.cell, xs, h0)
    found, expected = (
        jax.jit(lambda *args, f=f: (jax.grad(f, (0, 1, 2))(*args), jax.jvp(f, args, args)))(*args)
        for f in (split, whole)
    )
    assert_close(found, expected)

    def by_hand(params, targets):
        # The inputs are shared and the targets are not.
        found = jaxrnn.loss_and_grads(params, xs[:, :2], targets, h0=h0[:2])
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), (found[0], found[1].params))

    split = jax.shard_map(by_hand, mesh=mesh, in_specs=parts[:2], out_specs=P())
    halves = [jaxrnn.loss_and_grads(params, xs[:, :2], half, h0=h0[:2])
              for half in (targets[:, :2], targets[:, 2:])]  # fmt: skip
    expected = [(loss, found.params) for loss, found in halves]
    found = jax.jit(split)(params, targets)
    assert_close(found, jax.tree.map(jnp.add, *expected))


def test_no_tracer_outlives_its_trace():
    params, xs, h0, _ = random_case()
    jax.clear_caches()
    with jax.checking_leaks():
        found = jax.grad(lambda cell: jnp.sum(jaxrnn.unroll(cell, xs, h0)[1]))(params.cell)
        hs, _ = jax.jvp(lambda xs: jaxrnn.unroll(params.cell, xs, h0)[1], (xs,), (xs,))
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((found, hs)))


def test_half_precision_sums_over_segments_in_float32(monkeypatch):
    params, xs, h0, _, _ = case(T=64)
    cell = dataclasses.replace(params.cell, W=0.1 * params.cell.W)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (cell, xs, h0))

    def gradient(length):
        monkeypatch.setattr(schedule, "segment_length", lambda *shape: length)
        jax.clear_caches()
        return jax.jit(jax.grad(lambda *a: jnp.sum(jaxrnn.unroll(*a)[1])))(*half)

    # The same products of the same numbers: only the last rounding of a sum may differ.
    assert_close(gradient(2), gradient(64), 2**-8)


def test_symbolic_sizes_have_a_schedule():
    def symbolic(sizes):
        return jax.export.symbolic_shape(sizes)

    (time,), (batch,) = symbolic("T"), symbolic("B")
    assert schedule.segment_length(time, (batch,), 8, 64) is time
    assert schedule.hoists_inputs(time, (batch,), 64, 64) is True
    assert schedule.puts_weights_left((batch,), 512) is False

    params, *_ = random_case(batch=())
    export = jax.export.export(jax.jit(jax.vmap(lambda xs: jaxrnn.unroll(params.cell, xs)[1])))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("B, T, 4"), jnp.float64)
    xs = weights((3, 6, 4))
    found = export(shape).call(xs)
    assert_close(found, jax.vmap(lambda x: naive_unroll(params.cell, x, jnp.zeros(5))[1])(xs))


@pytest.mark.parametrize(
    "shape", [(784, (128,), 1, 128), (100, (128,), 64, 512), (1009, (64,), 64, 64)]
)
def test_segments_divide_time_where_they_can(shape):
    length = schedule.segment_length(*shape)
    assert 1 < length < shape[0]
    assert (shape[0] % length == 0) == (shape[0] != 1009)

"""How far derivatives reach back, and what is kept for them: truncate, window, checkpoint_every."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, naive_unroll, random_case, rare, temporaries, weights
from jax import lax

import jaxrnn
from jaxrnn import textbook

T, B = 5, 2
MASK = np.array([[1, 0], [1, 1], [0, 1], [1, 0], [1, 1]], bool)


def one_step(cell, h, x, seen=None):
    """A step that reads `seen` in place of h in its pre-activation."""
    a = cell.U @ x + cell.W @ (h if seen is None else seen) + cell.b
    return h + (jnp.tanh(a) - h) * (1 if cell.leak is None else cell.leak)


def truncated(cell, xs, h, k):
    """One sequence, its valid steps only, in scan order."""
    hs = []
    for n, x in enumerate(xs):
        h = one_step(cell, h, x, lax.stop_gradient(h) if n and n % k == 0 else h)
        hs.append(h)
    return hs


def windowed(cell, xs, h0, k):
    """h_t computed again by k steps from an h_{t−k} that does not move."""
    states = [h0, *truncated(cell, xs, h0, len(xs) + 1)]
    hs = []
    for n in range(1, len(xs) + 1):
        h = h0 if n < k else lax.stop_gradient(states[n - k])
        for x in xs[max(n - k, 0) : n]:
            h = one_step(cell, h, x)
        hs.append(h)
    return hs


def literal(of_one, k, valid, reverse):
    """An unroll by the definition, sequence by sequence, in Python loops."""

    def unroll(cell, xs, h0):
        last, every = [], jnp.zeros((*xs.shape[:2], h0.shape[-1]))
        for b in range(xs.shape[1]):
            t = np.flatnonzero(valid[:, b])[:: -1 if reverse else 1]
            hs = of_one(cell, list(xs[t, b]), h0[b], k)
            last.append(hs[-1])
            every = every.at[t, b].set(jnp.stack(hs))
        return jnp.stack(last), every

    return unroll


def scalar(unroll):
    def loss(*args):
        h_last, hs = unroll(*args)
        return jnp.sum(jnp.sin(hs) * weights(hs.shape)) + jnp.sum(jnp.exp(h_last))

    return loss


def derivatives(unroll, args):
    """First order, and second order in two mixtures; each is a part of a gradient."""
    f, n = scalar(unroll), (0, 1, 2)

    def gradient(*a):
        return jax.grad(f, n)(*a)

    def steep(*a):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(*a)))

    forward_over_reverse = jax.jvp(gradient, args, jax.tree.map(jnp.cos, args))
    return forward_over_reverse, jax.grad(steep, n)(*args)


VARIANTS = {
    "plain": ({}, {}),
    "leak, gaps and reverse": ({"leak": jnp.linspace(0, 0.8, 5)}, {"mask": MASK, "reverse": True}),
}
OPTIONS = [{"truncate": 1}, {"truncate": 2}, {"window": 1}, {"window": 2}, {"window": 6}]
# Two orders: 6 times the tolerance of the first.
SECOND = 6e-12


def both_ways(how, variant):
    """(Arguments, the unroll by its definition, that of the library)."""
    of_cell, of_unroll = VARIANTS[variant]
    params, xs, h0, _ = random_case(T=T, batch=(B,), **of_cell)
    valid, reverse = of_unroll.get("mask", np.ones((T, B), bool)), "reverse" in of_unroll
    of_one = windowed if "window" in how else truncated
    expected = literal(of_one, how.get("window", how.get("truncate")), valid, reverse)
    return (params.cell, xs, h0), expected, partial(jaxrnn.unroll, **how, **of_unroll)


@pytest.mark.parametrize("variant", ["leak, gaps and reverse", rare("plain")])
@pytest.mark.parametrize("how", [
    {"truncate": 2}, {"window": 2}, {"truncate": 2, "checkpoint_every": 3}, rare({"window": 5}),
    rare({"truncate": 1}), rare({"window": 1}), rare({"window": 6}),
], ids=str)  # fmt: skip
def test_gradients_equal_those_of_the_definition(how, variant):
    args, expected, found = both_ways(how, variant)
    assert_close(found(*args), expected(*args))
    gradient = jax.grad(scalar(expected), (0, 1, 2))(*args)
    assert_close(jax.jit(jax.grad(scalar(found), (0, 1, 2)))(*args), gradient)


@pytest.mark.parametrize(("how", "variant"), [
    ({"truncate": 2}, "leak, gaps and reverse"),
    *(rare(how, variant) for how in OPTIONS for variant in VARIANTS),
], ids=str)  # fmt: skip
def test_second_derivatives_equal_those_of_the_definition(how, variant):
    args, expected, found = both_ways(how, variant)
    # The definition is not compiled: its loops are unrolled.
    assert_close(jax.jit(partial(derivatives, found))(args), derivatives(expected, args), SECOND)


@pytest.mark.parametrize(("how", "leak"), [
    ({"truncate": 2}, None), ({"window": 2}, 0.3), rare({"truncate": 2}, 0.3),
    rare({"truncate": 9}, None), rare({"truncate": 9}, 0.3), rare({"window": 2}, None),
], ids=str)  # fmt: skip
def test_textbook_truncates_and_windows_the_double_sum_likewise(how, leak):
    params, xs, _, targets = random_case(leak=None if leak is None else jnp.asarray(leak))
    expected, by_sum = textbook.loss_and_grads(params, xs, targets, **how)
    loss, gradients = jaxrnn.loss_and_grads(params, xs, targets, **how)
    assert_close((loss, gradients.params), (expected, by_sum))

    def of_states(hs):
        return jnp.sum(jaxrnn.cross_entropy(jaxrnn.apply_readout(params.readout, hs), targets))

    hs = jaxrnn.unroll(params.cell, xs)[1]
    g = jax.grad(of_states)(hs)
    assert_close(jaxrnn.bptt(params.cell, xs, None, hs, g, **how).cell, by_sum.cell)
    terms = textbook.contributions(params, xs, targets, **how)
    assert_close(jax.tree.map(lambda x: jnp.sum(x, (0, 1)), terms), by_sum.cell)


@pytest.mark.parametrize("how", [{"truncate": 2}, {"window": 2}], ids=str)
def test_contributions_are_zero_beyond_a_window_and_across_a_cut(how):
    params, xs, _, targets = random_case()
    terms = textbook.contributions(params, xs, targets, **how)
    reach = np.abs(terms.b).sum(-1) > 0
    t, k = np.indices(reach.shape)
    allowed = (t - k < 2) if "window" in how else (t // 2 == k // 2)
    np.testing.assert_array_equal(reach, allowed & (k <= t))


AXES = {
    "in front": ((None, 0, 0), (0, 0)),
    "in place": ((None, 1, 0), (0, 1)),
    "members": ((0, None, None), (0, 0)),
}
MAPPED = [({"truncate": 2}, "in front"), ({"window": 2}, "in place"),
          ({"checkpoint_every": 2}, "members")]  # fmt: skip
MAPPED += [rare(how, axes) for how, _ in MAPPED for axes in AXES]


@pytest.mark.parametrize(("how", "axes"), MAPPED, ids=str)
def test_vmap_of_every_option_equals_one_call_each(how, axes):
    of, out = AXES[axes]
    params, *args = random_case(T=T, batch=())
    args = [params.cell, *args[:2]]
    args = [arg if axis is None else jax.tree.map(
        lambda x, axis=axis: jnp.stack([x, 0.9 * x, -x], axis), arg)
        for arg, axis in zip(args, of, strict=True)]  # fmt: skip
    unroll = partial(jaxrnn.unroll, **how)

    def singly(*args):
        each = [unroll(*(arg if axis is None else jax.tree.map(
            lambda x, axis=axis, n=n: jnp.take(x, n, axis), arg)
            for arg, axis in zip(args, of, strict=True))) for n in range(3)]  # fmt: skip
        return [jnp.stack(y, axis) for y, axis in zip(zip(*each, strict=True), out, strict=True)]

    def gradient(f):
        def total(*args):
            return sum(jnp.sum(jnp.sin(y) * weights(y.shape)) for y in f(*args))

        return jax.jit(jax.grad(total, (0, 1, 2)))(*args)

    assert_close(gradient(jax.vmap(unroll, of, out)), gradient(singly))


@pytest.mark.parametrize(
    "axes", [("members", 0), (0, "members", 0), rare((0, "members")),
             rare((0, 0))], ids=str,
)  # fmt: skip
def test_checkpoints_under_vmap_equal_a_naive_scan(axes):
    # All sizes are the same: an axis taken for another shows in the values alone.
    params, *_ = random_case(D=3, H=3)
    batch = (3,) * sum(axis != "members" for axis in axes)
    xs, h0 = weights((*batch, 3, 3), seed=1), weights((*batch, 3), seed=2)
    cells = params.cell
    if "members" in axes:
        cells = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, -x]), cells)

    def gradient(f):
        for axis in reversed(axes):
            f = jax.vmap(f, (0, None, None) if axis == "members" else (None, axis, 0))

        def total(*args):
            return sum(jnp.sum(jnp.sin(y) * weights(y.shape)) for y in f(*args))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(cells, xs, h0)

    assert_close(gradient(partial(jaxrnn.unroll, checkpoint_every=2)), gradient(naive_unroll))


EVERY = [1, 2, "sqrt", 9]
SEQUENCES = {
    "floats": {},
    "lengths": {"lengths": np.array([5, 0, 3])},
    "lengths, reverse": {"lengths": np.array([5, 0, 3]), "reverse": True},
    "gaps": {"mask": np.arange(15).reshape(5, 3) % 4 != 1},
    "drive": {"drive": weights((5, 3, 5), 3)},
}


EVERY_AND_SEQUENCES = [
    ("sqrt", "lengths"), (2, "gaps"), (9, "drive"),
]  # fmt: skip
EVERY_AND_SEQUENCES += [rare(k, name) for k in EVERY for name in SEQUENCES]


@pytest.mark.parametrize(("every", "name"), EVERY_AND_SEQUENCES)
def test_checkpoints_change_no_gradient(every, name):
    how = SEQUENCES[name]
    params, xs, h0, targets = random_case(T=T, leak=jnp.asarray(0.6) if "mask" in how else None)
    drive = how.get("drive")
    how = {name: value for name, value in how.items() if name != "drive"}
    if "mask" in how or "lengths" in how:
        valid = how["mask"] if "mask" in how else np.arange(T)[:, None] < how["lengths"]
        xs = jnp.where(valid[..., None], xs, jnp.nan)

    def loss(cell, xs, h0, drive, **more):
        return scalar(partial(jaxrnn.unroll, drive=drive, **how, **more))(cell, xs, h0)

    args = (params.cell, xs, h0, drive)
    wanted = (0, 1, 2) if drive is None else (0, 1, 2, 3)
    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, **more), wanted))(*args)
        for more in ({"checkpoint_every": every}, {})
    )
    assert_close(found, expected)
    found, expected = (
        jaxrnn.loss_and_grads(params, xs, targets, h0=h0, drive=drive, **how, **more)
        for more in ({"checkpoint_every": every}, {})
    )
    assert_close(found, expected)


@pytest.mark.parametrize(("every", "how"), [
    (3, {"truncate": 2}), rare(2, {}), rare(1, {"truncate": 2}),
    rare(5, {"truncate": 2}),
], ids=str)  # fmt: skip
def test_checkpoints_change_no_derivative_of_the_gradients(every, how):
    params, xs, _, targets = random_case(T=T, batch=(B,))

    def all_of(**more):
        def run(params):
            return jaxrnn.loss_and_grads(params, xs, targets, **how, **more)

        def steep(params):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(run(params)[1]))

        return jax.jit(lambda p: (jax.grad(lambda p: run(p)[0])(p), jax.grad(steep)(p)))(params)

    assert_close(all_of(checkpoint_every=every), all_of(), SECOND)


def in_chunks(cell, xs, h0, length):
    """States of chunks, between which the state is carried and does not move."""
    every, h = [], h0
    for start in range(0, len(xs), length):
        h, hs = jaxrnn.unroll(cell, xs[start : start + length], lax.stop_gradient(h))
        every.append(hs)
    return jnp.concatenate(every)


@pytest.mark.parametrize("form", ["rate", "voltage"])
def test_truncation_without_a_leak_equals_carrying_the_state(form):
    params, xs, h0, _ = random_case(T=7, batch=(2,), form=form)
    cell, dhs = params.cell, weights((7, 2, 5))

    def gradient(states, cell):
        return jax.grad(lambda cell: jnp.vdot(dhs, states(cell)))(cell)

    def both(cell):
        cut = gradient(lambda cell: jaxrnn.unroll(cell, xs, h0, truncate=3)[1], cell)
        return cut, gradient(lambda cell: in_chunks(cell, xs, h0, 3), cell)

    both = jax.jit(both)
    assert_close(*both(cell))
    # With a leak it is another: what the leak lets pass goes on.
    cut, carried = both(dataclasses.replace(cell, leak=jnp.asarray(0.5)))
    assert np.abs(cut.W - carried.W).max() > 0.1 * np.abs(carried.W).max()


def test_truncation_at_every_step_is_the_trace_of_rflo():
    params, xs, h0, _ = random_case(T=7, batch=(), leak=jnp.asarray(0.3))
    cell, dhs = params.cell, weights((7, 5))
    U, W, b = (np.asarray(x) for x in (cell.U, cell.W, cell.b))
    h, trace, expected = np.asarray(h0), np.zeros((5, 5)), np.zeros((5, 5))
    for x, dh in zip(np.asarray(xs), np.asarray(dhs), strict=True):
        phi = np.tanh(W @ h + U @ x + b)
        trace = (1 - 0.3) * trace + 0.3 * np.outer(1 - phi**2, h)
        expected += dh[:, None] * trace
        h = (1 - 0.3) * h + 0.3 * phi
    _, hs = jaxrnn.unroll(cell, xs, h0)
    found = jaxrnn.bptt(cell, xs, h0, hs, dhs, truncate=1).cell.W
    assert_close(found, jnp.asarray(expected))


def test_a_window_of_one_step_is_the_immediate_gradient():
    params, xs, h0, _ = random_case(T=7, batch=(), leak=jnp.asarray(0.3))
    cell, dhs = params.cell, weights((7, 5))
    _, hs = jaxrnn.unroll(cell, xs, h0)
    before = np.concatenate([h0[None], hs[:-1]])
    W, U, b = (np.asarray(x) for x in (cell.W, cell.U, cell.b))
    a = before @ W.T + np.asarray(xs) @ U.T + b
    expected = np.einsum("ti,tj->ij", 0.3 * (1 - np.tanh(a) ** 2) * dhs, before)
    assert_close(jaxrnn.bptt(cell, xs, h0, hs, dhs, window=1).cell.W, jnp.asarray(expected))


@pytest.mark.parametrize("name", ["truncate", "window", "checkpoint_every"])
@pytest.mark.parametrize("number", [2**32, 2**70])
def test_numbers_beyond_t_mean_t(name, number):
    how, (params, xs, h0, _) = {name: number}, random_case(T=T)

    def gradient(**how):
        return jax.grad(scalar(partial(jaxrnn.unroll, **how)), (0, 1, 2))(params.cell, xs, h0)

    assert_close(gradient(**how), gradient())


def test_gradients_in_a_window_are_differentiable_and_batched():
    params, xs, h0, _ = random_case(T=T)
    dhs = weights((T, 3, 5))

    def steep(cell, dhs):
        hs = jaxrnn.unroll(cell, xs, h0)[1]
        found = jaxrnn.bptt(cell, xs, h0, hs, dhs, window=2)
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(found))

    args = (params.cell, dhs)
    moved = jax.tree.map(jnp.cos, args)
    gradient = jax.tree.leaves(jax.jit(jax.grad(steep, (0, 1)))(*args))
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradient, jax.tree.leaves(moved), strict=True))
    assert_close(jax.jit(lambda *a: jax.jvp(steep, a, moved)[1])(*args), slope)
    cells = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), params.cell)
    one = jax.jit(steep)
    each = [one(jax.tree.map(lambda x, n=n: x[n], cells), dhs) for n in (0, 1)]
    assert_close(jax.jit(jax.vmap(steep, (0, None)))(cells, dhs), jnp.stack(each))


def test_checkpoints_change_no_gradient_of_ids():
    params, _, h0, targets = random_case(T=T)
    xs = jaxrnn.Ids(jnp.where(targets == 1, 7, targets))

    def gradient(every):
        def loss(cell, h0):
            h_last, hs = jaxrnn.unroll(cell, xs, h0, mask=targets != 1, checkpoint_every=every)
            return jnp.sum(jnp.sin(hs)) + jnp.sum(h_last)

        return jax.grad(loss, (0, 1))(params.cell, h0)

    assert_close(gradient(2), gradient(None))


def growing(every, of):
    """Bytes of temporaries for T = 1e3 and 1e5, nothing of which need exist."""
    batch, D, H, K = 8, 4, 32, 4

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cell = jaxrnn.Cell(shape(H, D), shape(H, H), shape(H))
    params = jaxrnn.Params(cell, jaxrnn.Readout(shape(K, H), shape(K)))
    for time in (1_000, 100_000):
        xs, ids = shape(time, batch, D), shape(time, batch, dtype=jnp.int32)
        if of == "h_last":
            yield temporaries(jax.grad(
                lambda cell, xs: jnp.sum(jaxrnn.unroll(cell, xs, checkpoint_every=every)[0]),
                (0, 1)), cell, xs)  # fmt: skip
        elif of == "lengths":
            yield temporaries(jax.grad(lambda cell, xs, lengths: jnp.sum(
                jaxrnn.unroll(cell, xs, lengths=lengths, checkpoint_every=every)[0])),
                cell, xs, shape(batch, dtype=jnp.int32))  # fmt: skip
        elif of == "vmap":
            yield temporaries(jax.grad(lambda cell, xs: jnp.sum(jax.vmap(
                lambda xs: jaxrnn.unroll(cell, xs, checkpoint_every=every)[0])(xs))),
                cell, shape(batch, time, D))  # fmt: skip
        else:
            yield temporaries(lambda params, ids, y: jaxrnn.loss_and_grads(
                params, jaxrnn.Ids(ids), y, checkpoint_every=every), params, ids, ids)  # fmt: skip


# Under vmap the mapped axis is moved behind time: one copy of the inputs.
@pytest.mark.parametrize(("of", "copied"), [
    ("h_last", (0, 0)), ("lengths", (0, 0)), ("loss_and_grads", (0, 0)),
    rare("vmap", (4 * 1_000 * 8 * 4, 4 * 100_000 * 8 * 4)),
])  # fmt: skip
def test_temporaries_grow_like_the_square_root_of_time(of, copied):
    few, many = growing("sqrt", of)
    # A hundredfold T is ten times the states and the steps of a segment, weights aside. The
    # divisors of T that are next to its root are up to 1.27 times as large.
    assert many - copied[1] <= 10 * 1.27 * (few - copied[0])
    # About √T states are kept, and of a segment of as many steps some eight arrays.
    assert many - copied[1] <= 10 * np.sqrt(1e5) * 4 * 8 * 32 * 2


def test_temporaries_grow_with_time_where_all_states_are_kept():
    few, many = growing(None, "h_last")
    states = 100_000 * 4 * 8 * 32
    # The states, and of the cotangents those of h_last alone.
    assert states < many < 1.1 * states and many > 30 * few


def test_the_last_state_alone_keeps_no_other():
    def used(time):
        xs = jax.ShapeDtypeStruct((time, 8, 4), jnp.float32)
        cell = jax.eval_shape(lambda: jaxrnn.init_cell(jax.random.key(0), 4, 32))
        return temporaries(lambda cell, xs: jaxrnn.unroll(cell, xs)[0], cell, xs)

    assert used(100_000) == used(1_000) < 10 * 4 * 8 * 32

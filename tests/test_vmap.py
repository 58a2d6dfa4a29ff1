"""vmap means the same as the batch axis, over data, over parameters, and nested."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, naive_unroll, random_case, rare, weights

import jaxrnn


def gradient(unroll, *args):
    """Of a sum over everything that a vmapped unroll returns."""

    def loss(args):
        return sum(jnp.sum(jnp.sin(out) * weights(out.shape)) for out in unroll(*args))

    return jax.jit(jax.grad(loss))(args)


def members(cell):
    return jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 0.8 * x, -x]), cell)


# name -> (in_axes of cell, xs and h0; out_axes); the mapped axis has 3 or, of members, 4 entries
AXES = {
    "batch first": ((None, 0, 0), 0),
    "batch in place": ((None, 1, 0), (0, 1)),
    "batch last": ((None, 2, 1), (1, 2)),
    "shared first state": ((None, 1, None), (0, 1)),
    "first state alone": ((None, None, 0), 0),
    "members": ((0, None, None), 0),
    "members and data": ((0, 1, 0), 0),
}


LEAKS = [
    ("batch first", 0.6), ("batch in place", None), ("batch last", None),
    ("shared first state", None), ("first state alone", None), ("members", 0.6),
    ("members and data", None),
]  # fmt: skip
LEAKS += [rare(name, leak) for name in AXES for leak in (None, 0.6) if (name, leak) not in LEAKS]


@pytest.mark.parametrize(("axes", "leak"), LEAKS)
def test_gradients_under_vmap_equal_a_naive_scan(axes, leak):
    (own, x_axis, h_axis), out = AXES[axes]
    leak = None if leak is None else jnp.asarray(leak)
    count = 4 if own == 0 else 3
    params, xs, h0, _ = random_case(batch=(), leak=leak)
    cell = members(params.cell) if own == 0 else params.cell
    if x_axis is not None:
        xs = jnp.stack([xs * (1 + 0.1 * n) for n in range(count)], x_axis)
    if h_axis is not None:
        h0 = jnp.stack([h0 * (1 + 0.1 * n) for n in range(count)], h_axis)
    found, expected = (
        gradient(jax.vmap(f, (own, x_axis, h_axis), out), cell, xs, h0)
        for f in (jaxrnn.unroll, naive_unroll)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gradients_of_a_batch_of_one_under_vmap(axis):
    params, xs, h0, _ = random_case(batch=(1,))
    xs = jnp.moveaxis(xs, 1, axis)
    found, expected = (
        gradient(jax.vmap(f, (None, axis, 0), (0, axis)), params.cell, xs, h0)
        for f in (jaxrnn.unroll, naive_unroll)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("order", ["data inside", "members inside", "members twice"])
def test_gradients_under_nested_vmap_equal_a_naive_scan(order):
    params, xs, h0, _ = random_case(batch=(2, 3))
    cells = members(params.cell)

    def nest(f):
        if order == "data inside":
            return jax.vmap(jax.vmap(f, (None, 1, 0)), (0, None, None))
        if order == "members inside":
            return jax.vmap(jax.vmap(f, (0, None, None)), (None, 1, 0))
        return jax.vmap(jax.vmap(f, (0, None, None)), (0, None, None))

    if order == "members twice":
        cells = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), cells)
    found, expected = (gradient(nest(f), cells, xs, h0) for f in (jaxrnn.unroll, naive_unroll))
    assert_close(found, expected)


def test_vmap_over_one_parameter_alone():
    params, xs, h0, _ = random_case()
    for name in ("U", "W", "b"):
        value = getattr(params.cell, name)
        stacked = jnp.stack([value, 0.5 * value])

        def with_one(f, one, xs, name=name):
            return f(dataclasses.replace(params.cell, **{name: one}), xs, h0)

        found, expected = (
            gradient(jax.vmap(lambda one, xs, f=f: with_one(f, one, xs), (0, None)), stacked, xs)
            for f in (jaxrnn.unroll, naive_unroll)
        )
        assert_close(found, expected)


def test_vmap_over_lengths_ids_and_drives_equals_the_batch():
    params, _, h0, _ = random_case()
    ids = jnp.arange(18).reshape(6, 3) % 4
    drive = weights((6, 3, 5))
    lengths = jnp.array([6, 0, 2])

    def one(ids, h0, length, drive):
        return jaxrnn.unroll(
            params.cell, jaxrnn.Ids(ids), h0, lengths=length, drive=drive, reverse=True
        )

    found = jax.vmap(one, (1, 0, 0, 1), (0, 1))(ids, h0, lengths, drive)
    expected = jaxrnn.unroll(
        params.cell, jaxrnn.Ids(ids), h0, lengths=lengths, drive=drive, reverse=True
    )
    assert_close(found, expected)


def test_gradients_of_each_sequence_add_up_to_those_of_the_batch():
    params, xs, h0, targets = random_case()

    def one(xs, h0, targets):
        return jaxrnn.loss_and_grads(params, xs, targets, h0=h0)[1].params

    each = jax.vmap(one, (1, 0, 1))(xs, h0, targets)
    _, together = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    assert_close(jax.tree.map(lambda x: jnp.sum(x, 0), each), together.params)


def test_hessian_vector_products_over_vmap_equal_a_naive_scan():
    params, xs, h0, _ = random_case()

    def product(f):
        def loss(cell):
            return jnp.sum(jnp.sin(jax.vmap(lambda x, h: f(cell, x, h)[1], (1, 0))(xs, h0)))

        return jax.jvp(jax.grad(loss), (params.cell,), (params.cell,))[1]

    assert_close(product(jaxrnn.unroll), product(naive_unroll), 6e-12)

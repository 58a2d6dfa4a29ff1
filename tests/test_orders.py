"""Second and third derivatives: the matvec of the linear solve runs only there."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, naive_unroll, random_case, weights

import jaxrnn

CELLS = {
    "tanh": {},
    "sigmoid, leaky": {"activation": "sigmoid", "leak": jnp.asarray(0.6)},
    "callable": {"activation": jnp.sin},
}
# Every order multiplies the number of summed terms by about T.
SECOND, THIRD = 1e-12 * 6, 1e-12 * 36


def case(**cell):
    params, xs, h0, _ = random_case(batch=(2,), H=4, **cell)
    args = (params.cell, xs, h0)
    direction = jax.tree.map(lambda x: weights(x.shape, x.size), args)
    return args, direction


def scalar(unroll):
    def loss(*args):
        h_last, hs = unroll(*args)
        return jnp.sum(jnp.sin(hs) * weights(hs.shape)) + jnp.sum(jnp.exp(h_last))

    return loss


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def all_args(f, args):
    return jax.grad(lambda packed: f(*packed))(args)


def forward_over_reverse(f, args, direction):
    return jax.jvp(lambda *a: all_args(f, a), args, direction)[1]


def reverse_over_forward(f, args, direction):
    return all_args(lambda *a: jax.jvp(f, a, direction)[1], args)


def reverse_over_reverse(f, args, direction):
    return all_args(lambda *a: inner(all_args(f, a), direction), args)


def forward_over_forward(f, args, direction):
    return jax.jvp(lambda *a: jax.jvp(f, a, direction)[1], args, direction)


MIXTURES = [
    forward_over_reverse, reverse_over_forward, reverse_over_reverse, forward_over_forward,
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize("product", MIXTURES, ids=lambda f: f.__name__)
def test_hessian_vector_products(product, cell):
    args, direction = case(**cell)
    found, expected = (
        jax.jit(lambda a, d, f=unroll: product(scalar(f), a, d))(args, direction)
        for unroll in (jaxrnn.unroll, naive_unroll)
    )
    assert_close(found, expected, SECOND)


@pytest.mark.parametrize("outer", MIXTURES[:3], ids=lambda f: f.__name__)
def test_third_derivatives(outer):
    args, direction = case()

    def third(unroll):
        # A scalar of the second order, differentiated once more by each mixture's first half.
        def curvature(*a):
            return inner(outer(scalar(unroll), a, direction), direction)

        return jax.jit(lambda a: (all_args(curvature, a), jax.jvp(curvature, a, direction)[1]))

    assert_close(third(jaxrnn.unroll)(args), third(naive_unroll)(args), THIRD)


@pytest.mark.parametrize("how", [{"reverse": True}, {"lengths": jnp.array([6, 3])}],
                         ids=["reverse", "lengths"])  # fmt: skip
def test_second_order_of_reverse_and_lengths(how):
    args, direction = case()

    def naive(cell, xs, h0):
        if "reverse" in how:
            h_last, hs = naive_unroll(cell, xs[::-1], h0)
            return h_last, hs[::-1]
        _, hs = naive_unroll(cell, xs, h0)
        valid = jnp.arange(6)[:, None, None] < how["lengths"][None, :, None]
        return jnp.stack([hs[5, 0], hs[2, 1]]), jnp.where(valid, hs, 0)

    def ours(cell, xs, h0):
        return jaxrnn.unroll(cell, xs, h0, **how)

    for product in MIXTURES[:3]:
        found, expected = (product(scalar(f), args, direction) for f in (ours, naive))
        assert_close(found, expected, SECOND)


def test_hessian_and_both_jacobians():
    (cell, xs, h0), _ = case()

    def every(unroll):
        hessian = jax.hessian(scalar(unroll))(cell, xs, h0)
        jacobians = [jac(unroll, argnums=(0, 1, 2))(cell, xs, h0) for jac in
                     (jax.jacfwd, jax.jacrev)]  # fmt: skip
        return hessian, jacobians

    assert_close(every(jaxrnn.unroll), every(naive_unroll), SECOND)


def test_linearize_and_its_transpose():
    args, direction = case()
    seen, push = jax.linearize(jaxrnn.unroll, *args)
    expected, tangent = jax.jvp(naive_unroll, args, direction)
    assert_close((seen, push(*direction)), (expected, tangent))
    pulled = jax.linear_transpose(push, *args)(tangent)
    assert_close(pulled, jax.vjp(naive_unroll, *args)[1](tangent))

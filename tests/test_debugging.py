"""JAX's own checks see what is inside a recurrence: jax_debug_nans, and checkify."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_case, rare
from jax.experimental import checkify

import jaxrnn

PARAMS, XS, _, TARGETS = random_case(T=4, batch=(2,), D=3, H=4)
VALID = jnp.asarray(np.arange(4)[:, None] < np.array([2, 4]))
PADDED = jnp.where(VALID[..., None], XS, jnp.nan)


def log(a):
    return jnp.log(a - 100)


def sqrt(a):
    return jnp.sqrt(a)


def checked(a):
    checkify.check(jnp.all(jnp.abs(a) < 2), "a has left its range")
    return jnp.tanh(a)


def cell(activation, **how):
    """Finite states of sqrt have a = 0, where its slope is not finite."""
    U, W, b = PARAMS.cell.U, PARAMS.cell.W, PARAMS.cell.b
    scale = 0 if activation is sqrt else 1
    return jaxrnn.Cell(scale * U, scale * W, scale * b, activation=activation, **how)


def loss(cell, xs, **how):
    return jnp.sum(jaxrnn.unroll(cell, xs, **how)[1])


def bptt(cell, xs):
    hs, h0 = jnp.zeros((4, 2, 4)), jnp.zeros((2, 4))
    return jaxrnn.bptt(cell, xs, h0, hs, jnp.ones_like(hs))


def loss_and_grads(cell, xs):
    return jaxrnn.loss_and_grads(jaxrnn.Params(cell, PARAMS.readout), xs, TARGETS)


FORWARD = {
    "unroll": jaxrnn.unroll,
    "unroll_layers": lambda cell, xs: jaxrnn.unroll_layers((cell,), xs),
}
GRADIENTS = {
    "grad": jax.grad(loss),
    "grad in segments": lambda cell, xs: jax.grad(loss)(cell, xs, checkpoint_every=2),
    "loss_and_grads": loss_and_grads,
}
BACKWARD = GRADIENTS | {"bptt": bptt}


def by_name(functions, few=()):
    """All functions, by default only few of them."""
    return pytest.mark.parametrize("f", [
        (pytest.param if name in few or not few else rare)(f, id=name)
        for name, f in functions.items()
    ])  # fmt: skip


def message(f, *args):
    """What `jax_debug_nans` says of it."""
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as raised:
        jax.block_until_ready(f(*args))
    return str(raised.value)


@by_name(FORWARD | GRADIENTS, few=("unroll", "loss_and_grads"))
def test_debug_nans_names_the_operation_of_a_nan_in_the_recurrence(f):
    assert message(f, cell(log), XS) == "invalid value (nan) encountered in scan"
    with jax.disable_jit():
        assert message(f, cell(log), XS) == "invalid value (nan) encountered in log"


@by_name(BACKWARD, few=("grad in segments", "bptt"))
def test_debug_nans_names_the_operation_of_a_nan_in_backpropagation(f):
    assert message(f, cell(sqrt), XS) == "invalid value (nan) encountered in scan"


@by_name(BACKWARD, few=("grad", "bptt"))
def test_without_jit_debug_nans_names_one_operation_of_backpropagation(f):
    with jax.disable_jit():
        assert message(f, cell(sqrt), XS) == "invalid value (nan) encountered in dot_general"


VALID_USES = {
    "NaN in the padding": lambda f: f(cell("tanh"), PADDED, mask=VALID, truncate=2),
    "NaN in the padding, voltage form": lambda f: f(
        cell("tanh", form="voltage"), PADDED, mask=VALID
    ),
    "invalid ids in the padding": lambda f: f(
        cell("tanh"), jaxrnn.Ids(jnp.where(VALID, 1, -5)), mask=VALID
    ),
}


@by_name(VALID_USES)
def test_nothing_is_reported_of_valid_uses(f):
    run = jax.value_and_grad(loss)
    with jax.debug_nans(True):
        jax.block_until_ready(f(run))
        with jax.disable_jit():
            jax.block_until_ready(f(run))
    error, _ = checkify.checkify(lambda: f(run), errors=checkify.all_checks)()
    assert error.get() is None


@pytest.mark.parametrize("rows", [False, True])
def test_nothing_is_reported_of_targets_in_the_padding(rows):
    targets = jnp.where(VALID, TARGETS, -1)
    if rows:
        targets = jnp.where(VALID[..., None], jax.nn.one_hot(TARGETS, 3), jnp.nan)
    params = jaxrnn.Params(cell("tanh"), PARAMS.readout)
    with jax.debug_nans(True):
        found = jaxrnn.loss_and_grads(params, PADDED, targets, mask=VALID)
        with jax.disable_jit():
            assert_close(jaxrnn.loss_and_grads(params, PADDED, targets, mask=VALID), found)


@pytest.mark.parametrize("without_jit", [False, True])
def test_without_jit_the_values_are_the_same(without_jit):
    run = jax.value_and_grad(lambda cell: loss(cell, PADDED, mask=VALID, truncate=2))
    expected = run(cell("tanh"))
    seen = []

    def tanh(a):
        seen.append(isinstance(a, jax.core.Tracer))
        return jnp.tanh(a)

    with jax.disable_jit(without_jit):
        assert_close(run(cell("tanh")), expected)
        jaxrnn.unroll(cell(tanh), XS)
    assert seen.count(False) == (len(XS) if without_jit else 0)


@pytest.mark.parametrize("around", [
    lambda f: checkify.checkify(f, errors=checkify.float_checks),
    lambda f: jax.jit(checkify.checkify(f, errors=checkify.float_checks)),
    lambda f: checkify.checkify(jax.jit(f), errors=checkify.float_checks),
    lambda f: lambda cell, xs: checkify.checkify(
        jax.vmap(f, (None, 0)), errors=checkify.float_checks
    )(cell, jnp.stack([xs, xs])),
    lambda f: lambda cell, xs: jax.vmap(
        checkify.checkify(f, errors=checkify.float_checks), (None, 0)
    )(cell, jnp.stack([xs, xs])),
], ids=["checkify", "jit outside", "jit inside", "vmap inside", "vmap outside"])  # fmt: skip
def test_checkify_names_the_operation_of_a_nan_in_the_recurrence(around):
    error, _ = around(jax.grad(loss))(cell(log), XS)
    assert "nan generated by primitive: log" in error.get()


@by_name(FORWARD | GRADIENTS, few=("unroll", "grad in segments", "loss_and_grads"))
def test_checkify_reports_a_nan_in_every_public_function(f):
    error, _ = checkify.checkify(f, errors=checkify.all_checks)(cell(log), XS)
    assert "nan generated by primitive: log" in error.get()


@by_name(BACKWARD, few=("grad in segments", "bptt"))
def test_checkify_names_the_operation_of_a_nan_in_backpropagation(f):
    error, _ = checkify.checkify(f, errors=checkify.nan_checks)(cell(sqrt), XS)
    assert "nan generated by primitive: dot_general" in error.get()


@pytest.mark.parametrize(("how", "activation"), [
    rare({"truncate": 2}, "tanh"), ({"truncate": 2}, checked), rare({"window": 2}, checked),
    ({"checkpoint_every": 2}, checked),
], ids=["truncate", "truncate, checked", "window, checked", "segments, checked"])  # fmt: skip
def test_derivatives_of_a_checked_program_are_those_of_the_program(how, activation):
    xs = XS / 9  # in the range

    def run(cell, errors):
        return checkify.checkify(lambda cell: loss(cell, xs, **how), errors=errors)(cell)[1]

    expected = jax.grad(loss)(cell("tanh"), xs, **how)
    found = jax.grad(run)(cell(activation), checkify.all_checks)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_second_derivatives_of_a_checked_program_are_those_of_the_program():
    def of_bias(b, activation):
        return loss(jaxrnn.Cell(PARAMS.cell.U, PARAMS.cell.W, b, activation=activation), XS / 9)

    run = checkify.checkify(lambda b: of_bias(b, checked), errors=checkify.all_checks)
    b = PARAMS.cell.b
    expected = jax.hessian(of_bias)(b, "tanh")
    assert_close(jax.hessian(lambda b: run(b)[1])(b), expected)


@by_name(FORWARD | GRADIENTS, few=("unroll", "grad in segments", "loss_and_grads"))
def test_a_check_inside_an_activation_is_reported(f):
    run = checkify.checkify(f)
    error, found = run(cell(checked), 9 * XS)
    assert "a has left its range" in error.get()
    assert_close(jax.tree.leaves(found), jax.tree.leaves(f(cell("tanh"), 9 * XS)))
    assert run(cell(checked), XS / 9)[0].get() is None


def test_a_check_inside_a_jitted_activation_is_reported():
    run = checkify.checkify(jaxrnn.unroll)
    assert "a has left its range" in run(cell(jax.jit(checked)), 9 * XS)[0].get()


def test_an_index_out_of_range_inside_an_activation_is_reported():
    table = jnp.asarray(np.linspace(0, 1, 3))

    def looked_up(a):
        return a * table.at[jnp.where(a > 100, 7, 1)].get(mode="fill")

    run = checkify.checkify(jaxrnn.unroll, errors=checkify.index_checks)
    assert run(cell(looked_up), XS)[0].get() is None
    assert "out-of-bounds" in run(cell(looked_up), 1e4 * XS)[0].get()

"""Four witnesses for every gradient: the oracle, a naive scan, central differences, JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, naive_unroll, random_case, rare, weights
from jax.test_util import check_grads
from oracle import batch_loss_and_grads

import jaxrnn
from jaxrnn import textbook


def by_oracle(params, xs, targets, h0):
    cell, readout = params.cell, params.readout
    ys = np.eye(readout.V.shape[0])[np.asarray(targets)]
    arrays = [np.asarray(a, np.float64) for a in
              (cell.U, cell.W, cell.b, readout.V, readout.c, xs, ys, h0)]  # fmt: skip
    loss, d = batch_loss_and_grads(*arrays)
    return loss, d, (d["U"], d["W"], d["b"], d["V"], d["c"])


def total_loss(params, xs, h0, targets):
    _, hs = jaxrnn.unroll(params.cell, xs, h0)
    return jnp.sum(jaxrnn.cross_entropy(jaxrnn.apply_readout(params.readout, hs), targets))


@pytest.mark.parametrize("time", [1, 2, 6])
def test_equations_of_section_3_match_the_oracle(time):
    params, xs, h0, targets = random_case(T=time)
    loss, d, expected = by_oracle(params, xs, targets, h0)
    by_hand, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    gradient = jax.jit(jax.value_and_grad(total_loss, (0, 1, 2)))
    by_jax, (d_params, d_xs, d_h0) = gradient(params, xs, h0, targets)
    leaves = tuple(jax.tree.leaves(gradients.params))
    assert_close((by_hand, leaves, gradients.h0), (loss, expected, d["h0"]))
    assert_close(
        (by_jax, tuple(jax.tree.leaves(d_params)), d_xs, d_h0), (loss, expected, d["xs"], d["h0"])
    )


def test_double_sum_of_section_3_3_matches_the_oracle():
    params, xs, h0, targets = random_case()
    loss, _, expected = by_oracle(params, xs, targets, jnp.zeros_like(h0))
    found, gradients = textbook.loss_and_grads(params, xs, targets)
    assert_close((found, tuple(jax.tree.leaves(gradients))), (loss, expected))


@pytest.mark.parametrize("leak", [None, rare(0.3), "per unit"])
def test_contributions_are_the_share_of_each_step(leak):
    if leak is not None:
        leak = jnp.linspace(0, 1, 5) if leak == "per unit" else jnp.asarray(leak)
    params, xs, _, targets = random_case(leak=leak)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (6, *x.shape)), params.cell)

    def losses(copies):
        # Step k has parameters of its own, so that a derivative by them is the (t, k) term.
        def body(h, now):
            cell, x = now
            return (h := jaxrnn.step(cell, x, h)), h

        _, hs = jax.lax.scan(body, jnp.zeros((3, 5)), (copies, xs))
        logits = jaxrnn.apply_readout(params.readout, hs)
        return jnp.sum(jaxrnn.cross_entropy(logits, targets), axis=1)

    terms = textbook.contributions(params, xs, targets)
    assert_close(terms, jax.jit(jax.jacrev(losses))(copies))
    _, gradients = jaxrnn.loss_and_grads(params, xs, targets)
    assert_close(jax.tree.map(lambda x: jnp.sum(x, (0, 1)), terms), gradients.params.cell)


CELLS = {
    "tanh": {},
    "relu": {"activation": "relu"},
    "sigmoid": {"activation": "sigmoid"},
    "identity": {"activation": "identity"},
    "callable": {"activation": jnp.sin},
    "leak": {"leak": jnp.asarray(0.3)},
    "leaks from 0 to 1": {"leak": jnp.linspace(0, 1, 5)},
    "leaky callable": {"leak": jnp.asarray(0.3), "activation": jnp.sin},
}


TIMES = [*((name, 7) for name in CELLS), ("tanh", 50)]
TIMES += [rare(name, 50) for name in CELLS if name != "tanh"]


@pytest.mark.parametrize(("name", "time"), TIMES)
def test_gradients_match_a_naive_scan(name, time):
    params, xs, h0, _ = random_case(T=time, **CELLS[name])
    seen = jaxrnn.unroll(params.cell, xs, h0)
    assert_close(seen, naive_unroll(params.cell, xs, h0))
    cotangents = (weights(seen[0].shape), weights(seen[1].shape, 8))

    def pull(unroll):
        return jax.jit(lambda *args: jax.vjp(unroll, *args)[1](cotangents))(params.cell, xs, h0)

    expected = pull(naive_unroll)
    assert_close(pull(jaxrnn.unroll), expected)
    by_hand = jaxrnn.bptt(params.cell, xs, h0, seen[1], cotangents[1], dh_last=cotangents[0])
    assert_close((by_hand.cell, by_hand.xs, by_hand.h0), expected)


def test_gradients_match_a_naive_scan_in_float32():
    params, xs, h0, _ = random_case(T=20, dtype=jnp.float32)

    def gradient(unroll, *args):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(unroll(*a)[1])), (0, 1, 2)))(*args)

    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params.cell, xs, h0))
    expected = gradient(naive_unroll, *wide)
    assert_close(gradient(jaxrnn.unroll, params.cell, xs, h0), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients_are_as_good_as_their_states(dtype):
    params, xs, h0, _ = random_case(T=20, dtype=dtype)

    def gradient(*args):
        return jax.grad(lambda *a: jnp.sum(jaxrnn.unroll(*a)[1].astype(jnp.float32)), (0, 1, 2))(
            *args
        )

    found = gradient(params.cell, xs, h0)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params.cell, xs, h0))
    _, hs = jaxrnn.unroll(params.cell, xs, h0)
    ones = jnp.ones_like(hs)
    by_hand = jaxrnn.bptt(params.cell, xs, h0, hs, ones)
    # Each state and each factor of an adjoint product is rounded once, with eps/2; through
    # Jacobians of norm ≤ 0.9 such errors add up to at most 10 of them, forward and backward.
    tolerance = 20 * float(jnp.finfo(dtype).eps) / 2
    assert_close(found, gradient(*wide), tolerance)
    assert_close((by_hand.cell, by_hand.xs, by_hand.h0), found, tolerance)


def test_gradients_agree_with_central_differences():
    params, xs, h0, targets = random_case()
    args = (params, xs, h0)
    gradient = jax.grad(total_loss, (0, 1, 2))(*args, targets)
    direction = jax.tree.map(lambda x: weights(x.shape, x.size), args)
    step = 1e-5

    def along(s):
        moved = jax.tree.map(lambda a, d: a + s * d, args, direction)
        return total_loss(*moved, targets)

    slope = (along(step) - along(-step)) / (2 * step)
    expected = sum(
        jnp.vdot(g, d)
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    # Truncation is step²·L'''/6 ≈ 1e-10, cancellation eps·L/step ≈ 1e-10.
    np.testing.assert_allclose(slope, expected, rtol=1e-8)


@pytest.mark.parametrize("name", [rare("tanh"), "leak", rare("callable")])
def test_check_grads_passes_in_both_modes_to_second_order(name):
    params, xs, h0, _ = random_case(T=4, batch=(), **CELLS[name])
    arrays, tree = jax.tree.flatten((params.cell, xs, h0))
    check_grads(
        lambda *leaves: jaxrnn.unroll(*jax.tree.unflatten(tree, leaves)), arrays, order=2,
        modes=["fwd", "rev"], atol=1e-5, rtol=1e-5, eps=1e-4,
    )  # fmt: skip


VARIANTS = {
    "plain": {},
    "lengths": {"lengths": jnp.array([7, 0, 4])},
    "mask": {"mask": jnp.arange(21).reshape(7, 3) % 4 != 1},
    "drive": {"drive": weights((7, 3, 5), 4)},
}


FEW = [("plain", False, False), ("lengths", True, True), ("mask", False, True),
       ("drive", True, False)]  # fmt: skip
FEW += [
    rare(name, ids, reverse) for name in VARIANTS for ids in (False, True)
    for reverse in (False, True) if (name, ids, reverse) not in FEW
]  # fmt: skip


@pytest.mark.parametrize(("name", "ids", "reverse"), FEW)
def test_hand_gradients_agree_with_autodiff_in_every_variant(name, ids, reverse):
    how = VARIANTS[name]
    params, xs, h0, _ = random_case(T=7, leak=jnp.asarray(0.7) if ids else None)
    if ids:
        xs = jaxrnn.Ids(jnp.arange(21).reshape(7, 3) % 4)
    drive = how.get("drive", jnp.zeros((7, 3, 5)))
    how = {name: value for name, value in how.items() if name != "drive"}

    def run(cell, h0, drive, xs=xs):
        return jaxrnn.unroll(cell, xs, h0, drive=drive, reverse=reverse, **how)

    (h_last, hs), pull = jax.vjp(run, params.cell, h0, drive, *([] if ids else [xs]))
    expected = pull((jnp.sin(h_last), jnp.cos(hs)))
    found = jaxrnn.bptt(
        params.cell, xs, h0, hs, jnp.cos(hs), dh_last=jnp.sin(h_last),
        drive=drive, reverse=reverse, **how,
    )  # fmt: skip
    assert (found.xs is None) == ids
    assert_close((found.cell, found.h0, found.delta, *([] if ids else [found.xs])), expected)


@pytest.mark.parametrize("how", [VARIANTS["lengths"], VARIANTS["mask"]], ids=["lengths", "mask"])
def test_loss_and_grads_skips_padding_that_holds_nan(how):
    params, xs, h0, targets = random_case(T=7)
    valid = how.get("mask", jnp.arange(7)[:, None] < jnp.array([[7, 0, 4]]))
    bad_xs = jnp.where(valid[..., None], xs, jnp.nan)
    loss, gradients = jaxrnn.loss_and_grads(params, bad_xs, targets, h0=h0, **how)

    def masked_loss(params, h0):
        _, hs = jaxrnn.unroll(params.cell, xs, h0, **how)
        logits = jaxrnn.apply_readout(params.readout, hs)
        return jnp.sum(jnp.where(valid, jaxrnn.cross_entropy(logits, targets), 0))

    expected = jax.value_and_grad(masked_loss, (0, 1))(params, h0)
    assert_close((loss, (gradients.params, gradients.h0)), expected)


def test_bptt_is_linear_in_its_cotangent():
    params, xs, h0, _ = random_case()
    _, hs = jaxrnn.unroll(params.cell, xs, h0)
    first, second = weights(hs.shape, 1), weights(hs.shape, 2)

    def pull(dhs):
        return jaxrnn.bptt(params.cell, xs, h0, hs, dhs)

    both = jax.tree.map(lambda a, b: 2 * a - 3 * b, pull(first), pull(second))
    assert_close(pull(2 * first - 3 * second), both)


def test_gradients_have_the_tree_of_the_parameters():
    params, xs, _, targets = random_case(activation="relu", leak=jnp.asarray(0.5))
    _, gradients = jaxrnn.loss_and_grads(params, xs, targets)
    _, by_sum = textbook.loss_and_grads(params, xs, targets)
    for tree in (gradients.params, by_sum):
        assert jax.tree.structure(tree) == jax.tree.structure(params)


@pytest.mark.parametrize("dtypes", [
    ("bfloat16", "float32", "float16", "float32"), ("bfloat16",) * 4,
    rare(("float32", "bfloat16", "float32", "bfloat16")),
    rare(("float64", "float32", "bfloat16", "float16")),
])  # fmt: skip
def test_each_gradient_has_the_dtype_of_its_argument(dtypes):
    params, xs, h0, targets = random_case()
    drive = weights((6, 3, 5))
    p, x, h, d = (jnp.dtype(name) for name in dtypes)
    params = jax.tree.map(lambda leaf: leaf.astype(p), params)
    xs, h0, drive = xs.astype(x), h0.astype(h), drive.astype(d)
    with jax.numpy_dtype_promotion("standard"):
        _, hs = jaxrnn.unroll(params.cell, xs, h0, drive=drive)
        by_hand = jaxrnn.bptt(params.cell, xs, h0, hs, hs, drive=drive)
        _, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, drive=drive)
        _, by_sum = textbook.loss_and_grads(params, xs, targets)
        terms = textbook.contributions(params, xs, targets)
        assert hs.dtype == jnp.result_type(p, x, h, d)
    for tree in (by_hand.cell, gradients.params, by_sum, terms):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {p}
    assert (by_hand.xs.dtype, by_hand.h0.dtype, by_hand.delta.dtype) == (x, h, d)
    assert gradients.h0.dtype == h


@pytest.mark.parametrize("how", [VARIANTS["lengths"], VARIANTS["mask"]], ids=["lengths", "mask"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bptt_reads_nothing_of_the_padding(how, reverse):
    params, xs, h0, _ = random_case(T=7, leak=jnp.asarray(0.7))
    how = {**how, "reverse": reverse}
    valid = how.get("mask", jnp.arange(7)[:, None] < jnp.array([[7, 0, 4]]))[..., None]
    h_last, hs = jaxrnn.unroll(params.cell, xs, h0, **how)
    clean = jaxrnn.bptt(params.cell, xs, h0, hs, hs, dh_last=h_last, **how)
    xs, hs = jnp.where(valid, xs, jnp.nan), jnp.where(valid, hs, jnp.nan)
    spoilt = jaxrnn.bptt(params.cell, xs, h0, hs, hs, dh_last=h_last, **how)
    jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
    for on_padding in (spoilt.xs, spoilt.delta):
        assert not np.any(np.where(valid, 0, on_padding))


@pytest.mark.parametrize("batch", [(), (3,), (2, 0)])
def test_empty_sequences_have_gradients_of_zero(batch):
    params, xs, h0, targets = random_case(T=0, batch=batch)
    loss, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    found, by_sum = textbook.loss_and_grads(params, xs, targets)
    assert loss == found == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((gradients.params, by_sum)))
    nothing = jnp.zeros((0, *batch, 5))
    pulled = jaxrnn.bptt(params.cell, xs, h0, nothing, nothing, dh_last=h0)
    np.testing.assert_array_equal(pulled.h0, h0)


@pytest.mark.parametrize("kind", ["uint8", rare("int8"), rare("int64")])
def test_textbook_takes_ids_of_few_bits(kind):
    params, *_ = random_case(D=300)
    ids, targets = np.array([3, 100, 120], kind), jnp.array([0, 2, 1])
    found = textbook.loss_and_grads(params, jaxrnn.Ids(ids), targets)[1]
    expected = jaxrnn.loss_and_grads(params, jaxrnn.Ids(jnp.asarray(ids, jnp.int32)), targets)[1]
    assert_close(found, expected.params)

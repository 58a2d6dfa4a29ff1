"""The loss, its gradient by hand and the output layer."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_case, rare

import jaxrnn
from jaxrnn import Cell, Ids, Params, Readout, textbook
from jaxrnn._core.loss import output_error

T, B, K = 4, 3, 5
EPS = 2.0**-52
RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.normal(size=(T, B, K))
IDS = RNG.integers(K, size=(T, B))
WHERE = RNG.random((T, B)) < 0.6
TARGETS = {
    "ids": IDS,
    "one_hot": np.eye(K)[IDS],
    "soft": RNG.uniform(size=(T, B, K)),  # Rows that sum to something else than 1.
}
# A sum of K = 5 exponentials, a logarithm or a division, and K products with the targets:
# 16 roundings of numbers that are no larger than the largest result (about 10 and 1).
LOSS = 16 * EPS


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def rows(targets):
    return np.eye(K)[targets] if targets.ndim == 2 else targets


def close(actual, expected, tolerance=LOSS):
    expected = np.asarray(expected)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", TARGETS)
def test_cross_entropy_is_log_sum_exp(kind):
    losses = jaxrnn.cross_entropy(LOGITS, TARGETS[kind])
    assert losses.shape == (T, B) and losses.dtype == jnp.float64
    close(losses, -(rows(TARGETS[kind]) * log_softmax(LOGITS)).sum(-1))


def test_cross_entropy_takes_one_step():
    close(jaxrnn.cross_entropy(LOGITS[0, 0], IDS[0, 0]), -log_softmax(LOGITS)[0, 0, IDS[0, 0]])


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_logits_are_exact(dtype, one_hot):
    # exp(−2e4) is 0 in both dtypes, so that every number below is exact.
    logits = np.array([[1e4, -1e4, -1e4], [1e4, -1e4, -1e4], [-1e4, 1e4, 1e4]], dtype)
    ids = np.array([0, 1, 0])
    targets = np.eye(3, dtype=dtype)[ids] if one_hot else ids
    loss = jax.jit(jaxrnn.cross_entropy)
    losses = loss(logits, targets)
    # ln 2 is lost beside 2e4 in float32, whose spacing there is 2e-3, and rounded to it.
    expected = np.array([0, 2e4, 2e4 + np.log(2)])
    np.testing.assert_allclose(losses, expected, rtol=jnp.finfo(dtype).eps, atol=0)
    gradient = jax.grad(lambda x: loss(x, targets).sum())(logits)
    expected = [[0, 0, 0], [1, -1, 0], [-1, 0.5, 0.5]]
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(output_error(jnp.array(logits), jnp.array(targets)), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TARGETS)
def test_uncounted_steps_have_no_loss_and_no_gradient(kind, bad):
    logits = np.where(WHERE[..., None], LOGITS, bad)
    targets = TARGETS[kind]
    if kind == "ids":
        targets = np.where(WHERE, targets, -1)
    else:
        targets = np.where(WHERE[..., None], targets, bad)

    # Eagerly, where the ids are looked at; the gradient compiled, for speed.
    losses = jaxrnn.cross_entropy(logits, targets, where=WHERE)
    loss = jax.jit(lambda x: jaxrnn.cross_entropy(x, targets, where=WHERE).sum())
    gradient = jax.grad(loss)(logits)
    everywhere = np.asarray(jaxrnn.cross_entropy(LOGITS, TARGETS[kind]))
    np.testing.assert_array_equal(np.asarray(losses)[~WHERE], 0)
    close(np.asarray(losses)[WHERE], everywhere[WHERE])
    np.testing.assert_array_equal(np.asarray(gradient)[~WHERE], 0)
    y = rows(TARGETS[kind])
    expected = y.sum(-1, keepdims=True) * np.exp(log_softmax(LOGITS)) - y
    close(np.asarray(gradient)[WHERE], expected[WHERE])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["ids", "one_hot"])
def test_half_precision_returns_float32(kind, dtype):
    logits = jnp.asarray(LOGITS, dtype)
    targets = jnp.asarray(TARGETS[kind], None if kind == "ids" else dtype)
    losses = jaxrnn.cross_entropy(logits, targets)
    assert losses.dtype == jnp.float32
    # Computed in float32 all along: the same roundings as above, of float32.
    expected = -(rows(TARGETS[kind]) * log_softmax(logits)).sum(-1)
    close(losses, expected, 16 * 2.0**-23)
    assert output_error(logits, targets).dtype == jnp.float32


# A class that cannot be, and is not: its logit is −inf, its target 0. In one row there are two.
MASKED = LOGITS.copy()
MASKED[..., 1] = MASKED[0, 0, 3] = -np.inf
OTHERS = RNG.choice([0, 2, 4], size=(T, B))
SOFT = np.where(MASKED == -np.inf, 0, TARGETS["soft"])
MASKED_TARGETS = {"ids": OTHERS, "one_hot": np.eye(K)[OTHERS], "soft": SOFT}


DTYPES = [("ids", "float64"), ("soft", "float32"), ("one_hot", "bfloat16"), ("ids", "float16")]
DTYPES += [
    rare(kind, dtype) for kind in TARGETS for dtype in ("float64", "float32", "bfloat16", "float16")
    if (kind, dtype) not in DTYPES
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_an_impossible_class_costs_nothing(kind, dtype):
    logits = jnp.asarray(MASKED, dtype)
    targets = jnp.asarray(MASKED_TARGETS[kind], None if kind == "ids" else dtype)
    # As if it were not there: exp(−1e5) is 0 in every dtype, and 0 · 1e5 too.
    finite = np.maximum(np.asarray(logits, np.float64), -1e5)
    y = rows(np.asarray(MASKED_TARGETS[kind] if kind == "ids" else targets.astype("float64")))
    p = np.exp(log_softmax(finite))
    eps = min(float(jnp.finfo(dtype).eps), 2.0**-23)  # sums are float32 or better
    for call in (
        jaxrnn.cross_entropy,
        jax.jit(jaxrnn.cross_entropy),
        jax.vmap(jaxrnn.cross_entropy),
    ):
        close(call(logits, targets), -(y * log_softmax(finite)).sum(-1), 16 * eps)
    error = y.sum(-1, keepdims=True) * p - y
    close(output_error(logits, targets), error, 16 * eps)
    loss = jax.jit(lambda x, y: jaxrnn.cross_entropy(x, y).sum())
    # Rounded to the dtype of the logits.
    close(jax.grad(loss)(logits, targets), error, 16 * max(eps, float(jnp.finfo(dtype).eps)))
    curvature = jax.jacfwd(jax.grad(loss))(logits[0, 0], targets[0, 0])
    expected = y[0, 0].sum() * (np.diag(p[0, 0]) - np.outer(p[0, 0], p[0, 0]))
    close(curvature, expected, 16 * max(eps, float(jnp.finfo(dtype).eps)))


def test_gradients_by_soft_targets_are_minus_the_log_probabilities():
    loss = jax.jit(lambda x, y: jaxrnn.cross_entropy(x, y).sum())
    for logits, y in ((LOGITS, np.eye(K)[IDS]), (MASKED, SOFT)):
        gradient = jax.grad(loss, 1)(logits, y)
        close(gradient, np.where(logits == -np.inf, 0, -log_softmax(logits)))
        mixed = jax.jacfwd(jax.grad(loss, 1))(logits[0, 0], y[0, 0])
        p = np.exp(log_softmax(logits[0, 0]))
        close(mixed, np.where(logits[0, 0][:, None] == -np.inf, 0, p - np.eye(K)))


@pytest.mark.parametrize("target", [1, [0.5, 0.5], [0.0, 1.0]])
def test_a_target_of_an_impossible_class_has_infinite_loss(target):
    logits, target = jnp.array([0.0, -np.inf]), np.asarray(target)
    assert jaxrnn.cross_entropy(logits, target) == np.inf
    y = np.eye(2)[target] if target.ndim == 0 else target
    np.testing.assert_array_equal(jax.grad(jaxrnn.cross_entropy)(logits, target), [1, 0] - y)


HOWS = [{}, {"checkpoint_every": 2}, {"window": 2}]
GRADIENTS = [textbook.loss_and_grads, *(partial(jaxrnn.loss_and_grads, **how) for how in HOWS)]


CALLS = dict(zip(["textbook", *map(str, HOWS)], GRADIENTS, strict=True))
CASES = [("textbook", "ids"), (str(HOWS[1]), "soft")]
CASES += [rare(call, kind) for call in CALLS for kind in TARGETS if (call, kind) not in CASES]


@pytest.mark.parametrize(("call", "kind"), CASES)
def test_a_bias_of_minus_infinity_masks_a_class(call, kind):
    call = CALLS[call]
    params = jaxrnn.init_params(jax.random.key(0), 4, 6, K, dtype=jnp.float64)
    V, c = params.readout.V, params.readout.c
    without = Params(params.cell, Readout(V[np.arange(K) != 1], c[np.arange(K) != 1]))
    params = Params(params.cell, Readout(V, c.at[1].set(-jnp.inf)))
    ids, targets = IDS % 4, {**MASKED_TARGETS, "soft": TARGETS["soft"] * (np.arange(K) != 1)}[kind]
    kept = np.array([0, -1, 1, 2, 3])[targets] if kind == "ids" else np.delete(targets, 1, -1)
    loss, found = jax.jit(call)(params, Ids(ids), targets)
    wanted, expected = jax.jit(call)(without, Ids(ids), kept)
    found, expected = (getattr(g, "params", g) for g in (found, expected))
    close(loss, wanted, T * B * LOSS)
    np.testing.assert_array_equal(found.readout.V[1], 0)
    assert found.readout.c[1] == 0
    close(found.cell.W, expected.cell.W, T * B * LOSS)
    close(np.delete(found.readout.V, 1, 0), expected.readout.V, T * B * LOSS)

    def moved(params):
        found = call(params, Ids(ids), targets)[1]
        return sum(map(jnp.sum, jax.tree.leaves(getattr(found, "params", found))))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(moved))(params)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("bfloat16", "float64")])
def test_a_readout_may_be_wider_than_the_cell(dtypes):
    """Over several segments, whose shares are added up in the dtype of the error."""
    params = jaxrnn.init_params(jax.random.key(0), 2, 64, K, dtype=dtypes[0])
    readout = jax.tree.map(lambda x: x.astype(dtypes[1]), params.readout)
    xs, targets = jnp.zeros((2048, 16, 2), dtypes[0]), np.zeros((2048, 16), int)
    with jax.numpy_dtype_promotion("standard"):
        call = jax.jit(jaxrnn.loss_and_grads)
        loss, found = jax.eval_shape(call, Params(params.cell, readout), xs, targets)
    assert loss.dtype == dtypes[1]
    assert {x.dtype for x in jax.tree.leaves(found.params.cell)} == {jnp.dtype(dtypes[0])}
    assert {x.dtype for x in jax.tree.leaves(found.params.readout)} == {jnp.dtype(dtypes[1])}


@pytest.mark.parametrize("bad", [-1, K, 10**6])
def test_an_invalid_target_under_jit_makes_its_loss_alone_nan(bad):
    targets = IDS.copy()
    targets[1, 2] = bad
    losses = np.array(jax.jit(jaxrnn.cross_entropy)(LOGITS, targets))
    assert np.isnan(losses[1, 2])
    losses[1, 2] = -log_softmax(LOGITS)[1, 2, IDS[1, 2]]
    close(losses, jaxrnn.cross_entropy(LOGITS, IDS))


@pytest.mark.parametrize("call", [jaxrnn.loss_and_grads, textbook.loss_and_grads])
@pytest.mark.parametrize("wrong", ["xs", "targets"])
def test_an_invalid_id_under_jit_makes_the_loss_nan(call, wrong):
    params = Params(
        Cell(np.ones((3, K)), np.eye(3), np.ones(3)), Readout(np.ones((K, 3)), np.ones(K))
    )
    ids = {"xs": IDS, "targets": IDS, wrong: np.full_like(IDS, -1)}
    loss, _ = jax.jit(call)(params, Ids(ids["xs"]), ids["targets"])
    assert np.isnan(loss)


@pytest.mark.parametrize(("dtype", "size"), [("uint8", 256), ("int8", 200)])
def test_targets_may_be_of_few_bits(dtype, size):
    # The number of classes itself does not fit into the dtype of the ids: bytes, say.
    ids = np.array([3, 100], dtype)
    logits = np.random.default_rng(1).normal(size=(2, size))
    expected = -log_softmax(logits)[[0, 1], ids]
    # A sum of at most 256 terms.
    close(jaxrnn.cross_entropy(logits, ids), expected, 256 * EPS)


@pytest.mark.parametrize("where", [None, WHERE])
@pytest.mark.parametrize("kind", TARGETS)
def test_output_error_is_the_gradient_of_the_summed_loss(kind, where):
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(TARGETS[kind])
    if where is not None:
        logits = jnp.asarray(np.where(where[..., None], LOGITS, np.nan))
    found = jax.jit(output_error)(logits, targets, where)
    loss = jax.jit(lambda x: jaxrnn.cross_entropy(x, targets, where=where).sum())
    expected = jax.grad(loss)(logits)
    assert np.isfinite(found).all() and np.abs(found).max() > 0.1
    close(found, expected)


@pytest.mark.parametrize("batch", [(), (3,), (T, B)])
def test_apply_readout_is_the_formula(batch):
    V, c, hs = (RNG.normal(size=shape) for shape in [(K, 6), K, (*batch, 6)])
    logits = jaxrnn.apply_readout(Readout(V, c), hs)
    # Sums of 7 terms, each no larger than about the largest result.
    close(logits, hs @ V.T + c, 8 * EPS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_apply_readout_rounds_once(dtype):
    H = 256
    V, c, hs = (jnp.asarray(RNG.uniform(size=shape), dtype) for shape in [(K, H), K, (T, H)])
    logits = jaxrnn.apply_readout(Readout(V, c), hs)
    assert logits.dtype == dtype
    V, c, hs = (np.asarray(x, np.float64) for x in (V, c, hs))
    # Half an ulp of the result, and H additions in float32, each of half an eps at most. All
    # terms are positive: a sum formed in half precision would be off by many ulp.
    rounding = float(jnp.finfo(dtype).eps) / 2 + H * 2.0**-24
    np.testing.assert_allclose(np.asarray(logits, np.float64), hs @ V.T + c, rtol=rounding)


KEPT = {
    "leak": ({"leak": jnp.asarray(0.3)}, {}),
    "relu with a leak": ({"leak": jnp.asarray(0.3), "activation": "relu"}, {}),
    "a callable, truncated": ({"activation": jnp.sin}, {"truncate": 2}),
    "voltage": ({"leak": jnp.asarray(0.3), "form": "voltage"}, {}),
    "custom, truncated": (
        {
            "form": jaxrnn.Form(lambda a, h, p: p * jnp.sin(h) + jnp.tanh(a), lambda h, p: h * p),
            "parameters": jnp.linspace(0.2, 0.8, 5),
        },
        {"truncate": 2},
    ),
}


@pytest.mark.parametrize("name", ["leak", "custom, truncated", *map(rare, list(KEPT)[1:4])])
def test_gradients_by_hand_are_differentiable_in_every_form(name):
    network, how = KEPT[name]
    params, xs, h0, targets = random_case(T=4)
    params = replace(params, cell=replace(params.cell, **network))

    def by_hand(params, h0):
        return jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how)[1].params

    def by_jax(params, h0):
        def loss(params):
            hs = jaxrnn.unroll(params.cell, xs, h0, **how)[1]
            Omega = jaxrnn.apply_readout(params.readout, jaxrnn.outputs(params.cell, hs))
            return jnp.sum(jaxrnn.cross_entropy(Omega, targets))

        return jax.grad(loss)(params)

    found, expected = (
        jax.jit(lambda *args, f=f: jax.jvp(f, args, args))(params, h0) for f in (by_hand, by_jax)
    )
    assert_close(found, expected)

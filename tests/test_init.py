"""Initial parameters: what is drawn, how large, and in which dtype.

Statistics are those of one fixed draw, and the bounds are five standard deviations of the
statistic wide: a right initialiser fails with odds of 1 in 1.7 million, once and for all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import jaxrnn

D, H, K = 64, 128, 32
SIGMAS = 5
RECURRENT = ("orthogonal", "identity", "normal", "uniform")


def init(seed=0, **how):
    cell = jaxrnn.init_cell(random.key(seed), D, H, dtype=jnp.float64, **how)
    return jax.tree.map(np.asarray, cell)


def has_std(values, std, fourth_moment=3.0):
    """The mean is 0 and the standard deviation is std, as far as n values tell."""
    n = values.size
    # The variance of a sample variance is (κ − 1) σ⁴ / n, κ the fourth moment in σ⁴; half of
    # its relative error is that of the standard deviation.
    relative = np.sqrt((fourth_moment - 1) / n) / 2
    assert abs(values.mean()) < SIGMAS * std / np.sqrt(n)
    assert abs(values.std() / std - 1) < SIGMAS * relative


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_orthogonal_is_orthogonal(dtype):
    W = jaxrnn.init_cell(random.key(0), D, H, dtype=dtype).W
    W = np.asarray(W, np.float64)
    # Householder QR errs by eps·H at most, and rounding each entry by eps / 2 changes a row
    # of norm 1 by eps / 2.
    bound = float(jnp.finfo(dtype).eps) * H
    np.testing.assert_allclose(W @ W.T, np.eye(H), rtol=0, atol=bound)


def test_orthogonal_draws_both_signs_alike():
    # A QR without its signs mended draws W[0, 0] of one sign only.
    n = 400
    draw = jax.jit(jax.vmap(lambda key: jaxrnn.init_cell(key, 1, 2).W))
    W = np.asarray(draw(random.split(random.key(0), n)))
    for positive in (W[:, 0, 0] > 0, W[:, 1, 1] > 0, np.linalg.det(W) > 0):
        assert abs(positive.mean() - 0.5) < SIGMAS * 0.5 / np.sqrt(n)


def test_identity_is_the_identity():
    np.testing.assert_array_equal(init(recurrent="identity").W, np.eye(H))


def test_normal_has_variance_one_over_H():
    W = init(recurrent="normal").W
    has_std(W, H**-0.5)
    # Not cut off: the largest of 16,384 normal numbers is beyond 3 σ (odds e⁻⁴⁴ otherwise).
    assert np.abs(W).max() > 3 * H**-0.5


def test_uniform_fills_its_bounds():
    cell = init(recurrent="uniform")
    bound = H**-0.5
    for values in (cell.W, cell.U):
        assert np.abs(values).max() <= bound
        # The largest of n is below (1 − 14 / n) of the bound with odds e⁻¹⁴, as 5 σ have.
        assert np.abs(values).max() > (1 - 14 / values.size) * bound
        has_std(values, bound / np.sqrt(3), fourth_moment=9 / 5)


@pytest.mark.parametrize("recurrent", ["orthogonal", "identity", "normal"])
def test_U_has_variance_one_over_D(recurrent):
    # Truncated at 2 σ, so that the fourth moment is below 3.
    has_std(init(recurrent=recurrent).U, D**-0.5)


def test_V_has_variance_one_over_H_and_the_cell_is_that_of_init_cell():
    params = jaxrnn.init_params(random.key(0), D, H, K, gain=1.5, recurrent="normal")
    assert params.readout.V.shape == (K, H) and params.readout.c.shape == (K,)
    has_std(np.asarray(params.readout.V, np.float64), H**-0.5)
    has_std(np.asarray(params.cell.W, np.float64), 1.5 * H**-0.5)


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_gain_scales_W_alone(recurrent):
    one, other = init(recurrent=recurrent), init(recurrent=recurrent, gain=1.7)
    np.testing.assert_array_equal(other.W, 1.7 * one.W)
    np.testing.assert_array_equal(other.U, one.U)


@pytest.mark.parametrize(
    ("dtype", "recurrent"),
    [
        ("bfloat16", "orthogonal"),
        ("bfloat16", "normal"),
        ("float16", "uniform"),
        ("float16", "identity"),
        ("float32", "normal"),
        ("float64", "orthogonal"),
    ],
)
def test_half_precision_rounds_a_draw_in_float32(dtype, recurrent):
    make = dict(recurrent=recurrent, leak=0.3)
    params = jaxrnn.init_params(random.key(1), 3, 4, 2, dtype=dtype, **make)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    assert params.cell.leak == jnp.asarray(0.3, dtype)
    # Half precision is drawn in float32 and rounded.
    wide = "float64" if dtype == "float64" else "float32"
    drawn = jaxrnn.init_params(random.key(1), 3, 4, 2, dtype=wide,
                               **make)  # fmt: skip
    for leaf, full in zip(jax.tree.leaves(params), jax.tree.leaves(drawn), strict=True):
        np.testing.assert_array_equal(leaf, full.astype(dtype))


@pytest.mark.parametrize("leak", [0.25, np.full(4, 0.25)])
def test_leak_and_activation_stay_on_the_cell(leak):
    cell = jaxrnn.init_cell(random.key(0), 3, 4, leak=leak, activation="relu")
    assert cell.activation == "relu" and cell.leak.shape == np.shape(leak)
    assert jaxrnn.init_cell(random.key(0), 3, 4).leak is None


def test_draws_depend_on_the_key_and_are_independent():
    make = dict(recurrent="normal", dtype=jnp.float64)
    one, again, other = (jaxrnn.init_params(random.key(s), 8, 8, 8, **make) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    drawn = [m for p in (one, other) for m in (p.cell.U, p.cell.W, p.readout.V)]
    # The correlation of 64 independent pairs has a standard deviation of 1/8.
    correlations = np.abs(np.corrcoef([np.ravel(m) for m in drawn]) - np.eye(len(drawn)))
    assert correlations.max() < SIGMAS / 8


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_biases_are_zero(recurrent):
    params = jaxrnn.init_params(random.key(2), 3, 4, 2, recurrent=recurrent)
    np.testing.assert_array_equal(params.cell.b, np.zeros(4))
    np.testing.assert_array_equal(params.readout.c, np.zeros(2))


@pytest.mark.parametrize("make", [random.key, random.PRNGKey])
def test_more_layers_change_neither_the_first_nor_the_readout(make):
    def draw(layers):
        return jaxrnn.init_params(make(3), 4, 5, 2, layers=layers, recurrent="normal")

    one, two, three = draw(1), draw(2), draw(3)
    assert one.cell == two.cell[0] == three.cell[0] and two.cell == three.cell[:2]
    assert one.readout == two.readout == three.readout
    key_cell, _ = random.split(make(3))
    assert one.cell == jaxrnn.init_cell(key_cell, 4, 5, recurrent="normal")
    # The correlation of 25 independent pairs has a standard deviation of 1/5.
    drawn = [np.ravel(m) for cell in three.cell for m in (cell.W, cell.U) if m.size == 25]
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < SIGMAS / 5


@pytest.mark.parametrize(
    ("layers", "recurrent"), [(2, "orthogonal"), (1, "identity"), (3, "normal"), (1, "uniform")]
)
def test_every_key_is_used_once(layers, recurrent):
    with jax.debug_key_reuse(True):
        jaxrnn.init_cell(random.key(0), 3, 4, recurrent=recurrent)
        jaxrnn.init_params(random.key(0), 3, 4, 2, layers=layers, recurrent=recurrent)
        key = random.key(0)
        jax.jit(lambda key: jaxrnn.init_params(key, 3, 4, 2, layers=layers).readout)(key)
        with pytest.raises(jax.errors.KeyReuseError):  # it looks
            random.normal(key)

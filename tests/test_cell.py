"""The dataclasses as pytrees, the activations and one step."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FUNCTIONS, assert_close
from jax import random

import jaxrnn
from jaxrnn import Activation, Cell, Ids, Params, Readout
from jaxrnn._base.forms import resolve, slope

EPS = 2.0**-52
D, H, K = 4, 5, 3
NUMPY = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "identity": lambda a: a,
}
# XLA's tanh errs by up to 4.6 ulp below 1 on the CPU (measured), each eps / 2: 8 allowed.
TANH = 4
# One step sums D + H + 1 = 10 terms and applies the function; the largest entry of each
# result is no smaller than these terms by more than a factor 2.
STEP = 2 * (10 + TANH) * EPS


def case(batch=(3,), **changes):
    """Params, x and h, drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(0)
    U, W, b, V, c = (rng.normal(size=shape) / 2 for shape in [(H, D), (H, H), H, (K, H), K])
    params = Params(Cell(U, W, b, **changes), Readout(V, c))
    return params, rng.normal(size=(*batch, D)), rng.normal(size=(*batch, H))


def counted():
    """Tanh that notes each time it is traced."""
    traces = []

    def phi(a):
        if a.shape != (1, 1):  # the shape with which arguments are checked, at every call
            traces.append(a.shape)
        return jnp.tanh(a)

    return phi, traces


def numpy_step(cell, x, h):
    U, W, b = (np.asarray(leaf) for leaf in (cell.U, cell.W, cell.b))
    phi = NUMPY[cell.activation](np.asarray(x) @ U.T + np.asarray(h) @ W.T + b)
    alpha = 1.0 if cell.leak is None else np.asarray(cell.leak)
    return (1 - alpha) * np.asarray(h) + alpha * phi


@pytest.mark.parametrize("leak", [None, 0.3])
def test_every_dataclass_is_a_pytree(leak):
    params, x, h = case(leak=leak)
    gradients = jaxrnn.CellGradients(params.cell, x, h, h, h)
    for tree in (params, Ids(x), gradients, jaxrnn.Gradients(params, h, h)):
        leaves, treedef = jax.tree.flatten(tree)
        again = jax.tree.unflatten(treedef, leaves)
        assert type(again) is type(tree)
        for field in dataclasses.fields(tree):
            one, other = getattr(again, field.name), getattr(tree, field.name)
            assert jax.tree.structure(one) == jax.tree.structure(other)
        assert all(a is b for a, b in zip(jax.tree.leaves(again), leaves, strict=True))
    assert len(jax.tree.leaves(params)) == (5 if leak is None else 6)


def test_pytree_paths_name_the_fields():
    params, *_ = case(leak=0.5)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert names == [".cell.U", ".cell.W", ".cell.b", ".cell.leak", ".readout.V", ".readout.c"]


def test_activation_is_static_under_transformations():
    cell = case()[0].cell
    relu = dataclasses.replace(cell, activation="relu")
    assert relu.W is cell.W
    assert jax.tree.map(lambda leaf: 2 * leaf, relu).activation == "relu"
    assert jax.tree.structure(relu) != jax.tree.structure(cell)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.activation = "relu"
    # Two activations are equal when their functions are.
    phi, _ = counted()
    one, other = (dataclasses.replace(cell, activation=Activation(phi)) for _ in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    other = dataclasses.replace(cell, activation=Activation(phi, jnp.ones_like))
    assert jax.tree.structure(one) != jax.tree.structure(other)


def test_jit_compiles_once_for_equal_cells():
    phi, traces = counted()
    params, x, h = case(activation=Activation(phi))
    run = jax.jit(jaxrnn.step)
    run(params.cell, x, h)
    first = len(traces)
    assert first > 0
    # Other values, a rebuilt cell, an equal Activation: nothing to trace.
    run(jax.tree.map(lambda leaf: leaf / 2, params.cell), 2 * x, h)
    run(dataclasses.replace(params.cell, activation=Activation(phi)), x, h)
    assert len(traces) == first
    other, others = counted()
    run(dataclasses.replace(params.cell, activation=Activation(other)), x, h)
    assert len(traces) == first and others


@pytest.mark.parametrize("leak", [None, (), (H,)])
@pytest.mark.parametrize("activation", NUMPY)
def test_step_is_the_formula(activation, leak):
    leak = None if leak is None else np.random.default_rng(4).uniform(size=leak)
    for batch in [(), (3,), (2, 3)]:
        params, x, h = case(batch, activation=activation, leak=leak)
        new = jaxrnn.step(params.cell, x, h)
        assert isinstance(new, jax.Array)
        assert_close(new, numpy_step(params.cell, x, h), STEP)


@pytest.mark.parametrize("activation", ["tanh", Activation(jnp.tanh), jnp.tanh])
def test_an_activation_is_a_name_an_activation_or_a_callable(activation):
    params, x, h = case(activation=activation)
    assert_close(jaxrnn.step(params.cell, x, h), numpy_step(case()[0].cell, x, h), STEP)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_ids_equal_one_hot_rows(batch):
    params, _, h = case(batch)
    ids = np.random.default_rng(3).integers(D, size=batch)
    expected = numpy_step(params.cell, np.eye(D)[ids], h)
    assert_close(jaxrnn.step(params.cell, Ids(ids), h), expected, STEP)


@pytest.mark.parametrize(("dtype", "size"), [("uint8", 256), ("int8", 200)])
def test_step_takes_ids_of_few_bits(dtype, size):
    # D itself does not fit into the dtype of the ids: bytes, say.
    rng = np.random.default_rng(1)
    params, _, h = case((2,))
    cell = dataclasses.replace(params.cell, U=rng.normal(size=(H, size)))
    ids = np.array([3, 100], dtype)
    expected = numpy_step(cell, np.eye(size)[ids], h)
    assert_close(jaxrnn.step(cell, Ids(ids), h), expected, STEP)
    assert_close(jaxrnn.unroll(cell, Ids(ids[None]), h)[0], expected, STEP)


@pytest.mark.parametrize("bad", [-1, D, D + 1])
def test_an_invalid_id_under_jit_makes_its_state_alone_nan(bad):
    params, _, h = case()
    new = np.asarray(jax.jit(jaxrnn.step)(params.cell, Ids(np.array([1, bad, 2])), h))
    assert np.isnan(new[1]).all() and np.isfinite(new[[0, 2]]).all()


@pytest.mark.parametrize(
    ("cell", "x", "h", "expected"),
    [
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16", "float16"),
        ("float64", "float64", "float64", "float64"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "float32", "float32"),
        ("bfloat16", "float16", "bfloat16", "float32"),
        ("float16", "float16", "float64", "float64"),
        ("float32", "float64", "float16", "float64"),
        ("bfloat16", "ids", "bfloat16", "bfloat16"),
        ("float16", "ids", "float32", "float32"),
    ],
)
def test_the_result_has_the_promoted_dtype(cell, x, h, expected):
    params, inputs, state = case(())
    params = jax.tree.map(lambda leaf: leaf.astype(cell), params)
    x = Ids(np.array(1)) if x == "ids" else inputs.astype(x)
    with jax.numpy_dtype_promotion("standard"):
        result = jaxrnn.step(params.cell, x, state.astype(h))
        logits = jaxrnn.apply_readout(params.readout, result)
        xs = jax.tree.map(lambda x: x[None], x)
        h_last, hs = jax.eval_shape(jaxrnn.unroll, params.cell, xs, state.astype(h))
    assert result.dtype == h_last.dtype == hs.dtype == expected
    assert logits.dtype == expected  # The cell's dtype, and so the readout's, is part of it.


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_slope_of_saturated_tanh_is_exact_to_eps(dtype):
    eps = float(jnp.finfo(dtype).eps)
    a = np.linspace(0.1, 18 if dtype == "float64" else 7, 500).astype(dtype)
    tanh = resolve("tanh")
    h = np.asarray(tanh.function(a))
    found = np.asarray(tanh.derivative_from_output(h), np.float64)
    # Given the state as it is rounded: 1 − h is exact from 1/2 on, 1 + h and the product are
    # rounded once each, by eps / 2; below 1/2 so is 1 − h. Three half eps, and 1 to spare.
    exact = np.array([float(1 - Fraction(float(state)) ** 2) for state in h])
    np.testing.assert_allclose(found, exact, rtol=2 * eps, atol=0)
    # Given a: 1 + h doubles the error of tanh.
    exactly_of_a = 1 / np.cosh(a.astype(float)) ** 2
    np.testing.assert_allclose(found, exactly_of_a, rtol=0, atol=2 * TANH * eps)
    # The formula that this one replaces fails the first line: near 1 − h = √eps the rounding of
    # h² costs half of the digits.
    naive = (1 - h * h).astype(float)
    assert np.abs(naive / exact - 1).max() > np.sqrt(eps) / 10


def test_relu_at_zero_has_the_slope_of_jax():
    zeros = jnp.array([0.0, -0.0])
    expected = jax.vmap(jax.grad(jax.nn.relu))(zeros)
    relu = resolve("relu")
    np.testing.assert_array_equal(slope(relu, relu.function(zeros), zeros), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_from_output_is_the_derivative(name, dtype):
    activation = resolve(name)
    a = (2 * random.normal(random.key(0), (200,), jnp.float64)).astype(dtype)
    expected = jax.vmap(jax.grad(lambda a: FUNCTIONS[name](a.astype(float))))(a.astype(float))
    found = slope(activation, activation.function(a), a)
    assert found.dtype == dtype
    # Where the slope depends on the output it has at most twice the error of that, and two
    # roundings more.
    tolerance = (2 * TANH + 2) * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=tolerance)


def test_slope_without_derivative_from_output_comes_from_jax():
    a = np.linspace(-3, 3, 50)
    found = slope(resolve(jnp.sin), np.sin(a), a)
    # One call of cos, good to a few ulp.
    np.testing.assert_allclose(found, np.cos(a), rtol=0, atol=4 * EPS)


def test_the_jacobian_of_a_step_is_slope_times_w():
    params, x, h = case(())
    J = jax.jacobian(jaxrnn.step, argnums=2)(params.cell, x, h)
    slopes = 1 - numpy_step(params.cell, x, h) ** 2
    assert_close(J, slopes[:, None] * params.cell.W, STEP)

"""A cell inside modules of flax.nnx, flax.linen, equinox and haiku, trained in their own idiom.

Each model is a cell and a linear readout. The function below each imports its library, builds the
model, and gives what the tests need of it. README.md shows the models.
"""

import io
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

import jaxrnn

T, B, D, H = 6, 4, 3, 8
STEPS = 40


class Trained(NamedTuple):
    """A model before training, its gradient, and what became of it.

    Args:
      cell: the cell of the untrained model.
      readout: weights `[1, H]` and bias `[1]` of its linear layer.
      gradient: the loss's by the cell, of the untrained model, as the library takes it.
      losses: of the updates, in order.
      restored: whether the trained model's outputs are exact after it was split or written, and
        put together again.
    """

    cell: jaxrnn.Cell
    readout: tuple[Any, Any]
    gradient: jaxrnn.Cell
    losses: list[float]
    restored: bool


@contextmanager
def as_a_user_has_it():
    """Other libraries are not written for the strict settings of this suite."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield


def data():
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((T, B, D)), jnp.float32)
    return xs, jnp.sum(xs[..., 0], 0)[:, None]  # to be remembered over all steps


def with_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.data(jax.tree.map(nnx.Param, jaxrnn.init_cell(rngs(), D, H)))
            self.readout = nnx.Linear(H, 1, rngs=rngs)

        def __call__(self, xs):
            return self.readout(jaxrnn.unroll(self.cell, xs)[0])

    @nnx.jit
    def update(model, optimizer):
        loss, gradient = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, gradient)
        return loss

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    cell = nnx.as_pure(model.cell)
    readout = model.readout.kernel[...].T, model.readout.bias[...]
    gradient = nnx.as_pure(nnx.grad(mean_square)(model))["cell"]
    losses = [float(update(model, optimizer)) for _ in range(STEPS)]
    graph, state = nnx.split(model)
    written = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    merged = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), written))
    return Trained(cell, readout, gradient, losses, same(merged, model))


def with_linen():
    nn = pytest.importorskip("flax.linen")
    serialization = pytest.importorskip("flax.serialization")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            cell = self.param("cell", lambda key: jaxrnn.init_cell(key, D, H))
            return nn.Dense(1)(jaxrnn.unroll(cell, xs)[0])

    model = Model()
    params = model.init(jax.random.key(0), data()[0])

    def loss(params):
        return mean_square(lambda xs: model.apply(params, xs))

    cell, dense = params["params"]["cell"], params["params"]["Dense_0"]
    gradient = jax.grad(loss)(params)["params"]["cell"]
    after, losses = descend(loss, params)
    leaves, structure = jax.tree.flatten(after)
    written = serialization.msgpack_restore(serialization.to_bytes(dict(enumerate(leaves))))
    read = jax.tree.unflatten(structure, [written[str(n)] for n in range(len(leaves))])
    restored = same(lambda xs: model.apply(read, xs), lambda xs: model.apply(after, xs))
    return Trained(cell, (dense["kernel"].T, dense["bias"]), gradient, losses, restored)


def with_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        cell: jaxrnn.Cell
        readout: eqx.nn.Linear

        def __call__(self, xs):
            return jax.vmap(self.readout)(jaxrnn.unroll(self.cell, xs)[0])

    @eqx.filter_jit
    def update(model, state):
        loss, gradient = eqx.filter_value_and_grad(mean_square)(model)
        updates, state = optimizer.update(gradient, state, model)
        return eqx.apply_updates(model, updates), state, loss

    keys, optimizer = jax.random.split(jax.random.key(0)), optax.adam(2e-2)
    model = before = Model(jaxrnn.init_cell(keys[0], D, H), eqx.nn.Linear(H, 1, key=keys[1]))
    gradient = eqx.filter_grad(mean_square)(model).cell
    state, losses = optimizer.init(eqx.filter(model, eqx.is_inexact_array)), []
    for _ in range(STEPS):
        model, state, loss = update(model, state)
        losses.append(float(loss))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    read = eqx.tree_deserialise_leaves(file, before)
    arrays, rest = eqx.partition(model, eqx.is_array)
    restored = same(read, model) and same(eqx.combine(arrays, rest), model)
    readout = before.readout.weight, before.readout.bias
    return Trained(before.cell, readout, gradient, losses, restored)


def with_haiku():
    hk = pytest.importorskip("haiku")

    class Model(hk.Module):
        def __call__(self, xs):
            draw, get = hk.initializers.VarianceScaling(), hk.get_parameter
            U, W = get("U", (H, D), init=draw), get("W", (H, H), init=draw)
            cell = jaxrnn.Cell(U, W, get("b", (H,), init=jnp.zeros))
            return hk.Linear(1)(jaxrnn.unroll(cell, xs)[0])

    model = hk.without_apply_rng(hk.transform(lambda xs: Model(name="model")(xs)))
    params = model.init(jax.random.key(0), data()[0])

    def loss(params):
        return mean_square(lambda xs: model.apply(params, xs))

    gradient = jaxrnn.Cell(**jax.grad(loss)(params)["model"])
    after, losses = descend(loss, params)
    cells, rest = hk.data_structures.partition(lambda module, *_: module == "model", after)
    merged = hk.data_structures.merge(cells, rest)
    restored = same(lambda xs: model.apply(merged, xs), lambda xs: model.apply(after, xs))
    linear = params["model/linear"]
    readout = linear["w"].T, linear["b"]
    return Trained(jaxrnn.Cell(**params["model"]), readout, gradient, losses, restored)


def mean_square(model):
    xs, ys = data()
    return jnp.mean(jnp.square(model(xs) - ys))


def descend(loss, params):
    """Updates by optax alone, which is how libraries of pure functions are trained."""
    optimizer = optax.adam(2e-2)

    @jax.jit
    def update(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(STEPS):
        params, state, value = update(params, state)
        losses.append(float(value))
    return params, losses


def same(model, other):
    xs, _ = data()
    return bool(np.array_equal(model(xs), other(xs)))


MODELS: dict[str, Callable[[], Trained]] = {
    "flax.nnx": with_nnx, "flax.linen": with_linen, "equinox": with_equinox, "haiku": with_haiku,
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    with as_a_user_has_it():
        return MODELS[request.param]()


def test_the_loss_falls(trained):
    assert len(trained.losses) == STEPS
    assert trained.losses[-1] < 0.2 * trained.losses[0]


def test_the_gradient_is_that_of_the_plain_function(trained):
    V, c = trained.readout

    def loss(cell):
        return mean_square(lambda xs: jaxrnn.unroll(cell, xs)[0] @ V.T + c)

    with as_a_user_has_it():
        expected = jax.grad(loss)(trained.cell)
    assert isinstance(trained.cell, jaxrnn.Cell) and trained.cell.U.shape == (H, D)
    # Sums of T·B = 24 terms and eps 1.2e-7, in another order.
    names = "U", "W", "b"
    actual = [np.asarray(getattr(trained.gradient, name)) for name in names]
    assert_close(actual, [getattr(expected, name) for name in names], 1e-5)


def test_a_model_taken_apart_and_put_together_is_the_same(trained):
    assert trained.restored

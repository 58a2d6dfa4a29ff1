"""Layers of other libraries as cells: the same states and gradients as their library's."""

import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, random_case

import jaxrnn
from jaxrnn import Cell, convert

T, B, D, H = 5, 3, 4, 6
FULL = pytest.mark.full
FROM = ("from_torch", "from_flax", "from_haiku", "from_keras")


@contextlib.contextmanager
def lax():
    """Other libraries are not written for the strict settings of this suite."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def peer(name):
    if name.startswith("keras"):
        os.environ.setdefault("KERAS_BACKEND", "jax")
    with lax():
        module = pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "keras" and module.backend.backend() != "jax":
        pytest.skip("keras runs on another backend than jax")
    return module


@pytest.fixture
def torch():
    return peer("torch")


@pytest.fixture
def nnx():
    return peer("flax.nnx")


@pytest.fixture
def linen():
    return peer("flax.linen")


@pytest.fixture
def hk():
    return peer("haiku")


@pytest.fixture
def keras():
    return peer("keras")


def draw(shape, seed=0, scale=0.4):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def parameters(init, *args):
    """Random numbers in every array that a peer's init makes, the biases too."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(init, *args))
    new = [jnp.asarray(draw(leaf.shape, n)) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


def objective(hs, h_last):
    """A loss of all states in which none counts as another does, and the last ones twice."""
    last = jax.tree.leaves(h_last)
    terms = [jnp.sum(h * draw(h.shape, 50 + n).astype(h.dtype)) for n, h in enumerate(last)]
    return jnp.sum(hs * draw(hs.shape, 40).astype(hs.dtype)) + sum(terms)


def ours(cells, xs, h0=None):
    """(hs, final states in order, gradients by cells, by xs)."""

    def loss(cells, xs):
        h_last, hs = jaxrnn.unroll_layers(cells, xs, h0)
        return objective(hs, h_last), (hs, jax.tree.leaves(h_last))

    grads, (hs, h_last) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(cells, xs)
    return hs, h_last, *grads


def theirs(run, params, xs):
    """The same of a peer, with gradients by its own parameters; run(params, xs) -> (hs, h_last)."""

    def loss(params, xs):
        hs, h_last = run(params, xs)
        return objective(hs, h_last), (hs, jax.tree.leaves(h_last))

    with lax():
        grads, (hs, h_last) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, xs)
    return hs, h_last, *grads


def is_cell(node):
    return isinstance(node, Cell)


def without_bias(cells):
    def change(cell):
        return dataclasses.replace(cell, b=jnp.zeros_like(cell.b))

    return jax.tree.map(change, cells, is_leaf=is_cell)


def inputs(batch=(B,), dtype=np.float64):
    return jnp.asarray(draw((T, *batch, D), 30, 1.0).astype(dtype))


# torch


def torch_run(torch, module, xs, h0):
    """(hs, h_n as a list, gradients as a state dict, dxs) by autograd."""
    xs = torch.tensor(np.asarray(xs), requires_grad=True)
    hs, h_n = module(xs, torch.tensor(np.asarray(h0)))
    loss = (hs * torch.tensor(draw(hs.shape, 40)).to(hs.dtype)).sum()
    for n, h in enumerate(h_n):
        loss = loss + (h * torch.tensor(draw(h.shape, 50 + n)).to(h.dtype)).sum()
    loss.backward()
    grads = {name: value.grad.numpy() for name, value in module.named_parameters()}
    for name in [name for name in grads if name.startswith("bias_hh")]:
        # b is the sum of both biases: d/db is the gradient of either.
        assert_close(grads[name], grads[name.replace("hh", "ih")], TOLERANCE[str(hs.dtype)[6:]])
        grads[name] = np.zeros_like(grads[name])
    return hs.detach().numpy(), [h.detach().numpy() for h in h_n], grads, xs.grad.numpy()


@pytest.mark.parametrize(
    ("phi", "layers", "both", "bias", "dtype"),
    [
        ("tanh", 1, False, True, "float64"),
        pytest.param("tanh", 2, True, False, "float64", marks=FULL),
        pytest.param("relu", 1, True, False, "float64", marks=FULL),
        ("relu", 2, False, False, "float64"),
        ("relu", 2, True, True, "float64"),
        ("tanh", 2, True, True, "float32"),
    ],
)
def test_a_torch_rnn_is_converted(torch, phi, layers, both, bias, dtype):
    torch.manual_seed(1)
    module = torch.nn.RNN(
        D, H, layers, phi, bidirectional=both, bias=bias, dtype=getattr(torch, dtype)
    )
    cells = convert.from_torch(module)
    flat = jax.tree.leaves(cells, is_leaf=is_cell)
    assert len(flat) == layers * (1 + both)
    assert isinstance(cells, Cell) == (layers == 1 and not both)
    assert all(cell.activation == phi and cell.U.dtype == dtype for cell in flat)
    assert bias or not any(np.any(cell.b) for cell in flat)
    xs, states = inputs(dtype=dtype), jnp.asarray(draw((len(flat), B, H), 31).astype(dtype))
    order = jax.tree.structure(jax.tree.map(lambda cell: 0, cells, is_leaf=is_cell))
    h0 = jax.tree.unflatten(order, list(states))
    hs, h_last, grads, dxs = ours(cells, xs, h0)
    *found, torch_grads, torch_dxs = torch_run(torch, module, xs, states)
    torch_grads = convert.from_torch(torch_grads, phi)
    grads = grads if bias else without_bias(grads)
    tolerance = TOLERANCE[dtype]
    assert_close([hs, h_last], found, tolerance)
    assert_close([grads, dxs], [torch_grads, torch_dxs], tolerance)


@pytest.mark.parametrize("batch", [(), pytest.param((1,), marks=FULL), (2, 3)])
def test_a_converted_rnn_takes_any_batch(torch, batch):
    module = torch.nn.RNN(D, H, 2, dtype=torch.float64)
    xs = inputs(batch)
    flat = xs.reshape(T, -1, D) if len(batch) > 1 else xs
    hs, h_n = module(torch.tensor(np.asarray(flat)))
    h_last, states = jaxrnn.unroll_layers(convert.from_torch(module), xs)
    assert_close(states.reshape(hs.shape), hs.detach().numpy())
    assert_close(jnp.stack(h_last).reshape(h_n.shape), h_n.detach().numpy())


@pytest.mark.parametrize("phi", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_torch_cell_is_converted(torch, phi, bias):
    module = torch.nn.RNNCell(D, H, bias=bias, nonlinearity=phi, dtype=torch.float64)
    cell = convert.from_torch(module)
    assert cell.activation == phi
    x, h = inputs()[0], jnp.asarray(draw((B, H), 3))
    expected = module(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(h)))
    assert_close(jaxrnn.step(cell, x, h), expected.detach().numpy())


def test_a_torch_state_dict_is_converted(torch):
    module = torch.nn.RNN(D, H, 2, "relu")
    by_module = convert.from_torch(module)
    by_state = convert.from_torch(module.state_dict(), "relu")
    arrays = {name: value.numpy() for name, value in module.state_dict().items()}
    by_arrays = convert.from_torch(arrays, activation="relu")
    assert_close(by_state, by_module, 0)
    assert_close(by_arrays, by_module, 0)
    assert convert.from_torch(module.state_dict())[0].activation == "tanh"
    assert convert.from_torch(module, "sigmoid")[1].activation == "sigmoid"
    # Layers are counted, not sorted as text: 10 comes after 9.
    deep = torch.nn.RNN(H, H, 11)
    assert_close(convert.from_torch(deep)[10].U, deep.weight_ih_l10.detach().numpy(), 0)


def test_training_in_torch_does_not_change_the_cell(torch):
    module = torch.nn.RNN(128, 128, dtype=torch.float64)
    cell = convert.from_torch(module)
    before = [np.array(leaf) for leaf in jax.tree.leaves(cell)]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_close(jax.tree.leaves(cell), before, 0)
    module = convert.to_torch(cell)
    again = convert.from_torch(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_close(jax.tree.leaves((cell, again)), before + before, 0)


def bits(cells):
    return [
        (np.asarray(leaf).dtype, np.asarray(leaf).shape, np.asarray(leaf).tobytes())
        for leaf in jax.tree.leaves(cells)
    ]


def layer(seed, size, phi, dtype):
    cell = random_case(seed, D=size, H=H, activation=phi)[0].cell
    cell = jax.tree.map(lambda leaf: leaf.astype(dtype), cell)
    # A zero with a sign, and a number below the normal ones.
    special = np.array([-0.0, jnp.finfo(dtype).smallest_subnormal], dtype)
    return dataclasses.replace(cell, b=jnp.asarray(np.append(special, np.asarray(cell.b)[2:])))


@pytest.mark.parametrize(
    ("dtype", "phi", "build"),
    [
        ("float64", "tanh", lambda make: make(0, D)),
        ("float32", "relu", lambda make: (make(0, D), make(1, H), make(2, H))),
        ("bfloat16", "tanh", lambda make: ((make(0, D), make(1, D)),)),
        ("float16", "relu", lambda make: tuple((make(s, s), make(9, s)) for s in (D, 2 * H))),
    ],
)
def test_a_round_trip_through_torch_is_exact(torch, dtype, phi, build):
    cells = build(lambda seed, size: layer(seed, size, phi, jnp.dtype(dtype)))
    random_state = torch.get_rng_state()
    module = convert.to_torch(cells)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(module, torch.nn.RNN) and not module.batch_first
    assert all(p.requires_grad and p.dtype == getattr(torch, dtype) for p in module.parameters())
    assert not any(p.any() for name, p in module.named_parameters() if "bias_hh" in name)
    back = convert.from_torch(module)
    assert bits(back) == bits(cells)
    assert jax.tree.structure(back) == jax.tree.structure(cells)


def test_to_torch_gives_the_same_network(torch):
    cells = tuple(
        tuple(layer(2 * n + m, s, "relu", np.float64) for m in (0, 1))
        for n, s in [(0, D), (1, 2 * H)]
    )
    xs = inputs()
    hs, h_n = convert.to_torch(cells)(torch.tensor(np.asarray(xs)))
    h_last, expected = jaxrnn.unroll_layers(cells, xs)
    assert_close(hs.detach().numpy(), expected)
    assert_close(list(h_n.detach().numpy()), jax.tree.leaves(h_last))
    # A known function is its name.
    named = dataclasses.replace(cells[0][0], activation=jnp.tanh)
    assert convert.to_torch(named).nonlinearity == "tanh"


CELL = Cell(jnp.zeros((H, D)), jnp.zeros((H, H)), jnp.zeros(H))
NEXT = Cell(jnp.zeros((H, H)), jnp.zeros((H, H)), jnp.zeros(H))
WIDE = Cell(jnp.zeros((D, H)), jnp.zeros((D, D)), jnp.zeros(D))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (dataclasses.replace(CELL, leak=jnp.ones(())), "cells: expected no leak"),
        (dataclasses.replace(CELL, form="voltage"), "cells: expected the rate form"),
        (dataclasses.replace(CELL, activation="sigmoid"), "activation of cells: expected one of"),
        (dataclasses.replace(CELL, activation=jnp.sin), "activation of cells: expected one of"),
        ((CELL, dataclasses.replace(NEXT, activation="relu")), "one activation, got tanh and relu"),
        ((CELL, WIDE), f"one hidden size, got {H} and {D}"),
        (((CELL, CELL), dataclasses.replace(NEXT, U=jnp.zeros((H, 2 * H)))), "both directions"),
        ((CELL, jax.tree.map(lambda a: a.astype(jnp.float32), NEXT)), "one dtype"),
        (jax.tree.map(lambda a: a.astype(jnp.float8_e5m2), CELL), "dtype of cells: expected"),
        ((CELL, CELL), "cells"),
        ((), "cells: expected at least one layer"),
        (dataclasses.replace(CELL, U=jnp.zeros((H, 0))), f"got float64 array of shape [{H}, 0]"),
    ],
)  # fmt: skip
def test_to_torch_rejects_what_torch_cannot_hold(cells, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert.to_torch(cells)


def test_traced_cells_are_refused():
    with pytest.raises(ValueError, match="arrays of values that torch can hold, got traced"):
        jax.jit(convert.to_torch)(CELL)


def test_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'jaxrnn[peers]'")):
        convert.to_torch(CELL)
    with pytest.raises(TypeError, match=r"cells: expected .*, got int"):
        convert.to_torch(3)


# flax


def nnx_cell(nnx, size, seed=0, **how):
    how = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(seed), **how}
    cell = nnx.SimpleCell(size, H, **how)
    cell.dense_i.bias[...] = jnp.asarray(draw(H, seed + 5))
    return cell


def nnx_run(nnx, model, xs, carry):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, xs):
        h_last, hs = nnx.merge(graph, params, rest)(xs, initial_carry=carry)
        return hs, h_last

    return theirs(run, params, xs)


@pytest.mark.parametrize(
    ("phi", "name"),
    [("tanh", "tanh"), pytest.param("relu", "relu", marks=FULL),
     pytest.param("sigmoid", "sigmoid", marks=FULL), ("elu", None)],
)  # fmt: skip
def test_an_nnx_rnn_is_converted(nnx, phi, name):
    xs, how = inputs(), {"time_major": True, "return_carry": True, "rngs": False}
    with lax():
        cell = nnx_cell(nnx, D, activation_fn=getattr(nnx, phi))
        found = nnx_run(nnx, nnx.RNN(cell, **how), xs, jnp.zeros((B, H)))
    converted = convert.from_flax(cell)
    assert converted.activation == (name or nnx.elu)
    assert_close(convert.from_flax(nnx.RNN(cell)), converted, 0)
    expected = (*found[:2], convert.from_flax(found[2], converted.activation), found[3])
    assert_close(ours(converted, xs), expected)


def test_the_nnx_activation_is_tanh_by_default(nnx):
    with lax():
        cell = nnx.SimpleCell(D, H, rngs=nnx.Rngs(0))
    assert convert.from_flax(cell).activation == "tanh"
    assert convert.from_flax(nnx.state(cell)).activation == "tanh"
    assert convert.from_flax(cell, "relu").activation == "relu"
    assert convert.from_flax(cell).U.dtype == jnp.float32


def test_nnx_directions_and_stacks_are_converted(nnx):
    xs, how = inputs(), {"time_major": True, "rngs": False}
    with lax():
        ends = [nnx.RNN(nnx_cell(nnx, D, n), return_carry=True, **how) for n in (0, 1)]
        model = nnx.Bidirectional(*ends, return_carry=True, **how)
        found = nnx_run(nnx, model, xs, (jnp.zeros((B, H)),) * 2)
    cells = convert.from_flax(model)
    assert len(cells) == 1 and len(cells[0]) == 2
    assert_close(ours(cells, xs), (*found[:2], convert.from_flax(found[2]), found[3]))
    with lax():
        second = nnx.RNN(nnx_cell(nnx, 2 * H, 2), **how)
        _, hs = model(xs, initial_carry=(jnp.zeros((B, H)),) * 2)
        expected = second(hs, initial_carry=jnp.zeros((B, H)))
    cells = convert.from_flax([model, second])
    assert len(cells) == 2 and isinstance(cells[1], Cell)
    assert_close(jaxrnn.unroll_layers(cells, xs)[1], expected)


def linen_cell(linen, **how):
    return linen.RNN(
        linen.SimpleCell(H, dtype=jnp.float64, param_dtype=jnp.float64, **how),
        time_major=True, return_carry=True,
    )  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
def test_a_linen_rnn_is_converted(linen, both):
    xs = inputs()
    with lax():
        model = linen_cell(linen)
        if both:
            model = linen.Bidirectional(
                model, linen_cell(linen), time_major=True, return_carry=True
            )
        variables = parameters(model.init, jax.random.key(0), xs)
    found = theirs(lambda params, xs: model.apply(params, xs)[::-1], variables, xs)
    cells = convert.from_flax(variables)
    assert isinstance(cells, Cell) != both
    assert_close(convert.from_flax(variables["params"]), cells, 0)
    assert_close(ours(cells, xs), (*found[:2], convert.from_flax(found[2]), found[3]))


def test_linen_parameters_inside_a_module_are_converted(linen):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, xs):
            return linen_cell(linen, activation_fn=linen.sigmoid)(xs)

    xs = inputs()
    with lax():
        variables = parameters(Net().init, jax.random.key(0), xs)
        _, expected = Net().apply(variables, xs)
    hs = jaxrnn.unroll(convert.from_flax(variables, activation="sigmoid"), xs)[1]
    assert_close(hs, expected)
    stack = convert.from_flax([variables, {"i": {"kernel": np.ones((H, 2)), "bias": np.ones(2)},
                                           "h": {"kernel": np.ones((2, 2))}}])  # fmt: skip
    assert stack[0].activation == stack[1].activation == "tanh"


# Haiku


def haiku_net(hk, sizes, double_bias):
    def run(xs):
        cores = [hk.VanillaRNN(size, double_bias) for size in sizes]
        core = hk.DeepRNN(cores) if len(cores) > 1 else cores[0]
        state = jax.tree.map(lambda h: h.astype(xs.dtype), core.initial_state(xs.shape[1]))
        return hk.dynamic_unroll(core, xs, state)

    with lax():
        net = hk.without_apply_rng(hk.transform(run))
        return net.apply, parameters(net.init, jax.random.key(0), inputs())


@pytest.mark.parametrize(
    ("sizes", "double_bias"),
    [((H,), False), ((H, 3), True), pytest.param((H,), True, marks=FULL),
     pytest.param((H, 3), False, marks=FULL)],
)  # fmt: skip
def test_a_haiku_rnn_is_converted(hk, sizes, double_bias):
    run, params = haiku_net(hk, sizes, double_bias)
    xs = inputs()
    found = theirs(run, params, xs)
    cells = convert.from_haiku(params)
    assert isinstance(cells, Cell) == (len(sizes) == 1)
    for name, grads in list(found[2].items()):
        if name.endswith("linear_1") and double_bias:
            # b is the sum of both biases: d/db is the gradient of either.
            assert_close(grads["b"], found[2][name[:-2]]["b"])
            found[2][name] = {**grads, "b": jnp.zeros_like(grads["b"])}
    assert_close(ours(cells, xs), (*found[:2], convert.from_haiku(found[2]), found[3]))


def test_haiku_names_are_in_natural_order():
    sizes = range(2, 14)
    names = [f"net/~/vanilla_rnn{f'_{n}' if n else ''}" for n in range(len(sizes))]
    params = {}
    for name, size in reversed(list(zip(names, sizes, strict=True))):
        params[f"{name}/linear_1"] = {"w": np.ones((size, size)), "b": np.ones(size)}
        params[f"{name}/linear"] = {"w": np.ones((size - 1, size)), "b": np.ones(size)}
    cells = convert.from_haiku(params, "tanh")
    assert [cell.W.shape[0] for cell in cells] == list(sizes)
    assert {cell.activation for cell in cells} == {"tanh"}


def test_gradients_pass_through_the_conversion(hk, linen):
    """A converter can stand inside what is differentiated and compiled."""
    xs = inputs()
    haiku_run, haiku_weights = haiku_net(hk, (H, 3), True)
    with lax():
        model = linen_cell(linen)
        variables = parameters(model.init, jax.random.key(0), xs)
    for run, params, of in (
        (haiku_run, haiku_weights, convert.from_haiku),
        (lambda params, xs: model.apply(params, xs)[::-1], variables, convert.from_flax),
    ):

        def loss(params, of=of):
            h_last, hs = jaxrnn.unroll_layers(of(params), xs)
            return objective(hs, h_last)

        assert_close(jax.jit(jax.grad(loss))(params), theirs(run, params, xs)[2])


# Keras


def keras_run(layer, xs):
    """The layer as a function of its weights, time first, and of its own gradients a layer."""
    values = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def run(weights, xs):
        hs, *states = layer.stateless_call(weights, others, jnp.swapaxes(xs, 0, 1))[0]
        return jnp.swapaxes(hs, 0, 1), states

    hs, h_last, grads, dxs = theirs(run, values, xs)
    with lax():
        layer.set_weights([np.asarray(grad) for grad in grads])
    return hs, h_last, convert.from_keras(layer), dxs


LAYERS = {
    "SimpleRNN": lambda k, how, t: k.SimpleRNN(H, **how),
    "without bias": lambda k, how, t: k.SimpleRNN(H, use_bias=False, **how),
    "relu": lambda k, how, t: k.SimpleRNN(H, activation="relu", **how),
    "sigmoid": lambda k, how, t: k.SimpleRNN(H, activation="sigmoid", **how),
    "linear": lambda k, how, t: k.SimpleRNN(H, activation=None, **how),
    "softplus": lambda k, how, t: k.SimpleRNN(H, activation="softplus", **how),
    "RNN of a cell": lambda k, how, t: k.RNN(k.SimpleRNNCell(H, dtype=t), **how),
    "stacked": lambda k, how, t: k.RNN(
        k.StackedRNNCells([k.SimpleRNNCell(n, dtype=t) for n in (H, 3)], dtype=t), **how
    ),
    "bidirectional": lambda k, how, t: k.Bidirectional(k.SimpleRNN(H, **how), dtype=t),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=FULL if name in ("SimpleRNN", "sigmoid", "linear", "relu") else ())
    for name in LAYERS
])  # fmt: skip
def test_a_keras_layer_is_converted(keras, name):
    # Keras's tanh gives float32 for float64.
    dtype = "float64" if name in ("relu", "sigmoid", "linear", "softplus") else "float32"
    how = {"return_sequences": True, "return_state": True, "dtype": dtype}
    with lax():
        layer = LAYERS[name](keras.layers, how, dtype)
        layer.build((None, None, D))
        layer.set_weights([draw(v.shape, n) for n, v in enumerate(layer.weights)])
    cells, xs = convert.from_keras(layer), inputs(dtype=dtype)
    found = ours(cells, xs)
    if name == "without bias":
        assert not np.any(cells.b)
        found = (*found[:2], without_bias(found[2]), found[3])
    if name == "softplus":
        assert cells.activation is keras.activations.softplus
    elif isinstance(cells, Cell):
        names = {"relu": "relu", "sigmoid": "sigmoid", "linear": "identity"}
        assert cells.activation == names.get(name, "tanh")
    assert_close(found, keras_run(layer, xs), TOLERANCE[dtype])


def test_keras_lists_and_backward_layers_are_converted(keras):
    with lax():
        forward = keras.layers.SimpleRNN(H, return_sequences=True)
        backward = keras.layers.SimpleRNN(H, return_sequences=True, go_backwards=True)
        forward.build((None, None, D))
        backward.build((None, None, D))
        xs = inputs(dtype=np.float32)
        expected = jnp.swapaxes(backward(jnp.swapaxes(xs, 0, 1)), 0, 1)
        second = keras.layers.SimpleRNNCell(3)
        second.build((None, H))
    cell = convert.from_keras(backward)
    assert cell.U.dtype == jnp.float32
    hs = jaxrnn.unroll(cell, xs, reverse=True)[1]
    assert_close(hs[::-1], expected, TOLERANCE["float32"])
    stack = convert.from_keras([forward, second])
    assert [cell.U.shape for cell in stack] == [(H, D), (3, H)]
    assert_close(stack[0], convert.from_keras(forward.cell), 0)
    # A custom function has no other's name.
    forward.cell.activation = tanh
    assert convert.from_keras(forward).activation is tanh


def tanh(a):
    return 2 * jnp.tanh(a)


# Errors


def state(**changes):
    weights = {"weight_ih_l0": np.ones((H, D)), "weight_hh_l0": np.ones((H, H)),
               "bias_ih_l0": np.ones(H), "bias_hh_l0": np.ones(H)}  # fmt: skip
    return {key: value for key, value in (weights | changes).items() if value is not None}


def flax_params(kernel=(D, H), recurrent=(H, H), bias=(H,)):
    return {"i": {"kernel": np.ones(kernel), "bias": np.ones(bias)},
            "h": {"kernel": np.ones(recurrent)}}  # fmt: skip


def haiku_params(**changes):
    linear = {"w": np.ones((D, H)), "b": np.ones(H)}
    return {"rnn/linear": linear, "rnn/linear_1": {"w": np.ones((H, H))}, **changes}


BAD = {
    "torch": [
        (3, TypeError, "module: expected a torch.nn.RNN"),
        (None, TypeError, "got NoneType"),
        ("model.pt", TypeError, "got str"),
        ([state()], TypeError, "got list"),
        ({}, ValueError, "module: expected the key 'weight_ih_l0', got no keys"),
        ({"weight": 1, 0: 1}, ValueError, "expected the key 'weight_ih_l0', got weight, 0"),
        ({f"k{n}": 1 for n in range(10)}, ValueError, "k6, k7, and 2 more"),
        (state(weight_hr_l0=np.ones((2, H))), ValueError, "module: expected no keys but "
         "weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, got weight_hr_l0"),
        (state(weight_hh_l0=None), ValueError, "module: expected the key 'weight_hh_l0', got "
         "weight_ih_l0, bias_ih_l0, bias_hh_l0"),
        (state(bias_hh_l0=None), ValueError, "module: expected the key 'bias_hh_l0', got weight"),
        (state(weight_ih_l2=np.ones((H, H))), ValueError, "expected the key 'weight_ih_l1', got"),
        (state(weight_ih_l999999999=np.ones((H, H))), ValueError, "the key 'weight_ih_l1', got"),
        (state(weight_ih_l0=np.ones((4 * H, D)), weight_hh_l0=np.ones((4 * H, H)),
               bias_ih_l0=np.ones(4 * H), bias_hh_l0=np.ones(4 * H)), ValueError,
         "module, cell_l0.W: expected shape"),
        (state(weight_ih_l0=np.ones((H, D), int)), TypeError, "a floating dtype, got int64"),
        (state(bias_hh_l0=np.ones(D)), ValueError,
         f"module['bias_hh_l0']: expected shape [{H}], got [{D}]"),
        (state(bias_hh_l0=np.zeros(D)), ValueError, f"shape [{H}], got [{D}]"),
        (state() | {"bias_hh_l0": None}, TypeError, "expected an array, got None"),
        (state(bias_hh_l0=[[1.0], [1.0, 2.0]]), TypeError, "entries have different shapes"),
        (state(weight_ih_l0=np.ones((D, D))), ValueError, "module['bias_ih_l0']: expected shape"),
    ],
    "flax": [
        (3, TypeError, "params: expected an nnx.SimpleCell"),
        (None, TypeError, "got NoneType"),
        ([None], TypeError, "params[0]: expected an nnx.SimpleCell"),
        ([[flax_params()]], TypeError, "params[0]: expected an nnx.SimpleCell or RNN"),
        ({}, ValueError, "params: expected the parameters of one SimpleCell, with i and h, got no"),
        ([], ValueError, "params: expected at least one layer"),
        ({"params": {}}, ValueError, "params['params']: expected the parameters"),
        ({"params": 3}, TypeError, "params['params']: expected an nnx.SimpleCell"),
        ({"a": flax_params(), "b": flax_params()}, ValueError, "got a, b"),
        ({"params": flax_params(), "more": {}}, ValueError, "got params, more"),
        (flax_params() | {"o": {}}, ValueError, "params: expected no keys but i, h, got o"),
        (flax_params(recurrent=(H, 3 * H)), ValueError, "params.W: expected shape [6, 6]"),
        (flax_params(kernel=(D,)), ValueError, "params['i']['kernel']: expected shape [any, any]"),
        (flax_params(bias=(D,)), ValueError, "params['i']['bias']: expected shape"),
        ({"i": flax_params()["i"]}, ValueError, "params: expected the key 'h', got i"),
        (flax_params() | {"i": {"kernel": np.ones((D, H))}}, ValueError,
         "params['i']: expected the key 'bias', got kernel"),
        (flax_params() | {"h": {"kernel": np.ones((H, H)), "lora": 1}}, ValueError,
         "params['h']: expected no keys but kernel, got lora"),
        ({"i": {}, "h": {}}, ValueError, "params['i']: expected the key 'kernel', got no keys"),
        ({"i": 1.0, "h": 2.0}, TypeError, "params['i']: expected an nnx.Linear, or parameters"),
        ([flax_params(), flax_params()], ValueError, "params[1].U"),
        ({"forward_rnn": {}, "backward_rnn": {}}, ValueError, "params['forward_rnn']: expected"),
        ({"in": {}, "hn": {}, "ir": {}, "hr": {}}, ValueError, "got in, hn, ir, hr"),
    ],
    "haiku": [
        (3, TypeError, "params: expected an hk.VanillaRNN's parameters, got int"),
        ({}, ValueError, "params: expected the key 'vanilla_rnn/linear', got no keys"),
        (haiku_params(linear={"w": np.ones((H, 2))}), ValueError,
         "params: expected no keys but rnn/linear, rnn/linear_1, got linear"),
        ({"lstm/linear": {"w": np.ones((D + H, 4 * H)), "b": np.ones(4 * H)}}, ValueError,
         "params: expected the key 'lstm/linear_1', got lstm/linear"),
        ({"gru": {"w_i": 1, "w_h": 1, "b": 1}}, ValueError, "'vanilla_rnn/linear', got gru"),
        ({3: {}}, ValueError, "got 3"),
        (haiku_params(**{"rnn/linear_1": {}}), ValueError,
         "params['rnn/linear_1']: expected the key 'w', got no keys"),
        (haiku_params(**{"rnn/linear": {"w": np.ones((D, H))}}), ValueError,
         "params['rnn/linear']: expected the key 'b', got w"),
        (haiku_params(**{"rnn/linear_1": 3}), TypeError, "params['rnn/linear_1']: expected arrays"),
        (haiku_params(**{"rnn/linear_1": {"w": "x"}}), TypeError,
         "params['rnn/linear_1']['w']: expected an array, got str"),
    ],
    "keras": [
        (3, TypeError, "layer: expected a keras SimpleRNN"),
        ([], ValueError, "layer: expected at least one layer"),
        ([None], TypeError, "layer[0]: expected a keras SimpleRNN"),
        ([[None]], TypeError, "layer[0]: expected a keras SimpleRNN, or layers of its"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("library", "value", "kind", "message"),
    [(library, *case) for library, cases in BAD.items() for case in cases],
)
def test_bad_values_are_named(library, value, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        getattr(convert, f"from_{library}")(value)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_unknown_activations_are_named():
    for function, value in (
        (convert.from_torch, state()),
        (convert.from_flax, flax_params()),
        (convert.from_haiku, haiku_params()),
    ):
        assert isinstance(function(value), Cell)
        with pytest.raises(ValueError, match="activation: expected one of"):
            function(value, "gelu")
        with pytest.raises(TypeError, match="activation: expected a name"):
            function(value, 3)


def refused(function, modules):
    for module, kind, message in modules:
        with pytest.raises(kind, match=re.escape(message)):
            function(module)


def test_other_torch_modules_are_refused(torch):
    nn = torch.nn
    names = [nn.LSTM(D, H), nn.LSTM(D, H, proj_size=2), nn.GRU(D, H), nn.LSTMCell(D, H),
             nn.GRUCell(D, H), nn.Linear(D, H), nn.Sequential(nn.RNN(D, H))]  # fmt: skip
    refused(convert.from_torch, [(m, TypeError, f"got {type(m).__name__}") for m in names])
    refused(convert.from_torch, [(m.state_dict(), ValueError, "module") for m in names])
    complex_ = nn.RNN(D, H, dtype=torch.complex64)
    refused(convert.from_torch, [(complex_, TypeError, "a floating dtype, got complex64")])
    weird = nn.RNNCell(D, H, nonlinearity="elu")
    refused(convert.from_torch, [(weird, ValueError, "activation: expected one of")])
    whole = nn.Sequential(nn.Embedding(5, D), nn.RNN(D, H)).state_dict()
    hint = "take off '1.': {k.removeprefix('1.'): v for k, v in state.items() if k.startswith('1.')"
    refused(convert.from_torch, [(whole, ValueError, "expected the key 'weight_ih_l0', got 0."),
                                 (whole, ValueError, hint)])  # fmt: skip

    class Twice(nn.RNN):
        def forward(self, xs, h=None):
            return super().forward(2 * xs, h)

    class Named(nn.RNN):
        def name(self):
            return "named"

    patched, hooked = nn.RNN(D, H), nn.RNN(D, H)
    patched.forward = lambda xs: xs
    hooked.register_forward_hook(lambda *_: None)
    refused(
        convert.from_torch,
        [
            (Twice(D, H), TypeError, "keeps torch's forward"),
            (patched, TypeError, "keeps torch's forward"),
            (hooked, ValueError, "no hooks except torch's own for weights"),
        ],
    )
    assert isinstance(convert.from_torch(hooked.state_dict()), Cell)
    assert isinstance(convert.from_torch(Named(D, H)), Cell)


def test_a_missing_array_of_torch_is_an_error(torch):
    state = torch.nn.RNN(D, H, 2, bidirectional=True).state_dict()
    for key in state:
        rest = {name: value for name, value in state.items() if name != key}
        refused(convert.from_torch, [(rest, ValueError, f"module: expected the key {key!r}, got")])
    without = {name: value for name, value in state.items() if "bias" not in name}
    assert not any(np.any(cell.b) for pair in convert.from_torch(without) for cell in pair)


def test_tensors_without_numbers_are_refused(torch):
    state, wanted = torch.nn.RNN(D, H).state_dict(), "expected a tensor that NumPy can hold, got"
    for change in (
        lambda value: value.to("meta"),
        lambda value: value.to_sparse(),
        lambda value: value.to(torch.float8_e5m2),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    ):
        with lax():
            changed = {key: change(value) for key, value in state.items()}
        refused(convert.from_torch, [(changed, TypeError, f"module['weight_ih_l0']: {wanted}")])
    meta = torch.nn.RNN(D, H, device="meta")
    refused(convert.from_torch, [(meta, TypeError, "torch.float32, torch.strided, on meta")])


# What a module computes its weights from.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ["weight_norm"],
        ["spectral_norm"],
        ["parametrizations.weight_norm"],
        ["parametrizations.spectral_norm"],
        ["parametrizations.orthogonal"],
        ["parametrizations.weight_norm", "parametrizations.spectral_norm"],
        ["prune.l1_unstructured"],
        ["prune.l1_unstructured", "prune.random_unstructured"],
    ],
)
def test_computed_torch_weights_are_converted(torch, names, training):
    module = torch.nn.RNN(D, H, 2, bidirectional=True, dtype=torch.float64)
    for key in ("weight_ih_l0_reverse", "weight_hh_l1"):
        for home, _, function in (name.rpartition(".") for name in names):
            how = {"amount": 0.4} if home == "prune" else {}
            home = importlib.import_module(f"torch.nn.utils.{home}".rstrip("."))
            with lax():
                getattr(home, function)(module, key, **how)
    with torch.no_grad():  # Now attributes that a hook refreshes are stale.
        for n, parameter in enumerate(module.parameters()):
            parameter.add_(torch.tensor(draw(parameter.shape, n, 0.3)))
    module.train(training)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    cells, xs = convert.from_torch(module), inputs()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(part.training == training for part in module.modules())
    hs, _ = module.eval()(torch.tensor(np.asarray(xs)))
    assert_close(jaxrnn.unroll_layers(cells, xs)[1], hs.detach().numpy())
    message = "pass the module, which computes its weights from these"
    refused(convert.from_torch, [(module.state_dict(), ValueError, message)])


def test_a_torch_cell_with_a_norm_is_converted(torch):
    module = torch.nn.RNNCell(D, H, dtype=torch.float64)
    with lax():
        torch.nn.utils.weight_norm(module, "weight_hh")
    x, h = inputs()[0], jnp.asarray(draw((B, H), 3))
    expected = module(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(h)))
    assert_close(jaxrnn.step(convert.from_torch(module), x, h), expected.detach().numpy())


def test_other_flax_modules_are_refused(nnx, linen):
    rngs = nnx.Rngs(0)
    with lax():
        kinds = nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.Linear
        others = [kind(D, H, rngs=rngs) for kind in kinds]
        residual = nnx.SimpleCell(H, H, residual=True, rngs=rngs)
        ends = [nnx.RNN(nnx_cell(nnx, D, n)) for n in (0, 1)]
        merged = nnx.Bidirectional(*ends, merge_fn=jnp.add)
        xs = jnp.zeros((B, T, D), jnp.float32)
        cells = linen.GRUCell(H), linen.OptimizedLSTMCell(H), linen.LSTMCell(H), linen.MGUCell(H)
        params = [parameters(linen.RNN(cell).init, jax.random.key(0), xs) for cell in cells]
    refused(convert.from_flax, [(m, TypeError, f"got {type(m).__name__}") for m in others])
    gated = [nnx.RNN(cell) for cell in others[:3]]
    refused(convert.from_flax, [(m, TypeError, "params['cell']: expected") for m in gated])
    refused(convert.from_flax, [(nnx.state(m), ValueError, "params") for m in others])
    refused(convert.from_flax, [(p, ValueError, "params") for p in params])
    refused(convert.from_flax, [(c, TypeError, f"got {type(c).__name__}") for c in cells])
    refused(convert.from_flax, [
        (residual, ValueError, "params.residual: expected the default, False, got True"),
        (merged, ValueError, "params.merge_fn: expected the default"),
        (linen.RNN(linen.SimpleCell(H)), TypeError, "got RNN"),
    ])  # fmt: skip


def test_changed_flax_modules_are_refused(nnx):
    class Own(nnx.SimpleCell):
        def __call__(self, carry, xs):
            return super().__call__(2 * carry, xs)

    ones = nnx.initializers.ones_init()
    with lax():
        lora = nnx_cell(nnx, D)
        lora.dense_h = nnx.LoRALinear(H, H, lora_rank=2, rngs=nnx.Rngs(0))
        odd = nnx_cell(nnx, D)
        odd.dense_h.dot_general = lambda *args, **how: 2 * jax.lax.dot_general(*args, **how)
        started = nnx_cell(nnx, D, carry_init=ones)
        both = nnx.Bidirectional(nnx.RNN(nnx_cell(nnx, D)), nnx.RNN(started))
        refused(convert.from_flax, [
            (nnx.RNN(nnx_cell(nnx, D), reverse=True), ValueError,
             "params.reverse: expected the default, False, got True"),
            (started, ValueError, "params.carry_init: expected the default, None, got ones"),
            (nnx.RNN(started), ValueError, "params['cell'].carry_init: expected the default"),
            (both, ValueError, "params['backward_rnn']['cell'].carry_init: expected the default"),
            (nnx_cell(nnx, D, dtype=jnp.float32), ValueError,
             "params['dense_i'].dtype: expected the weights' dtype, float64, got float32"),
            (nnx_cell(nnx, D, promote_dtype=lambda xs, dtype: xs), ValueError,
             "params.promote_dtype: expected the default, promote_dtype, got <lambda>"),
            (Own(D, H, rngs=nnx.Rngs(0)), TypeError, "got Own of"),
            (lora, TypeError, "params['dense_h']: expected an nnx.Linear"),
            (nnx.state(lora), ValueError,
             "params['dense_h']: expected no keys but kernel, bias, got lora"),
            (odd, ValueError, "params['dense_h'].dot_general: expected the default"),
            ([nnx.RNN(nnx_cell(nnx, D)), 3], TypeError, "params[1]: expected an nnx.SimpleCell"),
        ])  # fmt: skip
        # What changes nothing is taken.
        backward = nnx.RNN(nnx_cell(nnx, D, 1), reverse=True, keep_order=True)
        cell = nnx_cell(nnx, D, dtype=None, carry_init=nnx.initializers.zeros_init())
        how = {"time_major": True, "return_carry": True, "keep_order": True, "unroll": 2}
        pair = nnx.Bidirectional(nnx.RNN(nnx_cell(nnx, D)), backward)
    assert isinstance(convert.from_flax(nnx.RNN(cell, **how)), Cell)
    assert len(convert.from_flax(pair)[0]) == 2  # It says itself who reads backwards.


def test_a_cell_shared_by_both_directions_is_converted(nnx, linen):
    xs, how = inputs(), {"time_major": True, "rngs": False}
    with lax():
        forward = nnx.RNN(nnx_cell(nnx, D), **how)
        for backward in (forward, nnx.RNN(forward.cell, **how)):
            model = nnx.Bidirectional(forward, backward, **how)
            expected = model(xs, initial_carry=(jnp.zeros((B, H)),) * 2)
            cells = convert.from_flax(model)
            assert_close(jaxrnn.unroll_layers(cells, xs)[1], expected)
            refused(convert.from_flax, [(nnx.state(model), ValueError, "params")])
        shared = linen_cell(linen)
        model = linen.Bidirectional(shared, shared, time_major=True)
        params = parameters(model.init, jax.random.key(0), xs)
        expected = model.apply(params, xs)
    message = "params['params']: expected the key 'backward_rnn', got forward_rnn"
    refused(convert.from_flax, [(params, ValueError, message)])
    one = params["params"]["forward_rnn"]
    cells = convert.from_flax({"forward_rnn": one, "backward_rnn": one})
    assert_close(jaxrnn.unroll_layers(cells, xs)[1], expected)


def test_other_keras_layers_are_refused(keras):
    layers = keras.layers
    with lax():
        simple = layers.SimpleRNN(H)
        cells = [layers.SimpleRNNCell(H), layers.SimpleRNNCell(H)]
        others = [layers.LSTM(H), layers.GRU(H), layers.LSTMCell(H), layers.Dense(H)]
        built = [layers.Bidirectional(layers.SimpleRNN(H), merge_mode=m) for m in ("sum", None)]
        turned = layers.Bidirectional(layers.SimpleRNN(H, go_backwards=True),
                                      backward_layer=layers.SimpleRNN(H))  # fmt: skip
        stacks = layers.Bidirectional(layers.RNN(cells))
        stateful = layers.SimpleRNN(H, stateful=True)
        mixed = layers.SimpleRNN(H, dtype="mixed_bfloat16")
        own = type("Own", (layers.SimpleRNNCell,), {"call": lambda *args: args})(H)
        backward = layers.SimpleRNN(H, go_backwards=True)
        for layer in (*others[:2], *built, turned, stacks, stateful, mixed, backward):
            layer.build((B, T, D))
    refused(convert.from_keras, [
        (simple, ValueError, "layer.cell: expected a layer that is built"),
        *((layer, TypeError, "expected a keras SimpleRNN") for layer in others),
        *((layer, ValueError, "merge_mode") for layer in built),
        (turned, ValueError, "reads forward, got merge_mode 'concat', go_backwards=True"),
        (stateful, ValueError, "layer.stateful: expected False, got True"),
        (mixed, ValueError, "compute_dtype: expected the weights' dtype, float32, got bfloat16"),
        (own, TypeError, "got Own of"),
        ([backward, backward], ValueError, "layer[0]: expected a layer that reads forward"),
        (keras.Sequential([simple]), TypeError, "got Sequential"),
        (stacks, TypeError, "layer[0][0]: expected a jaxrnn.Cell, got tuple"),
    ])  # fmt: skip


def test_a_softmax_is_refused(keras):
    with lax():
        layer = keras.layers.SimpleRNN(H, activation="softmax")
        layer.build((None, T, D))
    message = "activation: expected an elementwise function"
    refused(convert.from_keras, [(layer, ValueError, message)])
    for function, value in ((convert.from_torch, state()), (convert.from_flax, flax_params()),
                            (convert.from_haiku, haiku_params())):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            function(value, jax.nn.softmax)


def test_functions_document_themselves():
    for name in (*FROM, "to_torch"):
        text = inspect.getdoc(getattr(convert, name))
        parameters = inspect.signature(getattr(convert, name)).parameters
        for part in ("Args:", "Returns:", "Raises:", *(f"{key}:" for key in parameters)):
            assert part in text, (name, part)


def test_no_other_library_is_imported():
    code = "import sys; from jaxrnn import convert; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "flax", "haiku", "keras"} & set(found.stdout.split())

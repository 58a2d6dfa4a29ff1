"""The unroll inside other programs: devices, control flow, checkpoints, export, nested rules."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, naive_unroll, random_case, weights
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn
from jaxrnn import textbook

BATCH = 4


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def squares(unroll):
    return lambda cell, xs, h0: jnp.sum(jnp.square(unroll(cell, xs, h0)[1]))


@pytest.fixture(scope="module")
def case():
    params, xs, h0, targets = random_case(batch=(BATCH,))
    return params, xs, h0, targets


def split(loss):
    """A loss of shared parameters and data split over four devices."""

    def local(cell, xs, h0):
        return lax.psum(loss(cell, xs, h0), "data")

    return jax.shard_map(
        local, mesh=mesh(), in_specs=(P(), P(None, "data"), P("data")), out_specs=P()
    )


def test_derivatives_of_data_parallel_losses_with_a_leak():
    params, xs, h0, _ = random_case(batch=(BATCH,), leak=jnp.asarray(0.6))
    args = (params.cell, xs, h0)
    ours, whole = split(squares(jaxrnn.unroll)), squares(naive_unroll)
    for derivative in (
        lambda f: jax.grad(f, (0, 1, 2))(*args),
        lambda f: jax.jvp(f, args, args),
        lambda f: jax.jvp(jax.grad(f, (0, 1, 2)), args, args),
    ):
        found = jax.jit(partial(derivative, ours))()
        assert_close(found, jax.jit(partial(derivative, whole))(), 6e-12)


def test_gradients_of_data_parallel_ids_with_lengths(case):
    params, *_ = case
    ids = jnp.arange(24).reshape(6, BATCH) % 4
    lengths = jnp.array([6, 2, 0, 5])

    def loss(cell, ids, lengths):
        return jnp.sum(jnp.square(jaxrnn.unroll(cell, jaxrnn.Ids(ids), lengths=lengths)[1]))

    found = jax.jit(jax.grad(split(loss)))(params.cell, ids, lengths)
    assert_close(found, jax.grad(loss)(params.cell, ids, lengths))


@pytest.mark.parametrize("by_hand", [jaxrnn.loss_and_grads, textbook.loss_and_grads])
def test_hand_gradients_add_up_over_devices(case, by_hand):
    params, xs, _, targets = case

    def gradients(*args):
        result = by_hand(*args)[1]
        return getattr(result, "params", result)

    data = P(None, "data")
    found = jax.shard_map(
        lambda *args: lax.psum(gradients(*args), "data"),
        mesh=mesh(), in_specs=(P(), data, data), out_specs=P(),
    )(params, xs, targets)  # fmt: skip
    assert_close(found, gradients(params, xs, targets))


@pytest.mark.parametrize("how", [
    {}, {"checkpoint_every": 4}, pytest.param({"truncate": 2}, marks=pytest.mark.full),
    pytest.param({"window": 2}, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_gradients_of_arguments_that_devices_share(case, how):
    # Inputs are split and the drive is shared; then lengths are split and inputs shared.
    params, xs, h0, _ = case
    drive, lengths = 0.3 * weights((6, 1, 5)), jnp.array([6, 2, 0, 5])

    def states(xs, h0, drive, lengths):
        return jaxrnn.unroll(params.cell, xs, h0, drive=drive, lengths=lengths, **how)[1]

    def total(specs):
        split = jax.shard_map(states, mesh=mesh(), in_specs=specs, out_specs=P(None, "data"))
        return lambda *args: jnp.sum(jnp.sin(split(*args)) * weights((6, BATCH, 5)))

    def whole(xs, h0, drive, lengths):
        xs, drive = (jnp.broadcast_to(x, (6, BATCH, x.shape[-1])) for x in (xs, drive))
        h0 = jnp.broadcast_to(h0, (BATCH, 5))
        return jnp.sum(jnp.sin(states(xs, h0, drive, lengths)) * weights((6, BATCH, 5)))

    by = P(None, "data")
    for specs, args in (
        ((by, P("data"), P(), P("data")), (xs, h0, drive, lengths)),
        ((P(), P(), P(), P("data")), (xs[:, :1], h0[:1], drive, lengths)),
    ):
        found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*args) for f in (total(specs), whole))
        assert_close(found, expected)


@pytest.mark.parametrize("call", [
    pytest.param("stack", marks=pytest.mark.full), "stack, checkpoints", "window", "bptt",
])  # fmt: skip
def test_each_device_returns_its_own_share(case, call):
    _, xs, _, targets = case

    def gradients(xs, targets):
        if call == "bptt":
            g = jnp.sin(targets)[..., None] * jnp.ones((1, 1, 5))
            return jaxrnn.bptt(PARAMS.cell, xs, None, g, g)
        how = {"stack": {}, "window": {"window": 2}}.get(call, {"checkpoint_every": 4})
        params = PARAMS if call == "window" else STACK
        loss, found = jaxrnn.loss_and_grads(params, xs, targets, **how)
        return loss, found.params

    xs = xs[:, :1]  # Shared; what is split are the targets.
    gradients = jax.jit(gradients)
    devices = [gradients(xs, targets[:, n : n + 1]) for n in range(BATCH)]
    expected = jax.tree.map(lambda *g: jnp.stack(g), *devices)
    found = jax.shard_map(
        lambda xs, y: jax.tree.map(lambda g: g[None], gradients(xs, y)),
        mesh=mesh(), in_specs=(P(), P(None, "data")), out_specs=P("data"),
    )(xs, targets)  # fmt: skip
    assert_close(found, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_gradients_of_sharded_arrays_without_a_first_state(case, kind):
    params, xs, h0, _ = case
    devices = mesh(kind)
    placed = jax.device_put(xs, NamedSharding(devices, P(None, "data")))
    everywhere = jax.device_put((params.cell, h0), NamedSharding(devices, P()))
    loss = squares(jaxrnn.unroll)
    with jax.set_mesh(devices):
        default = jax.jit(jax.grad(lambda c, x: loss(c, x, None), (0, 1)))(everywhere[0], placed)
    assert_close(default, jax.grad(lambda c, x: loss(c, x, None), (0, 1))(params.cell, xs))


PARAMS = random_case(K=4)[0]
STACK = jaxrnn.Params((PARAMS.cell, random_case(1, D=5)[0].cell), PARAMS.readout)
IDS = np.arange(24).reshape(6, BATCH) % 4
FLOATS, DRIVE = np.cos(np.arange(96.0)).reshape(6, BATCH, 4), np.ones((6, BATCH, 5))
LENGTHS = np.array([6, 2, 0, 5])


def gradient_of(xs, **how):
    def loss(cell):
        wrapped = jaxrnn.Ids(xs) if jnp.issubdtype(xs.dtype, jnp.integer) else xs
        return jnp.sum(jnp.sin(jaxrnn.unroll(cell, wrapped, **how)[1]))

    return jax.grad(loss)(PARAMS.cell)


VOLTAGE = dataclasses.replace(
    PARAMS, cell=dataclasses.replace(PARAMS.cell, form="voltage", leak=jnp.linspace(0.0, 1.0, 5))
)

# Batches of each argument lie on four devices, and JAX checks every operation's layout.
SHARDED = {
    "ids and a mask": lambda xs, mask: gradient_of(xs, mask=mask),
    "lengths, reverse": lambda xs, n: gradient_of(xs, lengths=n, reverse=True),
    "drive": lambda xs, drive: gradient_of(xs, drive=drive),
    "checkpoints": lambda xs, n: gradient_of(xs, lengths=n, checkpoint_every=4),
    "truncate": lambda xs, mask: gradient_of(xs, mask=mask, truncate=2),
    "window": lambda xs, n: gradient_of(xs, lengths=n, window=2),
    "bptt": lambda xs, g: jaxrnn.bptt(PARAMS.cell, xs, None, g, g),
    "loss and gradients": lambda xs, y: jaxrnn.loss_and_grads(PARAMS, jaxrnn.Ids(xs), y),
    "the same with checkpoints": lambda xs, y: jaxrnn.loss_and_grads(
        PARAMS, xs, y, checkpoint_every=2
    ),
    "a stack": lambda xs, y: jaxrnn.loss_and_grads(STACK, xs, y),
    "dropout": lambda xs: jaxrnn.unroll_layers(
        STACK.cell, xs, dropout=0.5, key=jax.random.key(1)
    ),
    "voltage": lambda xs, y: jaxrnn.loss_and_grads(VOLTAGE, xs, y),
    "voltage, checkpoints": lambda xs, y: jaxrnn.loss_and_grads(
        VOLTAGE, xs, y, checkpoint_every=2
    ),
}  # fmt: skip
ARGUMENTS = {
    "ids and a mask": (IDS, IDS != 1), "lengths, reverse": (FLOATS, LENGTHS),
    "drive": (FLOATS, DRIVE), "checkpoints": (IDS, LENGTHS), "truncate": (FLOATS, IDS != 1),
    "window": (IDS, LENGTHS), "bptt": (FLOATS, DRIVE), "loss and gradients": (IDS, IDS[::-1]),
    "the same with checkpoints": (FLOATS, IDS), "a stack": (FLOATS, IDS), "dropout": (FLOATS,),
    "voltage": (FLOATS, IDS), "voltage, checkpoints": (FLOATS, IDS),
}  # fmt: skip


RARE = "the same with checkpoints", "voltage", "lengths, reverse"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full) if name in RARE else name for name in SHARDED
])  # fmt: skip
def test_results_under_explicit_sharding(name):
    f, args = SHARDED[name], ARGUMENTS[name]
    expected = jax.jit(f)(*args)
    devices = mesh(AxisType.Explicit)
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(x, NamedSharding(devices, P(*(None,) * (x.ndim > 1), "data")))
            for x in args
        ]
        found = jax.jit(f)(*placed)
    assert_close(found, expected)


def test_a_window_is_exported_for_fewer_and_for_more_steps(case):
    params, xs, h0, _ = case
    (T,) = export.symbolic_shape("T")
    gradient = jax.jit(jax.grad(lambda xs: jnp.sum(
        jnp.sin(jaxrnn.unroll(params.cell, xs, h0, window=4)[1]))))  # fmt: skip
    exported = export.export(gradient)(jax.ShapeDtypeStruct((T, *xs.shape[1:]), xs.dtype))
    for time in (2, 6):
        assert_close(exported.call(xs[:time]), gradient(xs[:time]))


def test_gradients_by_hand_are_exported_with_symbolic_lengths(case):
    params, xs, _, targets = case
    T, B = export.symbolic_shape("T, B")
    shapes = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params),
        jax.ShapeDtypeStruct((T, B, 4), xs.dtype),
        jax.ShapeDtypeStruct((T, B), targets.dtype),
    )
    exported = export.export(jax.jit(lambda *args: jax.tree.leaves(jaxrnn.loss_and_grads(*args))))
    args = params, xs[:5, :3], targets[:5, :3]
    expected = jax.tree.leaves(jaxrnn.loss_and_grads(*args))
    assert_close(exported(*shapes).call(*args), expected)


def test_gradients_by_hand_are_differentiable(case):
    params, xs, h0, targets = case

    def curvature(gradient):
        def size(params):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(params)))

        return jax.jit(lambda p: (jax.grad(size)(p), jax.jvp(size, (p,), (p,))[1]))(params)

    def loss(params):
        logits = jaxrnn.apply_readout(params.readout, jaxrnn.unroll(params.cell, xs, h0)[1])
        return jnp.sum(jaxrnn.cross_entropy(logits, targets))

    by_hand = curvature(lambda p: jaxrnn.loss_and_grads(p, xs, targets, h0=h0)[1].params)
    assert_close(by_hand, curvature(jax.grad(loss)), 6e-12)
    value = jax.jit(jax.grad(lambda p: jaxrnn.loss_and_grads(p, xs, targets, h0=h0)[0]))(params)
    assert_close(value, jax.jit(jax.grad(loss))(params))


def test_gradients_without_64_bits(case):
    params, xs, _, targets = case
    host = jax.tree.map(np.asarray, (params, xs, targets))
    with jax.enable_x64(False):
        loss, gradients = jaxrnn.loss_and_grads(*host)
        assert {x.dtype.name for x in jax.tree.leaves((loss, gradients))} == {"float32"}
    wide, expected = jaxrnn.loss_and_grads(params, xs, targets)
    assert_close((loss, gradients.params), (wide, expected.params), 1e-5)


def test_prints_inside_an_activation_are_in_order(case, capfd):
    params, xs, h0, _ = case
    cell = params.cell

    def phi(a):
        jax.debug.print("{}", jnp.ravel(a)[0], ordered=True)
        return jnp.tanh(a)

    def loss(cell):
        return jnp.sum(jaxrnn.unroll(dataclasses.replace(cell, activation=phi), xs, h0)[0])

    jax.block_until_ready(jax.jit(jax.grad(loss))(cell))
    jax.effects_barrier()
    printed = [float(line) for line in capfd.readouterr().out.split()]
    h = jnp.concatenate([h0[None], jaxrnn.unroll(cell, xs, h0)[1][:-1]])
    a = xs @ cell.U.T + h @ cell.W.T + jnp.broadcast_to(cell.b, h.shape)
    assert_close(jnp.array(printed[: len(xs)]), a[:, 0, 0])


def test_debug_nans_passes_ids(case):
    params, *_ = case
    ids = jaxrnn.Ids(jnp.array([1, 0, 3]))
    with jax.debug_nans(True):
        h = jaxrnn.step(params.cell, jaxrnn.Ids(jnp.array(2)), jnp.zeros(5))
        found = h, jaxrnn.unroll(params.cell, ids)
        loss, _ = jaxrnn.loss_and_grads(params, ids, jnp.array([0, 1, 2]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, loss)))


@pytest.mark.parametrize("transformed", [
    lambda f: jax.grad(f)(2.0), lambda f: jax.jit(jax.grad(f))(2.0), lambda f: jax.jit(f)(2.0),
    lambda f: jax.vmap(f)(jnp.ones(2)),
], ids=["grad", "jit of grad", "jit", "vmap"])  # fmt: skip
def test_activations_over_a_traced_value_are_refused(case, transformed):
    params, xs, h0, _ = case

    def loss(scale, over):
        U, W, b = params.cell.U, params.cell.W, params.cell.b
        cell = jaxrnn.Cell(U, W, b, activation=over(lambda scale, a: jnp.tanh(scale * a), scale))
        return jnp.sum(jaxrnn.unroll(cell, xs, h0)[0])

    said = r"activation: .* got <lambda>, .* traced value: let it be one of the parameters"
    for over in (lambda f, scale: lambda a: f(scale, a), jax.tree_util.Partial):
        with pytest.raises(ValueError, match=said):
            transformed(lambda scale, over=over: loss(scale, over))

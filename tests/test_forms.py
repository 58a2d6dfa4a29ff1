"""Forms of a network, built in and custom: values, gradients, layers, losses, dtypes, errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from forms import (
    FIRST,
    GAPS,
    KINDS,
    LENGTHS,
    B,
    D,
    H,
    K,
    T,
    check_loss,
    compare,
    cross_entropy,
    first_states,
    g,
    is_number_or_list,
    layer,
    naive,
    naive_both,
    naive_outputs,
    network,
    parameters_of,
    rich_output,
    rich_update,
    scalar,
    spread,
    stack,
    up_to,
)  # fmt: skip
from helpers import assert_close, rare, weights
from jax import lax

import jaxrnn
from jaxrnn import textbook, train

full = pytest.mark.full

# A NumPy double sum ---------------------------------------------------------------------------

BOTH = ["rate", "voltage"]
NETWORKS = [
    ("rate", "tanh", "bias", {}), ("rate scalar", "sigmoid", "no bias", {}),
    ("rate per unit", "tanh", "bias", {}), ("voltage", "identity", "no bias", {}),
    ("voltage scalar", "tanh", "bias", {}), ("voltage per unit", "relu", "bias", {}),
    rare("rate scalar", "tanh", "bias", {}), rare("voltage", "tanh", "bias", {}),
    rare("voltage per unit", "tanh", "bias", {}),
    ("rate per unit", "tanh", "bias", {"truncate": 3}),
    ("voltage scalar", "tanh", "bias", {"window": 2}),
    ("voltage per unit", "sigmoid", "bias", {"truncate": 3, "reverse": True}),
    ("rate per unit", "sigmoid", "bias", {"window": 3, "reverse": True}),
]  # fmt: skip


def in_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def arrays_of(cell):
    return {name: in_numpy(getattr(cell, name)) for name in ("U", "W", "b", "leak")}


@pytest.mark.parametrize(("kind", "activation", "bias", "options"), NETWORKS, ids=str)
def test_states_and_all_gradients_match_the_double_sum(kind, activation, bias, options):
    params, xs, h0, targets = network(kind, activation, bias)
    form = params.cell.form
    cell, drive, valid = params.cell, 0.3 * weights((T, B, H), 3), GAPS
    dhs, dh_last = weights((T, B, H), 1), weights((B, H), 2)
    reverse = options.get("reverse", False)
    given = (form, activation, arrays_of(cell), *in_numpy((xs, h0, drive)), valid)
    expected = oracle.batch_states_of_form(*given, reverse)
    sums, d = oracle.batch_gradients_of_form(*given, *in_numpy((dhs, dh_last)), **options)
    of_cell = dataclasses.replace(cell, **sums)

    there = jnp.asarray(valid)[..., None]
    xs, dhs = jnp.where(there, xs, jnp.nan), jnp.where(there, dhs, jnp.nan)
    how = {"mask": valid, **options}

    @jax.jit
    def by_jax(cell, xs, h0, drive):
        def states(cell, xs, h0, drive):
            return jaxrnn.unroll(cell, xs, h0, drive=drive, **how)

        seen, pull = jax.vjp(states, cell, xs, h0, drive)
        return seen, pull((dh_last, dhs))

    seen, pulled = by_jax(cell, xs, h0, drive)
    assert_close(seen, expected)
    assert_close(pulled, (of_cell, d["xs"], d["h0"], d["delta"]))
    hs = jnp.where(there, seen[1], jnp.nan)
    found = jaxrnn.bptt(cell, xs, h0, hs, dhs, dh_last=dh_last, drive=drive, **how)
    names = ("xs", "h0", "delta", "adjoint")
    assert_close(
        (found.cell, *(getattr(found, name) for name in names)),
        (of_cell, *(d[name] for name in names)),
    )
    for on_padding in (found.xs, found.delta, found.adjoint):
        assert not np.any(np.where(there, 0, on_padding))

    V, c = in_numpy((params.readout.V, params.readout.c))
    given = (form, activation, given[2], V, c, given[3], np.eye(K)[np.asarray(targets)], *given[4:])
    loss, sums, d, dV, dc = oracle.batch_loss_and_grads_of_form(*given, **options)
    readout = jaxrnn.Readout(dV, dc)
    expected_params = jaxrnn.Params(dataclasses.replace(cell, **sums), readout)
    found_loss, found = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, drive=drive, **how)
    assert_close(
        (found_loss, found.params, found.h0, found.h_last),
        (loss, expected_params, d["h0"], expected[0]),
    )


@pytest.mark.parametrize(("kind", "activation", "bias", "options"), [
    ("rate scalar", "sigmoid", "no bias", {}), ("rate per unit", "tanh", "bias", {"truncate": 3}),
    ("voltage per unit", "relu", "bias", {}), ("voltage scalar", "tanh", "bias", {"window": 2}),
], ids=str)  # fmt: skip
def test_textbook_matches_the_double_sum(kind, activation, bias, options):
    params, xs, _, targets = network(kind, activation, bias)
    form = params.cell.form
    V, c = in_numpy((params.readout.V, params.readout.c))
    zeros, every = np.zeros((T, B, H)), np.ones((T, B), bool)
    loss, sums, _, dV, dc = oracle.batch_loss_and_grads_of_form(
        form, activation, arrays_of(params.cell), V, c, np.asarray(xs),
        np.eye(K)[np.asarray(targets)], zeros[0], zeros, every, **options,
    )  # fmt: skip
    cell = dataclasses.replace(params.cell, **sums)
    found = textbook.loss_and_grads(params, xs, targets, **options)
    assert_close(found, (loss, jaxrnn.Params(cell, jaxrnn.Readout(dV, dc))))


@pytest.mark.parametrize(
    ("kind", "option"), [("rich", {"truncate": 3}), rare("no output", {"window": 2})], ids=str
)
def test_textbook_of_a_custom_form_matches_a_naive_scan(kind, option):
    params, xs, _, targets = network(kind)

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        hs = naive(params.cell, xs, jnp.zeros((B, H)), **option)[1]
        return jnp.sum(cross_entropy(params.readout, g(params.cell, hs), targets))

    loss, gradient = expected(params)
    assert_close(textbook.loss_and_grads(params, xs, targets, **option), (loss, gradient))
    terms = textbook.contributions(params, xs, targets, **option)
    later = np.arange(T)[:, None] < np.arange(T)  # k > t
    for leaf in jax.tree.leaves(terms):
        assert not np.any(np.asarray(leaf)[later])
    assert_close(jax.tree.map(lambda x: x.sum((0, 1)), terms), gradient.cell)


@pytest.mark.parametrize("kind", [rare("voltage"), "voltage per unit", "rich"])
def test_contributions_are_the_share_of_each_step(kind):
    params, xs, _, targets = network(kind)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), params.cell)

    def losses(copies):
        # Step k, and the readout after it, have parameters of their own.
        def body(h, now):
            cell, x = now
            h, _ = naive(cell, x[None], h)
            return h, g(cell, h)

        _, ys = lax.scan(body, jnp.zeros((B, H)), (copies, xs))
        return jnp.sum(cross_entropy(params.readout, ys, targets), axis=1)

    terms = textbook.contributions(params, xs, targets)
    assert_close(terms, jax.jit(jax.jacrev(losses))(copies))


# Conversions between forms --------------------------------------------------------------------


def original(step):
    """h_1 … h_T of h_t = step(parameters, h_{t−1}, x_t, ξ_t), as a plain scan."""

    def states(parameters, h0, xs, noise):
        def body(h, now):
            h = step(parameters, h, *now)
            return h, h

        return lax.scan(body, h0, (xs, noise))[1]

    return states


def arrays_with(leak):
    params, xs, h0, _ = network(f"rate {leak}")
    cell = params.cell
    return (cell.U, cell.W, cell.b, cell.leak), h0, xs, 0.3 * weights((T, B, H), 3)


def affine(W, h, U, x, b):
    return h @ W.T + x @ U.T + jnp.broadcast_to(b, h.shape)


@original
def voltages(parameters, v, x, noise):
    U, W, b, leak = parameters
    leak = spread(leak, v)
    return (1 - leak) * v + leak * affine(W, jnp.tanh(v), U, x, b) + noise


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_the_voltage_form_equals_its_equation(leak):
    def ours(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        cell = jaxrnn.Cell(U, W, b, leak, form="voltage")
        return jaxrnn.unroll(cell, xs, v0, drive=noise / spread(leak, noise))[1]

    parameters, *rest = arrays_with(leak)
    if leak == "per unit":
        # Noise outside the bracket of α is a drive of ξ / α: no α may be 0 here.
        parameters = (*parameters[:3], jnp.asarray([0.1, 0.3, 0.7, 1.0]))
    compare(ours, voltages, parameters, *rest)


def test_the_voltage_form_equals_a_filtered_rate_network():
    def converted(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        current = affine(jnp.zeros_like(W), noise, U, xs, b) + noise / leak

        def body(d, now):
            d = (1 - leak) * d + leak * now
            return d, d

        _, d = lax.scan(body, v0, current)
        d = jnp.concatenate([v0[None], d])
        cell = jaxrnn.Cell(jnp.zeros((H, 0)), W, None, leak)
        _, rates = jaxrnn.unroll(cell, jnp.zeros((T, B, 0)), drive=d[:-1])
        return rates @ W.T + d[1:]

    def native(parameters, v0, xs, noise):
        U, W, b, leak = parameters
        cell = jaxrnn.Cell(U, W, b, leak, form="voltage")
        return jaxrnn.unroll(cell, xs, v0, drive=noise / leak)[1]

    args = arrays_with("scalar")
    compare(converted, voltages, *args)
    compare(converted, native, *args)


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_outer_leak_equals_an_elman_network_of_other_weights(leak):
    @original
    def outer(parameters, h, x, noise):
        U, W, b, leak = parameters
        leak = spread(leak, h)
        return jnp.tanh((1 - leak) * h + leak * affine(W, h, U, x, b) + noise)

    def elman(parameters, h0, xs, noise):
        U, W, b, leak = parameters
        leak = spread(leak, b)
        rows = leak[:, None]
        cell = jaxrnn.Cell(rows * U, jnp.diag(1 - leak) + rows * W, leak * b)
        return jaxrnn.unroll(cell, xs, h0, drive=noise)[1]

    compare(elman, outer, *arrays_with(leak))


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_wilson_cowan_equals_a_rate_network_of_filtered_inputs(leak):
    @original
    def wilson_cowan(parameters, h, x, noise):
        U, W, b, leak = parameters
        leak = spread(leak, h)
        rates = jnp.tanh(h @ W.T + jnp.broadcast_to(b, h.shape) + noise)
        return (1 - leak) * h + leak * (rates + x @ U.T)

    def converted(parameters, h0, xs, noise):
        U, W, b, leak = parameters
        spread_leak = spread(leak, h0)

        def body(f, x):
            new = (1 - spread_leak) * f + spread_leak * (x @ U.T)
            return new, (f, new)

        _, (before, f) = lax.scan(body, jnp.zeros_like(h0), xs)
        cell = jaxrnn.Cell(jnp.zeros((H, 0)), W, b, leak)
        drive = before @ W.T + noise
        return f + jaxrnn.unroll(cell, xs[..., :0], h0, drive=drive)[1]

    compare(converted, wilson_cowan, *arrays_with(leak))


# Long sequences -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rate scalar", "voltage per unit", rare("voltage")])
def test_checkpoints_at_a_prime_length_change_no_gradient(kind):
    time, size = 10_007, 2
    params, xs, h0, _ = network(kind, T=time, batch=(1,), D=1, H=size)
    cell = params.cell
    if kind.endswith("per unit"):
        cell = dataclasses.replace(cell, leak=jnp.asarray([0.2, 1.0]))

    def gradients(**how):
        def loss(cell, xs, h0):
            h_last, hs = jaxrnn.unroll(cell, xs, h0, **how)
            return jnp.sum(hs**2) + jnp.sum(h_last)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(cell, xs, h0)

    # Sums of time terms, in another order.
    eps = float(jnp.finfo(jnp.float64).eps)
    assert_close(gradients(checkpoint_every="sqrt"), gradients(), time * eps)


# By hand --------------------------------------------------------------------------------------

BY_HAND = {
    "mask and drive": {"mask": GAPS, "drive": 0.3 * np.asarray(weights((T, B, H), 3))},
    "lengths in reverse": {"lengths": LENGTHS, "reverse": True},
    "mask and truncate": {"mask": GAPS, "truncate": 3},
    "mask and window": {"mask": GAPS, "window": 3},
}


def valid_of(how):
    """Valid steps, and the options that the naive scan knows."""
    valid = np.ones((T, B), bool)
    valid = np.asarray(up_to(how["lengths"])) if "lengths" in how else how.get("mask", valid)
    names = "reverse", "truncate", "window"
    return valid, {name: how[name] for name in names if name in how}


@pytest.mark.parametrize("name", [
    "mask and drive", "lengths in reverse", rare("mask and truncate"), rare("mask and window"),
])  # fmt: skip
def test_bptt_returns_the_gradients_of_everything(name):
    how = BY_HAND[name]
    params, xs, h0, _ = network("rich")
    valid, options = valid_of(how)
    there = jnp.asarray(valid)[..., None]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4), has_aux=True)
    def expected(cell, xs, h0, drive, push):
        states = naive(cell, xs, h0, drive=drive, push=push, valid=valid, **options)
        return scalar(states), states

    nothing = jnp.zeros((T, B, H))
    drive = jnp.asarray(how.get("drive", nothing))
    (_, (h_last, hs)), wanted = expected(params.cell, xs, h0, drive, nothing)
    dhs = jnp.where(there, 3 * jnp.cos(3 * hs), jnp.nan)
    xs = jnp.where(there, xs, jnp.nan)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, dhs, dh_last=jnp.exp(h_last), **how)
    assert_close((found.cell, found.xs, found.h0, found.delta, found.adjoint), wanted)
    for on_padding in (found.xs, found.delta, found.adjoint):
        assert not np.any(np.where(there, 0, on_padding))


def everything(number, args):
    return jax.grad(number, (0, 1, 2))(*args)


def of_cotangents_alone(number, args):
    # The map is transposed once more here; else JAX differentiates it.
    return jax.grad(number, 2)(*args)


def forward(number, args):
    return jax.jvp(number, args, jax.tree.map(jnp.cos, args))[1]


DIFFERENTIATED = [
    ("rate per unit", "mask and truncate", everything),
    ("voltage per unit", "mask and drive", of_cotangents_alone),
    ("voltage per unit", "mask and window", forward),
    ("rich", "mask and truncate", everything),
]
DIFFERENTIATED += [
    pytest.param(kind, name, derivative, marks=full)
    for kind in ("rate per unit", "voltage per unit", "rich") for name in BY_HAND
    for derivative in (everything, of_cotangents_alone, forward)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "derivative"), DIFFERENTIATED)
def test_all_that_bptt_returns_is_differentiable(kind, name, derivative):
    how = BY_HAND[name]
    params, xs, h0, _ = network(kind, "sigmoid")
    valid, options = valid_of(how)
    there = jnp.asarray(valid)[..., None]
    drive = jnp.asarray(how.get("drive", jnp.zeros((T, B, H))))

    def by_hand(cell, h0, dhs):
        _, hs = jaxrnn.unroll(cell, xs, h0, **how)
        return jaxrnn.bptt(cell, xs, h0, hs, dhs, **how)

    def by_jax(cell, h0, dhs):
        def states(cell, xs, h0, drive, push):
            return naive(cell, xs, h0, drive=drive, push=push, valid=valid, **options)[1]

        return jax.vjp(states, cell, xs, h0, drive, jnp.zeros((T, B, H)))[1](dhs)

    def derivatives(run):
        def number(cell, h0, dhs):
            leaves = jax.tree.leaves(run(cell, h0, jnp.where(there, dhs, 0)))
            return sum(jnp.sum(jnp.sin(x + n)) for n, x in enumerate(leaves))

        return derivative(number, (params.cell, h0, weights((T, B, H))))

    found, expected = (jax.jit(derivatives, static_argnums=0)(run) for run in (by_hand, by_jax))
    assert_close(found, expected, FIRST * T)


# Losses ---------------------------------------------------------------------------------------

LOSSES = {
    "voltage": (layer(0, "voltage per unit"), first_states(1)[0]),
    "custom": (layer(0, "rich"), first_states(1)[0]),
    "stack of voltages": (stack("voltage per unit", "rate scalar", "voltage"), first_states(3)),
    "stack of all forms": (stack("rich", "rate scalar", "voltage"), first_states(3)),
    "two directions": (
        ((layer(0, "rich"), layer(1, "voltage")), layer(2, "nested", 2 * H)),
        (first_states(2), weights((B, H), 22)),
    ),
    "two directions of voltages": (
        ((layer(0, "voltage"), layer(1, "voltage per unit")), layer(2, "voltage", 2 * H)),
        (first_states(2), weights((B, H), 22)),
    ),
}
OPTIONS = [{}, {"checkpoint_every": 3}, {"checkpoint_every": 3, "truncate": 3}, {"window": 2}]
CASES = [
    ("voltage", OPTIONS[2]), ("custom", OPTIONS[3]), ("stack of all forms", OPTIONS[1]),
    ("two directions", OPTIONS[0]),
]  # fmt: skip
CASES += [pytest.param(name, how, marks=full) for name in LOSSES for how in OPTIONS]


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_loss_and_grads_reads_outputs(name, how):
    cells, h0 = LOSSES[name]
    options = {k: v for k, v in how.items() if k != "checkpoint_every"}
    check_loss(cells, partial(naive_outputs, **options), h0, H, **how)


# Layers, steps, training ----------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [
    ("voltage", "rate scalar"), rare(("voltage", "voltage per unit")),
    ("voltage per unit", "rich", "no output", "nested"),
], ids=", ".join)  # fmt: skip
def test_layers_pass_outputs_up_and_return_last_states(kinds):
    cells, xs, h0 = stack(*kinds), weights((T, B, D)), first_states(len(kinds))
    valid = up_to(LENGTHS)

    def ours(cells, xs, h0):
        return jaxrnn.unroll_layers(cells, xs, h0, lengths=LENGTHS)

    compare(ours, partial(naive_outputs, valid=valid), cells, xs, h0)
    _, ys = ours(cells, xs, h0)
    assert not np.any(np.where(valid[..., None], 0, ys))


@pytest.mark.parametrize(("kinds", "how"), [
    (("voltage", "voltage per unit"), {"lengths": LENGTHS}), (("rich", "nested"), {"mask": GAPS}),
], ids=["voltage, lengths", "custom, mask"])  # fmt: skip
def test_bidirectional_returns_outputs_of_both_directions(kinds, how):
    cells, xs = tuple(layer(n, kind) for n, kind in enumerate(kinds)), weights((T, B, D))
    valid = up_to(LENGTHS) if "lengths" in how else jnp.asarray(GAPS)

    def ours(cells, xs, h0):
        return jaxrnn.bidirectional(*cells, xs, h0, **how)

    compare(ours, partial(naive_both, valid=valid), cells, xs, first_states(2))
    _, ys = ours(cells, xs, first_states(2))
    assert not np.any(np.where(valid[..., None], 0, ys))


def test_one_cell_as_layers_returns_outputs():
    (cell,), xs = stack("voltage"), weights((T, B, D))
    h_last, hs = jaxrnn.unroll(cell, xs, lengths=LENGTHS)
    found = jaxrnn.unroll_layers(cell, xs, lengths=LENGTHS)
    valid = up_to(LENGTHS)[..., None]
    assert_close(found, (h_last, jnp.where(valid, jax.nn.sigmoid(hs), 0)))


def test_a_residual_adds_outputs():
    cells, xs, h0 = stack("voltage", "voltage per unit"), weights((T, B, D)), first_states(2)

    def ours(cells, xs, h0):
        return jaxrnn.unroll_layers(cells, xs, h0, residual=True, lengths=LENGTHS)

    def by_hand(cells, xs, h0):
        first, y = naive_outputs(cells[0], xs, h0[0], up_to(LENGTHS))
        second, z = naive_outputs(cells[1], y, h0[1], up_to(LENGTHS))
        return (first, second), y + z

    compare(ours, by_hand, cells, xs, h0)


@pytest.mark.parametrize("kind", ["voltage", "voltage scalar", "voltage per unit", *KINDS])
def test_steps_one_by_one_are_the_unroll(kind):
    params, xs, h0, _ = network(kind, "sigmoid")
    for inputs in (xs, jaxrnn.Ids(jnp.argmax(xs, -1))):
        h, hs = h0, []
        for t in range(T):
            h = jaxrnn.step(params.cell, jax.tree.map(lambda x, t=t: x[t], inputs), h)
            hs.append(h)
        assert_close(jaxrnn.unroll(params.cell, inputs, h0), (h, jnp.stack(hs)))


@pytest.mark.parametrize("kind", ["rate", "voltage", "rich", "no output"])
def test_outputs_and_their_gradients(kind):
    cell, hs = network(kind)[0].cell, weights((T, B, H))

    def gradients(outputs):
        return jax.grad(lambda cell, hs: jnp.sum(jnp.sin(outputs(cell, hs))), (0, 1))(cell, hs)

    assert_close(jaxrnn.outputs(cell, hs), g(cell, hs))
    assert_close(gradients(jaxrnn.outputs), gradients(g))


def test_a_custom_form_runs_one_step():
    params, xs, h0, _ = network("rich", T=1)
    compare(jaxrnn.unroll, naive, params.cell, xs, h0)


def test_a_custom_form_runs_no_steps():
    params, xs, h0, targets = network("rich", T=0)
    h_last, hs = jaxrnn.unroll(params.cell, xs, h0)
    assert_close(h_last, h0)
    assert hs.shape == (0, B, H)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, hs, dh_last=h0)
    assert_close((found.cell, found.h0), (jax.tree.map(jnp.zeros_like, params.cell), h0))
    loss, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    assert not any(np.any(x) for x in jax.tree.leaves((loss, gradients.params)))


@pytest.mark.parametrize("kind", ["voltage scalar", "rich"])
def test_generate_reads_outputs(kind):
    params, *_ = network(kind, "sigmoid", D=K)
    h, logits, expected, run = np.zeros((1, H)), None, [], jax.jit(naive)
    for n in range(8):
        drawn = n % 2 if n < 2 else int(np.argmax(logits))
        expected += [drawn] if n >= 2 else []
        h, _ = run(params.cell, jnp.eye(K)[drawn][None, None], h)
        logits = g(params.cell, h[0]) @ params.readout.V.T + params.readout.c
    found = jaxrnn.generate(params, jax.random.key(1), jnp.array([0, 1]), 6, temperature=0)
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", ["voltage scalar", "rich"])
def test_an_update_descends_the_loss_of_outputs(kind):
    params, *_ = network(kind, "sigmoid", D=K)
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, K, (T, B)), generator.integers(0, K, (T, B))

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        xs = jax.nn.one_hot(inputs, K, dtype=jnp.float64)
        ys = g(params.cell, naive(params.cell, xs, jnp.zeros((B, H)))[1])
        return jnp.mean(cross_entropy(params.readout, ys, jnp.asarray(targets)))

    loss, gradient = mean_loss(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    # optax multiplies floats by its integer step counts.
    with jax.numpy_dtype_promotion("standard"):
        state = train.init_state(params, optax.sgd(0.1), B)
        new, found = train.make_update(optax.sgd(0.1))(state, inputs, targets)
    assert_close((found, new.params), (loss, expected))
    assert mean_loss(new.params)[0] < loss


def test_a_cell_without_bias_has_no_gradient_of_one():
    params, xs, h0, targets = network("rate scalar", bias="no bias")
    _, hs = jaxrnn.unroll(params.cell, xs, h0)
    found = jaxrnn.bptt(params.cell, xs, h0, hs, hs).cell
    terms = textbook.contributions(params, xs, targets)
    for cell in (found, terms):
        assert cell.b is None
        assert jax.tree.structure(cell) == jax.tree.structure(params.cell)


@pytest.mark.parametrize("kind", [pytest.param("rate per unit", marks=full), "voltage per unit"])
def test_networks_may_have_no_inputs(kind):
    params, xs, h0, targets = network(kind, "sigmoid")
    cell = dataclasses.replace(params.cell, U=params.cell.U[:, :0])
    params, xs = dataclasses.replace(params, cell=cell), xs[..., :0]
    dhs, dh_last = weights((T, B, H), 1), weights((B, H), 2)

    @jax.jit
    def expected(cell, xs, h0):
        seen, pull = jax.vjp(naive, cell, xs, h0)
        return seen, pull((dh_last, dhs))

    seen, pulled = expected(cell, xs, h0)
    assert_close(jaxrnn.unroll(cell, xs, h0), seen)
    found = jaxrnn.bptt(cell, xs, h0, seen[1], dhs, dh_last=dh_last)
    assert_close((found.cell, found.xs, found.h0), pulled)
    mapped = jax.vmap(jaxrnn.unroll, (None, 1, 0), (0, 1))(cell, xs, h0)
    assert_close(mapped, seen)
    h_last, ys = jaxrnn.unroll_layers((cell, layer(3, "voltage", H)), xs, (h0, None))
    assert_close(h_last[0], seen[0])
    assert ys.shape == (T, B, H)

    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, h0):
        ys = g(params.cell, naive(params.cell, xs, h0)[1])
        return jnp.sum(cross_entropy(params.readout, ys, targets))

    total, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0)
    assert_close((total, (gradients.params, gradients.h0)), jax.jit(loss)(params, h0))


@pytest.mark.parametrize("form", BOTH)
def test_init_cell_makes_cells_of_built_in_forms(form):
    cell = jaxrnn.init_cell(jax.random.key(0), 0, H, form=form, dtype=jnp.float64)
    assert (cell.form, cell.U.shape, cell.W.shape) == (form, (H, 0), (H, H))
    assert np.all(np.isfinite(cell.W)) and np.any(cell.W)
    given = (jaxrnn.init_cell(jax.random.key(1), D, H, form=form, dtype=jnp.float64),
             weights((T, B, D)), weights((B, H)))  # fmt: skip
    assert_close(jaxrnn.unroll(*given), jax.jit(naive)(*given))


def test_the_rate_form_is_the_default():
    cell = jaxrnn.Cell(jnp.zeros((H, D)), jnp.zeros((H, H)), jnp.zeros(H))
    assert cell.form == "rate"
    assert jaxrnn.init_cell(jax.random.key(0), D, H).form == "rate"


def test_init_cell_makes_cells_of_custom_forms():
    form, theta = KINDS["rich"]
    theta = jax.tree.map(np.asarray, theta, is_leaf=is_number_or_list)
    cell = jaxrnn.init_cell(jax.random.key(0), D, H, form=form, parameters=theta, dtype="bfloat16")
    assert cell.form is form and cell.leak is None
    assert {x.dtype for x in jax.tree.leaves(cell)} == {jnp.dtype("bfloat16")}
    assert jaxrnn.unroll(cell, jnp.ones((T, D), jnp.bfloat16))[1].shape == (T, H)


# The built-in forms, written as a Form --------------------------------------------------------

BUILT_IN = {
    "rate": jaxrnn.Form(lambda a, h, leak: (1 - leak) * h + leak * jnp.sin(a)),
    "voltage": jaxrnn.Form(
        lambda a, h, leak: (1 - leak) * h + leak * a, lambda h, _: jnp.sin(h)
    ),
}  # fmt: skip
NOISY = {"drive": 0.3 * weights((T, B, H), 3)}
SAME_OPTIONS = {
    "mask, drive, truncate": {"mask": jnp.asarray(GAPS), "truncate": 3} | NOISY,
    "window, associative": {"window": 3, "implementation": "associative"},
    "lengths, reverse, sqrt": {
        "lengths": jnp.asarray(LENGTHS), "reverse": True, "checkpoint_every": "sqrt"
    },
}  # fmt: skip


def both_ways(form):
    """A network of a built-in form, and the same of a custom one."""
    params, xs, h0, targets = network(f"{form} per unit", jnp.sin)
    cell = params.cell
    custom = dataclasses.replace(cell, leak=None, form=BUILT_IN[form], parameters=cell.leak)
    return [(dataclasses.replace(params, cell=c), xs, h0, targets) for c in (cell, custom)]


def leaves_of(params):
    """In which the leak is a parameter."""
    cell = getattr(params, "cell", params)
    theta = cell.leak if cell.parameters is None else cell.parameters
    return cell.U, cell.W, cell.b, theta, getattr(params, "readout", None)


@pytest.mark.parametrize(("form", "name"), [
    ("rate", "mask, drive, truncate"), ("voltage", "window, associative"),
    ("voltage", "lengths, reverse, sqrt"),
])  # fmt: skip
def test_a_built_in_form_equals_the_same_custom_form(form, name):
    how = SAME_OPTIONS[name]

    def everything(params, xs, h0):
        def states(cell, xs, h0):
            return jaxrnn.unroll(cell, xs, h0, **how)

        seen, pull = jax.vjp(states, params.cell, xs, h0)
        dcell, *rest = pull(jax.tree.map(jnp.cos, seen))
        return seen, leaves_of(dcell), rest

    found, expected = (jax.jit(everything)(*args[:3]) for args in both_ways(form))
    assert_close(found, expected)


@pytest.mark.parametrize("form", [pytest.param("rate", marks=full), "voltage"])
def test_hand_gradients_of_a_built_in_form_equal_those_of_the_same_custom_form(form):
    how = SAME_OPTIONS["mask, drive, truncate"]

    def everything(params, xs, h0, targets):
        hs = jnp.sin(jnp.cumsum(xs @ params.cell.U.T, 0))  # whatever they are
        found = jaxrnn.bptt(params.cell, xs, h0, hs, jnp.cos(hs), **how)
        loss, of_loss = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how)
        others = found.xs, found.h0, found.delta, found.adjoint, loss, of_loss.h0
        return leaves_of(found.cell), leaves_of(of_loss.params), others

    found, expected = (jax.jit(everything)(*args) for args in both_ways(form))
    assert_close(found, expected)


# Half precision -------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def sines_and_gradients(unroll, *args):
    def loss(*args):
        _, hs = unroll(*args)
        return jnp.sum(jnp.sin(hs.astype(jnp.float32))), hs

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*args)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_a_custom_form_is_near_float32(dtype):
    params, xs, h0, _ = network("rich", dtype=jnp.dtype(dtype))

    args = params.cell, xs, h0
    found = sines_and_gradients(jaxrnn.unroll, *args)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    expected = sines_and_gradients(naive, *wide)
    # T states and T adjoints are each rounded once, by eps/2, and Jacobians are below 1 here:
    # |∂f/∂h| ≤ 0.8, and 0.3 · 1.2 · 0.9 / 4 by way of W.
    limit = T * float(jnp.finfo(dtype).eps)
    assert_close(found, expected, limit)
    hs = found[1]
    by_hand = jaxrnn.bptt(*args, hs, jnp.cos(hs.astype(jnp.float32)).astype(hs.dtype))
    assert {x.dtype for x in jax.tree.leaves(by_hand)} == {jnp.dtype(dtype)}
    assert_close((by_hand.cell, by_hand.xs, by_hand.h0), expected[0], limit)


@pytest.mark.parametrize("kind", [
    "rate scalar", "voltage per unit", pytest.param("voltage", marks=full),
    pytest.param("voltage scalar", marks=full),
])  # fmt: skip
def test_bfloat16_gradients_are_near_those_of_float64(kind):
    params, xs, h0, _ = network(kind, T=64, batch=(8,), dtype=jnp.bfloat16)

    def gradients(unroll, *args):
        def loss(*args):
            return jnp.sum(jnp.sin(unroll(*args)[1].astype(jnp.float64)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    args = (params.cell, xs, h0)
    found = gradients(jaxrnn.unroll, *args)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    expected = gradients(naive, *jax.tree.map(lambda x: x.astype(jnp.float64), args))
    # Of α = 0 every step adds the same rounded cotangent: those errors do not average out.
    assert_close(found[0].leak, expected[0].leak, 5e-2)
    found, expected = (
        (dataclasses.replace(cell, leak=None), *rest) for cell, *rest in (found, expected)
    )
    assert_close(found, expected, 2e-2)
    hs = jaxrnn.unroll(*args)[1]
    by_hand = jaxrnn.bptt(*args, hs, jnp.cos(hs.astype(jnp.float32)).astype(hs.dtype))
    # Cotangents are rounded as well here.
    assert_close(by_hand.cell.W, expected[0].W, 2e-2)


@pytest.mark.parametrize("leak", ["scalar", "per unit"])
def test_sums_of_4096_ones_in_bfloat16_do_not_stop_at_256(leak):
    time = batch = 64
    ones = jnp.ones(2) if leak == "per unit" else jnp.ones(())
    U, W, b = jnp.ones((2, 1)), jnp.zeros((2, 2)), jnp.zeros(2)
    cell = jaxrnn.Cell(U, W, b, ones, form="voltage")
    # h_t = drive_t + x_t = t: a_t − h_{t−1} is 1, and so is dL/da_t.
    steps = jnp.arange(time, dtype=jnp.float64)[:, None, None]
    drive = jnp.broadcast_to(steps, (time, batch, 2))
    given = (cell, jnp.ones((time, batch, 1)), jnp.zeros((batch, 2)), drive)
    cell, xs, h0, drive = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given)

    @jax.grad
    def by_jax(cell):
        return jnp.sum(jaxrnn.unroll(cell, xs, h0, drive=drive)[1].astype(jnp.float32))

    _, hs = jaxrnn.unroll(cell, xs, h0, drive=drive)
    by_hand = jaxrnn.bptt(cell, xs, h0, hs, jnp.ones_like(hs), drive=drive).cell
    for found in (by_jax(cell), by_hand):
        assert found.b.dtype == jnp.bfloat16
        # 4,096 is a number of bfloat16, of which every term and every sum here is one in float32.
        np.testing.assert_array_equal(found.b.astype(jnp.float64), 4096)
        np.testing.assert_array_equal(found.U.astype(jnp.float64), 4096)
        expected = 2 * 4096 if leak == "scalar" else 4096
        np.testing.assert_array_equal(found.leak.astype(jnp.float64), expected)


def test_sums_of_parameters_in_bfloat16_do_not_stop_at_256():
    time = batch = 64
    form = jaxrnn.Form(lambda a, h, p: a + p["unit"] + p["all"], lambda h, p: h + p["read"])
    zeros = {"unit": jnp.zeros(2), "all": jnp.zeros(()), "read": jnp.zeros(2)}
    cell = jaxrnn.Cell(jnp.ones((2, 1)), jnp.zeros((2, 2)), None, form=form, parameters=zeros)
    readout = jaxrnn.Readout(jnp.zeros((2, 2)), jnp.zeros(2))
    to_half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    params, xs = jax.tree.map(to_half, (jaxrnn.Params(cell, readout), jnp.ones((time, batch, 1))))

    def by_jax(cell):
        return jnp.sum(jaxrnn.unroll(cell, xs)[1].astype(jnp.float32))

    hs = jaxrnn.unroll(params.cell, xs)[1]
    by_hand = jaxrnn.bptt(params.cell, xs, None, hs, jnp.ones_like(hs)).cell
    for found in (jax.grad(by_jax)(params.cell), by_hand):
        # 4,096 is a number of bfloat16; "all" is in two units.
        np.testing.assert_array_equal(found.parameters["unit"].astype(jnp.float64), 4096)
        np.testing.assert_array_equal(found.parameters["all"].astype(jnp.float64), 2 * 4096)
        np.testing.assert_array_equal(found.parameters["read"].astype(jnp.float64), 0)


# What else a form may be ----------------------------------------------------------------------


@jax.custom_vjp
def spike(h):
    return (h > 0).astype(h.dtype)


spike.defvjp(lambda h: (spike(h), h), lambda h, d: (d / (1 + jnp.abs(h)) ** 2,))


def test_forms_may_have_surrogate_gradients():
    # A function that JAX differentiates in reverse mode only, with learned decay and threshold.
    form = jaxrnn.Form(
        lambda a, v, p: p["decay"] * v + a, lambda v, p: spike(v - p["threshold"])
    )  # fmt: skip
    theta = {"decay": jnp.asarray(0.8), "threshold": jnp.linspace(0.1, 0.5, H)}
    params, xs, h0, _ = network("rich")
    cell = dataclasses.replace(params.cell, form=form, parameters=theta)
    compare(jaxrnn.unroll, naive, cell, xs, h0)
    check_loss(cell, naive_outputs, h0, H)


def test_parameters_may_be_python_numbers():
    params, xs, h0, _ = network("rich")
    theta = {"alpha": 0.3, "gain": 1.0, "threshold": np.linspace(0, 1, H)}

    def gradient(unroll, alpha):
        cell = dataclasses.replace(params.cell, parameters=theta | {"alpha": alpha})
        return scalar(unroll(cell, xs, h0))

    found = jax.grad(partial(gradient, jaxrnn.unroll))(0.3)
    assert_close(found, jax.jit(jax.grad(partial(gradient, naive)))(jnp.asarray(0.3)))


def test_unused_parameters_have_gradients_of_zero():
    theta = {"none": None, "unused": jnp.ones(H), "unused number": jnp.ones(()), "empty": ()}
    form = jaxrnn.Form(lambda a, h, _: 0.5 * h + jnp.tanh(a), lambda h, _: jnp.sin(h))
    params, xs, h0, targets = network("rich")
    cell = dataclasses.replace(params.cell, form=form, parameters=theta)
    _, hs = jaxrnn.unroll(cell, xs, h0)
    params = dataclasses.replace(params, cell=cell)
    found = (
        jax.grad(lambda cell: scalar(jaxrnn.unroll(cell, xs, h0)))(cell),
        jaxrnn.bptt(cell, xs, h0, hs, hs).cell,
        jaxrnn.loss_and_grads(params, xs, targets)[1].params.cell,
        textbook.loss_and_grads(params, xs, targets)[1].cell,
    )
    for gradient in found:
        assert jax.tree.structure(gradient) == jax.tree.structure(cell)
        assert not any(np.any(x) for x in jax.tree.leaves(gradient.parameters))


def test_custom_forms_ignore_the_activation():
    params, xs, h0, _ = network("rich")
    other = dataclasses.replace(params.cell, activation="relu")
    assert_close(jaxrnn.unroll(other, xs, h0), jaxrnn.unroll(params.cell, xs, h0), 0.0)
    assert "activation" not in repr(other)


def test_update_and_output_receive_arrays_of_one_shape():
    shapes = set()

    def update(a, h, p):
        shapes.add(tuple(map(jnp.shape, (a, h, *jax.tree.leaves(p)))))
        return p["alpha"] * a + p["gain"] * h

    def output(h, p):
        shapes.add(tuple(map(jnp.shape, (h, *jax.tree.leaves(p)))))
        return p["threshold"] * h

    params, xs, h0, targets = network("rich")
    cell = dataclasses.replace(params.cell, form=jaxrnn.Form(update, output))
    params = dataclasses.replace(params, cell=cell)
    jax.grad(lambda cell: scalar(jaxrnn.unroll(cell, xs, h0)))(cell)
    jaxrnn.loss_and_grads(params, xs, targets)
    jaxrnn.step(cell, xs[0], h0)
    assert all(len(set(each)) == 1 and each[0][-1] == H for each in shapes)


def test_forms_may_close_over_a_known_array():
    scale = np.linspace(0.2, 0.8, H)
    form = jaxrnn.Form(lambda a, h, _: jnp.tanh(a) * jnp.broadcast_to(scale, a.shape))
    params, xs, h0, _ = network("rich")
    cell = dataclasses.replace(params.cell, form=form, parameters=None)
    compare(jaxrnn.unroll, naive, cell, xs, h0)


def test_infinite_slopes_on_invalid_steps_reach_no_gradient():
    # Of a sequence without steps a, h and hs are 0, where these functions have no slope.
    def root(x):
        return jnp.sign(x) * jnp.sqrt(jnp.abs(x))

    form = jaxrnn.Form(lambda a, h, p: root(p * a) + root(p * h) / 9, lambda h, p: root(p * h))
    params, xs, h0, targets = network(bias="no bias")
    cell = dataclasses.replace(params.cell, form=form, parameters=jnp.linspace(0.5, 1, H))
    params = dataclasses.replace(params, cell=cell)
    h0 = h0.at[1].set(0)
    assert LENGTHS[1] == 0

    def of_states(unroll, *args):
        def loss(cell, xs, h0):
            return jnp.sum(jnp.sin(unroll(cell, xs, h0)[1]))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    def of_layers(cell, xs, h0):
        return jaxrnn.unroll_layers(cell, xs, h0, lengths=LENGTHS)

    def of_loss(params, xs, h0, targets, lengths):
        found = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, lengths=lengths)
        return found[0], found[1].params

    there = np.array([0, 2])
    fewer = xs[:, there], h0[there]
    every = partial(jaxrnn.unroll, lengths=LENGTHS)
    without = partial(jaxrnn.unroll, lengths=LENGTHS[there])
    found, expected = of_states(every, cell, xs, h0), of_states(without, cell, *fewer)
    assert np.all(np.isfinite(expected[0].W))
    assert_close((found[0], found[1][:, there]), (expected[0], expected[1]))
    assert_close(
        of_loss(params, xs, h0, targets, LENGTHS),
        of_loss(params, *fewer, targets[:, there], LENGTHS[there]),
    )
    outputs = of_states(of_layers, cell, xs, h0)
    assert np.all(np.isfinite(outputs[0].W)) and np.all(np.isfinite(outputs[0].parameters))


def test_infinite_outputs_on_invalid_steps_reach_no_gradient():
    form = jaxrnn.Form(
        lambda a, h, p: h / 2 + jax.nn.sigmoid(p * a), lambda h, p: jnp.log(jnp.abs(p * h))
    )
    params, xs, h0, _ = network("rich")
    cell = dataclasses.replace(params.cell, form=form, parameters=jnp.linspace(0.5, 1, H))
    h0 = h0.at[1].set(0)
    assert LENGTHS[1] == 0

    def gradient(lengths, *args):
        def loss(cell, xs, h0):
            return jnp.sum(jnp.sin(jaxrnn.unroll(cell, xs, h0, lengths=lengths)[1]))

        return jax.grad(loss)(*args)

    there = np.array([0, 2])
    expected = gradient(LENGTHS[there], cell, xs[:, there], h0[there])
    assert np.all(np.isfinite(expected.W)) and np.all(np.isfinite(expected.parameters))
    assert_close(gradient(LENGTHS, cell, xs, h0), expected)


# Errors ---------------------------------------------------------------------------------------


def replaced(**how):
    params, xs, h0, targets = network("rich")
    return (
        dataclasses.replace(params, cell=dataclasses.replace(params.cell, **how)),
        xs,
        h0,
        targets,
    )


def form_of(update=rich_update, output=rich_output):
    return {"form": jaxrnn.Form(update, output)}


def theta_of(**how):
    return {"parameters": parameters_of("rich") | how}


def missing_argument(a, h):
    return a + h


# name -> (what of the cell is wrong, the error, a word of its message).
WRONG = {
    "a leak": ({"leak": jnp.asarray(0.5)}, ValueError, "leak"),
    "parameters of the rate form": ({"form": "rate"}, ValueError, "parameters"),
    "parameters of the voltage form": ({"form": "voltage"}, ValueError, "parameters"),
    "parameters of H + 1 units": (theta_of(gain=jnp.ones(H + 1)), ValueError, "parameters.*gain"),
    "parameters of two axes": (theta_of(gain=jnp.ones((B, H))), ValueError, "parameters.*gain"),
    "integer parameters": (theta_of(gain=jnp.ones(H, int)), TypeError, "parameters.*gain"),
    "a word as a parameter": (theta_of(gain="one"), TypeError, "parameters.*gain"),
    "a number as a form": ({"form": 3}, (TypeError, ValueError), "form"),
    "a function as a form": ({"form": rich_update}, (TypeError, ValueError), "form"),
    "an unknown form": ({"form": "current", "parameters": None}, ValueError, "form"),
    "an update that is none": (form_of(update="tanh"), TypeError, "update"),
    "an output that is none": (form_of(output=0.5), TypeError, "output"),
    "an update that mixes units": (
        form_of(lambda a, h, p: jax.nn.softmax(a)), ValueError, "update.*depends on others"),
    "an update that mixes states of units": (
        form_of(lambda a, h, p: a + jnp.roll(h, 1, -1)), ValueError, "update.*depends on others"),
    "an update that mixes parameters of units": (
        form_of(lambda a, h, p: a * jnp.mean(p["gain"])), ValueError, "update"),
    "an update that mixes sequences": (
        form_of(lambda a, h, p: a - jnp.mean(a, 0, keepdims=True)), ValueError, "update"),
    "an output that mixes units": (
        form_of(output=lambda h, p: h / jnp.linalg.norm(h)), ValueError, "output"),
    "an update of another shape": (form_of(lambda a, h, p: a[..., :1]), ValueError, "update"),
    "an output of another shape": (form_of(output=lambda h, p: jnp.sum(h)), ValueError, "output"),
    "an update of integers": (form_of(lambda a, h, p: a.astype(int)), ValueError, "update"),
    "an update of two results": (form_of(lambda a, h, p: (a, h)), ValueError, "update"),
    "an update without parameters": (form_of(missing_argument), ValueError, "update"),
    "an update that asks for another parameter": (
        form_of(lambda a, h, p: a * p["beta"]), ValueError, "update.*beta"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "kind", "match"), WRONG.values(), ids=WRONG)
def test_wrong_cells_are_refused_in_one_line(how, kind, match):
    params, xs, h0, targets = replaced(**how)
    hs = jnp.zeros((T, B, H))
    calls = [
        lambda: jaxrnn.unroll(params.cell, xs, h0),
        lambda: jaxrnn.step(params.cell, xs[0], h0),
        lambda: jaxrnn.bptt(params.cell, xs, h0, hs, hs),
        lambda: jaxrnn.loss_and_grads(params, xs, targets),
        lambda: jaxrnn.unroll_layers((params.cell,), xs),
        lambda: textbook.loss_and_grads(params, xs, targets),
        lambda: jaxrnn.outputs(params.cell, hs),
    ]
    for call in calls:
        with pytest.raises(kind, match=match) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_form_requires_an_update():
    with pytest.raises(TypeError, match="update"):
        jaxrnn.Form()


@pytest.mark.parametrize("by", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
@pytest.mark.parametrize("which", ["update", "output"])
def test_forms_that_close_over_a_traced_value_are_refused(which, by):
    params, xs, h0, _ = network("rich")

    @by
    def number(gain):
        functions = {
            "update": lambda a, h, p: gain * jnp.tanh(a),
            "output": lambda h, p: gain * h,
        }
        how = form_of(**{which: functions[which]})
        return jnp.sum(jaxrnn.unroll(dataclasses.replace(params.cell, **how), xs, h0)[1])

    with pytest.raises(ValueError, match="parameters") as raised:
        number(jnp.ones(2) if by is jax.vmap else 1.0)
    assert which in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["mosaic_gpu", "pallas_tpu"])
@pytest.mark.parametrize(("kind", "said"), [("rich", "custom form"), ("voltage", "voltage")])
def test_kernels_refuse_forms_by_name(kind, said, name):
    params, xs, h0, targets = network(kind, dtype=jnp.float32, batch=(8,))
    hs = jnp.zeros((T, 8, H), jnp.float32)
    calls = [
        lambda how: jaxrnn.unroll(params.cell, xs, h0, **how),
        lambda how: jaxrnn.bptt(params.cell, xs, h0, hs, hs, **how),
        lambda how: jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how),
        lambda how: jaxrnn.unroll_layers((params.cell,), xs, (h0,), **how),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=said):
            call({"implementation": name})


def test_to_torch_refuses_a_custom_form():
    params, *_ = network("rich")
    with pytest.raises(ValueError, match="custom form"):
        jaxrnn.convert.to_torch(params.cell)

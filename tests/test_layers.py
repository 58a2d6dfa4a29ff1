"""Stacks, layers in both directions, and what goes between them, against unrolls by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, naive_unroll, random_case, rare, temporaries, weights

import jaxrnn
from jaxrnn import train
from jaxrnn._core import layers

T, B, D = 6, 3, 4
LENGTHS = np.array([6, 0, 4])


def cell(seed, D, H, **how):
    return random_case(seed, D=D, H=H, **how)[0].cell


def inputs(seed=0):
    return weights((T, B, D), seed)


def total(outputs):
    return sum(jnp.sum(jnp.sin(y) * weights(y.shape)) for y in jax.tree.leaves(outputs))


def compare(ours, theirs, *args):
    """Values and gradients of everything."""
    found, expected = (
        jax.jit(jax.value_and_grad(lambda args, f=f: total(f(*args))))(args) for f in (ours, theirs)
    )
    assert_close(found, expected)


def turned(x, lengths):
    """Each sequence from its last valid step to its first, the rest as it was."""
    return jnp.stack(
        [jnp.concatenate([x[:n, b][::-1], x[n:, b]]) for b, n in enumerate(lengths)], 1
    )


def ragged(cell, xs, h0, lengths, reverse=False):
    """A naive scan of each sequence by itself."""
    xs = turned(xs, lengths) if reverse else xs
    last, every = [], []
    for b, n in enumerate(lengths):
        h, hs = naive_unroll(cell, xs[:n, b], h0[b])
        last.append(h)
        every.append(jnp.concatenate([hs, jnp.zeros((T - n, hs.shape[-1]))]))
    hs = jnp.stack(every, 1)
    return jnp.stack(last), turned(hs, lengths) if reverse else hs


@pytest.mark.parametrize(
    ("residual", "reverse"), [(False, True), (True, False), rare(False, False), rare(True, True)]
)
def test_a_stack_is_one_layer_on_the_states_of_another(residual, reverse):
    cells = cell(1, D, 5), cell(2, 5, 5, activation="relu"), cell(3, 5, 5, leak=jnp.asarray(0.4))
    h0 = tuple(weights((B, 5), seed) for seed in (4, 5, 6))

    def ours(cells, xs, h0):
        how = dict(lengths=LENGTHS, residual=residual, reverse=reverse)
        return jaxrnn.unroll_layers(cells, xs, h0, **how)

    def by_hand(cells, xs, h0):
        last, y = [], xs
        for n, (cell, h) in enumerate(zip(cells, h0, strict=True)):
            h, hs = ragged(cell, y, h, LENGTHS, reverse)
            y = hs + y if residual and n else hs
            last.append(h)
        return tuple(last), y

    compare(ours, by_hand, cells, inputs(), h0)


def test_bidirectional_equals_two_scans_with_lengths_and_drives():
    cells = cell(1, D, 5), cell(2, D, 3)
    h0 = weights((B, 5), 4), weights((B, 3), 5)

    def ours(cells, xs, h0):
        return jaxrnn.bidirectional(*cells, xs, h0, lengths=LENGTHS)

    def by_hand(cells, xs, h0):
        forward = ragged(cells[0], xs, h0[0], LENGTHS)
        backward = ragged(cells[1], xs, h0[1], LENGTHS, reverse=True)
        last, hs = zip(forward, backward, strict=True)
        return last, jnp.concatenate(hs, -1)

    compare(ours, by_hand, cells, inputs(), h0)
    drive = weights((T, B, 5), 6), None
    _, hs = jaxrnn.bidirectional(*cells, inputs(), h0, drive=drive)
    _, forward = jaxrnn.unroll(cells[0], inputs(), h0[0], drive=drive[0])
    assert_close(hs[..., :5], forward)


def test_stacks_of_pairs_and_pairs_of_stacks_equal_their_parts():
    first, second = (cell(1, D, 3), cell(2, D, 2)), (cell(3, 5, 4), cell(4, 5, 3))

    def stack(cells, xs):
        return jaxrnn.unroll_layers(cells, xs, lengths=LENGTHS)

    def by_hand(cells, xs):
        below, hs = jaxrnn.bidirectional(*cells[0], xs, lengths=LENGTHS)
        above, hs = jaxrnn.bidirectional(*cells[1], hs, lengths=LENGTHS)
        return (below, above), hs

    compare(stack, by_hand, (first, second), inputs())
    forward, backward = (cell(1, D, 3), cell(2, 3, 2)), cell(4, D, 3)

    def of_stacks(cells, xs):
        return jaxrnn.bidirectional(*cells, xs)

    def one_by_one(cells, xs):
        last, hs = jaxrnn.unroll_layers(cells[0], xs)
        h, back = jaxrnn.unroll(cells[1], xs, reverse=True)
        return (last, h), jnp.concatenate([hs, back], -1)

    compare(of_stacks, one_by_one, (forward, backward), inputs())
    # A reversed stack of pairs reads as the flipped inputs do.
    (last, hs), (h, back) = (
        jaxrnn.unroll_layers((first,), inputs(), reverse=True),
        jaxrnn.unroll_layers((first,), inputs()[::-1]),
    )
    assert_close((last, hs), (h, back[::-1]))


def test_one_cell_is_a_stack_of_one():
    one, xs = cell(1, D, 5), inputs()
    h_last, hs = jaxrnn.unroll(one, xs)
    assert_close(jaxrnn.unroll_layers(one, xs), (h_last, hs))
    assert_close(jaxrnn.unroll_layers((one,), xs), ((h_last,), hs))
    assert_close(jaxrnn.unroll_layers([one], xs, (None,)), ((h_last,), hs))


def test_dropout_is_applied_between_layers_only():
    identity = jaxrnn.Cell(jnp.eye(64), jnp.zeros((64, 64)), jnp.zeros(64), activation="identity")
    xs, rate, key = jnp.ones((50, 8, 64)), 0.25, jax.random.key(3)

    def run(cells, key=key, rate=rate):
        return jaxrnn.unroll_layers(cells, xs, dropout=rate, key=key)[1]

    np.testing.assert_array_equal(run((identity,)), xs)
    dropped = np.asarray(run((identity, identity)))
    assert set(np.unique(dropped)) == {0.0, 1 / (1 - rate)}
    # 25,600 draws: four standard errors of a proportion.
    assert abs((dropped == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / dropped.size)
    np.testing.assert_array_equal(dropped, run((identity, identity)))
    other = run((identity, identity), key=jax.random.key(4))
    assert (dropped != other).mean() > rate
    twice = np.asarray(run((identity,) * 3))
    # Every layer draws anew.
    assert abs((twice == 0).mean() - (1 - (1 - rate) ** 2)) < 0.02
    np.testing.assert_array_equal(run((identity, identity), rate=0.0, key=None), xs)


@pytest.mark.parametrize("how", [
    {"checkpoint_every": 2}, {"lengths": LENGTHS}, rare({}), rare({"truncate": 2}),
    rare({"window": 2}), rare({"reverse": True}),
], ids=str)  # fmt: skip
def test_loss_and_gradients_of_a_stack(how):
    cells = cell(1, D, 5), (cell(2, 5, 2), cell(3, 5, 3))
    readout = random_case(H=5)[0].readout
    params, xs = jaxrnn.Params(cells, readout), inputs()
    targets = jnp.arange(T * B).reshape(T, B) % 3
    h0 = weights((B, 5), 4), (weights((B, 2), 5), None)

    def loss(params, h0):
        _, hs = jaxrnn.unroll_layers(params.cell, xs, h0, **how)
        logits = jaxrnn.apply_readout(params.readout, hs)
        where = np.arange(T)[:, None] < how["lengths"] if "lengths" in how else None
        return jnp.sum(jaxrnn.cross_entropy(logits, targets, where=where))

    filled = h0[0], (h0[1][0], jnp.zeros((B, 3)))
    expected, (of_params, of_h0) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, filled)
    found, gradients = jaxrnn.loss_and_grads(params, xs, targets, h0=h0, **how)
    assert_close((found, gradients.params, gradients.h0), (expected, of_params, of_h0))
    h_last, _ = jaxrnn.unroll_layers(cells, xs, h0, **how)
    assert_close(gradients.h_last, h_last)


@pytest.mark.parametrize("how", [
    rare({}, id="plain"), rare({"mask": weights((T, B)) > -1}, id="gaps"),
    pytest.param({"lengths": LENGTHS.astype("int8"), "reverse": True}, id="lengths, reverse"),
    rare({"drive": (None, weights((T, B, 2), 8))}, id="drive"),
])  # fmt: skip
def test_checkpoints_of_a_stack_change_no_gradient(how):
    cells = cell(1, D, 5), cell(2, 5, 2, leak=jnp.asarray(0.6))
    params = jaxrnn.Params(cells, random_case(H=2)[0].readout)
    ids = jnp.arange(T * B).reshape(T, B) % 3
    found, expected = (
        jaxrnn.loss_and_grads(params, jaxrnn.Ids(ids), ids[::-1], checkpoint_every=k, **how)
        for k in (4, None)
    )
    assert_close(found, expected)


def test_checkpoints_of_a_stack_in_half_precision_change_one_rounding():
    params = jaxrnn.init_params(jax.random.key(0), D, 8, 3, layers=2, dtype=jnp.bfloat16)
    ids = jnp.arange(T * B).reshape(T, B) % 3
    h0 = weights((B, 8), dtype=jnp.float32), None  # The result is float32.

    def run(every):
        with jax.numpy_dtype_promotion("standard"):
            return jaxrnn.loss_and_grads(
                params, jaxrnn.Ids(ids), ids, h0=h0, checkpoint_every=every
            )

    found, expected = run(4), run(None)
    assert {x.dtype.name for x in (*found[1].h0, *found[1].h_last)} == {"float32"}
    # The shares of two segments and their float32 sum are rounded to bfloat16, by eps/2 each.
    assert_close(found, expected, 3 * 2**-8)


def test_temporaries_of_a_stack_grow_like_the_square_root_of_time():
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    params = jax.eval_shape(
        lambda: jaxrnn.init_params(jax.random.key(0), 4, 32, 4, layers=2, dtype=jnp.float32)
    )

    def used(time):
        ids = shape(time, 8, dtype=jnp.int32)
        return temporaries(
            lambda params, ids: jaxrnn.loss_and_grads(
                params, jaxrnn.Ids(ids), ids, checkpoint_every="sqrt"
            ),
            params,
            ids,
        )

    # A hundredfold T is ten times the states and the steps of a segment, weights aside.
    assert used(100_000) <= 10 * used(1_000)


def test_a_stack_of_ids_under_vmap_and_jit_equals_the_batch():
    cells = cell(1, D, 5), cell(2, 5, 4)
    ids = np.arange(T * B).reshape(T, B) % D

    def one(ids):
        return jaxrnn.unroll_layers(cells, jaxrnn.Ids(ids))

    last, hs = jax.jit(jax.vmap(one, 1, (0, 1)))(ids)
    assert_close((last, hs), one(ids))


def test_a_stack_learns_a_text_and_samples_it():
    import optax

    params = jaxrnn.init_params(jax.random.key(0), 3, 16, 3, layers=2, dtype=jnp.float64)
    assert [c.U.shape for c in params.cell] == [(16, 3), (16, 16)]
    assert float(jnp.abs(params.cell[0].W - params.cell[1].W).max()) > 0.1
    text = np.tile([0, 1, 1, 2], 40)
    optimizer = optax.adam(1e-2)
    state, update = train.init_state(params, optimizer, 2), train.make_update(optimizer)
    reader = train.windows(*train.streams(text, 2), seq_length=8)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(60):
            inputs, targets, first = next(reader)
            state, nats = update(train.start_over(state) if first else state, inputs, targets)
        held = train.evaluate(state.params, inputs, targets)
    assert nats < 0.1 and held < 0.2
    drawn = jaxrnn.generate(state.params, jax.random.key(1), [0, 1], 6, temperature=0)
    np.testing.assert_array_equal(drawn, [1, 2, 0, 1, 1, 2])


def test_generation_and_training_refuse_pairs_of_directions():
    pair = jaxrnn.Params(((cell(1, 3, 2), cell(2, 3, 3)),), random_case(H=5)[0].readout)
    message = r"^params.cell\[0\]: expected a Cell, which reads forward, got a pair of them$"
    with pytest.raises(TypeError, match=message):
        jaxrnn.generate(pair, jax.random.key(0), [0], 1)
    with pytest.raises(TypeError, match=message):
        train.init_state(pair, None, 2)


@pytest.mark.parametrize("transformed", [lambda f: f, jax.jit, jax.grad], ids=["", "jit", "grad"])
def test_every_key_of_dropout_is_used_once(transformed):
    cells = cell(1, D, 5), cell(2, 5, 5), cell(3, 5, 5)

    def outputs(cells, key):
        return jaxrnn.unroll_layers(cells, inputs(), dropout=0.5, key=key)[1].sum()

    key = jax.random.key(0)
    with jax.debug_key_reuse(True):
        found = transformed(outputs)(cells, key)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
        with pytest.raises(jax.errors.KeyReuseError):  # it is looked at
            jax.random.normal(key)


def test_a_stack_takes_each_step_in_the_dtypes_of_its_unroll():
    """The state of a layer has the result dtype of its weights and of what it reads."""
    half, single = (
        jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), cell(1, 5, 5))
        for dtype in ("bfloat16", "float32")
    )
    mixed = replace(half, b=single.b)
    ids = jaxrnn.Ids(np.array([1, 2, 0]))
    with jax.numpy_dtype_promotion("standard"):
        for cells in (mixed, replace(mixed, form="voltage"), (half, single), (single, half)):
            h, ys = jaxrnn.unroll_layers(cells, ids)
            now = jax.tree.map(jnp.zeros_like, h)
            for n in (1, 2, 0):
                now, y = layers.step(cells, jaxrnn.Ids(jnp.asarray(n)), now)
            # One rounding of sums of six terms in another order, three steps.
            pairs = map(jax.tree.leaves, ((now, y), (h, ys[-1])))
            for found, expected in zip(*pairs, strict=True):
                assert found.dtype == expected.dtype
                np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-20)

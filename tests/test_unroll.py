"""The forward pass: against NumPy, over ragged batches, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, naive_unroll, rare
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import Cell, Ids

EPS = 2.0**-52
T, B, D, H = 5, 3, 4, 3
# Each step sums D + H + 2 = 9 terms and applies φ, good to 4 eps; with |φ'| ≤ 1 and a W of
# norm 0.9 the errors of T steps add up at most.
STATES = T * (9 + 4) * EPS


def case(T=T, batch=(B,), D=D, H=H, seed=0, **how):
    """A cell, xs, h0 and drive, drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(H, H))
    W *= 0.9 / np.linalg.norm(W, 2)
    cell = Cell(rng.normal(size=(H, D)) / np.sqrt(D), W, rng.normal(size=H), **how)
    xs, h0 = rng.normal(size=(T, *batch, D)), rng.uniform(-1, 1, (*batch, H))
    return cell, xs, h0, rng.normal(size=(T, *batch, H))


def loop(cell, xs, h0, drive=None, reverse=False):
    """The recurrence in float64 NumPy, step by step; in reverse, that of the flipped inputs."""
    if reverse:
        h, hs = loop(cell, xs[::-1], h0, drive[::-1])
        return h, hs[::-1]
    cell, xs, h = jax.tree.map(lambda x: np.asarray(x, np.float64), (cell, xs, h0))
    alpha = 1.0 if cell.leak is None else cell.leak
    hs = np.zeros((*xs.shape[:-1], len(cell.b)))
    for t in range(len(xs)):
        a = xs[t] @ cell.U.T + h @ cell.W.T + cell.b + (0 if drive is None else drive[t])
        hs[t] = h = (1 - alpha) * h + alpha * np.tanh(a)
    return h, hs


SHAPES = [dict(batch=()), dict(leak=np.array([0.0, 0.4, 1.0])), dict(batch=(2, 3), leak=0.3),
          dict(T=1), dict(H=1), dict(batch=(0,))]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_states_equal_those_of_a_numpy_loop(shape, reverse):
    cell, xs, h0, drive = case(**shape)
    found = jaxrnn.unroll(cell, xs, h0, drive=drive, reverse=reverse)
    assert_close(found, loop(cell, xs, h0, drive, reverse), STATES)


@pytest.mark.parametrize("lengths", [None, np.zeros(B, int)])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_steps_return_the_first_state(lengths, reverse):
    cell, xs, h0, drive = case(T=0, leak=0.3)

    def run(cell, xs, h0, drive):
        return jaxrnn.unroll(cell, xs, h0, lengths=lengths, drive=drive, reverse=reverse)

    (h_last, hs), vjp = jax.vjp(run, cell, xs, h0, drive)
    np.testing.assert_array_equal(h_last, h0)
    dcell, dxs, dh0, ddrive = vjp((2 * h_last, hs))
    assert all(not leaf.any() for leaf in jax.tree.leaves(dcell))
    np.testing.assert_array_equal(dh0, 2 * h0)
    assert dxs.shape == xs.shape and ddrive.shape == hs.shape == drive.shape


LENGTHS = np.array([0, 3, 5, 1])
GAPS = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool).T


def compacted(cell, xs, h0, drive, valid, reverse):
    """Every sequence on its own, without the invalid steps. The drive rides as more inputs."""
    cell = Cell(jnp.concatenate([cell.U, jnp.eye(H)], 1), cell.W, cell.b, cell.leak)
    inputs = jnp.concatenate([xs, drive], -1)
    h_last, hs = h0, jnp.zeros_like(drive)
    for n, steps in enumerate(valid.T):
        t = np.flatnonzero(steps)[:: -1 if reverse else 1]
        h, states = naive_unroll(cell, inputs[t, n], h0[n])
        h_last, hs = h_last.at[n].set(h), hs.at[t, n].set(states)
    return h_last, hs


@pytest.mark.parametrize(("how", "reverse"), [
    (dict(lengths=LENGTHS), True), (dict(mask=GAPS), False), rare(dict(lengths=LENGTHS), False),
    rare(dict(mask=GAPS), True),
], ids=["lengths, reverse", "mask", "lengths", "mask, reverse"])  # fmt: skip
def test_lengths_and_masks_freeze_the_state(how, reverse):
    valid = how.get("mask", np.arange(T)[:, None] < LENGTHS)
    cell, xs, h0, drive = case(batch=(4,), leak=None if "mask" in how else 0.6)
    g_last, g = np.cos(h0), np.sin(drive)  # Any cotangents.

    def padded(cell, xs, h0, drive):
        return jaxrnn.unroll(cell, xs, h0, drive=drive, reverse=reverse, **how)

    def spoil(x):
        return np.where(valid[..., None], x, np.resize([np.nan, np.inf, -np.inf], x.shape))

    (h_last, hs), vjp = jax.vjp(jax.jit(padded), cell, spoil(xs), h0, spoil(drive))
    gradients = vjp((g_last, spoil(g)))
    alone = jax.jit(lambda *args: compacted(*args, valid, reverse))
    expected, vjp = jax.vjp(alone, cell, xs, h0, drive)
    assert_close((h_last, hs), expected, STATES)
    np.testing.assert_array_equal(np.asarray(hs)[~valid], 0)  # Exactly, and h0 exactly.
    np.testing.assert_array_equal(np.asarray(h_last)[~valid.any(0)], h0[~valid.any(0)])
    assert_close(gradients, vjp((g_last, g)))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [0, 2, 5]])
def test_ids_equal_one_hot_rows_and_may_be_invalid_in_the_padding(lengths):
    cell, _, h0, _ = case()
    ids = np.random.default_rng(2).integers(D, size=(T, B))
    expected = jaxrnn.unroll(cell, np.eye(D)[ids], h0, lengths=lengths)
    ids = np.where(np.arange(T)[:, None] < lengths, ids, -1)
    assert_close(jaxrnn.unroll(cell, Ids(ids), h0, lengths=lengths), expected, STATES)


def test_an_invalid_id_under_jit_gives_nan_from_there_on():
    cell, _, h0, _ = case()
    ids = np.array([[1, 0, 3], [2, 1, D], [-1, 3, 0]])
    h_last, hs = jax.jit(jaxrnn.unroll)(cell, Ids(ids), h0)
    wrong = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(np.isnan(hs), np.repeat(wrong[..., None], H, -1))
    np.testing.assert_array_equal(h_last, hs[-1])


@pytest.mark.parametrize(("dtype", "T"), [("int8", 130), ("uint8", 258)])
def test_lengths_may_be_of_few_bits(dtype, T):
    # T itself does not fit into the dtype of the lengths.
    cell, xs, h0, _ = case(T=T)
    lengths = np.array([0, 2, 100], dtype)
    h_last, hs = jaxrnn.unroll(cell, xs, h0, lengths=lengths)
    np.testing.assert_array_equal(np.asarray(hs).any(-1), np.arange(T)[:, None] < lengths)
    assert_close(h_last[1], loop(cell, xs[:2], h0)[0][1], STATES)


def test_numpy_lists_and_weakly_typed_inputs_are_arrays():
    cell, xs, h0, _ = jax.tree.map(np.float32, case(leak=0.3))
    weak = jnp.broadcast_to(jnp.asarray(0.5), h0.shape)
    assert weak.weak_type and weak.dtype == jnp.float64
    h_last, hs = jaxrnn.unroll(cell, xs, weak, lengths=[1, 2, 3])
    assert isinstance(hs, jax.Array) and not hs.weak_type and h_last.dtype == hs.dtype == "float32"
    # Lists are arrays too, and the state is 0 where none is given.
    cell, xs, h0, _ = case(leak=0.3)
    assert_close(jaxrnn.unroll(cell, xs.tolist()), loop(cell, xs, 0 * h0), STATES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_each_state_is_rounded_once(dtype):
    size = 64
    cell, xs, h0, _ = jax.tree.map(lambda x: jnp.asarray(x, dtype), case(D=size, H=size))
    h_last, hs = jaxrnn.unroll(cell, xs, h0)
    assert h_last.dtype == hs.dtype == dtype
    cell, xs, h0, hs = jax.tree.map(lambda x: np.asarray(x, float), (cell, xs, h0, hs))
    h_prev = np.concatenate([h0[None], hs[:-1]])
    a = xs @ cell.U.T + h_prev @ cell.W.T + cell.b
    # From the state before, as it was rounded: half an ulp below 1, eps / 4, and what float32
    # does to tanh (4 eps, as above) and to a sum of n = 2·64 terms: each addition errs by half
    # an eps of the partial sum, and n errors of random sign add up like √n.
    size_of_sum = (np.abs(xs) @ np.abs(cell.U.T) + np.abs(h_prev) @ np.abs(cell.W.T)).max()
    float32 = (4 + np.sqrt(2 * size) * size_of_sum / 2) * 2.0**-23
    rounding = float(jnp.finfo(dtype).eps) / 4 + float32
    np.testing.assert_allclose(hs, np.tanh(a), rtol=0, atol=rounding)
    # From h0 on: |E_t| ≤ |W| |E_{t−1}| + √H · rounding in the 2-norm.
    drift = np.linalg.norm(hs - loop(cell, xs, h0)[1], axis=-1).max()
    growth = (np.linalg.norm(cell.W, 2) ** np.arange(T)).sum()
    assert 0 < drift < np.sqrt(size) * rounding * growth


few = settings(derandomize=True, database=None, deadline=None, max_examples=12)
seeds = st.integers(0, 2**32 - 1)


@few
@given(seed=seeds, t=st.integers(0, T - 1), reverse=st.booleans())
def test_states_depend_on_no_later_input(seed, t, reverse):
    cell, xs, h0, _ = case(seed=seed)
    hs = np.asarray(jaxrnn.unroll(cell, xs, h0, reverse=reverse)[1])
    xs[t] = np.nan
    changed = np.asarray(jaxrnn.unroll(cell, xs, h0, reverse=reverse)[1])
    later = np.arange(T) <= t if reverse else np.arange(T) >= t
    # The same program on the same numbers: the states before are the same to the bit.
    np.testing.assert_array_equal(changed[~later], hs[~later])
    assert np.isnan(changed[later]).all()


@few
@given(seed=seeds, t=st.integers(0, T), reverse=st.booleans())
def test_a_sequence_can_be_split_anywhere(seed, t, reverse):
    cell, xs, h0, _ = case(seed=seed)
    parts = [xs[:t], xs[t:]][:: -1 if reverse else 1]
    h, first = jaxrnn.unroll(cell, parts[0], h0, reverse=reverse)
    h, second = jaxrnn.unroll(cell, parts[1], h, reverse=reverse)
    hs = np.concatenate([first, second][:: -1 if reverse else 1])
    assert_close((h, hs), jaxrnn.unroll(cell, xs, h0, reverse=reverse), STATES)


@few
@given(seed=seeds, order=st.permutations(range(B)))
def test_sequences_of_a_batch_are_independent(seed, order):
    cell, xs, h0, _ = case(seed=seed)
    lengths, order = np.array([5, 3, 0]), np.array(order)
    h_last, hs = jaxrnn.unroll(cell, xs, h0, lengths=lengths)
    found = jaxrnn.unroll(cell, xs[:, order], h0[order], lengths=lengths[order])
    assert_close(found, (h_last[order], hs[:, order]), STATES)


@pytest.mark.parametrize(
    ("axis", "nested", "kind"), [(0, 1, "floats"), (1, 1, "ids"), (0, 2, "ids"), (1, 2, "floats")]
)
def test_vmap_and_jit_change_nothing(axis, nested, kind):
    cell, xs, h0, drive = case(batch=(2, B))
    lengths = np.array([[5, 3, 0], [1, 5, 2]])
    xs = Ids(np.random.default_rng(2).integers(D, size=xs.shape[:-1])) if kind == "ids" else xs
    behind = 0 if axis else nested  # Where time stands: the mapped axes are in front, or not.

    def run(xs, h0, drive, lengths):
        return jaxrnn.unroll(cell, xs, h0, lengths=lengths, drive=drive)

    mapped = run
    for _ in range(nested):
        mapped = jax.vmap(mapped, in_axes=(axis, 0, axis, 0), out_axes=(0, axis))
    expected = run(xs, h0, drive, lengths)
    assert_close(jax.jit(run)(xs, h0, drive, lengths), expected, STATES)
    xs, drive = jax.tree.map(lambda x: np.moveaxis(x, 0, behind), (xs, drive))
    for f in (mapped, jax.jit(mapped)):
        h_last, hs = f(xs, h0, drive, lengths)
        assert_close((h_last, np.moveaxis(hs, behind, 0)), expected, STATES)

"""The checked update and the loop, as functions: what they count, when they stop, custom models."""

import copy
import math
import pickle
from itertools import islice
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import assert_close

import jaxrnn
from jaxrnn import train

T, B, K, H = 4, 3, 5, 6
OPTIMIZER = optax.adam(1e-2)


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    """optax multiplies floats by its integer step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_state(**how):
    params = jaxrnn.init_params(jax.random.key(0), K, H, K, dtype=jnp.float64)
    return train.init_state(params, OPTIMIZER, B, **how)


def reader(start=0):
    ids = np.random.default_rng(0).integers(0, K, (41, B))
    return train.windows(ids[:-1], ids[1:], T, start)


def broken_loss(at):
    """That of the network, but not a number in the update after so many."""

    def loss(params, h, inputs, targets, key):
        h, hs = jaxrnn.unroll(params.cell, jaxrnn.Ids(inputs), h)
        total = jnp.sum(jaxrnn.cross_entropy(jaxrnn.apply_readout(params.readout, hs), targets))
        # The key is folded with the step: which of the steps this is.
        steps = jnp.stack([jax.random.fold_in(jax.random.key(7), n) for n in range(12)])
        now = jnp.argmax(jax.random.key_data(steps)[:, 1] == jax.random.key_data(key)[1])
        return jnp.where(now == at, jnp.nan, total), h

    return loss


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_checked_update_equals_an_update():
    plain, checked = train.make_update(OPTIMIZER), train.make_checked_update(OPTIMIZER)
    inputs, targets, _ = next(reader())
    expected, loss = plain(make_state(), inputs, targets)
    found, figures = checked(make_state(), inputs, targets)
    # Another program, of other roundings.
    assert_close((found, figures.loss), (expected, loss), 1e-14)
    assert figures.finite
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(make_state().params)))
    np.testing.assert_allclose(figures.parameter_norm, norm, rtol=1e-14)


# A gradient that overflows although the loss is finite, and an optimiser that does.
INFINITE = {
    "loss": (OPTIMIZER, lambda p, *_: jnp.nan * jnp.sum(p.cell.b)),
    "gradient": (OPTIMIZER, lambda p, *_: jnp.sum(jnp.sqrt(jnp.abs(p.cell.b)))),
    "optimizer": (optax.sgd(1e300), lambda p, *_: 1e20 * jnp.sum(p.cell.b)),
    "state": (OPTIMIZER, lambda p, *_: jnp.sum(p.cell.b)),
}


@pytest.mark.parametrize("name", INFINITE)
def test_a_nonfinite_update_changes_nothing(name):
    optimizer, value = INFINITE[name]
    params = make_state().params
    state = train.init_state(params, optimizer, B)
    state = train.TrainState(state.params, state.optimizer_state, state.h + 1, state.step)
    wrong = jnp.inf if name == "state" else 1.0
    update = train.make_checked_update(optimizer, lambda p, h, *_: (value(p), h * wrong))
    kept = optimizer.init(params)
    inputs, targets, _ = next(reader())
    new, figures = update(state, inputs, targets)
    assert not figures.finite
    assert_same((new.params, new.optimizer_state), (params, kept))
    assert new.step == 1 and not np.any(new.h)


def test_an_infinite_optimizer_state_may_stay_infinite():
    """Which was so before the first update, and stays so for two."""
    plateau = optax.contrib.reduce_on_plateau(accumulation_size=3)
    optimizer = optax.chain(optax.sgd(0.1), plateau)
    state = train.init_state(make_state().params, optimizer, B)
    assert any(not np.all(np.isfinite(x)) for x in jax.tree.leaves(state.optimizer_state))
    update = train.make_checked_update(optimizer)
    for n, (inputs, targets, _) in enumerate(islice(reader(), 4)):
        state, figures = update(state, inputs, targets)
        assert figures.finite and state.step == n + 1


def test_fit_reports_when_due_with_mean_losses():
    update, losses, state = train.make_checked_update(OPTIMIZER), [], make_state()
    windows = reader()
    for _ in range(11):
        inputs, targets, first = next(windows)
        state, figures = update(train.start_over(state) if first else state, inputs, targets)
        losses.append(float(figures.loss))
    reports = list(train.fit(make_state(), update, reader(), 11, every=(4, 6)))
    assert [report.step for report in reports] == [4, 6, 8, 11]
    means = [np.mean(losses[a:b]) for a, b in ((0, 4), (4, 6), (6, 8), (8, 11))]
    assert [report.loss for report in reports] == means
    assert_same(reports[-1].state, state)
    assert reports[-1].gradient_norm == figures.gradient_norm
    assert all(report.updates_per_second > 0 and not report.skipped for report in reports)


def test_fit_stops_on_request_and_resumes_exactly():
    update = train.make_checked_update(OPTIMIZER)
    *_, whole = train.fit(make_state(), update, reader(), 14, every=5)
    asked = []
    *_, half = train.fit(
        make_state(), update, reader(), 14, stop=lambda step: asked.append(step) or step == 7
    )
    assert (half.step, asked) == (7, [1, 2, 3, 4, 5, 6, 7])
    # The streams start over at step 10: the place in the text is the step.
    *_, rest = train.fit(half.state, update, reader(7), 14, every=5)
    assert_same(rest.state, whole.state)
    assert not list(train.fit(rest.state, update, reader(14), 14))
    with pytest.raises(ValueError, match=r"^every: expected at least 1, got 0"):
        next(train.fit(make_state(), update, reader(), 14, every=0))


def test_fit_raises_at_a_nonfinite_loss_and_names_the_step():
    update = train.make_checked_update(OPTIMIZER, broken_loss(at=5))
    reports = train.fit(make_state(key=jax.random.key(7)), update, reader(), 12, every=4)
    assert next(reports).step == 4
    said = r"^the loss became nan at step 6 \(gradient norm 0, parameter norm \d\.\d+\)$"
    with pytest.raises(train.DivergedError, match=said) as error:
        next(reports)
    # The state at hand: step 6 changed nothing, and the later ones in flight were updates again.
    state = error.value.state
    assert (error.value.step, state.step) == (6, 8)
    skipped = train.fit(make_state(key=jax.random.key(7)), update, reader(), 8, skip_nonfinite=True)
    assert state == list(skipped)[-1].state
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, state.h)))
    *_, last = train.fit(state, train.make_checked_update(OPTIMIZER), reader(8), 12)
    assert last.step == 12


def test_diverged_error_can_be_pickled_and_copied():
    plain = train.DivergedError("text")
    assert (str(plain), plain.state, plain.step) == ("text", None, None)
    error = train.DivergedError("text", state=make_state(key=jax.random.PRNGKey(0)), step=3)
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (str(same), same.step, same.state) == ("text", 3, error.state)


def test_skip_nonfinite_continues():
    update = train.make_checked_update(OPTIMIZER, broken_loss(at=5))
    reports = list(
        train.fit(make_state(key=jax.random.key(7)), update, reader(), 6, every=(4, 5),
                  skip_nonfinite=True)
    )  # fmt: skip
    assert [report.skipped for report in reports] == [0, 0, 1]
    assert math.isnan(reports[-1].loss) and not math.isnan(reports[0].loss)
    assert reports[-1].state.step == 6
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(reports[-1].state.params))


def test_random_draws_depend_on_key_and_step():
    """So that a run that goes on draws what it would have drawn."""

    def loss(params, h, inputs, targets, key):
        h, hs = jaxrnn.unroll_layers(params.cell, jaxrnn.Ids(inputs), h, dropout=0.5, key=key)
        logits = jaxrnn.apply_readout(params.readout, hs)
        return jnp.sum(jaxrnn.cross_entropy(logits, targets)), h

    def state(seed):
        params = jaxrnn.init_params(jax.random.key(0), K, H, K, layers=2, dtype=jnp.float64)
        return train.init_state(params, optax.sgd(0.0), B, jax.random.key(seed))

    update = train.make_checked_update(optax.sgd(0.0), loss)
    inputs, targets, _ = next(reader())

    def losses(seed):
        now, found = state(seed), []
        for _ in range(3):
            now, figures = update(train.start_over(now), inputs, targets)
            found.append(float(figures.loss))
        return found

    assert len(set(losses(0))) == 3
    assert losses(0) == losses(0) != losses(1)


def test_evaluate_places_arrays_by_put():
    params, put = make_state().params, []
    ids = np.random.default_rng(1).integers(0, K, (9, B))

    def recorded(x, axis):
        put.append((x.shape, axis))
        return jnp.asarray(x)

    found = train.evaluate(params, ids[:-1], ids[1:], put=recorded)
    assert found == train.evaluate(params, ids[:-1], ids[1:])
    assert put == [((B, H), 0), ((8, B), 1), ((8, B), 1)]


class Slow:
    """A loss that is under way until somebody waits for it."""

    under_way: ClassVar[set] = set()

    def __init__(self):
        self.under_way.add(self)

    def block_until_ready(self):
        self.under_way.discard(self)

    def is_deleted(self):
        return False

    def __float__(self):
        self.block_until_ready()
        return 1.0

    def __array__(self, dtype=None, copy=None):
        return np.asarray(1.0, dtype)


class Jitted:
    """An update that JAX has compiled, all of which is under way until somebody waits."""

    most = 0

    def __init__(self, function, donate_argnums):
        self.lower = self.trace = self.eval_shape = self.clear_cache = self._cache_size = None

    def __call__(self, state, inputs, targets):
        said = Slow()
        Jitted.most = max(Jitted.most, len(Slow.under_way))
        return state, said


def test_few_updates_run_ahead(monkeypatch):
    monkeypatch.setattr(Slow, "under_way", set())
    monkeypatch.setattr(jax, "jit", Jitted)
    update, state = train.make_update(OPTIMIZER, lambda *_: None), make_state()
    for _ in range(100):
        state, _ = update(state, None, None)
    # The next one is begun before the oldest is waited for.
    assert 1 < Jitted.most <= train.AHEAD + 1 < 10


def test_an_update_can_be_jitted_scanned_and_lowered():
    update, state = train.make_update(OPTIMIZER), make_state()
    inputs, targets, _ = next(reader())
    expected = update(make_state(), inputs, targets)
    compiled = update.lower(state, inputs, targets).compile()
    assert_close(compiled(make_state(), inputs, targets)[1], expected[1], 1e-6)
    types = jax.eval_shape(update, state, inputs, targets)
    assert types[0].h.shape == (B, H)
    ids = jnp.asarray(inputs), jnp.asarray(targets)
    jitted = jax.jit(lambda state, ids: jax.lax.scan(lambda s, _: update(s, *ids), state, None, 3))
    found, losses = jitted(make_state(), ids)
    seen = []
    for _ in range(3):
        state, loss = update(state, *ids)
        seen.append(loss)
        loss.delete()  # nobody waits for what is gone
    assert_close(found, state, 1e-12)
    assert losses.shape == (3,)


def test_evaluate_waits_for_each_window(monkeypatch):
    most = 0

    def total(params, inputs, targets, h, *, loss):
        nonlocal most
        slow = Slow()
        most = max(most, len(Slow.under_way))
        return slow, h

    monkeypatch.setattr(train, "_total", total)
    monkeypatch.setattr(Slow, "under_way", set())
    ids = np.zeros((100, B), int)
    assert train.evaluate(make_state().params, ids, ids, seq_length=10) == 10 / ids.size
    assert most == 1


def test_fit_ends_with_its_windows():
    few = [next(windows) for windows in [reader()] for _ in range(7)]
    update = train.make_checked_update(OPTIMIZER)
    reports = list(train.fit(make_state(), update, few, 100, every=[3]))
    assert [report.step for report in reports] == [3, 6, 7]
    again = list(train.fit(make_state(), update, iter(few), 7, every=100))
    assert [report.step for report in again] == [7]
    assert_same(again[0].state.params, reports[-1].state.params)


def test_the_pace_of_one_update_is_nan():
    update = train.make_checked_update(OPTIMIZER)
    paces = [r.updates_per_second for r in train.fit(make_state(), update, reader(), 3, every=1)]
    assert math.isnan(paces[0]) and min(paces[1:]) > 0


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"state": {}}, TypeError, "state: expected a jaxrnn.TrainState, got dict"),
        ({"steps": 2.5}, TypeError, "steps: expected a whole number, got float"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"update": train.make_update(OPTIMIZER)}, TypeError, "update: expected a function from"),
    ],
)
def test_fit_rejects_bad_arguments(how, kind, message):
    update = train.make_checked_update(OPTIMIZER)
    how = {"state": make_state(), "update": update, "windows": reader(), "steps": 5, **how}
    with pytest.raises(kind, match=f"^{message}"):
        list(train.fit(**how))


def gru(params, h, inputs, targets, key):
    """A model that is none of this library's."""

    def step(h, n):
        z, r = jax.nn.sigmoid(params["in"][:2, n] + jnp.einsum("bh,khg->kbg", h, params["W"][:2]))
        new = jnp.tanh(params["in"][2, n] + (r * h) @ params["W"][2])
        h = z * h + (1 - z) * new
        return h, h

    h, hs = jax.lax.scan(step, h, inputs)
    logits = jaxrnn.apply_readout(params["out"], hs)
    return jnp.sum(jaxrnn.cross_entropy(logits, targets)), h


def test_fit_trains_a_custom_model():
    key = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": jax.random.normal(key[0], (3, K, H), jnp.float64),
        "W": 0.3 * jax.random.normal(key[1], (3, H, H), jnp.float64),
        "out": jaxrnn.Readout(jnp.zeros((K, H)), jnp.zeros(K)),
    }
    h, ids = jnp.zeros((B, H)), np.arange(31)[:, None] % K + np.zeros((1, B), int)
    state = train.init_state(params, OPTIMIZER, h=h)
    update = train.make_checked_update(OPTIMIZER, gru)
    windows = train.windows(ids[:-1], ids[1:], T)
    before = train.evaluate(params, ids[:-1], ids[1:], loss=gru, h=h)
    *_, last = train.fit(state, update, windows, 200)
    after = train.evaluate(last.state.params, ids[:-1], ids[1:], loss=gru, h=h)
    assert before == pytest.approx(math.log(K)) and after < last.loss + 0.2 < 0.5
    # All of it in one piece.
    total, _ = gru(last.state.params, h, ids[:-1], ids[1:], None)
    assert after == pytest.approx(float(total) / ids[1:].size)
    assert params["W"].shape == (3, H, H) and not h.is_deleted()
    for both in ({}, {"batch_size": B, "h": h}):
        with pytest.raises(ValueError, match=r"^batch_size: expected either that or h, got "):
            train.init_state(params, OPTIMIZER, **both)


def test_windows_start_at_a_step():
    windows, later = reader(), reader(13)
    for _ in range(13):
        next(windows)
    for _ in range(9):
        assert_same(next(later), next(windows))
    with pytest.raises(ValueError, match=r"^start: expected at least 0, got -1"):
        next(reader(-1))


def test_keys_and_complex_numbers_can_be_carried():
    """A key in h is left as it is where the streams start over, and norms are real."""
    h = {"key": jax.random.key(7), "state": jnp.ones((B, 2))}
    state = train.init_state({"w": jnp.full(2, 3 + 4j)}, optax.sgd(0.1), h=h)
    over = train.start_over(state)
    assert over.h["key"] == h["key"] and not over.h["state"].any()

    def loss(params, h, inputs, targets, key):
        return jnp.sum(jnp.abs(params["w"]) ** 2) * inputs.size, h

    _, figures = train.make_checked_update(optax.sgd(0.1), loss)(
        state, *[np.zeros((T, B), int)] * 2
    )
    assert figures.finite and figures.parameter_norm == pytest.approx(50**0.5)
    assert figures.gradient_norm == pytest.approx(2 * 50**0.5)

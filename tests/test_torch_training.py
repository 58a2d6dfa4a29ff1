"""The comparison with torch: both of its sides make the same updates of the same network."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxrnn
from benchmarks import results, torch_training
from benchmarks.training_sides import NAMES, Run, train_jaxrnn, train_torch
from jaxrnn import train

torch = pytest.importorskip("torch")

SIZE, STREAM = 7, 40
# Thirteen windows of the streams, so that twenty updates start over once.
RUN = Run(25, 20, hidden_size=12, seq_length=3, batch_size=4, grad_clip=0.65, dtype="float64")


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    """optax multiplies floats by its integer step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def streams():
    """Every other character is the one after the last, so that there is something to learn."""
    ids = np.random.default_rng(0).integers(0, SIZE, STREAM * RUN.batch_size + 1, np.int32)
    ids[1::2] = (ids[:-1:2] + 1) % SIZE
    return train.streams(ids, RUN.batch_size)


def trained(side, run=RUN):
    key = jax.random.key(run.seed)
    params = jaxrnn.init_params(key, SIZE, run.hidden_size, SIZE, dtype=run.dtype)
    return side(params, train.windows(*streams(), run.seq_length), run)


@pytest.fixture(scope="module")
def ours():
    with jax.numpy_dtype_promotion("standard"):
        found, nats = trained(train_jaxrnn)
        return {**found, "nats": nats(*streams())}


@pytest.fixture
def norms(monkeypatch):
    """The norms of torch's gradients before they are clipped."""
    seen, norm = [], torch.nn.utils.get_total_norm

    def note(gradients):
        seen.append(float(norm(gradients)))
        return norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", note)
    return seen


def apart(ours, theirs):
    return max(np.abs(np.asarray(ours[name]) - theirs[name]).max() for name in NAMES)


def test_adam_clipping_and_decay_are_the_same_on_both_sides(ours, norms):
    theirs, nats = trained(train_torch)
    clipped = sum(norm > RUN.grad_clip for norm in norms)
    assert len(norms) == RUN.updates and 3 <= clipped <= RUN.updates - 3
    # Adam takes relative errors of small gradients up, and 1 − β₂ᵗ those of β₂ by a thousand.
    assert apart(ours, theirs) < 1e-10
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-10)
    assert np.isclose(ours["nats"], nats(*streams()), rtol=1e-10, atol=0)
    start, _ = trained(train_torch, replace(RUN, updates=0))
    assert apart(start, theirs) > 1e-2


@pytest.mark.parametrize("other", [{"grad_clip": 0.66}, {"steps": 26}, {"learning_rate": 3.01e-3}])
def test_another_optimizer_is_found_out(ours, other):
    assert apart(ours, trained(train_torch, replace(RUN, **other))[0]) > 1e-6


@pytest.mark.parametrize(
    ("bits", "seconds", "loss", "code"),
    [
        ((2.0, 2.0), (2.5, 2.5), 4.0, 0),
        ((2.05, 1.95), (2.5, 2.5), 4.0, 0),
        ((2.03, 2.0), (2.5, 2.5), 4.0, 1),
        ((1.97, 2.0), (2.5, 2.5), 4.0, 1),
        ((np.nan, 2.0), (2.5, 2.5), 4.0, 1),
        ((2.0, 2.0), (1.9, 1.9), 4.0, 1),
        ((2.0, 2.0), (2.5, 2.5), 4.0 + 1e-9, 1),
        ((2.0, 2.0), (2.5, 2.5), np.nan, 1),
    ],
)
def test_the_verdict(monkeypatch, tmp_path, capsys, bits, seconds, loss, code):
    calls = []

    def measure(side, run):
        calls.append((side, run.dtype, run.updates, run.seed))
        mine = {"bits": 2.0, "seconds": 2.0, "first": 1.0, "losses": np.full(3, 4.0)}
        n = run.seed
        theirs = {**mine, "bits": bits[n], "seconds": seconds[n], "losses": np.array([4, loss, 4])}
        return mine if side == "jaxrnn" else theirs

    monkeypatch.setattr(torch_training, "measure", measure)
    path = tmp_path / "a.json"
    arguments = ["--steps", "7", "--rounds", "2", "--output", str(path)]
    assert torch_training.main(arguments) == code
    found, shown = results.read(path)["training"], capsys.readouterr().out
    assert found["steps"] == 7
    checked, trained = calls[:2], calls[2:]
    assert checked == [(side, "float64", 50, 0) for side in ("jaxrnn", "torch")]
    if loss != 4:
        assert not trained and "means" not in shown
        return
    turns = [("jaxrnn", 0), ("torch", 0), ("torch", 1), ("jaxrnn", 1)]
    assert trained == [(side, "float32", 7, seed) for side, seed in turns]
    assert f"{found['torch over jaxrnn']:.2f}" in shown
    assert found["torch over jaxrnn"] == seconds[0] / 2
    assert json.dumps(found["rounds"][1][0]) == "[2.0, 2.0, 1.0]"

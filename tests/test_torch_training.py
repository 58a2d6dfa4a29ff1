"""The comparison with torch: both of its sides make the same updates of the same network."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from benchmarks import results, torch_training
from benchmarks.torch_training import NAMES, Run, differences, train_jaxrnn, train_torch
from jaxrnn import train

torch = pytest.importorskip("torch")

SIZE, STREAM = 7, 40
# Thirteen windows of the streams, so that twenty updates start over once.
RUN = Run(steps=25, updates=20, hidden_size=12, seq_length=3, batch_size=4, grad_clip=0.65)


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


def trained(side, run=RUN, dtype=jnp.float64):
    key = jax.random.key(run.seed)
    params = jaxrnn.init_params(key, SIZE, run.hidden_size, SIZE, dtype=dtype)
    return side(params, train.windows(*streams(), run.seq_length), run)


@pytest.fixture(scope="module")
def ours():
    with jax.numpy_dtype_promotion("standard"):
        found, nats = trained(train_jaxrnn)
        return {**found, "nats": nats(*streams())}


@pytest.fixture
def norms(monkeypatch):
    """`clip_grad_norm_` without its 1e-6, as optax does it; the norms that it sees."""
    seen = []

    def clip(parameters, max_norm):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm - 1e-6)
        seen.append(float(norm))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
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


def test_what_clipping_adds_to_the_norm_does_not_matter(ours):
    theirs, _ = trained(train_torch)
    # Gradients are smaller by 1e-6 / grad_clip where they are clipped. The mean and the root that
    # Adam divides by change by as much, weighted otherwise: less than three times that together.
    rates = RUN.learning_rate * RUN.updates
    assert 0 < apart(ours, theirs) < rates * 3 * 1e-6 / RUN.grad_clip


@pytest.mark.parametrize("other", [{"grad_clip": 0.66}, {"steps": 26}, {"learning_rate": 3.01e-3}])
def test_another_optimizer_is_found_out(ours, norms, other):
    assert apart(ours, trained(train_torch, replace(RUN, **other))[0]) > 1e-6


def test_the_check_in_float32_passes_and_can_fail():
    run = replace(RUN, updates=5)
    ours, theirs = (trained(side, run, jnp.float32)[0] for side in (train_jaxrnn, train_torch))
    start, _ = trained(train_torch, replace(RUN, updates=0), jnp.float32)
    found = differences(ours, theirs, start, RUN)
    assert set(found) == {"loss", *NAMES} and max(found.values()) < 1
    theirs["b"] = start["b"] + 1.001 * (theirs["b"] - start["b"])
    found = differences(ours, theirs, start, RUN)
    assert found["b"] > 1 and max(found[name] for name in "UWVc") < 1


@pytest.mark.parametrize(
    ("bits", "seconds", "code"), [(2.009, 2.5, 0), (1.985, 2.5, 1), (2.0, 1.9, 1), (np.nan, 9, 1)]
)
def test_the_verdict(monkeypatch, tmp_path, capsys, bits, seconds, code):
    calls = []

    def measure(side, run):
        calls.append((side, run.updates))
        ours = {"bits": 2.0, "seconds": 2.0, "first": 1.0}
        rest = {"losses": [4.0], **{name: np.full(3, float(run.updates)) for name in NAMES}}
        return (ours if side == "jaxrnn" else {**ours, "bits": bits, "seconds": seconds}) | rest

    monkeypatch.setattr(torch_training, "measure", measure)
    path = tmp_path / "a.json"
    arguments = ["--steps", "7", "--rounds", "2", "--output", str(path)]
    assert torch_training.main(arguments) == code
    turns = ["jaxrnn", "torch", "torch", "jaxrnn"]
    assert calls[-4:] == [(side, 7) for side in turns] and ("torch", 5) in calls
    assert f"{seconds / 2:.2f}" in capsys.readouterr().out
    found = results.read(path)["training"]
    assert found["torch over jaxrnn"] == seconds / 2 and found["steps"] == 7
    assert json.dumps(found["rounds"][1][0]) == "[2.0, 2.0, 1.0]"


def test_sides_that_differ_are_not_timed(monkeypatch, capsys):
    def measure(side, run):
        values = {name: np.full(3, run.updates + (side == "torch")) for name in NAMES}
        return {"losses": [4.0], **values}

    monkeypatch.setattr(torch_training, "measure", measure)
    assert torch_training.main(["--steps", "7"]) == 1
    assert "medians" not in capsys.readouterr().out

"""A run in this process: what it saves and keeps, and when it gives memory back."""

import os
import signal
from math import log

import jax
import pytest

from jaxrnn import train
from jaxrnn._training import directory
from jaxrnn._training.checkpoints import Checkpoints
from jaxrnn._training.config import Config
from jaxrnn._training.corpus import Corpus, open_corpus
from jaxrnn._training.devices import Placement
from jaxrnn._training.encode import encode
from jaxrnn._training.run import Run

# Held-out bits by the step at which they are measured.
BITS = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 2.5, 12: 2.0, 14: 1.25, 15: 2.0}


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def begin(tmp_path):
    """A `Run` in the same directory each time."""
    source = tmp_path / "fox.txt"
    source.write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    out = tmp_path / "run"
    out.mkdir()
    text = encode([str(source)], "char", out / directory.IDS)
    how = {"batch_size": 2, "seq_length": 4}
    config = Config(**how, hidden_size=8, steps=15, eval_every=2, checkpoint_every=3)

    def begin():
        corpus = open_corpus(out / directory.IDS, text, held_out=0.1, **how)
        return Run(out, config, text, corpus, Placement(2, 8))

    return begin


def test_the_best_is_kept_whenever_it_was_measured(begin, monkeypatch):
    """Evaluated at even steps, saved at each third; told to stop at step 8, and gone on with."""
    saved, released, measured = [], [], iter(BITS.values())
    save, release = Checkpoints.save, Corpus.release

    def noted(self, step, *args):
        saved.append(step)
        save(self, step, *args)

    def given_back(self):
        released.append(self)
        release(self)

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(Corpus, "release", given_back)
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: next(measured) * log(2))

    def stop_at_8(row):
        if row["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    run = begin()
    assert (run.go(stop_at_8).signal, run.step) == (signal.SIGTERM, 9)
    assert saved == [2, 3, 4, 6, 9]
    run = begin()
    assert run.go(lambda row: None).bits == pytest.approx(BITS[15])
    assert saved == [2, 3, 4, 6, 9, 12, 15]
    checkpoints, rows = Checkpoints(run.out), directory.read_metrics(run.out)
    assert (checkpoints.steps(), checkpoints.best()) == ([4, 9, 12, 15], 4)
    bits = {row["step"]: row["held_out_bits"] for row in rows if "held_out_bits" in row}
    assert bits == pytest.approx(BITS)
    assert len(released) == len(rows)

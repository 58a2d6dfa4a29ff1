"""A run in this process: what it saves and keeps, and when it gives memory back."""

import math
import os
import signal
from contextlib import ExitStack
from dataclasses import replace
from math import log

import jax
import pytest

from jaxrnn import train
from jaxrnn._api.checks import InputError
from jaxrnn._app import directory
from jaxrnn._app import run as run_module
from jaxrnn._app.checkpoints import Checkpoints, FailedError
from jaxrnn._app.corpus import encode, open_corpus
from jaxrnn._app.devices import SIGNALS, Placement, stop_requests
from jaxrnn._app.directory import best_checkpoint, checkpoint_steps
from jaxrnn._app.run import Config, Run

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

    def begin(**free):
        corpus = open_corpus(out / directory.IDS, text, held_out=0.1, **how)
        return Run(out, replace(config, **free), corpus, Placement(2, 8))

    return begin


def claim(out, held):
    return directory.claimed(out, {"of": "a run"}, held)


def test_of_two_that_claim_a_directory_at_once_one_gets_it(tmp_path, monkeypatch):
    """Both have found it empty; the second changes nothing, and the first keeps its lock."""
    monkeypatch.setattr(directory, "PATIENCE", 0.1)
    out, begin = tmp_path / "run", directory._begin
    with ExitStack() as first, ExitStack() as second:

        def begun_by_another(out, config, held):
            monkeypatch.setattr(directory, "_begin", begin)
            with claim(out, first):
                pass
            return begin(out, config, held)

        monkeypatch.setattr(directory, "_begin", begun_by_another)
        with pytest.raises(directory.TakenError, match="is a run; to go on"), claim(out, second):
            pass
        assert (out / "config.json").read_text() == '{\n  "of": "a run"\n}\n'
        assert [found.name for found in out.iterdir()] == ["config.json"]
        with pytest.raises(InputError, match="a run that nobody is training"):
            first.enter_context(directory.locked(out))


def row(run, step):
    (found,) = [row for row in directory.read_metrics(run.out) if row["step"] == step]
    return found


def test_time_and_skipped_updates_are_counted_over_all_parts(begin, monkeypatch):
    """The key of each update is what may make it fail: two of three do, in both parts."""
    make = train.make_checked_update

    def unreliable(*args, **how):
        update = make(*args, **how)

        def made(state, inputs, targets):
            fails = int(state.step) % 3 > 0
            state, figures = update(state, inputs, targets)
            return state, replace(figures, finite=figures.finite & (not fails))

        return made

    monkeypatch.setattr(train, "make_checked_update", unreliable)
    run = begin(skip_nonfinite=True)
    run.go(lambda row: row["step"] == 6 and os.kill(os.getpid(), signal.SIGTERM))
    first = directory.read_metrics(run.out)[-1]
    assert (first["step"], first["skipped"]) == (7, 4)
    again = begin(skip_nonfinite=True)
    again.go(lambda row: None)
    assert row(again, 15)["skipped"] == 10
    assert row(again, 15)["seconds"] > first["seconds"] > 0


def test_a_held_out_loss_that_is_no_number_ends_the_run(begin, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: math.inf)
    said = (
        r"the held-out loss became inf at step 2 \(gradient norm \S+, parameter norm \S+\); begin"
    )
    with pytest.raises(FailedError, match=said):
        begin().go(lambda row: None)
    run = begin(skip_nonfinite=True)
    run.go(lambda row: None)
    assert math.isnan(run.bits) and best_checkpoint(run.out) is None


def test_metrics_that_cannot_be_written_end_the_run(begin, monkeypatch):
    def full(path, row):
        raise OSError(28, "No space left on device", str(path / "metrics.jsonl"))

    monkeypatch.setattr(directory, "append_metrics", full)
    run = begin()
    with pytest.raises(FailedError, match=r"run/metrics.jsonl: cannot be written: No space left"):
        run.go(lambda row: None)


def test_output_that_nobody_reads_saves_first(begin, monkeypatch):
    """At a step where no checkpoint is due."""
    measured = iter(BITS.values())
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: next(measured) * log(2))

    def closed(row):
        if row["step"] == 8:
            raise BrokenPipeError(32, "Broken pipe")

    run = begin()
    with pytest.raises(FailedError, match=r"^standard output: cannot be written: Broken pipe$"):
        run.go(closed)
    assert checkpoint_steps(run.out) == [4, 6, 8] and row(run, 8)["held_out_bits"] == 1.5


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt),
                                              (signal.SIGTERM, SystemExit)])  # fmt: skip
def test_a_second_signal_ends_at_once(begin, number, ends):
    before, seen = [signal.getsignal(each) for each in SIGNALS], []

    def twice(row):
        seen.append(row["step"])
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    run = begin()
    with pytest.raises(ends) as ended:
        run.go(twice)
    assert ends is KeyboardInterrupt or ended.value.code == 128 + number
    assert seen == [2] and checkpoint_steps(run.out) == [2]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_nohup_asks_for():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() == signal.SIGTERM
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_best_is_kept_whenever_it_was_measured(begin, monkeypatch):
    """Evaluated at even steps, saved at each third; told to stop at step 8, and gone on with."""
    saved, released, measured = [], [], iter(BITS.values())
    save, release = Checkpoints.save, run_module.release

    def noted(self, step, *args):
        saved.append(step)
        save(self, step, *args)

    def given_back(ids):
        released.append(ids)
        release(ids)

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(run_module, "release", given_back)
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: next(measured) * log(2))

    def stop_at_8(row):
        if row["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    run = begin()
    assert (run.go(stop_at_8), run.step) == (signal.SIGTERM, 9)
    assert saved == [2, 3, 4, 6, 9]
    run = begin()
    assert run.go(lambda row: None) == 0 and run.bits == pytest.approx(BITS[15])
    assert saved == [2, 3, 4, 6, 9, 12, 15]
    rows = directory.read_metrics(run.out)
    assert (checkpoint_steps(run.out), best_checkpoint(run.out)) == ([4, 9, 12, 15], (4, BITS[4]))
    bits = {row["step"]: row["held_out_bits"] for row in rows if "held_out_bits" in row}
    assert bits == pytest.approx(BITS)
    assert len(released) == len(rows)

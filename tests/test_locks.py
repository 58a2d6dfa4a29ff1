"""Several commands at one run directory: one trains it, others read it, and none harms another."""

import json
import re
import shutil
import threading
import time
from contextlib import ExitStack
from functools import partial

import commands
import pytest
from commands import (
    LONG,
    SIGNALS,
    SMALL,
    TEXT,
    assert_same_state,
    here,
    one_line,
    start,
    succeeded,
    wait_for,
)

from jaxrnn._api.checks import InputError
from jaxrnn._app import directory
from jaxrnn._app.checkpoints import Checkpoints
from jaxrnn._app.directory import checkpoint_steps
from jaxrnn._app.run import load

finished, stopped = commands.finished, commands.stopped
without_pictures, prepared_only = commands.without_pictures, commands.prepared_only
updates_once = commands.updates_once

pytestmark = pytest.mark.usefixtures("compile_once", "updates_once", "without_pictures")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with commands.as_users_have_it():
        yield


def claim(out, held, **about):
    return directory.claimed(out, {"of": "a run", **about}, held)


def test_sample_and_show_read_beside_a_trainer_and_a_second_one_is_refused(text_file, tmp_path):
    """A training that drops checkpoints all the time."""
    out = tmp_path / "run"
    process = start("train", text_file, "--out", out, *LONG, "--checkpoint-every", "1")
    try:
        wait_for(out / "checkpoints" / "4", process)
        steps = [int(load(out)[0].step) for _ in range(20)]
        for command in (["sample", "--length", "5"], ["sample", "--length", "5", "--best"]):
            succeeded(here(*command, out))
        assert "being trained, at step" in succeeded(here("show", out))
        one_line(here("train", "--resume", out), 2, "not being trained")
        one_line(here("train", text_file, "--out", out), 2, "--out: expected an empty or new")
    finally:
        process.send_signal(SIGNALS[0])
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert steps == sorted(steps) and len(set(steps)) > 5


def test_load_retries_after_a_dropped_checkpoint(stopped, monkeypatch):
    """The next one is read, as often as that happens."""
    read = Checkpoints.state

    def dropped_first(self, step, shapes):
        if step == 20:
            shutil.rmtree(self.folder / str(step))
        return read(self, step, shapes)

    monkeypatch.setattr(Checkpoints, "state", dropped_first)
    assert load(stopped)[0].step == 10
    shutil.rmtree(stopped / "checkpoints" / "10")
    with pytest.raises(ValueError, match="expected a run with a checkpoint, got none yet"):
        load(stopped)


def test_the_best_is_read_again_where_it_was_dropped(stopped, monkeypatch):
    """While one looks for it, it is replaced by a better one."""
    listed, folder = directory.checkpoint_steps, stopped / "checkpoints"
    answers = [[10, 20], [20, 25], [20, 25], [20, 25]]
    shutil.rmtree(folder / "10")
    shutil.copytree(folder / "20", folder / "25")
    monkeypatch.setattr(directory, "checkpoint_steps", lambda out: answers.pop(0))
    about = folder / "20" / "about" / "metadata"
    metadata = json.loads(about.read_text())
    assert directory.best_checkpoint(stopped) == (20, metadata["held_out_bits"])
    assert answers == []
    monkeypatch.setattr(directory, "checkpoint_steps", listed)
    # As orbax's manager wrote it for runs of before.
    about.write_text(json.dumps({**metadata, "held_out_bits": None}))
    (folder / "25" / "about" / "metadata").write_text("{}")
    (folder / "20" / "metrics").mkdir()
    (folder / "20" / "metrics" / "metrics").write_text('{"held_out_bits": 1.5}')
    assert directory.best_checkpoint(stopped) == (20, 1.5)


def test_show_does_not_block_training(finished, stopped):
    """As `watch jaxrnn show` does, but without a pause, and two of them."""
    seen, done, looking = [[], []], threading.Event(), [threading.Event(), threading.Event()]

    def watch(mine, started):
        while not done.is_set():
            locked = directory.is_locked(stopped)
            mine += [] if mine[-1:] == [locked] else [locked]
            started.set()

    watchers = [threading.Thread(target=watch, args=pair)
                for pair in zip(seen, looking, strict=True)]  # fmt: skip
    for watcher in watchers:
        watcher.start()
    try:
        assert all(event.wait(10) for event in looking)
        succeeded(here("train", "--resume", stopped, "--sample-length", "0"))
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
    assert [each[:2] for each in seen] == [[False, True]] * 2
    assert_same_state(stopped, finished)


def test_readers_do_not_block_each_other(stopped):
    with (stopped / "config.json").open("rb") as file:
        assert directory._lock(file, shared=True)
        assert not directory.is_locked(stopped)
        begun = time.monotonic()
        with pytest.raises(ValueError, match="not being trained"), directory.locked(stopped):
            pass
    assert 0.5 < time.monotonic() - begun < 10  # it has tried again and again
    with directory.locked(stopped):
        assert directory.is_locked(stopped)


def test_a_lock_is_on_the_run_that_is_there(stopped, monkeypatch):
    """Not on one that was undone, or begun again, while one waited for its lock."""
    lock = directory._lock

    def undone_meanwhile(file, *how, **more):
        (stopped / "config.json").rename(stopped / "gone")
        return lock(file, *how, **more)

    monkeypatch.setattr(directory, "_lock", undone_meanwhile)
    with pytest.raises(ValueError, match="not being trained"), directory.locked(stopped):
        pass


# Who begins a run.


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_starts_at_once_one_gets_the_directory(locks, tmp_path, monkeypatch):
    """Four of them, again and again; the others are refused and change nothing."""
    lock = partial(directory._lock, seconds=0.05)
    monkeypatch.setattr(directory, "_lock", lock if locks else lambda *args, **how: None)
    together = threading.Barrier(4)

    def begin(n, out, said):
        together.wait()
        with ExitStack() as held:
            try:
                with claim(out, held, by=n):
                    said[n] = "mine"
            except directory.TakenError as error:
                said[n] = str(error)
            together.wait()  # the lock is held until all have tried

    for attempt in range(12):
        out, said = tmp_path / str(attempt), [""] * 4
        starts = [threading.Thread(target=begin, args=(n, out, said)) for n in range(4)]
        for each in starts:
            each.start()
        for each in starts:
            each.join()
        assert said.count("mine") == 1, said
        winner = said.index("mine")
        others = [line for line in said if line != "mine"]
        assert all("--out: expected an empty or new directory, got" in line for line in others)
        assert json.loads((out / "config.json").read_text())["by"] == winner
        assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_second_claim_changes_nothing_and_the_first_keeps_its_lock(tmp_path, monkeypatch):
    """Both have found the directory empty."""
    monkeypatch.setattr(directory, "PATIENCE", 0.1)
    out, begin = tmp_path / "run", directory._begin
    with ExitStack() as first, ExitStack() as second:

        def begun_by_another(out, config, held):
            monkeypatch.setattr(directory, "_begin", begin)
            with claim(out, first):
                pass
            return begin(out, config, held)

        monkeypatch.setattr(directory, "_begin", begun_by_another)
        with (
            pytest.raises(directory.TakenError, match="is a run; to continue it"),
            claim(out, second),
        ):
            pass
        assert json.loads((out / "config.json").read_text()) == {"of": "a run"}
        assert [path.name for path in out.iterdir()] == ["config.json"]
        with pytest.raises(InputError, match="a run that is not being trained"):
            first.enter_context(directory.locked(out))


def test_what_another_has_begun_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    """While one waited for the lock on the unfinished file, another made a new one."""
    lock, new = directory._lock, tmp_path / ".config.json.partial"

    def begun_meanwhile(file):
        new.unlink()
        new.write_text("of another")
        return lock(file)

    monkeypatch.setattr(directory, "_lock", begun_meanwhile)
    with ExitStack() as held:
        assert not directory._begin(tmp_path, {}, held)
    assert new.read_text() == "of another" and list(tmp_path.iterdir()) == [new]


@pytest.mark.usefixtures("prepared_only")
def test_a_start_that_was_killed_leaves_a_directory_that_is_new(text_file, tmp_path):
    """Between the moments at which config.json is made and has its name."""
    (out := tmp_path / "run").mkdir()
    (out / ".config.json.partial").write_text('{"sour')
    succeeded(here("train", text_file, "--out", out, *SMALL))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "ids.npy", "text.json"]


def test_a_name_that_leads_nowhere_begins_no_run(text_file, tmp_path):
    (out := tmp_path / "run").mkdir()
    (out / ".config.json.partial").symlink_to(tmp_path / "nowhere")
    run = here("train", text_file, "--out", out, *SMALL)
    one_line(run, 2, "--out: expected an empty or new directory, got")


def test_a_failed_start_leaves_the_directory_above_to_others(tmp_path):
    """It has made that for its own, and another run has begun in it."""

    class Beside(commands.io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            (tmp_path / "runs" / "b").mkdir(exist_ok=True)
            text = b"" if hasattr(self, "read_once") else b"too short"
            self.read_once = True
            buffer[: len(text)] = text
            return len(text)

    run = here("train", "-", "--out", tmp_path / "runs" / "a", *SMALL,
               stdin=commands.io.BufferedReader(Beside()))  # fmt: skip
    one_line(run, 2, "standard input: expected at least")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_text_from_standard_input_cannot_be_read_again(tmp_path):
    """Of a start that was killed before it had written all of it."""
    (out := tmp_path / "run").mkdir()
    (tmp_path / "text").write_text(TEXT)
    config = {"sources": ["-"], "options": {"batch_size": 4, "seq_length": 8}}
    (out / "config.json").write_text(json.dumps(config))
    one_line(here("train", "--resume", out), 2, "standard input, which is gone")
    config["sources"] = [str(tmp_path / "text")]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrnn._app.train._run", lambda *_: 0)
        succeeded(here("train", "--resume", out))
    assert re.search('"length": 2700', (out / "text.json").read_text())
    assert checkpoint_steps(out) == []

"""Checkpoints: whole or not there, resumed from bit for bit; damage is one line."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import commands
import jax
import numpy as np
import pytest
from commands import (
    SMALL,
    assert_same_state,
    files,
    here,
    metrics,
    needs_rights,
    one_line,
    start,
    state,
    succeeded,
)

from jaxrnn import train
from jaxrnn._api.checks import InputError
from jaxrnn._app import devices, directory
from jaxrnn._app import run as run_module
from jaxrnn._app.checkpoints import Checkpoints, FailedError, fingerprint
from jaxrnn._app.corpus import encode, open_corpus
from jaxrnn._app.devices import SIGNALS, Placement, stop_requests
from jaxrnn._app.directory import best_checkpoint, checkpoint_steps
from jaxrnn._app.run import Config, Run, initial_state, load

finished, stopped, user = commands.finished, commands.stopped, commands.user
without_pictures = commands.without_pictures
updates_once = commands.updates_once

pytestmark = pytest.mark.usefixtures("compile_once", "updates_once", "without_pictures")

CONFIG, SIZE = Config(hidden_size=16, batch_size=4), 29
# Held-out bits by the step at which they are measured.
BITS = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 2.5, 12: 2.0, 14: 1.25, 15: 2.0}


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with commands.as_users_have_it():
        yield


@contextmanager
def disk_of(size):
    """In this block no file may hold more bytes than this."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def resume(out, *how):
    return here("train", "--resume", out, "--sample-length", "0", *how)


# What is saved and read.


@cache
def make_state(seed=0):
    return Placement(4, 16).put_state(initial_state(replace(CONFIG, seed=seed), SIZE))


def shapes(model=1):
    placement = Placement(4, 16, model)
    like = jax.eval_shape(lambda: initial_state(CONFIG, SIZE))
    return jax.tree.map(
        lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how),
        like, placement.of_state(like),
    )  # fmt: skip


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


def test_the_last_three_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.prepare()
    for step, bits in enumerate((3.0, 2.0, None, 2.5, None, None), 1):
        checkpoints.save(step, make_state(step), {"at": step}, bits)
    assert checkpoint_steps(tmp_path) == [2, 4, 5, 6]
    assert best_checkpoint(tmp_path) == (2, 2.0)
    # And no others anywhere.
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5", "6"]
    # Nor what a process leaves that is killed as it saves, or deletes.
    for left in ("7.orbax-checkpoint-tmp", "3.deleted"):
        shutil.copytree(folder / "4", folder / left)
    before, again = files(tmp_path), Checkpoints(tmp_path)
    assert checkpoint_steps(tmp_path) == [2, 4, 5, 6] and files(tmp_path) == before
    again.prepare()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5", "6"]
    assert again.about(4)["at"] == 4
    for step, model in ((2, 1), (6, 2)):  # on other devices too
        assert_same(again.state(step, shapes(model)), make_state(step))


def test_without_a_measured_loss_there_is_no_best(tmp_path):
    Checkpoints(tmp_path).save(1, make_state(1), {}, None)
    assert checkpoint_steps(tmp_path) == [1] and best_checkpoint(tmp_path) is None


def test_a_state_is_read_as_it_was_or_not_at_all(tmp_path, capfd):
    """Each file of a checkpoint with a bit turned over, cut in half, and gone."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"at": step}, 3.0 - step)
    capfd.readouterr()
    newest = tmp_path / "checkpoints" / "2"
    read = refused = 0
    for file in [path for path in newest.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        turned = bytearray(content)
        turned[len(turned) // 2] ^= 16
        for damaged in (bytes(turned), content[: len(content) // 2], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            before = files(tmp_path)
            try:
                actual = Checkpoints(tmp_path).state(2, shapes())
            except InputError as error:
                refused += 1
                assert str(tmp_path / "checkpoints") in str(error) and "\n" not in str(error)
            else:
                read += 1
                assert_same(actual, make_state(2))
            assert files(tmp_path) == before
            file.write_bytes(content)
    # All three of the data of each shard, at least; and orbax reads not every file.
    assert refused >= 6 and read > 0
    assert capfd.readouterr().err == ""


def test_a_fingerprint_sees_each_bit_and_no_split():
    state, number = make_state(), lambda tree: int(fingerprint(tree))
    whole = number(jax.device_get(state))
    assert number(state) == whole == number(jax.device_put(state, jax.devices()[0]))
    W = np.asarray(state.params.cell.W)
    words = W.view(np.uint32).copy()
    words[3, 5] ^= 1
    assert len({number(W), number(words.view(np.float32)), number(W.T.copy())}) == 3


def test_nothing_is_pickled(finished):
    contents = files(finished)
    assert len(contents) > 10
    for path, content in contents.items():
        assert not content.startswith(b"\x80\x04"), path
    np.load(finished / "ids.npy", allow_pickle=False)


# Going on.


def test_a_resumed_run_equals_an_undisturbed_one(finished, stopped):
    """Bit for bit: what is carried, what the optimiser has, and the place in the text."""
    output = succeeded(resume(stopped))
    assert "continuing from step 20 of 30" in output
    assert_same_state(stopped, finished)
    assert metrics(stopped) == metrics(finished)
    before = files(stopped)
    assert "is finished: 30 updates" in succeeded(resume(stopped))
    assert files(stopped) == before


def test_resume_takes_options_that_change_no_number(finished, stopped):
    succeeded(resume(stopped, "--checkpoint-every", "3", "--skip-nonfinite"))
    assert checkpoint_steps(stopped)[-3:] == [24, 27, 30]
    assert_same_state(stopped, finished)


def kill(process, out, way, wait, more=1):
    """Kill it while it saves, when there are more metrics, or some time after its start."""
    rows, before = out / directory.METRICS, len(metrics(out))
    deadline = time.monotonic() + (6 * wait if way == "time" else 60)
    while process.poll() is None and time.monotonic() < deadline:
        if way == "save" and any((out / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.05 * wait)
            break
        if way == "row" and rows.exists() and len(rows.read_text().splitlines()) >= before + more:
            time.sleep(0.2 * wait)
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(finished, tmp_path):
    out, words = tmp_path / "run", [*SMALL, "--checkpoint-every", "10"]
    process = start("train", finished.parent / "fox.txt", "--out", out, *words)
    assert kill(process, out, "save", 0.2)
    assert (out / "config.json").exists()
    newest = max(checkpoint_steps(out), default=0)
    output = succeeded(resume(out))
    assert newest == 0 or f"continuing from step {newest} of 30" in output
    assert_same_state(out, finished)
    assert metrics(out) == metrics(finished)


@pytest.mark.full
@pytest.mark.parametrize(("seed", "least"), [(0, 6), (1, 30)])
def test_kills_at_random_moments_lose_nothing(seed, least, text_file, tmp_path):
    """Each run is killed until it has ended; then another one is begun, until there were enough."""
    words = [*SMALL, "--steps", "40", "--checkpoint-every", "3"]
    how = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    undisturbed = tmp_path / "undisturbed"
    output, errors = start("train", text_file, "--out", undisturbed, *words, **how).communicate()
    assert errors == "" and "run directory" in output
    generator, kills, runs = random.Random(seed), 0, 0
    while kills < least:
        out, newest, killed = tmp_path / f"run-{runs}", 0, 0
        runs += 1
        ended = False
        while not ended:
            begun = (out / directory.CONFIG).exists()
            where = ["--resume", out] if begun else [text_file, "--out", out, *words]
            process = start("train", *where, **how)
            if killed < 6:  # so that it comes to its end
                way = generator.choice(["save", "save", "row", "time"])
                kills += kill(process, out, way, generator.random(), generator.randrange(1, 6))
                killed += 1
            output, errors = (
                process.communicate(timeout=120) if not process.stdout.closed else ("", "")
            )
            assert process.returncode in (0, -signal.SIGKILL), output + errors
            if (out / directory.CONFIG).exists():
                json.loads((out / directory.CONFIG).read_text())
                directory.read_metrics(out)
            steps = checkpoint_steps(out)
            assert max(steps, default=0) >= newest
            newest = max(steps, default=0)
            if newest:
                state(out)  # which reads the newest, and looks at every bit of it
            ended = process.returncode == 0
        assert_same_state(out, undisturbed)
        assert metrics(out) == metrics(undisturbed)


# The loop that saves, without the command around it.


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


def row(run, step):
    (only,) = [row for row in directory.read_metrics(run.out) if row["step"] == step]
    return only


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
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: next(measured) * math.log(2))

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


def test_seconds_and_skipped_updates_are_counted_over_all_parts(begin, monkeypatch):
    """Two of three updates are not finite, before the run is stopped and after."""
    make = train.make_checked_update

    def unreliable(*args, **how):
        update = make(*args, **how)

        def made(state, inputs, targets):
            fails = int(state.step) % 3 > 0
            state, figures = update(state, inputs, targets)
            return state, replace(figures, finite=np.asarray(figures.finite) & (not fails))

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


def test_a_nonfinite_held_out_loss_ends_the_run(begin, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: math.inf)
    with pytest.raises(FailedError, match=r"held-out loss became inf at step 2 \(gradient"):
        begin().go(lambda row: None)
    run = begin(skip_nonfinite=True)
    run.go(lambda row: None)
    assert math.isnan(run.bits) and best_checkpoint(run.out) is None


def test_metrics_that_cannot_be_written_end_the_run(begin, monkeypatch):
    def full(path, row):
        raise OSError(28, "No space left on device", str(path / "metrics.jsonl"))

    monkeypatch.setattr(directory, "append_metrics", full)
    with pytest.raises(FailedError, match=r"run/metrics.jsonl: cannot be written: No space left"):
        begin().go(lambda row: None)


def test_output_that_nobody_reads_saves_first(begin, monkeypatch):
    """At a step where no checkpoint is due."""
    measured = iter(BITS.values())
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: next(measured) * math.log(2))

    def closed(row):
        if row["step"] == 8:
            raise BrokenPipeError(32, "Broken pipe")

    run = begin()
    with pytest.raises(FailedError, match=r"^standard output: cannot be written: Broken pipe$"):
        run.go(closed)
    assert checkpoint_steps(run.out) == [4, 6, 8] and row(run, 8)["held_out_bits"] == 1.5


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_ends_at_once(begin, number, ends):
    before, seen = [signal.getsignal(each) for each in SIGNALS], []

    def twice(row):
        seen.append(row["step"])
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    run = begin()
    with pytest.raises(ends) as ended:
        run.go(twice)
    assert getattr(ended.value, "code", 128 + number) == 128 + number
    assert seen == [2] and checkpoint_steps(run.out) == [2]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_to_another_process_stops_this_one_at_a_report(begin, monkeypatch):
    """As one of several, which ask each other now and then."""
    reports = []
    monkeypatch.setattr(devices, "are_several", lambda: True)
    monkeypatch.setattr(devices, "largest", lambda number: signal.SIGTERM)
    run = begin(steps=90, eval_every=90, checkpoint_every=10)
    assert run.go(lambda row: reports.append(row["step"])) == signal.SIGTERM
    assert run.step == reports[-1] == checkpoint_steps(run.out)[-1]
    assert run.step % run_module.REPORT_EVERY == 0


def test_an_ignored_hangup_stays_ignored():
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requested() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert requested() == signal.SIGTERM
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, do=function: (do(*args), calls.append(name))
        )
    directory.write(tmp_path / "config.json", {})
    assert calls == ["fsync", "replace"]
    directory.append_metrics(tmp_path, {"step": 1})
    assert calls[2:] == ["fsync"]


# Damage.


def test_a_damaged_checkpoint_is_one_line(stopped):
    newest = stopped / "checkpoints" / "20"
    data = list((newest / "state").rglob("d/*"))
    assert data
    for file in data:
        file.write_bytes(b"")
    before = files(stopped)
    for command in (["train", "--resume"], ["sample"]):
        one_line(here(*command, stopped), 2, f"{newest}: the checkpoint cannot be read",
                 "checkpoints/10 is the newest")  # fmt: skip
    assert files(stopped) == before


@pytest.mark.parametrize("content", ["[]", ""])
def test_damage_beside_the_arrays_is_one_line(content, stopped):
    (stopped / "checkpoints" / "20" / "about" / "metadata").write_text(content)
    one_line(resume(stopped), 2, "checkpoints/20: the checkpoint cannot be read")


def test_other_numbers_than_were_saved_are_one_line(stopped):
    about = stopped / "checkpoints" / "20" / "about" / "metadata"
    metadata = json.loads(about.read_text())
    about.write_text(json.dumps({**metadata, "fingerprint": metadata["fingerprint"] ^ 1}))
    for command in (["train", "--resume"], ["sample"]):
        one_line(here(*command, stopped), 2, "checkpoints/20: the checkpoint cannot be read")


def test_metrics_without_their_fields_are_one_line(stopped):
    rows = [row for row in directory.read_metrics(stopped) if row.pop("seconds")]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line(resume(stopped), 2, "expected a row of metrics, got")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_every", 0, "eval_every: expected at least 1, got 0"),
        ("eval_length", 1, "eval_length: expected at least 2, got 1"),
        ("optimizer", "x", "optimizer: expected one of 'adam'"),
        ("level", "x", "level: expected one of 'char', 'byte', got 'x'"),
    ],
)
def test_damaged_options_are_one_line(name, value, message, stopped):
    values = json.loads((stopped / "config.json").read_text())
    values["options"][name] = value
    (stopped / "config.json").write_text(json.dumps(values))
    one_line(resume(stopped), 2, "config.json: expected the options", message)


def test_a_checkpoint_of_another_run_is_one_line(stopped):
    values = json.loads((stopped / "config.json").read_text())
    values["options"]["learning_rate"] = 0.5
    (stopped / "config.json").write_text(json.dumps(values))
    before = files(stopped)
    one_line(resume(stopped), 2, "/20: expected a checkpoint of this run, got", "learning_rate")
    assert files(stopped) == before


def test_a_checkpoint_of_another_step_is_one_line(stopped):
    (stopped / "checkpoints" / "20").rename(stopped / "checkpoints" / "25")
    one_line(resume(stopped), 2, "/25: expected the state of step 25, got that of step 20")


def test_a_checkpoint_of_another_text_is_one_line(stopped):
    values = json.loads((stopped / "text.json").read_text())
    values["text"]["name"] = "the same by another name"
    (stopped / "text.json").write_text(json.dumps(values))
    assert load(stopped)[0].step == 20
    values["text"]["length"] -= 1
    (stopped / "text.json").write_text(json.dumps(values))
    one_line(here("sample", stopped), 2, "expected a checkpoint of this run", "another length")


def test_the_ids_of_a_run_are_not_replaced(stopped):
    """Nor trained on where they are others."""
    (stopped / "text.json").rename(stopped / "elsewhere")
    before = files(stopped)
    one_line(resume(stopped), 2, "expected a run directory, got no text.json")
    assert files(stopped) == before
    (stopped / "elsewhere").rename(stopped / "text.json")
    ids = np.load(stopped / "ids.npy")
    np.save(stopped / "ids.npy", ids[::-1])
    one_line(resume(stopped), 2, "ids.npy: expected the ids of", "different ids")


def test_other_names_are_no_checkpoints_and_stay(stopped, finished):
    names = ["040", "٤٠", "40.good", "before v1.2", "0", "-1", "+4"]
    for name in names:
        shutil.copytree(stopped / "checkpoints" / "20", stopped / "checkpoints" / name)
    assert checkpoint_steps(stopped) == [10, 20]
    succeeded(resume(stopped))
    assert all((stopped / "checkpoints" / name / "about").is_dir() for name in names)
    assert_same_state(stopped, finished)


def test_a_checkpoint_that_leads_nowhere_is_one_line(stopped):
    (stopped / "checkpoints" / "40").symlink_to(stopped / "nowhere")
    one_line(here("sample", stopped), 2, "/40: the checkpoint cannot be read")


# Disks and rights.


def test_a_full_disk_loses_no_checkpoint(stopped):
    before = files(stopped / "checkpoints")
    with disk_of(2000):
        run = resume(stopped)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert re.search(r"/30: cannot be written: .*checkpoints/20; to continue: ", run.stderr)
    assert files(stopped / "checkpoints").items() >= before.items()
    with disk_of(10):
        run = resume(stopped, "--checkpoint-every", "5")
    one_line(run, 2, f"{stopped}/metrics.jsonl: cannot be written: File too large")
    assert load(stopped)[0].step == 20


@pytest.mark.parametrize(
    ("limit", "name"), [(100, "config.json"), (1000, "ids.npy"), (3500, "text.json")]
)
def test_a_full_disk_at_the_start_leaves_no_directory(limit, name, tmp_path):
    """Of a text whose alphabet is larger than itself, written down."""
    (tmp_path / "text").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 800))) * 2)
    with disk_of(limit):
        run = here("train", tmp_path / "text", *SMALL, "--out", tmp_path / "deep" / "run")
    one_line(run, 2, f"deep/run/{name}: cannot be written: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@needs_rights
@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_directory_that_cannot_be_written_is_one_line(stopped, user, name):
    before, folder = files(stopped), stopped / name
    folder.chmod(0o500)
    run = user("train", "--resume", stopped)
    folder.chmod(0o700)
    one_line(run, 2, f"{folder}: expected a directory that can be written")
    assert files(stopped) == before


@needs_rights
def test_checkpoints_that_cannot_be_listed_are_one_line(stopped, user):
    (stopped / "checkpoints").chmod(0o000)
    runs = [user(*command, stopped) for command in (["sample"], ["show"], ["train", "--resume"])]
    (stopped / "checkpoints").chmod(0o700)
    for run in runs:
        one_line(run, 2, f"{stopped}/checkpoints: cannot be read: Permission denied")

"""Checkpoints that are damaged, of another run, or cannot be written: one line, nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import AS_A_USER, MAY_WRITE_ANYWHERE

from jaxrnn._api.checks import InputError
from jaxrnn._app import directory
from jaxrnn._app.checkpoints import Checkpoints, fingerprint
from jaxrnn._app.devices import Placement
from jaxrnn._app.directory import best_checkpoint, checkpoint_steps
from jaxrnn._app.run import Config, initial_state, load

SMALL = ["--steps", "30", "--hidden-size", "16", "--seq-length", "8", "--batch-size", "4",
         "--eval-every", "10", "--checkpoint-every", "10", "--sample-length", "0"]  # fmt: skip
CONFIG = Config(hidden_size=16, batch_size=4)
SIZE = 29

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def float32():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def train(*args, limit=-1):
    """`jaxrnn train` as a process whose files may hold so many bytes."""
    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv[0] = "jaxrnn"
runpy.run_module("jaxrnn", run_name="__main__")
"""
    return subprocess.run(
        [*AS_A_USER, sys.executable, "-c", program, "train", *map(str, args)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(text_file, tmp_path_factory):
    """A run that was asked to stop: `jaxrnn train` itself, with a longer way to go."""
    out = tmp_path_factory.mktemp("runs") / "fox"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxrnn", "train", text_file, "--out", out, *SMALL,
         "--steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step     30"):
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")
    assert re.search(r"stopped by SIGTERM at step \d+ of 100000; to go on: .*--resume", output)
    return out


@pytest.fixture
def run(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_state(seed=0):
    config = Config(hidden_size=16, batch_size=4, seed=seed)
    return Placement(4, 16).put_state(initial_state(config, SIZE))


def shapes(model=1):
    placement = Placement(4, 16, model)
    like = jax.eval_shape(lambda: initial_state(CONFIG, SIZE))
    return jax.tree.map(
        lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how),
        like, placement.of_state(like),
    )  # fmt: skip


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_the_last_three_and_the_best_are_kept(float32, tmp_path):
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
    before, again = contents(tmp_path), Checkpoints(tmp_path)
    assert checkpoint_steps(tmp_path) == [2, 4, 5, 6] and contents(tmp_path) == before
    again.prepare()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5", "6"]
    assert again.about(4)["at"] == 4
    for model in (1, 2):  # on other devices too
        for step in checkpoint_steps(tmp_path):
            assert_same(again.state(step, shapes(model)), make_state(step))


def test_without_a_measured_loss_there_is_no_best(float32, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {}, None)
    assert checkpoint_steps(tmp_path) == [1] and best_checkpoint(tmp_path) is None


def test_a_state_is_read_as_it_was_or_not_at_all(float32, tmp_path, capfd):
    """Each file of a checkpoint with a bit turned over, cut in half, and gone."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"at": step}, 3.0 - step)
    capfd.readouterr()
    files = [path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file()]
    refused = 0
    for file in files:
        content = file.read_bytes()
        turned = bytearray(content)
        turned[len(turned) // 2] ^= 16
        for damaged in (bytes(turned), content[: len(content) // 2], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            before = contents(tmp_path)
            try:
                assert_same(Checkpoints(tmp_path).state(2, shapes()), make_state(2))
            except InputError as error:
                refused += 1
                assert str(tmp_path / "checkpoints") in str(error)
                assert "\n" not in str(error)
            assert contents(tmp_path) == before
            file.write_bytes(content)
    # All three of the data of each shard, at least.
    assert refused >= 6
    assert capfd.readouterr().err == ""


def test_a_fingerprint_sees_each_bit_and_no_split(float32):
    state, number = make_state(), lambda tree: int(fingerprint(tree))
    whole = number(jax.device_get(state))
    assert number(state) == whole == number(jax.device_put(state, jax.devices()[0]))
    W = np.asarray(state.params.cell.W)
    words = W.view(np.uint32).copy()
    words[3, 5] ^= 1
    assert len({number(W), number(words.view(np.float32)), number(W.T.copy())}) == 3


def test_a_disk_that_is_full_loses_nothing(run, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # JAX would warn of that one too.
    before = contents(run / "checkpoints")
    found = train("--resume", run, limit=2000)
    assert found.returncode == 1, found.stderr
    said = r"jaxrnn train: error: .* cannot be written: .*; the last checkpoint is .*; to go on.*\n"
    assert re.fullmatch(said, found.stderr), found.stderr
    assert contents(run / "checkpoints").items() >= before.items()
    newest = checkpoint_steps(run)[-1]
    found = train("--resume", run, "--checkpoint-every", "5", limit=10)
    said = rf"jaxrnn train: error: {run}/metrics.jsonl: cannot be written: File too large\n"
    assert found.returncode == 2 and re.fullmatch(said, found.stderr), found.stderr
    load(run)
    assert checkpoint_steps(run)[-1] == newest


@pytest.mark.parametrize(("limit", "name"), [(100, "config.json"), (1000, "ids.npy"),
                                             (3500, "text.json")])  # fmt: skip
def test_a_disk_that_is_full_at_the_start_leaves_nothing(limit, name, tmp_path):
    """Of a text whose alphabet is larger than itself, written down."""
    (tmp_path / "text").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 800))) * 2)
    found = train(tmp_path / "text", *SMALL, "--out", tmp_path / "deep" / "run", limit=limit)
    said = f"jaxrnn train: error: {tmp_path}/deep/run/{name}: cannot be written: File too large\n"
    assert (found.returncode, found.stderr) == (2, said)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_picture_on_a_full_disk_ends_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    found = train(text_file, *SMALL, "--out", tmp_path / "run", limit=30_000)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"no picture: {tmp_path}/run/loss.png: cannot be written: File too" in found.stdout
    assert "run directory: " in found.stdout and checkpoint_steps(tmp_path / "run")[-1] == 30


def test_a_damaged_checkpoint_is_one_line(run):
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in (newest / "state").rglob("d/*"):
        file.write_bytes(b"")
    before = contents(run)
    found = train("--resume", run)
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1), found.stderr
    said = rf"jaxrnn train: error: {newest}: the checkpoint cannot be read: .* is the newest\n"
    assert re.fullmatch(said, found.stderr), found.stderr
    assert contents(run) == before


def test_a_checkpoint_of_another_run_is_one_line(run):
    values = json.loads((run / "config.json").read_text())
    values["options"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(values))
    before = contents(run)
    found = train("--resume", run)
    assert found.returncode == 2
    said = r".*/\d+: expected a checkpoint of this run, got one of another learning_rate, .*\n"
    assert re.fullmatch(said, found.stderr), found.stderr
    assert contents(run) == before


def test_one_of_another_step_or_text_is_one_line(run):
    steps = checkpoint_steps(run)
    for name in (run / "checkpoints").iterdir():
        if name.name != str(steps[0]):
            shutil.rmtree(name)
    (run / "checkpoints" / str(steps[0])).rename(run / "checkpoints" / "777")
    found = train("--resume", run)
    said = rf".*/777: expected the state of step 777, got that of step {steps[0]}\n"
    assert found.returncode == 2 and re.fullmatch(said, found.stderr), found.stderr
    (run / "checkpoints" / "777").rename(run / "checkpoints" / str(steps[0]))
    values = json.loads((run / "text.json").read_text())
    values["text"]["name"] = "the same by another name"
    (run / "text.json").write_text(json.dumps(values))
    load(run)
    values["text"]["length"] -= 1
    (run / "text.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"expected a checkpoint of this run, .* another length"):
        load(run)


def test_what_is_damaged_beside_the_arrays_is_one_line(run):
    newest = checkpoint_steps(run)[-1]
    for name, content in (("about/metadata", "[]"), ("about/metadata", "")):
        file = run / "checkpoints" / str(newest) / name
        before = file.read_text()
        file.write_text(content)
        found = train("--resume", run)
        said = rf"jaxrnn train: error: {run}/checkpoints/{newest}: the checkpoint cannot be .*\n"
        assert found.returncode == 2 and re.fullmatch(said, found.stderr), found.stderr
        file.write_text(before)
    rows = [row for row in directory.read_metrics(run) if row.pop("seconds")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = train("--resume", run)
    assert found.returncode == 2 and "expected a row of metrics, got" in found.stderr
    values = json.loads((run / "config.json").read_text())
    for name, value, message in (
        ("eval_every", 0, "eval_every: expected at least 1, got 0"),
        ("eval_length", 1, "eval_length: expected at least 2, got 1"),
        ("optimizer", "x", "optimizer: expected one of 'adam', .* got 'x'"),
        ("level", "x", "level: expected one of 'char', 'byte', got 'x'"),
    ):
        damaged = {**values, "options": {**values["options"], name: value}}
        (run / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=rf"config.json: expected the options .*: {message}"):
            load(run)


def test_ids_of_a_run_are_not_replaced(run):
    """Nor trained on where they are others."""
    (run / "text.json").rename(run / "elsewhere")
    before = contents(run)
    found = train("--resume", run)
    said = f"jaxrnn train: error: {run}: expected a run directory, got no text.json in it\n"
    assert (found.returncode, found.stderr) == (2, said) and contents(run) == before
    (run / "elsewhere").rename(run / "text.json")
    ids = np.load(run / "ids.npy")
    np.save(run / "ids.npy", ids[::-1])
    found = train("--resume", run)
    said = f"jaxrnn train: error: {run}/ids.npy: expected the ids of .*, got others\n"
    assert found.returncode == 2 and re.fullmatch(said, found.stderr), found.stderr


def test_other_options_are_one_line(run):
    found = train("--resume", run, "--hidden-size", "8")
    said = f"--hidden-size: expected 16, as {run} was begun with, got 8"
    assert (found.returncode, found.stderr) == (2, f"jaxrnn train: error: {said}\n")


def test_only_one_at_a_time_trains_a_run(run):
    import fcntl

    with (run / "config.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = train("--resume", run)
    said = f"{run}: expected a run that nobody is training, another process is"
    assert (found.returncode, found.stderr) == (2, f"jaxrnn train: error: {said}\n")


@pytest.mark.skipif(MAY_WRITE_ANYWHERE, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_directory_that_cannot_be_written_is_one_line(run, name):
    before, folder = contents(run), run / name
    folder.chmod(0o500)
    found = train("--resume", run)
    folder.chmod(0o700)
    said = f"{folder}: expected a directory that can be written"
    assert (found.returncode, found.stderr) == (2, f"jaxrnn train: error: {said}\n")
    assert contents(run) == before


def test_where_nothing_can_be_written_is_one_line(text_file):
    found = train(text_file, *SMALL, "--out", "/proc/run")
    said = "jaxrnn train: error: --out: cannot write to /proc/run: .*\n"
    assert found.returncode == 2 and re.fullmatch(said, found.stderr), found.stderr


def test_a_run_that_diverges_says_where_and_goes_on_without(text_file, tmp_path):
    out = tmp_path / "run"
    wild = ["--activation", "identity", "--optimizer", "sgd", "--learning-rate", "1e30",
            "--grad-clip", "0"]  # fmt: skip
    found = train(text_file, *SMALL, *wild, "--out", out)
    assert found.returncode == 1
    said = (
        r"jaxrnn train: error: the .* at step \d+ \(gradient norm \S+, parameter norm \S+\); "
        r"begin again .*--skip-nonfinite; there is no checkpoint yet; to go on: .*\n"
    )
    assert re.fullmatch(said, found.stderr), found.stderr
    found = train("--resume", out, "--skip-nonfinite")
    assert (found.returncode, found.stderr) == (0, "")
    skipped = directory.read_metrics(out)[-1]["skipped"]
    assert f"skipped {skipped}" in found.stdout and 0 < skipped <= 30


def test_a_finished_run_says_so(run, text_file, tmp_path):
    out = tmp_path / "short"
    assert train(text_file, *SMALL, "--out", out).returncode == 0
    before = contents(out)
    found = train("--resume", out)
    assert (found.returncode, found.stderr) == (0, "")
    bits = directory.read_metrics(out)[-1]["held_out_bits"]
    said = f"{out} is finished: 30 updates, held-out bits per character: {bits:.3f}\n"
    assert found.stdout == said and contents(out) == before


def test_nothing_is_pickled(run):
    for path, content in contents(run).items():
        assert not content.startswith(b"\x80\x04"), path
    np.load(run / "ids.npy", allow_pickle=False)

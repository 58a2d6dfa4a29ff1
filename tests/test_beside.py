"""What stands beside a run or around it: other commands, other settings of JAX, what is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import jax
import numpy as np
import pytest
from commands import (
    AS_A_USER,
    MAY_WRITE_ANYWHERE,
    SMALL,
    free_address,
    hearing,
    here,
    jaxrnn,
    start,
    start_python,
    wait_for,
)  # fmt: skip

from jaxrnn._app import directory
from jaxrnn._app.checkpoints import Checkpoints
from jaxrnn._app.directory import checkpoint_steps
from jaxrnn._app.run import load

SETTINGS = {
    "random keys and promotion": {
        "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_ENABLE_CUSTOM_PRNG": "1",
        "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    },
    "64 bits": {"JAX_ENABLE_X64": "1"},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    run = jaxrnn("train", text_file, "--out", out, *SMALL, "--checkpoint-every", "10")
    assert (run.returncode, run.stderr) == (0, "")
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """That run as if it had been stopped at step 20."""
    out = shutil.copytree(finished, tmp_path / "stopped")
    shutil.rmtree(out / "checkpoints" / "30")
    return out


def state(out):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load(out)[0])]


def one_line(run, code, pattern):
    assert (run.returncode, run.stdout) == (code, ""), run
    assert re.fullmatch(pattern + r"\n", run.stderr), run.stderr


# Other settings of JAX.


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_same_whatever_jax_is_set_to(name, finished, stopped, text_file, tmp_path):
    """Begun under one setting, and gone on with and sampled under another, it is one run."""
    setting = SETTINGS[name]
    begun = jaxrnn("train", text_file, "--out", tmp_path / "run", *SMALL, **setting)
    assert (begun.returncode, begun.stderr) == (0, "")
    resumed = jaxrnn("train", "--resume", stopped, "--sample-length", "0", **setting)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    for out in (tmp_path / "run", stopped):
        for found, expected in zip(state(out), state(finished), strict=True):
            # With 64 bits optax forms the learning rate in them: an eps of float32 in each of 30
            # updates of 3e-3 at most, where Adam divides by a root of moments.
            np.testing.assert_allclose(found, expected, 0, 1e-5 if "64" in name else 0)
    there = jaxrnn("sample", finished, "--length", "20", **setting)
    assert (there.returncode, there.stderr) == (0, "")
    assert there.stdout == jaxrnn("sample", tmp_path / "run", "--length", "20").stdout


@pytest.mark.parametrize("platform", ["cuda", "tpu", "none such"])
def test_devices_that_are_not_there_are_one_line(platform, finished, text_file, tmp_path):
    said = f"error: JAX_PLATFORMS: expected devices that JAX can use, got {platform}: .*"
    run = jaxrnn("train", text_file, "--out", tmp_path / "run", *SMALL, JAX_PLATFORMS=platform)
    one_line(run, 2, f"jaxrnn train: {said}")
    assert not (tmp_path / "run").exists()
    one_line(jaxrnn("sample", finished, JAX_PLATFORMS=platform), 2, f"jaxrnn sample: {said}")
    one = ["--processes", "1", "--process", "0", "--coordinator", free_address()]
    run = jaxrnn("train", text_file, "--out", tmp_path / "run", *SMALL, *one,
                 JAX_PLATFORMS=platform)  # fmt: skip
    assert run.returncode == 2 and re.search(f"^jaxrnn train: {said}$", run.stderr, re.M)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('no fonts\\nand more')", "no picture: no fonts"),
        ("import not_there", "no picture: No module named 'not_there'"),
        ("raise OSError(24, 'Too many open files')", "Too many open files"),
    ],
)
def test_a_picture_library_that_fails_ends_nothing(code, said, finished, text_file, tmp_path):
    (tmp_path / "broken" / "matplotlib").mkdir(parents=True)
    (tmp_path / "broken" / "matplotlib" / "__init__.py").write_text(code)
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", os.getcwd())])
    for run in (
        jaxrnn("train", text_file, "--out", tmp_path / "run", *SMALL, PYTHONPATH=path),
        jaxrnn("show", finished, PYTHONPATH=path),
    ):
        assert (run.returncode, run.stderr) == (0, "")
        assert re.search(rf"^no picture: .*{re.escape(said.removeprefix('no picture: '))}$",
                         run.stdout, re.M), run.stdout  # fmt: skip


def test_an_extra_of_another_version_is_one_line(finished, text_file, tmp_path):
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "__init__.py").write_text("from orbax import checkpoint")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])
    for command in (["train", text_file, "--out", tmp_path / "run"], ["sample", finished]):
        run = jaxrnn(*command, PYTHONPATH=path)
        said = r"jaxrnn: error: orbax cannot be imported: cannot import name 'checkpoint' from .*"
        one_line(run, 2, said + r"; pip install 'jaxrnn\[cli\]'")
    assert not (tmp_path / "run").exists()


# Other commands beside a training.


def test_a_checkpoint_that_is_dropped_while_it_is_read(stopped, monkeypatch):
    """The next one is read, as often as that happens; one that is damaged is named as ever."""
    steps = checkpoint_steps(stopped)
    read = Checkpoints.state

    def dropped_first(self, step, shapes):
        if step == steps[-1]:
            shutil.rmtree(self.folder / str(step))
        return read(self, step, shapes)

    monkeypatch.setattr(Checkpoints, "state", dropped_first)
    assert load(stopped)[0].step == steps[-2]
    shutil.rmtree(stopped / "checkpoints" / str(steps[-2]))
    with pytest.raises(ValueError, match="expected a run with a checkpoint, got none yet"):
        load(stopped)


def test_reading_beside_a_training_that_drops_checkpoints(text_file, tmp_path):
    out = tmp_path / "run"
    process = start("train", text_file, "--out", out, *SMALL, "--steps", "1000000",
                    "--checkpoint-every", "1", stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for(out / "checkpoints" / "4", process)
        steps = [int(load(out)[0].step) for _ in range(30)]
        sampled = jaxrnn("sample", out, "--length", "5")
        best = jaxrnn("sample", out, "--length", "5", "--best")
        shown = jaxrnn("show", out)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert steps == sorted(steps) and len(set(steps)) > 5
    for run in (sampled, best, shown):
        assert (run.returncode, run.stderr) == (0, "")
    assert "being trained, at step" in shown.stdout


def test_who_looks_at_a_run_keeps_nobody_from_training_it(stopped):
    """As `watch jaxrnn show` does, but without a pause, and two of them."""
    watch = (
        "import sys; from pathlib import Path; from jaxrnn._app.directory import is_locked\n"
        "out, seen, found = Path(sys.argv[1]), 0, []\n"
        "while not (out / 'checkpoints' / '30').exists():\n"
        "    now, seen = is_locked(out), seen + 1\n"
        "    found += [] if found[-1:] == [now] else [now]\n"
        "    if seen == 100: print('watching', flush=True)\n"
        "print(*found)"
    )
    watching = [start_python("-c", watch, stopped) for _ in range(2)]
    try:
        assert {process.stdout.readline() for process in watching} == {"watching\n"}
        run = jaxrnn("train", "--resume", stopped, "--sample-length", "0")
        seen = {process.stdout.read() for process in watching}
    finally:
        for process in watching:
            process.kill()
            process.communicate()
    assert (run.returncode, run.stderr) == (0, "")
    assert seen == {"False True\n"}


def test_who_looks_at_a_run_does_not_see_the_others(stopped):
    with (stopped / "config.json").open("rb") as file:
        assert directory._lock(file, shared=True)
        assert not directory.is_locked(stopped)
        begun = time.monotonic()
        with pytest.raises(ValueError, match="nobody is training"), directory.locked(stopped):
            pass
    assert 0.5 < time.monotonic() - begun < 10  # it has asked again and again
    with directory.locked(stopped):
        assert directory.is_locked(stopped)


CLAIM = """
import os, sys, time
from contextlib import ExitStack
from pathlib import Path
from jaxrnn._app import directory

def refuse(*args, **how):
    raise OSError(1, "Operation not permitted")

os.link = refuse
if "no locks" in sys.argv:
    directory._lock = lambda *args, **how: None
print("ready", flush=True)
for line in sys.stdin:
    out, at = line.split()
    while time.time() < float(at):
        pass
    with ExitStack() as held:
        try:
            about = {"sources": [], "options": {"by": os.getpid()}}
            with directory.claimed(Path(out), about, held):
                print("mine", flush=True)
                sys.stdin.readline()
        except directory.TakenError as error:
            print(error, flush=True)
            sys.stdin.readline()
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_without_hard_links_one_start_gets_a_directory(locks, tmp_path):
    """Four of them, at once, again and again; the others are refused and change nothing."""
    with hearing():
        processes = [
            subprocess.Popen([sys.executable, "-c", CLAIM, locks], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for n in range(12):
            out, at = tmp_path / str(n), time.time() + 0.05
            for process in processes:
                process.stdin.write(f"{out} {at}\n")
                process.stdin.flush()
            said = [process.stdout.readline() for process in processes]
            assert said.count("mine\n") == 1, said
            for line in said:
                assert line == "mine\n" or "expected an empty or new directory, got" in line
            winner = processes[said.index("mine\n")].pid
            config = json.loads((out / "config.json").read_text())
            assert config["options"] == {"by": winner}
            assert [path.name for path in out.iterdir()] == ["config.json"]
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_start_that_was_killed_leaves_a_directory_that_is_new(text_file, tmp_path):
    """Between the moments at which config.json is made and has its name."""
    (out := tmp_path / "run").mkdir()
    (out / ".config.json.partial").write_text('{"sour')
    run = jaxrnn("train", text_file, "--out", out, *SMALL, "--sample-length", "0")
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "ids.npy", "loss.png", "metrics.jsonl", "text.json",
    ]  # fmt: skip


def test_a_name_that_leads_nowhere_begins_no_run(tmp_path, capsys):
    (out := tmp_path / "run").mkdir()
    (out / ".config.json.partial").symlink_to(tmp_path / "nowhere")
    run = here(capsys, "train", "--out", out, *SMALL)
    one_line(run, 2, "jaxrnn train: error: --out: expected an empty or new directory, got .*")


def test_a_lock_is_on_the_run_that_is_there(stopped, monkeypatch):
    """Not on one that was undone, or begun again, while one waited for its lock."""
    lock = directory._lock

    def undone_meanwhile(file, *how, **more):
        (stopped / "config.json").rename(stopped / "gone")
        return lock(file, *how, **more)

    monkeypatch.setattr(directory, "_lock", undone_meanwhile)
    with pytest.raises(ValueError, match="nobody is training"), directory.locked(stopped):
        pass


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


@pytest.mark.parametrize("name", ["040", "٤٠", "40.good", "before v1.2", "0", "-1", "+4"])
def test_other_names_are_no_checkpoints_and_stay(name, stopped):
    shutil.copytree(stopped / "checkpoints" / "20", stopped / "checkpoints" / name)
    assert checkpoint_steps(stopped)[-1] == 20
    run = jaxrnn("train", "--resume", stopped, "--sample-length", "0")
    assert (run.returncode, run.stderr) == (0, "")
    assert (stopped / "checkpoints" / name / "about").is_dir()
    assert load(stopped)[0].step == 30


def test_a_checkpoint_that_leads_nowhere_is_one_line(stopped, capsys):
    (stopped / "checkpoints" / "40").symlink_to(stopped / "nowhere")
    run = here(capsys, "sample", stopped)
    one_line(run, 2, "jaxrnn sample: error: .*/40: the checkpoint cannot be read: .*")


@pytest.mark.skipif(MAY_WRITE_ANYWHERE, reason="root may read everywhere")
def test_checkpoints_that_cannot_be_listed_are_one_line(stopped):
    (stopped / "checkpoints").chmod(0o000)
    before = (stopped / "metrics.jsonl").read_text()
    for command in (["sample"], ["show"], ["train", "--resume"]):
        run = subprocess.run([*AS_A_USER, sys.executable, "-m", "jaxrnn", *command, stopped],
                             capture_output=True, text=True)  # fmt: skip
        said = f"jaxrnn {command[0]}: error: {stopped}/checkpoints: cannot be read: Permission .*"
        one_line(run, 2, said)
    (stopped / "checkpoints").chmod(0o700)
    assert (stopped / "metrics.jsonl").read_text() == before


def test_the_best_is_read_again_where_it_was_dropped(stopped, monkeypatch):
    """While one looks for it, it is replaced by a better one."""
    listed, worse = directory.checkpoint_steps, stopped / "checkpoints" / "10"
    said = [[10, 20], [20, 25], [20, 25], [20, 25]]
    shutil.rmtree(worse)
    shutil.copytree(stopped / "checkpoints" / "20", stopped / "checkpoints" / "25")
    monkeypatch.setattr(directory, "checkpoint_steps", lambda out: said.pop(0))
    bits = json.loads((stopped / "checkpoints" / "20" / "about" / "metadata").read_text())
    assert directory.best_checkpoint(stopped) == (20, bits["held_out_bits"]) and said == []
    monkeypatch.setattr(directory, "checkpoint_steps", listed)
    # As orbax's manager wrote it for runs of before.
    about = stopped / "checkpoints" / "20" / "about" / "metadata"
    about.write_text(json.dumps({**bits, "held_out_bits": None}))
    (stopped / "checkpoints" / "25" / "about" / "metadata").write_text("{}")
    (stopped / "checkpoints" / "20" / "metrics").mkdir()
    (stopped / "checkpoints" / "20" / "metrics" / "metrics").write_text('{"held_out_bits": 1.5}')
    assert directory.best_checkpoint(stopped) == (20, 1.5)


def test_a_run_whose_new_name_is_no_utf_8_is_named(stopped, tmp_path):
    moved = stopped.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    for command in (["sample"], ["train", "--resume"]):
        run = jaxrnn(*command, moved)
        one_line(run, 2, rf"jaxrnn {command[0]}: error: RUN: expected a name that is UTF-8, got .*")


# What is named on the command line.


def test_files_stand_anywhere_among_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a", "ant\n"), ("b", "bee\n"), ("c", "cow\n")):
        (tmp_path / name).write_text(content * 200)
    run = jaxrnn("train", "a", "--seed", "1", "b", *SMALL, "c", "--out", "run", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("a b c: 2,160 characters,")
    sources = json.loads((tmp_path / "run" / "config.json").read_text())["sources"]
    assert sources == [str(tmp_path / name) for name in "abc"]
    for args, said in (
        (["a", "--steps", "3", "-x"], "unrecognized arguments: -x; a file of that name: ./-x"),
        (["a", "--depth", "3", "b"], "unrecognized arguments: --depth 3 b"),
        (["a", "--resume", "run", "b"], "--resume: expected no text beside it"),
        (["a", "--steps", "3", "--", "-b"], "-b: cannot be read: No such file or directory"),
    ):
        run = here(capsys, "train", *args)
        assert (run.returncode, run.stdout) == (2, "")
        assert said in run.stderr and len(run.stderr.splitlines()) == 1
    run = here(capsys, "show", "run", "b")
    assert run.returncode == 2 and "unrecognized arguments: b (see" in run.stderr


def test_a_prompt_that_begins_with_a_dash(finished, capsys):
    run = here(capsys, "sample", finished, "--prompt", "-x")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "--prompt: expected one argument; a text that begins with a dash: --prompt=-x" in (
        run.stderr
    )
    run = here(capsys, "sample", finished, "--prompt=-x")
    assert run.returncode == 2 and "'-' at position 0" in run.stderr


@pytest.mark.parametrize("command", ["show", "sample"])
@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_what_is_no_run_is_one_line(command, name, tmp_path, capsys):
    """A file of weights, or a run's own file, where its directory is expected."""
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(10_000))
    for path in (tmp_path / name, tmp_path):
        run = here(capsys, command, path)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.fullmatch(rf"jaxrnn {command}: error: .*expected .*\n", run.stderr)


def test_weights_of_another_library_are_no_text(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(100) + b"\x80\x02}q" + bytes(1000))
    run = here(capsys, "train", tmp_path / "model.pt", "--out", tmp_path / "run", *SMALL)
    said = r"jaxrnn train: error: .*model.pt: expected UTF-8, got byte 0x80 at offset 104 .*"
    one_line(run, 2, said)

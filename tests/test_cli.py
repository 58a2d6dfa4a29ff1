"""The command `jaxrnn`: its options, what it reads and prints, its exit codes, each bad input."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import closing, contextmanager

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import (
    LONG,
    SIGNALS,
    SMALL,
    TEXT,
    Interpreter,
    assert_same_state,
    here,
    in_terminal,
    jaxrnn,
    metrics,
    one_line,
    signalled,
    start,
    start_python,
    state,
    succeeded,
    wait_for,
)

from jaxrnn import text as text_module
from jaxrnn._app import directory
from jaxrnn._app.directory import read_metrics
from jaxrnn._app.run import Config, initial_state, make_optimizer

finished, stopped = commands.finished, commands.stopped
without_pictures, prepared_only = commands.without_pictures, commands.prepared_only

# Not UTF-8 wherever one begins to read.
BYTES = bytes([0xFF, 0x00, 0xC3, 0x28, 0x0A]) * 600
updates_once = commands.updates_once

pytestmark = pytest.mark.usefixtures("compile_once", "updates_once", "without_pictures")

# Training.


def test_train_prints_its_plan_progress_and_result(text_file, tmp_path):
    out = tmp_path / "run"
    output = succeeded(here("train", text_file, "--out", out, *SMALL, "--sample-length", "20"))
    for part in (text_file, "2,430 characters, 270 more held out, 29 distinct", "1,229 parameters",
                 "30 updates of 4 × 8", "unigram", "bigram", "step 10/30", "held-out"):  # fmt: skip
        assert str(part) in output
    sample = re.search(r"of the held-out text:\n(.*)\npicture: ", output, re.DOTALL)
    assert len(sample[1]) == 20
    bits = float(re.search(r"held-out bits per character: (\d\.\d+)", output)[1])
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [10, 20, 25, 30]
    assert bits == round(rows[-1]["held_out_bits"], 3) < rows[0]["held_out_bits"]


def test_train_leaves_a_run_directory(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.json", "ids.npy", "loss.png", "metrics.jsonl", "text.json",
    ]  # fmt: skip
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    begun = json.loads((finished / "config.json").read_text())
    assert begun["options"]["hidden_size"] == 16
    assert begun["sources"] == [str(finished.parent / "fox.txt")]
    characters = json.loads((finished / "text.json").read_text())["text"]["characters"]
    assert characters == "".join(dict.fromkeys(TEXT))
    np.testing.assert_array_equal(
        np.load(finished / "ids.npy"), [characters.index(c) for c in TEXT]
    )


@pytest.mark.full
def test_train_as_a_user_has_it(text_file, tmp_path):
    """With XLA's own flags: a program with every optimisation, on as many devices as cores."""
    run = jaxrnn("train", text_file, "--out", tmp_path / "run", *SMALL, XLA_FLAGS="")
    assert "held-out bits per character" in succeeded(run)


def test_train_in_a_terminal_shows_a_bar_and_computes_the_same(finished, tmp_path):
    run = in_terminal("train", finished.parent / "fox.txt", "--out", tmp_path / "run", *SMALL)
    assert (run.returncode, run.stderr) == (0, "")
    for part in ("30/30", "━", "held-out", "char/s"):
        assert part in run.stdout
    assert metrics(tmp_path / "run") == metrics(finished)


def test_every_option_of_train_reaches_the_run(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = {
        "level": "byte", "hidden_size": 8, "layers": 2, "seq_length": 4, "batch_size": 2,
        "steps": 3, "learning_rate": 0.5, "grad_clip": 2.0, "optimizer": "sgd",
        "activation": "relu", "recurrent": "identity", "held_out": 0.25, "eval_every": 2,
        "eval_length": 50, "checkpoint_every": 1, "skip_nonfinite": True, "seed": 3,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in
             ("--" + name.replace("_", "-"), *([] if value is True else [str(value)]))]  # fmt: skip
    run = here("train", tmp_path / "text", *words, "--model-devices", "2", "--out",
               tmp_path / "run", "--sample-length", "7")  # fmt: skip
    output = succeeded(run)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"] == options
    assert "hidden units over 2" in output and "3 updates of 2 × 4 bytes" in output
    assert f"{8 * (256 + 8 + 1) + 8 * (8 + 8 + 1) + 256 * (8 + 1):,} parameters" in output
    assert len(re.search(r"held-out text:\n(.*)\npicture", output, re.DOTALL)[1]) >= 7
    assert directory.checkpoint_steps(tmp_path / "run") == [1, 2, 3]


def test_options_change_the_numbers():
    """Those of which a run's numbers do not show at once that they are used."""

    def of(**options):
        config = Config(hidden_size=8, batch_size=2, **options)
        params, optimizer = {"w": jnp.ones(2, jnp.float32)}, make_optimizer(config)
        state, gradient = optimizer.init(params), {"w": jnp.full(2, 3, jnp.float32)}
        updates, _ = jax.jit(optimizer.update)(gradient, state, params)
        return jax.tree.leaves((initial_state(config, 5).params, updates))

    def differ(a, b):
        return any(np.any(x != y) for x, y in zip(of(**a), of(**b), strict=True))

    with commands.as_users_have_it():
        for option in ("seed", 1), ("recurrent", "normal"), ("optimizer", "sgd"):
            assert differ({}, dict([option]))
        for option in ("learning_rate", 0.1), ("grad_clip", 0.5):
            assert differ({"optimizer": "sgd"}, dict([("optimizer", "sgd"), option]))
        state = initial_state(Config(hidden_size=8, activation="relu"), 5)
    assert state.params.cell.activation == "relu"


@pytest.mark.usefixtures("prepared_only")
def test_train_reads_files_directories_and_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for name, content in (("notes/b", "bee\n"), ("notes/a", "ant\n"), ("last", "dog\n")):
        (tmp_path / name).write_text(content * 200)
    run = here("train", "notes", "--steps", "9", "-", *SMALL, "last", "--out", "run",
               stdin=b"cow\n" * 200)  # fmt: skip
    succeeded(run)
    text = json.loads((tmp_path / "run" / "text.json").read_text())["text"]
    assert (text["name"], text["length"]) == ("notes standard input last", 3200)
    ids = np.load(tmp_path / "run" / "ids.npy")
    everything = "".join(line * 200 for line in ("ant\n", "bee\n", "cow\n", "dog\n"))
    assert "".join(text["characters"][i] for i in ids) == everything
    sources = json.loads((tmp_path / "run" / "config.json").read_text())["sources"]
    assert sources == [str(tmp_path / "notes"), "-", str(tmp_path / "last")]


def test_bytes_are_trained_on_and_sampled(tmp_path):
    (tmp_path / "data").write_bytes(BYTES)
    out = tmp_path / "run"
    output = succeeded(here("train", tmp_path / "data", "--level", "byte", "--out", out, *SMALL))
    assert f"{tmp_path / 'data'}: 2,700 bytes, 300 more held out\n" in output
    assert "held-out bits per byte: " in output and "character" not in output
    np.testing.assert_array_equal(np.load(out / "ids.npy"), list(BYTES))
    how = ["sample", out, "--prompt", b"\xff(\xc3".decode(errors="surrogateescape"),
           "--length", "30"]  # fmt: skip
    piped = here(*how, text=False)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout.startswith(b"\xff(\xc3") and len(piped.stdout) == 3 + 30
    # A terminal would obey control characters, and changes line ends.
    readable = piped.stdout.decode(errors="backslashreplace")
    controls = {c for c in readable if unicodedata.category(c) == "Cc"} - set("\n\r\t")
    assert controls
    for control in controls:
        readable = readable.replace(control, f"\\x{ord(control):02x}")
    assert in_terminal(*how).stdout == (readable + "\n").replace("\n", "\r\n")


@pytest.mark.usefixtures("prepared_only")
def test_runs_begun_in_one_second_have_their_own_directories(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "runs/now")
    for name in ("now", "now-2", "now-3"):
        succeeded(here("train", text_file, *SMALL))
        assert (tmp_path / "runs" / name / "text.json").exists()


def test_train_refuses_a_nonfinite_loss_and_skips_it_on_request(text_file, tmp_path):
    out = tmp_path / "run"
    wild = ["--activation", "identity", "--optimizer", "sgd", "--learning-rate", "1e30",
            "--grad-clip", "0"]  # fmt: skip
    run = here("train", text_file, *SMALL, *wild, "--out", out)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert re.search(r"at step \d+ .*gradient norm \S+, parameter norm \S+; .*--learning-rate"
                     rf".*--skip-nonfinite.*no checkpoint yet.*train --resume {out}",
                     run.stderr.replace(")", "")), run.stderr  # fmt: skip
    output = succeeded(here("train", "--resume", out, "--skip-nonfinite"))
    skipped = read_metrics(out)[-1]["skipped"]
    assert f"skipped {skipped}" in output and 0 < skipped <= 30


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "--steps", "3", "-x"], "unrecognized arguments: -x; a file of that name: ./-x"),
        (["a", "--depth", "3", "b"], "unrecognized arguments: --depth 3 b"),
        (["a", "--resume", "run", "b"], "--resume: expected no text"),
        (["a", "--steps", "3", "--", "-b"], "-b: cannot be read: No such file or directory"),
    ],
)
def test_words_that_are_no_text_are_one_line(names, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text(TEXT)
    one_line(here("train", *names), 2, said)


# Sampling.


def test_sample_prints_the_prompt_and_what_is_drawn(finished):
    words = ["sample", finished, "--prompt", "the fox", "--length", "40"]
    first, again, other, greedy, best = (
        succeeded(here(*words, *how))
        for how in ([], [], ["--seed", "7"], ["--temperature", "0"], ["--best"])
    )
    assert first == again == best != other  # the last checkpoint is the best
    assert greedy not in (first, other)
    for output in (first, other, greedy):
        assert output.startswith("the fox") and len(output) == len("the fox") + 40 + 1
    assert succeeded(here("sample", finished, "--length", "0")) == "\n"


def test_sample_takes_the_best_checkpoint_on_request(finished, stopped):
    """Not the last, which here is that of another step."""
    about = stopped / "checkpoints" / "10" / "about" / "metadata"
    about.write_text(json.dumps({**json.loads(about.read_text()), "held_out_bits": 0.5}))
    words = ["sample", stopped, "--length", "60"]
    assert succeeded(here(*words, "--best")) != succeeded(here(*words))


def test_a_stream_of_blocks_is_what_is_drawn_at_once():
    from jaxrnn import init_params

    params = init_params(jax.random.key(3), 7, 8, 7)
    key, prompt = jax.random.key(5), jax.numpy.array([1, 6, 0])
    programs = text_module._draw._cache_size()
    for length in (0, 50):
        blocks = list(text_module.stream_ids(params, key, prompt, length, 0.7))
        assert [len(block) for block in blocks[:-1]] == [16] * (len(blocks) - 1)
        drawn = [int(n) for block in blocks for n in block]
        assert drawn == text_module.generate(params, key, prompt, length, 0.7).tolist()
    assert len(set(drawn)) > 1 and text_module._draw._cache_size() == programs + 1


def test_samples_are_printed_while_they_are_drawn(finished, capsys, monkeypatch):
    from jaxrnn._app.cli import run

    drawn = []

    def draw(*args, _draw=text_module._draw, **how):
        drawn.append(len(capsys.readouterr().out))
        return _draw(*args, **how)

    monkeypatch.setattr(text_module, "_draw", draw)
    with commands.as_users_have_it():
        assert run(["sample", str(finished), "--length", "100"]) == 0
    # Two blocks are under way before the first is there.
    assert list(itertools.accumulate(drawn)) == [0, 0, 16, 32, 48, 64, 80]


def test_a_prompt_may_begin_with_a_dash(finished):
    one_line(here("sample", finished, "--prompt", "-x"), 2, "--prompt", "--prompt=-x")
    one_line(here("sample", finished, "--prompt=-x"), 2, "--prompt", "'-' at position 0")


# Signals.


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_run_and_ends_it(number, text_file, tmp_path):
    out = tmp_path / "a run"
    with signalled(number, out / "metrics.jsonl"):
        run = here("train", text_file, "--out", out, *LONG)
    assert (run.returncode, run.stderr) == (128 + number, "")
    said = re.search(r"^stopped by (\w+) at step (\d+) of 1000000; .*: (.*)$", run.stdout, re.M)
    assert said[1] == number.name and said[3] == f"jaxrnn train --resume '{out}'"
    assert read_metrics(out)[-1]["step"] == int(said[2])
    assert (out / "checkpoints" / said[2]).is_dir()


def test_a_terminal_that_closes_saves_the_run(text_file, tmp_path):
    """A process in a terminal of its own, which takes nothing more of it."""
    ours, theirs = commands.pty.openpty()
    out = tmp_path / "run"
    code = (
        "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        f"sys.argv = {['jaxrnn', 'train', str(text_file), '--out', str(out), *LONG]!r};"
        "runpy.run_module('jaxrnn', run_name='__main__')"
    )
    process = start_python("-c", code, stdin=theirs, stdout=theirs, stderr=theirs,
                           start_new_session=True, TERM="xterm")  # fmt: skip
    os.close(theirs)
    wait_for(out / "metrics.jsonl", process)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (out / "checkpoints" / str(read_metrics(out)[-1]["step"])).is_dir()


class Input(commands.io.RawIOBase):
    """Standard input that calls a function when it is read the second time."""

    def __init__(self, then):
        self._parts = iter([lambda: b"text", then])

    def readable(self):
        return True

    def readinto(self, buffer):
        content = next(self._parts)()
        buffer[: len(content)] = content
        return len(content)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_text_is_read_leaves_no_directory(number, tmp_path):
    out = tmp_path / "run"

    def interrupt():
        # It is being trained already, for another one that would go on with it.
        one_line(here("train", "--resume", out), 2, "not being trained")
        assert "being trained, at step 0" in succeeded(here("show", out))
        os.kill(os.getpid(), number)
        time.sleep(1)
        return b""

    before = signal.signal(number, signal.default_int_handler)
    try:
        stdin = commands.io.BufferedReader(Input(interrupt), 4)
        run = here("train", "-", "--out", out, *SMALL, stdin=stdin)
    finally:
        signal.signal(number, before)
    assert (run.returncode, run.stderr) == (128 + number, "")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_a_sample(finished):
    process = start("sample", finished, "--length", "3000000")
    begin = process.stdout.read(40)
    assert len(begin) == 40 and process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert rest.endswith("\n") and len(rest) < 1_000_000


# Output that cannot be written.


@contextmanager
def closing_pipe(after):
    """A pipe, as a file to write to, whose other end is closed when so much has been read."""
    read, write = os.pipe()

    def reader():
        left = after
        while left and (part := os.read(read, left)):
            left -= len(part)
        os.close(read)

    thread = threading.Thread(target=reader)
    thread.start()
    with os.fdopen(write, "w") as file:
        yield file
    thread.join()


def test_output_that_nobody_reads_any_more_is_no_error(finished):
    with closing_pipe(14) as file:
        run = here("sample", finished, "--length", "100000", stdout=file)
    assert (run.returncode, run.stderr) == (0, "")


def test_training_whose_output_nobody_reads_saves_and_says_so(text_file, tmp_path):
    out = tmp_path / "run"
    with closing_pipe(400) as file:
        run = here("train", text_file, "--out", out, *LONG, stdout=file)
    one_line(run, 1, "standard output: cannot be written: Broken pipe", "--resume")
    step = int(re.search(rf"{out}/checkpoints/(\d+);", run.stderr)[1])
    assert step == read_metrics(out)[-1]["step"] > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("command", ["train", "show"])
def test_output_on_a_full_disk_is_one_line(command, finished, text_file, tmp_path):
    how = {"train": [text_file, "--out", tmp_path / "run", *SMALL], "show": [finished]}
    with open("/dev/full", "w") as full:
        run = here(command, *how.get(command, []), stdout=full)
    one_line(run, 1, "standard output: cannot be written: No space left on device")


def test_closed_output_is_no_error(finished):
    command = f"{sys.executable} -m jaxrnn show {finished} >&-"
    run = subprocess.run(["bash", "-c", command], capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


# Bad input.


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").write_text("")
    (folder / "short").write_text("abc" * 5)
    (folder / "latin").write_bytes(b"caf\xe9 au lait")
    (folder / "same").write_text("a" * 5000)
    (folder / "weights.pt").write_bytes(b"PK\x03\x04" + bytes(100) + b"\x80\x02}q" + bytes(1000))
    (folder / "bare").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    return folder


WHOLE = "expected a whole number, at least 1, got 0"
BAD_TRAINING = {
    "missing file": (["{bad}/none"], "none: cannot be read: No such file or directory"),
    "no text": (["{bad}/bare"], "bare: expected text, got a directory without text files"),
    "empty file": (["{bad}/empty"], "empty: expected text, got an empty file"),
    "short text": (["{bad}/short"], "short: expected at least 33 characters .* got 13"),
    "no UTF-8": (["{bad}/latin"], "latin: expected UTF-8, got byte 0xe9 at offset 3 .*--level"),
    "weights": (["{bad}/weights.pt"], "weights.pt: expected UTF-8, got byte 0x80 at offset 104"),
    "one character": (["{bad}/same"], "same: expected two distinct characters, got only 'a'"),
    "full directory": (["{text}", "--out", "{bad}/full"], "--out: expected an empty or new"),
    "out is a file": (["{text}", "--out", "{bad}/same"], "--out: cannot write to .*same"),
    "out is a run": (["{text}", "--out", "{run}"], "is a run; .*train --resume {run}"),
    "out is not UTF-8": (
        ["{text}", "--out", os.fsdecode(b"caf\xe9")], "--out: expected a name that is UTF-8, got"
    ),
    "out in /proc": (["{text}", "--out", "/proc/run"], "--out: cannot write to /proc/run"),
    "no name": (["--resume", ""], "--resume: expected a directory, got nothing"),
    "devices": (["{text}", "--model-devices", "3"], "--model-devices: expected a divisor of the"),
    "units": (
        ["{text}", "--hidden-size", "15", "--model-devices", "2"], "a divisor of --hidden-size 15",
    ),
    "two places": (["{text}", "--out", "a", "--resume", "b"], "--resume: not allowed with .*--out"),
    "another option": (["--resume", "{run}", "--layers", "2"], "--layers: expected 1, .* got 2"),
    "another text": (["{text}", "--resume", "{run}"], "--resume: expected no text"),
    "no run": (["--resume", "{bad}"], "bad.*: expected a run directory, got no config.json"),
    "seed": (["{text}", "--seed", "4294967296"], "--seed: expected a whole number from 0 to 2"),
    "no number": (["{text}", "--hidden-size", "many"], "expected a whole number, .* got many"),
    "negative rate": (["{text}", "--learning-rate", "-1"], "expected a number above 0, got -1"),
    "nan": (["{text}", "--grad-clip", "nan"], "expected a number, at least 0, got nan"),
    "all held out": (["{text}", "--held-out", "1"], "expected a fraction between 0 and 1, got 1"),
    "one character of text": (["{text}", "--eval-length", "1"], "at least 2, got 1"),
    "optimizer": (["{text}", "--optimizer", "newton"], "--optimizer: .*'newton'"),
    "unknown option": (["{text}", "--depth", "2"], "unrecognized arguments: --depth 2"),
    **{name: (["{text}", f"--{name}", "0"], f"--{name}: {WHOLE}")
       for name in ("steps", "layers", "seq-length", "batch-size", "eval-every",
                    "checkpoint-every", "model-devices")},
    "two words": (["{text}", "--sample-length", "x"], "--sample-length: .* at least 0, got x"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input_is_one_line(
    args, message, bad, finished, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {"bad": bad, "text": text_file, "run": finished}
    args = [arg.format(**names) for arg in args]
    if "--resume" not in args:
        # Options given later count, so that a case may override the small run.
        args = [*SMALL, *([] if "--out" in args else ["--out", "run"]), *args]
    run = here("train", *args)
    one_line(run, 2, "error: ")
    assert run.stdout == ""
    assert re.search(message.format(**names), run.stderr), run.stderr
    assert not list(tmp_path.iterdir())
    assert (bad / "full" / "file").read_text() == "mine"


def test_bad_sampling_input_is_one_line(finished, tmp_path):
    unsaved, broken = tmp_path / "unsaved", tmp_path / "broken"
    for folder in (unsaved, broken):
        folder.mkdir()
        for name in ("config.json", "text.json"):
            (folder / name).write_text((finished / name).read_text())
    config = (finished / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": "x"'))
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(10_000))
    for args, *parts in (
        ([tmp_path], "expected a run directory, got no config.json"),
        ([tmp_path / "model.pt"], "expected"),
        ([unsaved], "expected a run with a checkpoint, got none yet"),
        ([broken], "config.json: expected", "hidden_size: expected int"),
        ([finished, "--prompt", "the Fox"], "--prompt: expected the 29", "'F' at position 4"),
        ([finished, "--temperature", "1e-39"], "--temperature: expected 0", "got 1e-39"),
        ([finished, "--temperature", "-1"], "--temperature: expected 0", "got -1"),
        ([finished, "--length", "1.5"], "--length: expected a whole number", "got 1.5"),
    ):
        one_line(here("sample", *args), 2, "jaxrnn sample: error: ", *parts)
    one_line(here("sample", finished, "more"), 2, "unrecognized arguments: more")


def test_a_name_need_not_be_utf_8(stopped, tmp_path):
    """That of a text; a run with such a name is refused in one line."""
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(TEXT)
    output = here("train", tmp_path / name, "--out", tmp_path / "run", *SMALL, "--steps", "1")
    assert "2,430 characters" in succeeded(output)
    assert "is finished" in succeeded(here("train", "--resume", tmp_path / "run"))
    moved = stopped.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    for command in (["sample"], ["train", "--resume"]):
        one_line(here(*command, moved), 2, "RUN: expected a name that is UTF-8, got ")


# Other settings of JAX, and what is missing.


def test_runs_do_not_depend_on_jax_settings(finished, stopped, tmp_path):
    """Begun under some, and gone on with and sampled under others, it is one run."""
    text, out = finished.parent / "fox.txt", tmp_path / "run"
    with (
        jax.default_prng_impl("rbg"), jax.enable_custom_prng(True),
        jax.threefry_partitionable(False), jax.numpy_dtype_promotion("strict"),
    ):  # fmt: skip
        succeeded(here("train", text, "--out", out, *SMALL, "--checkpoint-every", "10"))
        succeeded(here("train", "--resume", stopped))
        sample = succeeded(here("sample", finished, "--length", "20"))
    assert sample == succeeded(here("sample", finished, "--length", "20"))
    assert_same_state(out, finished)
    assert_same_state(stopped, finished)


def test_a_run_goes_on_in_64_bits(finished, stopped):
    succeeded(here("train", "--resume", stopped, x64=True))
    sample = here("sample", finished, "--length", "20", x64=True)
    assert succeeded(sample) == succeeded(here("sample", finished, "--length", "20"))
    for actual, expected in zip(state(stopped), state(finished), strict=True):
        # optax forms the learning rate in 64 bits: an eps of float32 in each of 10 updates of 3e-3
        # at most, where Adam divides by a root of moments.
        np.testing.assert_allclose(actual, expected, 0, 1e-5)


def test_missing_devices_are_one_line(finished, text_file, tmp_path):
    train = ["train", text_file, "--out", tmp_path / "run", *SMALL]
    one = ["--processes", "1", "--process", "0", "--coordinator", commands.free_address()]
    with closing(Interpreter(JAX_PLATFORMS="none such")) as jaxrnn:
        for platform in ("none such", "cuda", "tpu"):
            setting = f"import jax; jax.config.update('jax_platforms', {platform!r})"
            for command in (train, ["sample", finished]):
                run = jaxrnn(*command, before=setting)
                one_line(run, 2, "JAX_PLATFORMS: expected devices that JAX can use", platform)
        succeeded(jaxrnn("show", finished))  # needs no devices
        run = jaxrnn(*train, *one)
        assert run.returncode == 2 and "JAX_PLATFORMS: expected devices" in run.stderr
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_extras_are_named(finished, text_file, tmp_path):
    """In a process in which none of them has been imported yet."""
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "__init__.py").write_text("from orbax import checkpoint")
    train = ["train", text_file, "--out", tmp_path / "run"]
    names = ["rich", "orbax", "shtab", "matplotlib"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    show = "import sys; sys.modules.pop({!r})".format
    broken = f"{show('orbax')}; sys.path.insert(0, {str(tmp_path)!r})"
    with closing(Interpreter()) as jaxrnn:
        assert "usage: jaxrnn" in succeeded(jaxrnn("--help", before=hide))
        assert re.fullmatch(r"\d+\.\d+\.\d+\n", succeeded(jaxrnn("--version")))
        for name, args, extra, before in (
            ("rich", ["example"], "cli", ""),
            ("rich", ["show", "."], "cli", ""),
            ("shtab", ["--print-completion", "bash"], "cli", ""),
            ("orbax", train, "cli", show("rich")),
            ("matplotlib", ["example", "--plot", tmp_path / "x.png"], "plot", ""),
        ):
            run = jaxrnn(*args, before=before)
            one_line(run, 2, f"{name} is missing", f"pip install 'jaxrnn[{extra}]'")
        for command in (train, ["sample", finished]):
            run = jaxrnn(*command, before=broken)
            one_line(run, 2, "orbax cannot be imported", "pip install 'jaxrnn[cli]'")
            broken = ""
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


# The example, help and completion.


def test_the_example_agrees_with_its_source(tmp_path):
    run = in_terminal("example", "--plot", tmp_path / "ensemble.png")
    assert (run.returncode, run.stderr) == (0, "")
    assert "68 of 68 printed numbers agree" in run.stdout
    assert (tmp_path / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    wrong = here("example", "--plot", tmp_path / "none" / "ensemble.png")
    assert wrong.returncode == 2 and "--plot: expected a file" in wrong.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["show"], ["example"]])
def test_help_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = succeeded(here(*command, "--help"))
    assert "usage: jaxrnn" in output
    assert max(map(len, output.splitlines())) <= 80


def completed(script, *words):
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    # As bash calls it: the command, the word, the word before.
    code = f"""
      COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="${{COMP_WORDS[*]}}"
      read -r _ _ name _ <<< "$(complete -p jaxrnn | sed 's/-o [^ ]*//')"
      "$name" jaxrnn '{words[-1]}' '{words[-2]}'; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(["bash", "-c", f"source {script}\n{code}"], capture_output=True, text=True)
    assert run.stderr == ""
    return run.stdout.split()


def test_bash_completes_commands_options_and_names(tmp_path, monkeypatch):
    script = tmp_path / "script"
    script.write_text(succeeded(here("--print-completion", "bash")))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completed(script, "jaxrnn", "tr") == ["train"]
    assert completed(script, "jaxrnn", "train", "--optim") == ["--optimizer"]
    assert completed(script, "jaxrnn", "train", "--optimizer", "na") == ["nadam"]
    assert completed(script, "jaxrnn", "train", "--resume", "") == ["runs"]
    assert completed(script, "jaxrnn", "show", "r") == ["runs"]
    assert completed(script, "jaxrnn", "train", "s") == ["script"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_completion(shell):
    output = succeeded(here("--print-completion", shell))
    assert "--optimizer" in output and "train" in output

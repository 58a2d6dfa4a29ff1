"""Each command as a process, in a terminal and without one; each bad input as one line."""

import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import unicodedata

import jax
import numpy as np
import pytest
from commands import (
    SIGNALS,
    SMALL,
    TEXT,
    hearing,
    here,
    in_terminal,
    jaxrnn,
    start,
    start_python,
    wait_for,
)  # fmt: skip

from jaxrnn import init_params
from jaxrnn import text as text_module
from jaxrnn._app.directory import read_metrics

# Not UTF-8 wherever one begins to read.
BYTES = bytes([0xFF, 0x00, 0xC3, 0x28, 0x0A]) * 600

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fox"
    return out, jaxrnn("train", text_file, "--out", out, *SMALL)


def test_training_without_a_terminal(trained, text_file):
    out, run = trained
    assert (run.returncode, run.stderr) == (0, "")
    plan, first = run.stdout.split("\nstep 10/30", 1)
    said = plan.splitlines()
    assert said[0] == f"{text_file}: 2,430 characters, 270 more held out, 29 distinct"
    assert said[1] == "1,229 parameters, 30 updates of 4 × 8 characters: the text 0.395 times"
    assert re.fullmatch(r"\d+ cpu devices?(, the batch over \d)?", said[2])
    assert re.search(r"unigram \d\.\d\d, bigram \d\.\d\d", said[3]) and len(said) == 4
    line = r"  loss \d\.\d+ bits \d\.\d+ held-out \d\.\d+ \d+k char/s  0:\d\d:\d\d left"
    assert re.match(line, first)
    sample = re.search(
        r"from where the held-out text begins:\n(.*)\npicture: ", run.stdout, re.DOTALL
    )
    assert len(sample[1]) == 20
    found = float(re.search(r"held-out bits per character: (\d\.\d+)", run.stdout)[1])
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [10, 20, 25, 30]
    assert found == round(rows[-1]["held_out_bits"], 3) < rows[0]["held_out_bits"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "ids.npy", "loss.png", "metrics.jsonl", "text.json",
    ]  # fmt: skip
    begun = json.loads((out / "config.json").read_text())
    assert begun["options"]["hidden_size"] == 16 and begun["sources"] == [str(text_file)]
    characters = json.loads((out / "text.json").read_text())["text"]["characters"]
    assert characters == "".join(dict.fromkeys(TEXT))
    np.testing.assert_array_equal(np.load(out / "ids.npy"), [characters.index(c) for c in TEXT])


def figures(out):
    return [(row["step"], row["loss"], row.get("held_out_bits")) for row in read_metrics(out)]


def test_training_in_a_terminal_shows_a_bar_and_does_the_same(trained, text_file, tmp_path):
    run = in_terminal("train", text_file, "--out", tmp_path / "run", *SMALL)
    assert (run.returncode, run.stderr) == (0, "")
    for shown in ("30/30", "━", "held-out", "char/s"):
        assert shown in run.stdout
    assert figures(tmp_path / "run") == figures(trained[0])


def test_a_stack_learns_from_files_directories_and_standard_input(trained, tmp_path):
    (tmp_path / "notes").mkdir()
    for name, content in (("notes/b", "bee\n"), ("notes/a", "ant\n"), ("last", "dog\n")):
        (tmp_path / name).write_text(content * 200)
    read, out = tmp_path / "notes", tmp_path / "run"
    with (tmp_path / "last").open() as file:
        run = jaxrnn("train", read, "-", tmp_path / "last", "--out", out, *SMALL, "--layers", "2",
                     "--seed", "1", stdin=file)  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{read} standard input {tmp_path / 'last'}: 2,880 characters,")
    text = json.loads((out / "text.json").read_text())["text"]
    ids = np.load(out / "ids.npy")
    everything = "".join(line * 200 for line in ("ant\n", "bee\n", "dog\n", "dog\n"))
    assert "".join(text["characters"][i] for i in ids) == everything
    weights = 16 * (9 + 16 + 1) + 16 * (16 + 16 + 1) + 9 * (16 + 1)
    assert f"\n{weights:,} parameters, 30 updates" in run.stdout
    assert figures(out)[-1] != figures(trained[0])[-1]


def test_bytes_from_end_to_end(tmp_path):
    (tmp_path / "data").write_bytes(BYTES)
    out = tmp_path / "run"
    run = jaxrnn("train", tmp_path / "data", "--level", "byte", "--out", out, *SMALL)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{tmp_path / 'data'}: 2,700 bytes, 300 more held out\n")
    assert "k byte/s" in run.stdout and "held-out bits per byte: " in run.stdout
    assert "character" not in run.stdout
    np.testing.assert_array_equal(np.load(out / "ids.npy"), list(BYTES))
    how = ["sample", out, "--prompt", b"\xff(\xc3".decode(errors="surrogateescape"),
           "--length", "30"]  # fmt: skip
    piped = jaxrnn(*how, text=False)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout.startswith(b"\xff(\xc3") and len(piped.stdout) == 3 + 30
    shown = in_terminal(*how)
    assert (shown.returncode, shown.stderr) == (0, "")
    readable = piped.stdout.decode(errors="backslashreplace")
    # A terminal would obey control characters, and changes line ends.
    controls = {c for c in readable if unicodedata.category(c) == "Cc"} - set("\n\r\t")
    assert "\0" in controls
    for control in controls:
        readable = readable.replace(control, f"\\x{ord(control):02x}")
    assert shown.stdout == (readable + "\n").replace("\n", "\r\n")


def test_sampling(trained, capsys):
    out, _ = trained
    asked = ["sample", out, "--prompt", "the fox", "--length", "40"]
    first = jaxrnn(*asked)
    again, other, greedy, best = (
        here(capsys, *asked, *how)
        for how in ([], ["--seed", "7"], ["--temperature", "0"], ["--best"])
    )
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout == again.stdout == best.stdout != other.stdout
    assert greedy.stdout not in (first.stdout, other.stdout)
    for run in (first, other, greedy):
        assert run.stdout.startswith("the fox") and len(run.stdout) == len("the fox") + 40 + 1
    unasked = here(capsys, "sample", out, "--length", "0")
    assert (unasked.returncode, unasked.stdout) == (0, "\n")


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_blocks_are_what_is_drawn_at_once(temperature):
    params = init_params(jax.random.key(3), 7, 8, 7, layers=2)
    key, prompt = jax.random.key(5), jax.numpy.array([1, 6, 0])
    programs = text_module._draw._cache_size()
    for length in (0, 1, 16, 17, 50):
        blocks = list(text_module.stream_ids(params, key, prompt, length, temperature))
        assert [len(block) for block in blocks[:-1]] == [16] * (len(blocks) - 1)
        drawn = [int(n) for block in blocks for n in block]
        assert drawn == text_module.generate(params, key, prompt, length, temperature).tolist()
    assert len(set(drawn)) > 1 and text_module._draw._cache_size() == programs + 1


def test_samples_are_printed_while_they_are_drawn(trained, capsys, monkeypatch):
    drawn = []

    def draw(*args, _draw=text_module._draw, **how):
        drawn.append(len(capsys.readouterr().out))
        return _draw(*args, **how)

    monkeypatch.setattr(text_module, "_draw", draw)
    here(capsys, "sample", trained[0], "--length", "100")
    printed = list(itertools.accumulate(drawn))
    # Two blocks are under way before the first is there.
    assert printed == [0, 0, 16, 32, 48, 64, 80]


def test_a_sample_that_is_interrupted(trained):
    process = start("sample", trained[0], "--length", "3000000")
    begin = process.stdout.read(40)
    assert len(begin) == 40 and process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert rest.endswith("\n") and len(rest) < 1_000_000


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_is_interrupted_is_kept(number, text_file, tmp_path, capsys):
    out = tmp_path / "a run"
    process = start("train", text_file, "--out", out, *SMALL, "--steps", "1000000")
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (128 + number, "")
    said = re.search(r"^stopped by (\w+) at step (\d+) of 1000000; to go on: (.*)$", rest, re.M)
    assert said[1] == number.name and said[3] == f"jaxrnn train --resume '{out}'"
    assert read_metrics(out)[-1]["step"] == int(said[2])
    assert (out / "checkpoints" / said[2]).is_dir()
    assert here(capsys, "sample", out, "--length", "5").returncode == 0


def test_a_terminal_that_closes(text_file, tmp_path):
    """A real one, which is the process's own, and takes nothing of it any more."""
    ours, theirs = pty.openpty()
    out = tmp_path / "run"
    code = (
        "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        f"sys.argv = {['jaxrnn', 'train', str(text_file), '--out', str(out), *SMALL]!r};"
        "sys.argv += ['--steps', '1000000']; runpy.run_module('jaxrnn', run_name='__main__')"
    )
    with hearing():
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, env={**os.environ, "XLA_FLAGS": "", "TERM": "xterm"},
        )  # fmt: skip
    os.close(theirs)
    wait_for(out / "metrics.jsonl", process)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (out / "checkpoints" / str(read_metrics(out)[-1]["step"])).is_dir()


def test_a_loss_that_is_no_number_keeps_the_run(text_file, tmp_path):
    run = jaxrnn("train", text_file, *SMALL, "--activation", "identity", "--optimizer", "sgd",
                 "--learning-rate", "1e30", "--grad-clip", "0", "--checkpoint-every", "1",
                 "--out", "deep/run", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 1
    assert re.fullmatch(
        r"jaxrnn train: error: .* at step \d+ .*gradient norm .*parameter norm .*; "
        r"begin again with a smaller --learning-rate .* --skip-nonfinite; "
        r"the last checkpoint is deep/run/checkpoints/\d+; "
        r"to go on: jaxrnn train --resume deep/run\n",
        run.stderr,
    ), run.stderr
    assert (tmp_path / "deep/run/config.json").exists()


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").write_text("")
    (folder / "short").write_text("abc" * 5)
    (folder / "latin").write_bytes(b"caf\xe9 au lait")
    (folder / "same").write_text("a" * 5000)
    (folder / "bare").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    return folder


BAD_TRAINING = {
    "missing file": (["{bad}/none"], "none: cannot be read: No such file or directory"),
    "no text": (["{bad}/bare"], "bare: expected text, got a directory without text files"),
    "empty file": (["{bad}/empty"], "empty: expected text, got an empty file"),
    "short text": (["{bad}/short"], "short: expected at least 33 characters .* got 13; lower"),
    "no UTF-8": (["{bad}/latin"], "latin: expected UTF-8, got byte 0xe9 at offset 3 .*--level"),
    "one character": (["{bad}/same"], "same: expected two distinct characters, got only 'a'"),
    "full directory": (["{text}", "--out", "{bad}/full"], "--out: expected an empty or new"),
    "out is a file": (["{text}", "--out", "{bad}/same"], "--out: cannot write to .*same"),
    "out is a run": (["{text}", "--out", "{run}"], "is a run; to go on .*train --resume .*fox"),
    "no name": (["--resume", ""], "--resume: expected a directory, got nothing"),
    "devices": (["{text}", "--model-devices", "3"], "--model-devices: expected a divisor of the"),
    "units": (
        ["{text}", "--hidden-size", "15", "--model-devices", "2"],
        "divisor of --hidden-size",
    ),
    "two places": (["{text}", "--out", "a", "--resume", "b"], "--resume: not allowed with .*--out"),
    "another option": (["--resume", "{run}", "--layers", "2"], "--layers: expected 1, as .*fox"),
    "another text": (["{text}", "--resume", "{run}"], "--resume: expected no text beside it"),
    "no run": (["--resume", "{bad}"], "bad.*: expected a run directory, got no config.json in it"),
    "no steps": (["{text}", "--steps", "0"], "--steps: expected a whole number, at least 1, got 0"),
    "one character of text": (
        ["{text}", "--eval-length", "1"],
        "a whole number, at least 2, got 1",
    ),
    "seed": (["{text}", "--seed", "4294967296"], "--seed: expected a whole number from 0 to 2"),
    "no number": (["{text}", "--hidden-size", "many"], "expected a whole number, .* got many"),
    "negative rate": (["{text}", "--learning-rate", "-1"], "expected a number above 0, got -1"),
    "nan": (["{text}", "--grad-clip", "nan"], "expected a number, at least 0, got nan"),
    "all held out": (["{text}", "--held-out", "1"], "expected a fraction between 0 and 1, got 1"),
    "optimizer": (["{text}", "--optimizer", "newton"], "invalid choice: 'newton'"),
    "unknown option": (["{text}", "--depth", "2"], "unrecognized arguments: --depth 2"),
}


@pytest.mark.parametrize(("args", "message"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input_is_one_line(
    args, message, bad, trained, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = [arg.format(bad=bad, text=text_file, run=trained[0]) for arg in args]
    if "--resume" not in args:
        # Options given later count, so that a case may override the small run.
        args = [*SMALL, *([] if "--out" in args else ["--out", "run"]), *args]
    run = here(capsys, "train", *args)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"jaxrnn(?: train)?: error: .*\n", run.stderr), run.stderr
    assert re.search(message, run.stderr), run.stderr
    assert not list(tmp_path.iterdir())
    assert (bad / "full" / "file").read_text() == "mine"


def test_bad_input_of_a_process_is_one_line(bad, tmp_path):
    run = jaxrnn("train", bad / "empty", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"jaxrnn train: error: .*: expected text, got an empty file\n", run.stderr)
    assert not list(tmp_path.iterdir())


def test_bad_sampling_input_is_one_line(trained, tmp_path, capsys):
    out, _ = trained
    unsaved, broken = tmp_path / "unsaved", tmp_path / "broken"
    for folder in (unsaved, broken):
        folder.mkdir()
        for name in ("config.json", "text.json"):
            (folder / name).write_text((out / name).read_text())
    config = (out / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": "x"'))
    cases = [
        ([tmp_path], "expected a run directory, got no config.json in it"),
        ([unsaved], "expected a run with a checkpoint, got none yet"),
        ([broken], "config.json: expected the options of a run: hidden_size: expected int"),
        ([out, "--prompt", "the Fox"], "--prompt: expected the 29 characters .* 'F' at position 4"),
        ([out, "--temperature", "1e-39"], "expected 0, or a number of at least 1.2e-38, got 1e-39"),
        ([out, "--temperature", "-1"], "0, or a number of at least 1.2e-38, got -1"),
        ([out, "--length", "1.5"], "expected a whole number, at least 0, got 1.5"),
    ]
    for args, message in cases:
        run = here(capsys, "sample", *args)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.fullmatch(r"jaxrnn sample: error: .*\n", run.stderr), run.stderr
        assert re.search(message, run.stderr), run.stderr


def test_example(tmp_path, capsys):
    run = in_terminal("example", "--plot", tmp_path / "ensemble.png")
    assert (run.returncode, run.stderr) == (0, "")
    assert "68 of 68 printed numbers agree" in run.stdout
    assert (tmp_path / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    wrong = here(capsys, "example", "--plot", tmp_path / "none" / "ensemble.png")
    assert wrong.returncode == 2
    assert re.fullmatch(r"jaxrnn example: error: --plot: expected a file .*\n", wrong.stderr)


def test_a_terminal_of_few_characters():
    run = jaxrnn("example", PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stderr) == (0, "") and "68 of 68" in run.stdout


def test_output_that_nobody_reads_any_more(trained):
    ours = f"{sys.executable} -m jaxrnn"
    for command in (f"{ours} example | head -c 14",
                    f"{ours} sample {trained[0]} --length 3000000 | head -c 14"):  # fmt: skip
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert len(run.stdout) == 14 and run.stderr == ""


@pytest.mark.parametrize("read", [0, 9])
def test_training_whose_output_nobody_reads_saves_and_says_so(read, text_file, tmp_path):
    out = tmp_path / "run"
    process = start("train", text_file, "--out", out, *SMALL, "--steps", "1000000")
    for _ in range(read):
        process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(timeout=60) == (1 if read else 0)
    if read:
        said = r"jaxrnn train: error: standard output: cannot be written: Broken pipe; "
        said += rf"the last checkpoint is {out}/checkpoints/(\d+); to go on: .*\n"
        assert re.fullmatch(said, errors), errors
        step = int(re.fullmatch(said, errors)[1])
        assert step == read_metrics(out)[-1]["step"] > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("command", ["train", "show", "example"])
def test_output_on_a_full_disk_is_one_line(command, trained, text_file, tmp_path):
    what = {"train": [text_file, "--out", tmp_path / "run", *SMALL], "show": [trained[0]]}
    with open("/dev/full", "w") as full:
        run = jaxrnn(command, *what.get(command, []), stdout=full)
    said = "jaxrnn: error: standard output: cannot be written: No space left on device\n"
    assert (run.returncode, run.stderr) == (1, said)


def test_output_that_is_closed(trained):
    ours = f"{sys.executable} -m jaxrnn"
    for command in (f"sample {trained[0]}", f"show {trained[0]}", "example"):
        run = subprocess.run(["bash", "-c", f"{ours} {command} >&-"], capture_output=True)
        assert (run.returncode, run.stderr) == (0, b"")


def test_starts_of_one_second_have_directories_of_their_own(text_file, tmp_path):
    code = (
        "import sys, time; time.strftime = lambda _: 'runs/now'; from jaxrnn.__main__ import main;"
        f"sys.argv = {['jaxrnn', 'train', str(text_file), *SMALL]!r}; sys.exit(main())"
    )
    all_three = [start_python("-c", code, cwd=tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in all_three]
    assert [process.returncode for process in all_three] == [0, 0, 0], said
    names = sorted(re.search("run directory: (.*);", output)[1] for output, _ in said)
    assert names == ["runs/now", "runs/now-2", "runs/now-3"]
    assert all((tmp_path / name / "checkpoints" / "30").is_dir() for name in names)


def test_a_name_that_is_no_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(TEXT)
    run = jaxrnn("train", tmp_path / name, "--out", tmp_path / "run", *SMALL)
    assert (run.returncode, run.stderr) == (0, "")
    again = jaxrnn("train", "--resume", tmp_path / "run")
    assert (again.returncode, again.stderr) == (0, "") and "is finished: 30 updates" in again.stdout
    run = jaxrnn("train", tmp_path / name, "--out", tmp_path / name / "run", *SMALL)
    assert run.returncode == 2 and "--out: expected a name that is UTF-8, got " in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_two_runs_that_begin_beside_each_other(text_file, tmp_path):
    """One of them fails, and leaves the directory of both to the other."""
    process = start("train", "-", "--out", tmp_path / "runs" / "a", *SMALL, stdin=subprocess.PIPE)
    wait_for(tmp_path / "runs" / "a" / "config.json", process)
    (tmp_path / "runs" / "b").mkdir()
    _, errors = process.communicate("too short", timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"jaxrnn train: error: standard input: expected at least .*\n", errors)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_start_that_is_interrupted_leaves_nothing(number, tmp_path):
    process = start("train", "-", "--out", tmp_path / "run", *SMALL, stdin=subprocess.PIPE)
    wait_for(tmp_path / "run" / ".ids.npy.partial", process)
    # It is being trained already, for another one that would go on with it.
    other = jaxrnn("train", "--resume", tmp_path / "run")
    assert other.returncode == 2 and "expected a run that nobody is training" in other.stderr
    assert "being trained, at step 0" in jaxrnn("show", tmp_path / "run").stdout
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    assert not list(tmp_path.iterdir())


def run_without(module, arguments, folder):
    code = (
        f"import sys; sys.modules[{module!r}] = None;"
        f"sys.argv = ['jaxrnn', *{list(map(str, arguments))!r}];"
        "from jaxrnn.__main__ import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120
    )


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("rich", ["example"], "cli"),
        ("rich", ["show", "."], "cli"),
        ("orbax", ["train", "{text}"], "cli"),
        ("shtab", ["--print-completion", "bash"], "cli"),
        ("matplotlib", ["example", "--plot", "x.png"], "plot"),
    ],
)
def test_a_missing_extra_is_named(module, arguments, extra, text_file, tmp_path):
    arguments = [argument.format(text=text_file) for argument in arguments]
    run = run_without(module, arguments, tmp_path)
    message = f"jaxrnn: error: {module} is missing; pip install 'jaxrnn[{extra}]'\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message)
    assert not list(tmp_path.iterdir())


def test_training_without_matplotlib_says_so(text_file, tmp_path):
    run = run_without("matplotlib", ["train", text_file, "--out", "run", *SMALL], tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "no picture: matplotlib is missing; pip install 'jaxrnn[plot]'" in run.stdout
    assert (tmp_path / "run" / "checkpoints" / "30").is_dir()


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["show"], ["example"]])
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = here(capsys, *command, "--help")
    assert run.returncode == 0 and "usage: jaxrnn" in run.stdout
    assert all(len(line) <= 80 for line in run.stdout.splitlines())


def test_help_and_version_need_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys(['rich', 'orbax', 'shtab', 'matplotlib']))"
    for option, said in (("--help", "usage: jaxrnn"), ("--version", "0.1.0\n")):
        call = f"from jaxrnn._app.cli import run; run([{option!r}])"
        run = subprocess.run([sys.executable, "-c", f"{code}; {call}"], capture_output=True,
                             text=True)  # fmt: skip
        assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith(said)


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


def test_completion_in_bash(capsys, tmp_path, monkeypatch):
    run = here(capsys, "--print-completion", "bash")
    assert (run.returncode, run.stderr) == (0, "")
    script = tmp_path / "script"
    script.write_text(run.stdout)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completed(script, "jaxrnn", "tr") == ["train"]
    assert completed(script, "jaxrnn", "train", "--optim") == ["--optimizer"]
    assert completed(script, "jaxrnn", "train", "--optimizer", "na") == ["nadam"]
    assert completed(script, "jaxrnn", "train", "--resume", "") == ["runs"]
    assert completed(script, "jaxrnn", "show", "r") == ["runs"]
    assert completed(script, "jaxrnn", "train", "s") == ["script"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completion_in_other_shells(shell, capsys):
    run = here(capsys, "--print-completion", shell)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--optimizer" in run.stdout and "train" in run.stdout

"""Each command as a process, in a terminal and without one; each bad input as one line."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
SMALL = ["--steps", "30", "--hidden-size", "16", "--seq-length", "8", "--batch-size", "4",
         "--eval-every", "10", "--sample-length", "20"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _compile_once(tmp_path_factory):
    """The processes share compiled programs, with those of a parallel pytest worker too."""
    cache = tmp_path_factory.getbasetemp().parent / "jax-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def start(*args, cwd=None, stdout=subprocess.PIPE, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxrnn", *map(str, args)],
        cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": "", **env},
    )  # fmt: skip


def jaxrnn(*args, **how):
    process = start(*args, **how)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fox"
    return out, jaxrnn("train", text_file, "--out", out, *SMALL)


def test_training_without_a_terminal(trained):
    out, run = trained
    assert (run.returncode, run.stderr) == (0, "")
    assert (
        "2,430 characters, 270 more held out, 29 distinct\n1,229 parameters, 30 updates"
        in run.stdout
    )
    assert re.search(r"unigram \d\.\d\d, bigram \d\.\d\d", run.stdout)
    line = r"step 10/30  loss \d\.\d+ bits \d\.\d+ held-out \d\.\d+ \d+k char/s  0:\d\d:\d\d left"
    assert re.search(line, run.stdout), run.stdout
    sample = re.search(
        r"from where the held-out text begins:\n(.*)\nloss curves", run.stdout, re.DOTALL
    )
    assert len(sample[1]) == 20
    found = float(re.search(r"held-out bits per character: (\d\.\d+)", run.stdout)[1])
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25, 30]
    assert found == round(rows[-1]["held_out_bits"], 3) < rows[0]["held_out_bits"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint", "config.json", "loss.png", "metrics.jsonl", "vocabulary.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text())["options"]["hidden_size"] == 16
    assert "".join(json.loads((out / "vocabulary.json").read_text())) == "".join(
        dict.fromkeys(TEXT)
    )


def test_the_same_seed_gives_the_same_run(trained, text_file, tmp_path):
    again = jaxrnn("train", text_file, "--out", tmp_path / "again", *SMALL)
    other = jaxrnn("train", text_file, "--out", tmp_path / "other", *SMALL, "--seed", "1")
    bits = [re.search(r"character: (\S+)", run.stdout)[1] for run in (trained[1], again, other)]
    assert bits[0] == bits[1] != bits[2]


def test_sampling(trained):
    out, _ = trained
    first, again, other, greedy = (
        jaxrnn("sample", out, "--prompt", "the fox", "--length", "40", *how)
        for how in ([], [], ["--seed", "7"], ["--temperature", "0"])
    )
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout == again.stdout != other.stdout
    assert greedy.stdout not in (first.stdout, other.stdout)
    for run in (first, other, greedy):
        assert run.stdout.startswith("the fox") and len(run.stdout) == len("the fox") + 40 + 1
    assert jaxrnn("sample", out, "--length", "3").returncode == 0


def read_terminal(terminal):
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            return shown.decode()
        if not part:
            return shown.decode()
        shown += part


def test_a_stack_is_trained_and_sampled(text_file, tmp_path):
    out = tmp_path / "run"
    run = jaxrnn("train", text_file, "--out", out, "--layers", "2", *SMALL)
    assert (run.returncode, run.stderr) == (0, "")
    weights = 16 * (29 + 16 + 1) + 16 * (16 + 16 + 1) + 29 * (16 + 1)
    assert f"\n{weights:,} parameters, 30 updates" in run.stdout
    sample = jaxrnn("sample", out, "--prompt", "the ", "--length", "20")
    assert (sample.returncode, sample.stderr, len(sample.stdout)) == (0, "", 4 + 20 + 1)


def test_training_in_a_terminal_shows_a_bar(text_file, tmp_path):
    ours, theirs = pty.openpty()
    process = start("train", text_file, "--out", tmp_path / "run", *SMALL, stdout=theirs,
                    TERM="xterm-256color", COLUMNS="100")  # fmt: skip
    os.close(theirs)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read_terminal(ours))
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "30/30" in text and "━" in text and "held-out" in text and "char/s" in text


def test_a_run_that_is_interrupted_is_kept(text_file, tmp_path):
    out = tmp_path / "run"
    process = start("train", text_file, "--out", out, *SMALL, "--steps", "1000000")
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == ""
    steps = int(re.search(r"stopped at step (\d+) of 1000000", rest)[1])
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == steps
    assert jaxrnn("sample", out, "--length", "5").returncode == 0


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").write_text("")
    (folder / "short").write_text("abc" * 5)
    (folder / "latin").write_bytes(b"caf\xe9 au lait")
    (folder / "same").write_text("a" * 5000)
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    return folder


BAD_TRAINING = {
    "missing file": (["{bad}/none"], "none: cannot be read: No such file or directory"),
    "a directory": (["{bad}/full"], "full: cannot be read: Is a directory"),
    "empty file": (["{bad}/empty"], "empty: expected text, got an empty file"),
    "short text": (["{bad}/short"], "short: expected at least 33 characters .* got 13; lower"),
    "no UTF-8": (["{bad}/latin"], "latin: expected UTF-8, got byte 0xe9 at offset 3"),
    "one character": (["{bad}/same"], "same: expected two distinct characters, got only 'a'"),
    "full directory": (["{text}", "--out", "{bad}/full"], "--out: expected an empty or new"),
    "out is a file": (["{text}", "--out", "{bad}/same"], "--out: cannot write to .*same"),
    "no steps": (["{text}", "--steps", "0"], "--steps: expected a whole number, at least 1, got 0"),
    "no number": (["{text}", "--hidden-size", "many"], "expected a whole number, .* got many"),
    "negative rate": (["{text}", "--learning-rate", "-1"], "expected a number above 0, got -1"),
    "nan": (["{text}", "--grad-clip", "nan"], "expected a number, at least 0, got nan"),
    "all held out": (["{text}", "--held-out", "1"], "expected a fraction between 0 and 1, got 1"),
    "optimizer": (["{text}", "--optimizer", "newton"], "invalid choice: 'newton'"),
    "unknown option": (["{text}", "--depth", "2"], "unrecognized arguments: --depth 2"),
}


@pytest.mark.parametrize(("args", "message"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input_is_one_line(args, message, bad, text_file, tmp_path):
    args = [arg.format(bad=bad, text=text_file) for arg in args]
    out = [] if "--out" in args else ["--out", str(tmp_path / "run")]
    # Options given later count, so that a case may override the small run.
    run = jaxrnn("train", *SMALL, *out, *args, cwd=tmp_path)
    assert run.returncode == 2, run.stdout
    assert re.fullmatch(r"jaxrnn(?: train)?: error: .*\n", run.stderr), run.stderr
    assert re.search(message, run.stderr), run.stderr
    assert not list(tmp_path.iterdir())
    assert (bad / "full" / "file").read_text() == "mine"


def test_a_loss_that_is_no_number_leaves_nothing(text_file, tmp_path):
    run = jaxrnn("train", text_file, *SMALL, "--activation", "identity", "--optimizer", "sgd",
                 "--learning-rate", "1e30", "--grad-clip", "0", "--out", "deep/run",
                 cwd=tmp_path)  # fmt: skip
    assert run.returncode == 1
    assert re.fullmatch(
        r"jaxrnn train: error: the loss became (nan|inf) at step \d+; nothing was kept; .*\n",
        run.stderr,
    )
    assert not list(tmp_path.iterdir())


def test_bad_sampling_input_is_one_line(trained, tmp_path):
    out, _ = trained
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "vocabulary.json"):
        (broken / name).write_text((out / name).read_text())
    cases = [
        ([tmp_path], "expected a run directory, got no vocabulary.json"),
        ([broken], "expected a run directory, got no checkpoint/"),
        ([out, "--prompt", "the Fox"], "--prompt: expected the 29 characters .* 'F' at position 4"),
        ([out, "--temperature", "-1"], "expected a number, at least 0, got -1"),
        ([out, "--length", "1.5"], "expected a whole number, at least 0, got 1.5"),
    ]
    for args, message in cases:
        run = jaxrnn("sample", *args)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.fullmatch(r"jaxrnn sample: error: .*\n", run.stderr), run.stderr
        assert re.search(message, run.stderr), run.stderr
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": "x"'))
    run = jaxrnn("sample", broken)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r".*config.json: expected the options of a run: .*\n", run.stderr)
    (broken / "config.json").write_text(config)
    (broken / "checkpoint").mkdir()
    (broken / "checkpoint" / "_METADATA").write_text("{")
    run = jaxrnn("sample", broken)
    assert run.returncode == 2 and "the checkpoint cannot be read" in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr


def test_example(tmp_path):
    run = jaxrnn("example", "--plot", tmp_path / "ensemble.png", COLUMNS="80")
    assert (run.returncode, run.stderr) == (0, "")
    assert "68 of 68 printed numbers agree" in run.stdout
    assert (tmp_path / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    wrong = jaxrnn("example", "--plot", tmp_path / "none" / "ensemble.png")
    assert wrong.returncode == 2
    assert re.fullmatch(r"jaxrnn example: error: --plot: expected a file .*\n", wrong.stderr)


@pytest.mark.parametrize("command", [[], ["example"], ["train"], ["sample"]])
def test_help_fits_80_columns(command):
    run = jaxrnn(*command, "--help", COLUMNS="80")
    assert run.returncode == 0 and "usage: jaxrnn" in run.stdout
    assert all(len(line) <= 80 for line in run.stdout.splitlines())


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("rich", ["example"], "cli"),
        ("orbax", ["train", "{text}"], "cli"),
        ("matplotlib", ["example", "--plot", "x.png"], "plot"),
    ],
)
def test_a_missing_extra_is_named(module, arguments, extra, text_file, tmp_path):
    arguments = [argument.format(text=text_file) for argument in arguments]
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['jaxrnn', *{arguments!r}];"
        "from jaxrnn.__main__ import main; sys.exit(main())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    message = f"jaxrnn: error: {module} is missing; pip install 'jaxrnn[{extra}]'\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message)
    assert not list(tmp_path.iterdir())


def test_training_without_matplotlib_says_so(text_file, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None;"
        f"sys.argv = ['jaxrnn', 'train', {str(text_file)!r}, '--out', 'run', *{SMALL!r}];"
        "from jaxrnn.__main__ import main; sys.exit(main())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "no loss curves: matplotlib is missing; pip install 'jaxrnn[plot]'" in run.stdout
    assert (tmp_path / "run" / "checkpoint").is_dir()


def test_output_that_nobody_reads_any_more():
    code = "jaxrnn example | head -n 1"
    command = code.replace("jaxrnn", f"{sys.executable} -m jaxrnn", 1)
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.stdout == "5 Forward pass\n" and run.stderr == ""


def test_a_terminal_of_few_characters():
    run = jaxrnn("example", PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stderr) == (0, "") and "68 of 68" in run.stdout


def test_version():
    assert jaxrnn("--version").stdout == "0.1.0\n"

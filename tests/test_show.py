"""`jaxrnn show`: of runs in every condition, without JAX's devices, changing nothing."""

import fcntl
import json
import math
import os
import re

import commands
import numpy as np
import pytest
from commands import here, in_terminal, needs_rights, one_line, succeeded

from jaxrnn._app import show, terminal
from jaxrnn._app.terminal import text_plot

OPTIONS = {
    "level": "char", "hidden_size": 16, "layers": 1, "seq_length": 64, "batch_size": 64,
    "steps": 100, "learning_rate": 3e-3, "grad_clip": 1.0, "optimizer": "adam",
    "activation": "tanh", "recurrent": "orthogonal", "held_out": 0.1, "eval_every": 250,
    "eval_length": 500_000, "checkpoint_every": 250, "skip_nonfinite": False, "seed": 0,
}  # fmt: skip
TEXT = {
    "name": "fox.txt",
    "level": "char",
    "characters": "the quick\n",
    "length": 12_345,
    "checksum": 7,
}
user = commands.user

REFERENCES = {"unigram": 3.25, "bigram": 2.125}


def rows(last, every=5, held_out=20):
    return [
        {"step": step, "loss": 2 / step, "bits": 1 + 40 / step, "characters_per_second": 1000,
         "seconds": step / 10} | ({"held_out_bits": 1 + 50 / step} if step % held_out == 0 else {})
        for step in range(every, last + 1, every)
    ]  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Makes a run directory without training: by its rows and the bits of its checkpoints."""

    def made(metrics=(), checkpoints=None, text=TEXT, **options):
        out = tmp_path / "a run"
        out.mkdir()
        write = {"config.json": {"sources": [], "options": {**OPTIONS, **options}}}
        if text is not None:
            write["text.json"] = {"text": text, "references": REFERENCES}
        for name, value in write.items():
            (out / name).write_text(json.dumps(value))
        if metrics:
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        for step, bits in (checkpoints or {}).items():
            folder = out / "checkpoints" / str(step) / "about"
            folder.mkdir(parents=True)
            (folder / "metadata").write_text(json.dumps({"held_out_bits": bits}))
        return out

    return made


def files(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_show_says_what_a_run_is_and_where_it_stands(make):
    out = make(rows(100), {60: 1.75, 80: 1.5, 100: 1.625})
    # What orbax has not finished yet.
    (out / "checkpoints" / "120.orbax-checkpoint-tmp").mkdir()
    before = files(out)
    output = succeeded(here("show", out))
    lines = [line.strip() for line in output.splitlines()]
    assert lines[0] == f"{out}: finished, 100 updates"
    cells = [re.split(r"  +", line) for line in lines]
    for row in (
        ["*", "hidden-size", "16", "default: 256"], ["*", "steps", "100", "default: 2000"],
        ["seed", "0"], ["skip-nonfinite", "False"], ["text", "fox.txt"],
        ["size", "12,345 characters"],
    ):  # fmt: skip
        assert row in cells
    together = " ".join(" ".join(lines).split())
    for part in (r"10 distinct: 'the quick\n'", "unigram 3.25", "bigram 2.12",
                 "at step 60, 80, 100", "the best is 80, with 1.500",
                 "training 1.400, held-out 1.500", f"picture: {out}/loss.png"):  # fmt: skip
        assert part in together
    assert "\x1b" not in output
    picture = out / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path: content for path, content in files(out).items() if path != picture} == before


def test_show_in_a_terminal_has_its_width(make):
    run = in_terminal("show", make(rows(40), {40: 2.25}))
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert " " * 9 + "+" + "-" * 90 in lines
    assert "stopped at step 40 of 100" in run.stdout


def test_every_line_fits_80_columns(make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "long/" * 30 + "name.txt"
    out = make(rows(100), {n: 1.5 for n in range(60, 101)}, {**TEXT, "name": name})
    run = here("show", out)
    # The path of the run is the test's; it is left in one piece.
    lines = [line for line in run.stdout.splitlines() if str(out) not in line]
    assert max(map(len, lines)) == 80


def test_a_run_is_stopped_or_being_trained(make):
    out = make(rows(60), {40: 2.25, 60: math.inf})
    stands = f"{out}: stopped at step 60 of 100\nto continue: jaxrnn train --resume '{out}'\n"
    assert here("show", out).stdout.startswith(stands)
    with (out / "config.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process that trains it does
        assert here("show", out).stdout.startswith(f"{out}: being trained, at step 60 of")
    assert "at step 40, 60; the best is 40, with 2.250" in here("show", out).stdout


@pytest.mark.parametrize("text", [TEXT, None])
def test_a_run_without_metrics_is_shown(make, text):
    out = make(text=text)
    before = files(out)
    run = here("show", out)
    assert (run.returncode, run.stderr) == (0, "")
    assert "stopped before its first checkpoint\nto continue: jaxrnn train --resume" in run.stdout
    assert re.search(r"^checkpoints +none yet *$", run.stdout, re.M)
    assert ("not fully read yet" in run.stdout) == (text is None)
    assert run.stdout.endswith("no metrics yet, so no curves to show\n")
    assert files(out) == before


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.filterwarnings("error")
def test_skipped_updates_are_counted_and_have_no_loss(make, measured):
    skipped = [{**row, "loss": None, "bits": None, "skipped": 5 * n + 5}
               for n, row in enumerate(rows(10))]  # fmt: skip
    metrics = [*skipped, *({**row, "skipped": 10} for row in rows(20)[2:])] if measured else skipped
    out = make(metrics)
    run = here("show", out)
    assert (run.returncode, run.stderr) == (0, "")
    last = "step 20: training 3.000, held-out 3.500" if measured else "step 10: training –"
    assert f"{last}; 10 updates skipped\n" in run.stdout
    assert ("bits per character   . training" in run.stdout) == measured
    assert (out / "loss.png").exists()


def test_a_folded_alphabet_loses_no_character(make):
    characters = "The " + "".join(map(chr, range(0x21, 0x7F)))
    out = make(text={**TEXT, "characters": "".join(dict.fromkeys(characters))})
    lines = here("show", out).stdout.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("alphabet"))
    shown = "".join(line[13:73] for line in lines[first : first + 2])
    assert shown.startswith("95 distinct: 'The !")


def test_bytes_and_large_alphabets_are_shortened(make):
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    out = make(text={**TEXT, "characters": many}, level="byte")
    assert re.search(r"5000 distinct:\s+'[^']+' …", here("show", out).stdout)
    assert "\\u2026" in succeeded(here("show", out, encoding="ascii"))
    written = {"text": {**TEXT, "level": "byte", "characters": "".join(map(chr, range(256)))}}
    (out / "text.json").write_text(json.dumps({**written, "references": REFERENCES}))
    run = here("show", out).stdout
    assert re.search(r"size +12,345 bytes", run) and re.search(r"alphabet +256 bytes", run)


def test_a_picture_that_cannot_be_written_ends_nothing(make):
    out = make(rows(20))
    (out / "loss.png").mkdir()
    run = here("show", out)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"no picture: {out}/loss.png: cannot be written: Is a directory\n")
    assert sorted(os.listdir(out)) == ["config.json", "loss.png", "metrics.jsonl", "text.json"]


@needs_rights
def test_a_run_that_may_only_be_read_is_shown(make, user):
    out = make(rows(20))
    out.chmod(0o555)
    run = user("show", out)
    out.chmod(0o755)
    assert "loss.png: cannot be written: Permission denied" in succeeded(run)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no fonts\nand more"), "no fonts"),
        (ModuleNotFoundError("No module named 'not_there'", name="not_there"), "not_there"),
        (ModuleNotFoundError("", name="matplotlib"), "pip install 'jaxrnn[plot]'"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_a_failing_picture_library_ends_nothing(error, said, make, monkeypatch):
    def fail(*size):
        raise error

    monkeypatch.setattr(terminal, "new_figure", fail)
    out = make(rows(20))
    output = succeeded(here("show", out))
    assert re.search(rf"^no picture: .*{re.escape(said)}.?$", output, re.M), output
    # As the command that trains shows it at its end.
    assert said in show.picture(out, rows(20), {}, "character")


def test_bad_runs_are_one_line(make, tmp_path):
    out = make(rows(20))
    (out / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10, "bits": 1}\n')
    for path, message in (
        (tmp_path, "expected a run directory, got no config.json in it"),
        (tmp_path / "none", "expected a run directory, got no config.json in it"),
        (out, "expected a row of metrics, got '{\"step\": 5}' in line 1"),
    ):
        one_line(here("show", path), 2, "jaxrnn show: error: ", message)


def test_points_of_the_text_plot_are_where_they_belong():
    metrics = [{"step": n, "bits": 5.0 - n} for n in range(1, 5)]
    metrics[3]["held_out_bits"] = 2.0
    lines = text_plot(metrics, 10 + 31, height=4)
    assert lines[0] == "bits per character   . training   o held-out"
    canvas = np.array([list(line[10:].ljust(31)) for line in lines[1:5]])
    assert [tuple(at) for at in np.argwhere(canvas == ".")] == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert [tuple(at) for at in np.argwhere(canvas == "o")] == [(2, 30)]
    assert [line[:10].strip(" |") for line in lines[1:5]] == ["4", "", "2", "1"]
    assert lines[-1].split() == ["step", "1", "4"] and len(lines[-1]) == len(lines[-2]) == 41
    one = text_plot([{"step": 3, "bits": 2.0}], 80)
    assert "\n".join(one[1:-2]).count(".") == 1
    assert text_plot([{"step": 3, "bits": None}], 80) == []

"""`jaxrnn show`: of runs in every condition, without JAX's devices, changing nothing."""

import fcntl
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import AS_A_USER, MAY_WRITE_ANYWHERE, here, in_terminal, jaxrnn

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


def test_a_finished_run_as_a_process_without_devices(make):
    out = make(rows(100), {60: 1.75, 80: 1.5, 100: 1.625})
    # What orbax has not finished yet.
    (out / "checkpoints" / "120.orbax-checkpoint-tmp").mkdir()
    before = files(out)
    run = jaxrnn("show", out, JAX_PLATFORMS="none such", PYTHONWARNINGS="error")
    assert (run.returncode, run.stderr) == (0, "")
    lines = [line.strip() for line in run.stdout.splitlines()]
    assert lines[0] == f"{out}: finished, 100 updates"
    found = [re.split(r"  +", line) for line in lines]
    assert ["*", "hidden-size", "16", "default: 256"] in found
    assert ["*", "steps", "100", "default: 2000"] in found
    assert ["seed", "0"] in found and ["skip-nonfinite", "False"] in found
    assert ["text", "fox.txt"] in found and ["size", "12,345 characters"] in found
    assert ["alphabet", r"10 distinct: 'the quick\n'"] in found
    assert ["reference", "unigram 3.25, bigram 2.12 bits per held-out character"] in found
    told = " ".join(lines)
    assert "at step 60, 80, 100; the best is 80, with 1.500 held-out bits per character" in told
    assert lines[-2:] == ["step 100: training 1.400, held-out 1.500", f"picture: {out}/loss.png"]
    assert "\x1b" not in run.stdout
    picture = out / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path: content for path, content in files(out).items() if path != picture} == before


def test_in_a_terminal(make):
    run = in_terminal("show", make(rows(40), {40: 2.25}))
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert " " * 9 + "+" + "-" * 90 in lines
    assert "stopped at step 40 of 100" in run.stdout


def test_every_line_fits_80_columns(make, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "long/" * 30 + "name.txt"
    out = make(rows(100), {n: 1.5 for n in range(60, 101)}, {**TEXT, "name": name})
    run = here(capsys, "show", out)
    # The path of the run is the test's; it is left in one piece.
    lines = [line for line in run.stdout.splitlines() if str(out) not in line]
    assert max(map(len, lines)) == 80


def test_where_a_run_stands(make, capsys):
    out = make(rows(60), {40: 2.25, 60: math.inf})
    stands = f"{out}: stopped at step 60 of 100\nto go on: jaxrnn train --resume '{out}'\n"
    assert here(capsys, "show", out).stdout.startswith(stands)
    with (out / "config.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process that trains it does
        assert here(capsys, "show", out).stdout.startswith(f"{out}: being trained, at step 60 of")
    assert "at step 40, 60; the best is 40, with 2.250" in here(capsys, "show", out).stdout


@pytest.mark.parametrize("text", [TEXT, None])
def test_a_run_that_has_hardly_begun(make, capsys, text):
    out = make(text=text)
    before = files(out)
    run = here(capsys, "show", out)
    assert (run.returncode, run.stderr) == (0, "")
    assert "stopped before its first checkpoint\nto go on: jaxrnn train --resume" in run.stdout
    assert re.search(r"^checkpoints +none yet *$", run.stdout, re.M)
    assert ("not read to its end yet" in run.stdout) == (text is None)
    assert run.stdout.endswith("no metrics yet, and so no curves\n")
    assert files(out) == before


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.filterwarnings("error")
def test_updates_that_were_skipped(make, capsys, measured):
    skipped = [{**row, "loss": None, "bits": None, "skipped": 5 * n + 5}
               for n, row in enumerate(rows(10))]  # fmt: skip
    metrics = [*skipped, *({**row, "skipped": 10} for row in rows(20)[2:])] if measured else skipped
    out = make(metrics)
    run = here(capsys, "show", out)
    assert (run.returncode, run.stderr) == (0, "")
    last = "step 20: training 3.000, held-out 3.500" if measured else "step 10: training –"
    assert f"{last}; 10 updates skipped\n" in run.stdout
    assert ("bits per character   . training" in run.stdout) == measured
    assert (out / "loss.png").exists()


def test_an_alphabet_is_cut_anywhere_but_loses_nothing(make, capsys):
    characters = "The " + "".join(map(chr, range(0x21, 0x7F)))
    out = make(text={**TEXT, "characters": "".join(dict.fromkeys(characters))})
    lines = here(capsys, "show", out).stdout.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("alphabet"))
    shown = "".join(line[13:73] for line in lines[first : first + 2])
    assert shown.startswith("95 distinct: 'The !")


def test_bytes_and_large_alphabets(make, capsys):
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    out = make(text={**TEXT, "characters": many}, level="byte")
    assert re.search(r"5000 distinct:\s+'[^']+' …", here(capsys, "show", out).stdout)
    written = {"text": {**TEXT, "level": "byte", "characters": "".join(map(chr, range(256)))}}
    (out / "text.json").write_text(json.dumps({**written, "references": REFERENCES}))
    run = here(capsys, "show", out).stdout
    assert re.search(r"size +12,345 bytes", run) and re.search(r"alphabet +256 bytes", run)


def test_a_picture_that_cannot_be_written(make, capsys):
    out = make(rows(20))
    (out / "loss.png").mkdir()
    run = here(capsys, "show", out)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"no picture: {out}/loss.png: cannot be written: Is a directory\n")
    assert sorted(os.listdir(out)) == ["config.json", "loss.png", "metrics.jsonl", "text.json"]


@pytest.mark.skipif(MAY_WRITE_ANYWHERE, reason="root may write everywhere")
def test_a_run_that_may_only_be_read(make):
    out = make(rows(20))
    out.chmod(0o555)
    command = [*AS_A_USER, sys.executable, "-m", "jaxrnn", "show", out]
    run = subprocess.run(command, capture_output=True, text=True)
    out.chmod(0o755)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("loss.png: cannot be written: Permission denied\n")


def test_without_matplotlib(make, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    run = here(capsys, "show", make(rows(20)))
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("no picture: matplotlib is missing; pip install 'jaxrnn[plot]'\n")


def test_bad_input_is_one_line(make, capsys, tmp_path):
    out = make(rows(20))
    (out / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10, "bits": 1}\n')
    for path, message in (
        (tmp_path, "expected a run directory, got no config.json in it"),
        (tmp_path / "none", "expected a run directory, got no config.json in it"),
        (out, "expected a row of metrics, got '{\"step\": 5}' in line 1"),
    ):
        run = here(capsys, "show", path)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.fullmatch(rf"jaxrnn show: error: .*{re.escape(message)}\n", run.stderr)


def test_the_curves_of_text_are_where_they_belong():
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

"""The GPU's benchmarks, rehearsed: each command to its closing tables, whatever a kernel does."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from benchmarks import dry, plans, results
from benchmarks.kernels import ASSOCIATIVE, KERNEL, MOST_OF_A_BLOCK, NAMED, SCAN
from benchmarks.measures import BACKWARD, BACKWARD_ALONE, FORWARD

ROOT = pathlib.Path(__file__).parent.parent
FIRST, WHOLE = ("first",), ("run", "--device", "gpu")
recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas interprets GPU kernels from jax 0.11"
)


@pytest.fixture
def start():
    """Starts a rehearsal in a process of its own, from a checkout."""
    started = []

    def started_with(command, out, faults=""):
        arguments = [sys.executable, "-m", "benchmarks", *command, "--dry", "--out", str(out)]
        environment = os.environ | {dry.FAULTS: faults}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, **pipes))
        return started[-1]

    yield started_with
    for process in started:
        process.kill()  # its workers end with it
        process.communicate()


def end(process, out):
    """(exit code, tables, lines of progress, results)."""
    tables, progress = process.communicate(timeout=300)
    (path,) = out.iterdir()
    return process.returncode, tables, progress.splitlines(), results.read(path)


def of_kernels(document):
    """(dtype, H, measure): the row, of every kernel; of those without tuning (dtype, None, ...)."""
    found = {}
    for row in document["rows"]:
        name, workload = row["subject"], row["workload"]
        if name.startswith(KERNEL):
            H = workload["H"] if workload["tuned"] else None
            found[name.removeprefix(f"{KERNEL}, "), H, row["measure"]] = row
    return found


@recent
def test_both_commands_end_with_their_tables_whatever_a_kernel_does(start, tmp_path):
    faults = {
        FIRST: "illegal:float32:64,hang:bfloat16:384",
        WHOLE: "abort:float16:384,illegal:float16:64",
    }
    started = {c: start(c, tmp_path / c[0], faults[c]) for c in (FIRST, WHOLE)}
    ended = {c: end(process, tmp_path / c[0]) for c, process in started.items()}
    said = {
        "abort": "the process was killed by signal 6",
        "hang": "the process gave no answer in 15 s",
        "illegal": "the process ended with exit code 1: RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS",
    }
    for command, (code, tables, progress, document) in ended.items():
        assert code == 1 and f"python -m benchmarks report {tmp_path}" in tables, progress
        broken = {tuple(fault.split(":")[1:]): said[fault.split(":")[0]]
                  for fault in faults[command].split(",")}  # fmt: skip
        verdicts = [line for line in progress if "s] jaxrnn, kernel" in line]
        rows = of_kernels(document)
        assert len(verdicts) == len(rows) and not document["interrupted"]
        for (dtype, H, measure), row in rows.items():
            reason = broken.get((dtype, str(H)))
            if reason is None:
                assert row["status"] == "ready" and row["seconds"] and row["alike"], row
                assert set(row["kernels"]) == set(NAMED[measure]) and max(row["errors"].values())
            elif measure == FORWARD:
                assert row["status"] == "failed" and row["reason"].startswith(reason), row
            else:
                assert row["reason"].startswith(f"forward it failed: {reason}")
        # What is no kernel was measured all the same.
        others = [r for r in document["rows"] if not r["subject"].startswith((KERNEL, "cuDNN"))]
        assert all(row["status"] == "ready" and row["seconds"] for row in others)
        titles = ["kernels and scan beside float64", f"{FORWARD}: microseconds a step",
                  f"{BACKWARD}: microseconds a step", "Not timed", "MEASURED: tuple"]  # fmt: skip
        places = [tables.index(title) for title in titles]
        assert places == sorted(places) and "exact, 2 calls alike" in tables
        (path,) = (tmp_path / command[0]).iterdir()
        assert str(ROOT) not in path.read_text()
    of_first, of_whole = (of_kernels(ended[command][3]) for command in (FIRST, WHOLE))
    assert {key[:2] for key in of_first} == {
        ("bfloat16", None), ("bfloat16", 64), ("bfloat16", 384), ("float32", 64),
    }  # fmt: skip
    assert {key[:2] for key in of_whole} == {
        ("bfloat16", 64), ("bfloat16", 384), ("float32", 64), ("float16", 64), ("float16", 384),
    }  # fmt: skip
    linear = {(r["subject"], r["workload"]["T"]) for r in ended[FIRST][3]["rows"]
              if r["measure"] == BACKWARD_ALONE}  # fmt: skip
    assert linear == {(f"{n}, float32", T) for n in (SCAN, ASSOCIATIVE) for T in (10, 100)}
    assert f"{BACKWARD_ALONE}: microseconds a step" in ended[FIRST][1]


def test_cudnn_is_timed_beside_them(start, tmp_path):
    pytest.importorskip("torch")
    code, tables, progress, document = end(start(FIRST, tmp_path), tmp_path)
    rows = [row for row in document["rows"] if row["subject"].startswith("cuDNN")]
    assert {row["subject"] for row in rows} == {
        "cuDNN bfloat16", "cuDNN float16", "cuDNN float32", "cuDNN TF32",
    }  # fmt: skip
    assert all(row["status"] == "ready" and row["seconds"] for row in rows), progress
    arrays = {FORWARD: {"hs"}, BACKWARD: {"dU", "dW", "db", "dxs"}}
    assert all(row["errors"].keys() == arrays[row["measure"]] for row in rows)
    assert "cuDNN TF32" in tables
    if jax.__version_info__ < (0, 11):
        refused = [row["reason"] for row in of_kernels(document).values()]
        assert code == 1 and all("it is written for jax 0.11" in reason for reason in refused)
    else:
        assert code == 0


def test_sigterm_keeps_what_was_measured(start, tmp_path):
    process = start(FIRST, tmp_path)
    for line in process.stderr:
        if line.startswith("[2/"):
            process.send_signal(signal.SIGTERM)
            break
    code, tables, progress, document = end(process, tmp_path)
    assert code == 143 and progress[-1].startswith("stopped after")
    assert str(next(tmp_path.iterdir())) in progress[-1] and document["interrupted"]
    timed = [row for row in document["rows"] if row.get("seconds")]
    assert {row["measure"] for row in timed} >= {FORWARD, BACKWARD}
    assert "The run was stopped early." in " ".join(tables.split())


def test_the_run_is_over_when_its_minutes_are(start, tmp_path):
    process = start((*FIRST, "--minutes", "0"), tmp_path)
    _, progress = process.communicate(timeout=300)
    last = progress.splitlines()[-1]
    assert process.returncode == 2 and not any(tmp_path.iterdir())
    assert last.startswith("benchmarks: error: --minutes: the time was up before")


@pytest.mark.parametrize("plan", [plans.FIRST, plans.GPU], ids=["first", "whole"])
def test_a_rehearsal_has_every_kind_of_step(plan):
    def kinds(plan):
        steps = ((step, step.workload) for step in plan.steps)
        return {(s.dtype, w.H > MOST_OF_A_BLOCK, w.tuned, s.measures) for s, w in steps}

    rehearsed = dry.rehearsal(plan)
    assert kinds(rehearsed) == kinds(plan)
    assert (rehearsed.measures, rehearsed.ahead) == (plan.measures, True)
    assert max(step.workload.T * step.workload.B for step in rehearsed.steps) <= 100

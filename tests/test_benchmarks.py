"""The harness: what is timed is right, ratios are paired, and nothing that was measured is lost."""

import json
import pathlib
import re
import signal
import sys
from dataclasses import asdict

import jax
import jax.numpy as jnp
import pytest
from commands import start_python

from benchmarks import crew, plan, report, results, worker
from benchmarks.__main__ import main
from benchmarks.plan import FULL, QUICK, Limits, Plan, Step
from benchmarks.run import Run
from benchmarks.subjects import naive
from benchmarks.subjects.registry import NAIVE, ON_CPU, OURS, Subject
from benchmarks.worker import Bench
from benchmarks.workloads import BACKWARD, FORWARD, HVP, WORKLOADS, Workload, from_json

ROOT = pathlib.Path(__file__).parent.parent
TINY = Workload("tiny", 3, 2, 4, 5)


@pytest.fixture(autouse=True)
def _jax_as_users_have_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


# A worker's inside.


def bench(**makers):
    return Bench("jax", subjects=[Subject(name, "stub", make) for name, make in makers.items()])


def prepare(inside, name, measure, workload=TINY, **how):
    request = {"subject": name, "measure": measure, "workload": asdict(workload), **how}
    return inside.answer({"do": "prepare", **request})


def scaled(by):
    """The naive scan, its states off by a factor."""

    def make(network):
        layer = naive.batched(network)
        return layer._replace(unroll=lambda *args: by * layer.unroll(*args))

    return make


def with_wrong_slope(network):
    """The naive scan with a wrong derivative of tanh."""
    phi = jax.custom_jvp(jnp.tanh)

    @phi.defjvp
    def _(primals, tangents):
        h = jnp.tanh(*primals)
        return h, 1.001 * (1 - h * h) * tangents[0]

    def unroll(weights, xs):
        def step(h, x):
            h = phi(x @ weights.U.T + h @ weights.W.T + weights.b)
            return h, h

        return jax.lax.scan(step, jnp.zeros((xs.shape[1], 5)), xs)[1]

    return naive.batched(network)._replace(unroll=unroll)


def test_a_wrong_subject_fails_and_is_not_timed():
    inside = bench(states=scaled(1.001), slope=with_wrong_slope)
    wrong = prepare(inside, "states", FORWARD)
    assert wrong["status"] == "failed" and wrong["reason"].startswith("hs is off by")
    assert inside.answer({"do": "sample", "subject": "states"})["status"] == "failed"
    assert prepare(inside, "slope", FORWARD)["status"] == "ready"
    assert prepare(inside, "slope", BACKWARD)["reason"].startswith("dU is off by")
    # What was ready before is not timed as the new measure.
    assert inside.answer({"do": "sample", "subject": "slope"})["status"] == "failed"
    assert prepare(inside, "slope", HVP)["reason"].startswith("tangent of dU is off by")


def test_a_right_subject_is_timed():
    inside = bench(scan=naive.batched)
    for measure in (FORWARD, BACKWARD, HVP):
        reply = prepare(inside, "scan", measure)
        assert reply["status"] == "ready" and max(reply["errors"].values()) < 1e-5
        assert reply["trace"] > 0 and reply["compile"] > 0 and reply["temporaries"] >= 0
        seconds = inside.answer({"do": "sample", "subject": "scan"})["seconds"]
        assert reply["repeats"] * seconds > worker.SAMPLE_SECONDS / 4
    assert inside.answer({"do": "forget"})["status"] == "ready" and not inside.ready


def test_missing_packages_and_exceptions_are_replies():
    def missing(network):
        raise ModuleNotFoundError("No module named 'peer'")

    def broken(network):
        raise ValueError("no such shape in /home/someone/peer/layer.py\nand more")

    inside = bench(missing=missing, broken=broken)
    assert prepare(inside, "missing", FORWARD)["status"] == "not installed"
    reply = prepare(inside, "broken", FORWARD)
    assert reply == {"status": "failed", "reason": "ValueError: no such shape in layer.py"}


def test_a_device_that_computes_no_more_ends_its_process(monkeypatch, capsys):
    class EndedError(BaseException):
        pass

    def end(code):
        raise EndedError(code)

    def illegal(network):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr("os._exit", end)
    inside = bench(kernel=illegal)
    assert prepare(inside, "kernel", FORWARD)["status"] == "failed"
    monkeypatch.setattr("benchmarks.programs.check_device", lambda: 1 / 0)
    with pytest.raises(EndedError, match="1"):
        prepare(inside, "kernel", FORWARD)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in capsys.readouterr().err


def test_calls_are_queued_where_they_can_be_waited_for():
    events = []

    def call():
        events.append("call")
        return len(events)

    assert worker.seconds(call, 3, events.append) > 0
    assert events == ["call"] * 3 + [3]


# Rounds.


class StubCrew:
    """Answers at once, `left` times; sample n of a subject takes what `seconds` says."""

    def __init__(self, seconds=lambda subject, n: 1.0, dies=(), left=-1):
        self.seconds, self.dies, self.left = seconds, set(dies), left
        self.asked, self.alive = [], set()

    def call(self, kind, /, do, subject="", **request):
        if self.left == 0:
            raise crew.TimeIsUpError
        self.left -= 1
        self.asked.append((do, subject))
        n = self.asked.count((do, subject))
        if (do, subject, n) in self.dies:
            self.alive.clear()
            raise crew.WorkerDiedError("the process ended with code -9")
        if do == "prepare":
            self.alive.add(subject)
            return {"status": "ready", "repeats": 1}
        if do == "sample":
            assert subject in self.alive
            return {"status": "ready", "seconds": self.seconds(subject, n)}
        return {"status": "ready"}


def measured(stub, *names, most=6, least=5, budget=25.0):
    """The rows of some subjects of one workload, by subject."""
    subjects = {name: Subject(name, "stub") for name in names}
    step = Step(TINY, (FORWARD,), names, Limits(most, least, budget))
    document = results.new({})
    Run(stub, Plan((step,)), subjects, document, lambda line: None, lambda: None).go()
    return {row["subject"]: row for row in document["rows"]}


def test_subjects_go_in_turn_and_each_begins_a_round():
    stub = StubCrew()
    measured(stub, "a", "b", "c")
    order = [subject for do, subject in stub.asked if do == "sample"]
    assert "".join(order) == "abcbcacababcbcacab"
    assert stub.asked[-1] == ("forget", "")


def test_ratios_are_taken_pair_by_pair():
    # The machine slows down tenfold after three rounds; in each round b takes 1.5 times a.
    pace = {"a": 1.0, "b": 1.5}
    rows = measured(StubCrew(lambda subject, n: pace[subject] * (1 if n <= 3 else 10)), "a", "b")
    assert report.paired(rows["b"], rows["a"]) == (1.5, 1.5, 1.5)
    # Rounds that only one of them has are left out.
    late = {"rounds": [4, 5, 6], "seconds": [20.0, 40.0, 1.0]}
    assert report.paired(late, rows["a"]).median == 3.0
    assert report.paired({"rounds": [9], "seconds": [1.0]}, rows["a"]) is None


@pytest.mark.parametrize(("limits", "rounds"), [((50, 5, 0.0), 5), ((3, 3, 9.0), 3)])
def test_the_budget_ends_rounds_but_not_the_first_ones(limits, rounds):
    assert len(measured(StubCrew(), "a", **dict(zip(("most", "least", "budget"), limits)))["a"]["seconds"]) == rounds  # fmt: skip  # noqa: B905, E501


def test_rows_that_are_not_begun_in_time_say_so():
    rows = measured(StubCrew(left=1), "a", "b")
    for row in rows.values():
        assert (row["status"], row["reason"]) == ("not measured", "the time of the run was up")
    rows = measured(StubCrew(left=2 + 2 * 2 + 1), "a", "b")
    assert [len(row["seconds"]) for row in rows.values()] == [3, 2]


def test_a_dead_worker_costs_one_row():
    stub = StubCrew(lambda subject, n: n, dies=[("sample", "b", 3)])
    rows = measured(stub, "a", "b", "c")
    assert rows["b"]["status"] == "failed" and "code -9" in rows["b"]["reason"]
    assert not rows["b"]["seconds"]
    assert rows["a"]["rounds"] == rows["c"]["rounds"] == [0, 1, 2, 3, 4, 5]


# Processes.

SCRIPT = """
import os, sys, time
from benchmarks.worker import serve

class Stub:
    def answer(self, request):
        do = request["do"]
        if do == "machine":
            print("a stray print", flush=True)
            os.write(1, b"and one past Python\\n")
            assert sys.stdin.read() == ""
        if do == "die":
            sys.stderr.write("out of memory in /home/someone/x.py\\n")
            sys.stderr.flush()
            os._exit(3)
        if do == "hang":
            time.sleep(1000)
        return {"status": "ready"}

serve(Stub)
"""


def scripted(kind="jax", device="cpu"):
    return crew.Worker(kind, device, [sys.executable, "-c", SCRIPT], {"hang": 0.5})


def test_a_worker_that_dies_or_hangs_is_started_again(monkeypatch):
    monkeypatch.setattr(crew, "LIVES", 2)
    with crew.Crew("cpu", scripted) as workers:
        for do, said in (("die", r"code 3: out of memory in x\.py"), ("hang", "no answer in 0 s")):
            assert workers.call("jax", do="machine")["status"] == "ready"
            with pytest.raises(crew.WorkerDiedError, match=said):
                workers.call("jax", do=do)
        with pytest.raises(crew.WorkerDiedError, match="died 2 times before"):
            workers.call("jax", do="machine")


def test_a_run_is_over_when_its_minutes_are():
    with crew.Crew("cpu", scripted, until=0.0) as workers, pytest.raises(crew.TimeIsUpError):
        workers.call("jax", do="machine")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)],
)
def test_an_interruption_keeps_what_was_measured(number, code, tmp_path):
    command = ["--workload", "document", "--subject", OURS, "--subject", NAIVE, "--out", tmp_path]
    with start_python("-m", "benchmarks", *command, cwd=ROOT) as process:
        for line in process.stderr:
            if "[1/3]" in line:
                process.send_signal(number)
                break
        tables, said = process.communicate(timeout=120)
    (path,) = tmp_path.iterdir()
    made = results.read(path)
    assert process.returncode == code and "stopped after" in said and str(path) in said
    assert made["interrupted"] and "stopped early" in tables and str(ROOT) not in path.read_text()
    assert any(row["seconds"] for row in made["rows"])


# Plans.


def test_rows_have_names_of_their_own_and_rounds():
    for name, chosen in (("full", FULL), ("quick", QUICK)):
        pairs = [(s.workload.name, m) for s in chosen.steps for m in s.measures]
        assert len(pairs) == len(set(pairs)), name
        assert all(s.limits.most >= s.limits.least >= 5 for s in chosen.steps)
        for step in chosen.steps:
            assert {OURS, NAIVE} <= set(step.subjects) <= {subject.name for subject in ON_CPU}
    assert len({step.workload.name for step in FULL.steps}) == 48


def test_committed_files_have_the_rows_of_today():
    known = {step.workload.name: step.workload for step in FULL.steps}
    for path in (ROOT / "benchmarks" / "results").glob("cpu-intel*/*.json"):
        for row in results.read(path)["rows"]:
            assert from_json(row["workload"]) == known[row["workload"]["name"]]


def test_workloads_survive_json():
    for workload in (*WORKLOADS, plan.on_gpu(128, 16)):
        assert from_json(json.loads(json.dumps(asdict(workload)))) == workload


# Results.


def document(**seconds):
    """Results of TINY: the seconds of each subject in each round."""
    made = results.new({})
    made["device"] = {"processor": "Some", "cores": 2, "gpu": None}
    for name, values in seconds.items():
        name = name.replace("_", " ")
        package = {"jaxrnn": "jaxrnn", "naive scan": "jax"}.get(name, name)
        made["subjects"].append({"name": name, "package": package, "kind": "jax"})
        row = {"workload": asdict(TINY), "subject": name, "measure": FORWARD, "status": "ready"}
        row |= {"rounds": list(range(len(values))), "seconds": values, "temporaries": 120}
        made["rows"].append(row)
    return made


def cells(text):
    """The row of TINY and the geometric mean, by column."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]  # fmt: skip  # noqa: E501
    header, _, row, *_, mean = lines
    return dict(zip(header, row, strict=True)), dict(zip(header, mean, strict=True))


def test_a_report_has_every_ratio_and_the_best_peer():
    made = document(
        jaxrnn=[1.0, 2.0, 3.0], naive_scan=[2.0, 4.0, 6.0], flax=[1.5, 3.0, 4.5], keras=[3.0] * 3
    )
    made["rows"][1]["temporaries"] = 240
    made["rows"][3] |= {"status": "failed", "reason": "hs is off", "rounds": [], "seconds": []}
    text = "\n".join(report.tables([made]))
    row, mean = cells(text)
    assert row["row (T, B, D, H)"] == "tiny (3, 2, 4, 5)" and row["jaxrnn, ms"] == "2,000"
    assert (row["naive scan"], row["flax"], row["best JAX peer"]) == ("2.00", "1.50", "1.50 flax")
    assert row["temporaries beyond naive, [T, B, H]"] == "-1.00"
    assert mean["naive scan"] == "2.00" and mean["jaxrnn, ms"] == report.NOTHING
    assert "keras: failed, hs is off (tiny: forward; 1 in all)" in text


def test_several_runs_show_the_best_and_the_worst():
    runs = [document(jaxrnn=[1.0] * 3, naive_scan=[by] * 3) for by in (2.0, 4.0, 3.0)]
    row, mean = cells("\n".join(report.tables(runs)))
    assert row["naive scan"] == mean["naive scan"] == "4.00 / 2.00"


def test_results_are_read_as_they_were_written(tmp_path):
    made, path = document(jaxrnn=[1.0]), results.new_path(tmp_path / "new" / "run.json")
    results.write(made, path)
    assert results.read(path) == made and [*path.parent.iterdir()] == [path]
    assert results.new_path(path).name == "run-2.json"


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    made = document(jaxrnn=[1.0, 2.0], naive_scan=[2.0, 3.0])
    results.write(made, tmp_path / "run.json")
    picture = tmp_path / "run.png"
    assert main(["report", str(tmp_path / "run.json"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path / "run.json"), "--plot", str(tmp_path / "no" / "x")]) == 2


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "nobody"], "no 'nobody'; there are 'document'"),
        (["--subject", "nobody"], "no 'nobody'"),
        (["--workload", "lengths", "--measure", HVP], "got none"),
        (["--rounds", "0"], "at least 1, got 0"),
        (["--dry"], "needs --device gpu"),
        (["--sideways"], "--sideways"),
        (["report", "nowhere.json"], "nowhere.json"),
        (["report", "README.md"], "README.md: is no JSON"),
        (["tune", "nothing"], "no choice 'nothing'"),
        (["--device", "gpu", "--subject", "cuDNN TF32"], "--device gpu: "),  # no GPU, or no torch
        (["--subject", "jaxrnn", "--minutes", "0"], "the time was up before a worker had started"),
        (["--subject", "jaxrnn", "--out", "README.md/x"], "cannot write the results"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.full
def test_a_quick_run_measures_and_reports(tmp_path, capsys):
    assert main(["--quick", "--rounds", "2", "--budget", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    text = capsys.readouterr().out
    assert f"report {path}" in text and re.search(r"\| medium \(256, 32, 128, 128\) +\|", text)
    rows = results.read(path)["rows"]
    expected = sum(len(step.measures) * len(step.subjects) for step in QUICK.steps)
    assert len(rows) == expected
    assert all(len(row["seconds"]) == 2 for row in rows if row["status"] == "ready")


def test_a_part_is_measured_with_as_many_rounds_as_asked_for(tmp_path):
    chosen = ["--workload", "document", "--subject", OURS, "--subject", NAIVE, "--rounds", "2"]
    assert main([*chosen, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = results.read(path)["rows"]
    assert {row["measure"] for row in rows} == {FORWARD, BACKWARD, HVP} and len(rows) == 6
    assert all(row["rounds"] == [0, 1] and row["errors"] for row in rows)

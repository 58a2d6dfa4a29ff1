"""The harness: what is timed is right, ratios are paired, and nothing that was measured is lost."""

import ast
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import machine, plans, ratios, report, results, run, sweeps, timing, workers
from benchmarks.catalogue import Listed, listed
from benchmarks.cli import main
from benchmarks.jax_side import JaxSide
from benchmarks.measures import BACKWARD, FORWARD, HVP, JVP, MEASURES, PARAMETERS
from benchmarks.networks import Network
from benchmarks.picture import plot
from benchmarks.progress import Reporter, reporter
from benchmarks.rounds import Limits, Trial
from benchmarks.subjects import JaxSubject, naive, ours
from benchmarks.subjects.registry import Entry, _two_devices
from benchmarks.text import one_line, without_directories
from benchmarks.worker import Bench
from benchmarks.workloads import NEW_WORKLOADS, WORKLOADS, Workload, is_new

ROOT = pathlib.Path(__file__).parent.parent
TINY = Workload("tiny", 3, 2, 4, 5)


@pytest.fixture(autouse=True)
def _jax_as_users_have_it():
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


# What is measured.


def bench(kind=workers.JAX, **subjects):
    """A worker's inside, with these subjects: functions that make them."""
    entries = {name: Entry("stub", "", make) for name, make in subjects.items()}
    described = [Listed(name, "stub", kind, name) for name in subjects]
    return Bench(JaxSide(kind, entries=entries, subjects=described))


def prepare(bench, name, measure, workload=TINY):
    request = {"subject": name, "measure": measure, "workload": asdict(workload), "compiles": 1}
    return bench.answer({"do": "prepare", **request})


def stub(phi):
    """The naive scan with another φ."""
    return replace(naive.batched(), name="stub", unroll=naive._scan(phi))


@jax.custom_vjp
def _wrong_slope(a):
    return jnp.tanh(a)


_wrong_slope.defvjp(lambda a: (jnp.tanh(a), a), lambda a, g: (1.001 * g * (1 - jnp.tanh(a) ** 2),))


@jax.custom_jvp
def _wrong_curvature(a):
    return jnp.tanh(a)


@_wrong_curvature.defjvp
def _(primals, tangents):
    h = jnp.tanh(*primals)
    return h, (1 - jax.lax.stop_gradient(h) ** 2) * tangents[0]


def test_a_wrong_subject_fails_and_is_not_timed():
    worker = bench(
        states=lambda: stub(lambda a: 1.001 * jnp.tanh(a)),
        slope=lambda: stub(_wrong_slope),
        curvature=lambda: stub(_wrong_curvature),
    )
    wrong = prepare(worker, "states", FORWARD)
    assert wrong["status"] == "failed" and wrong["reason"].startswith("hs is off by")
    assert worker.answer({"do": "sample", "subject": "states"})["status"] == "failed"
    assert prepare(worker, "slope", FORWARD)["status"] == "ready"
    assert prepare(worker, "slope", BACKWARD)["reason"].startswith("dU is off by")
    # What was ready before is not timed as the new measure.
    assert worker.answer({"do": "sample", "subject": "slope"})["status"] == "failed"
    assert prepare(worker, "curvature", PARAMETERS)["status"] == "ready"
    assert prepare(worker, "curvature", HVP)["reason"].startswith("the tangent of dU is off by")


@pytest.mark.parametrize(
    "workload",
    [TINY, Workload("ids", 3, 2, 4, 5, ids=True), Workload("many", 3, 2, 4, 5, members=3)],
    ids=lambda workload: workload.name,
)
def test_every_measure_of_a_right_subject_is_timed(workload):
    worker = bench(
        scan=naive.batched, mapped=naive.mapped, relu=partial(naive.batched, "relu"),
        jaxrnn=ours.native, no_ids=lambda: replace(naive.mapped(), takes_ids=False),
    )  # fmt: skip
    for name, measures in {
        "scan": MEASURES, "relu": (BACKWARD, JVP, HVP), "mapped": (BACKWARD, JVP),
        "jaxrnn": (HVP,), "no_ids": (BACKWARD,),
    }.items():  # fmt: skip
        for measure in measures:
            reply = prepare(worker, name, measure, workload)
            assert reply["status"] == "ready", (name, measure, reply)
            assert reply["repeats"] * reply["seconds"] > timing.SAMPLE_SECONDS / 2
            assert 0 < reply["trace"] < reply["first_call"] and reply["temporaries"] >= 0
            assert worker.answer({"do": "sample", "subject": name})["seconds"] > 0


def test_a_sample_does_not_compile(monkeypatch):
    """Preparing a subject drops the compiled programs of those before it."""
    traced, within, seconds = [], [], timing.seconds

    def phi(a):
        traced.append(a.shape)
        return jnp.tanh(a)

    def counted(*args):
        before, found = len(traced), seconds(*args)
        within.append(len(traced) - before)
        return found

    slow = replace(TINY, T=2000, H=256)  # a sample is one call
    worker = bench(first=lambda: stub(phi), second=naive.batched)
    assert prepare(worker, "first", FORWARD, slow)["repeats"] == 1
    prepare(worker, "second", FORWARD, slow)
    monkeypatch.setattr(timing, "seconds", counted)
    worker.answer({"do": "sample", "subject": "first"})
    assert within[0] > 0 and within[-1] == 0


def test_missing_packages_and_exceptions_are_rows():
    def missing():
        raise ModuleNotFoundError("No module named 'peer'")

    def broken(weights, xs):
        raise ValueError("no such shape in /home/someone/peer/layer.py\nand more")

    worker = bench(missing=missing, broken=lambda: replace(naive.batched(), unroll=broken))
    absent, there = worker.answer({"do": "subjects", "names": None})["subjects"]
    assert absent["status"] == "not installed" and "No module named 'peer'" in absent["reason"]
    assert there["status"] == "ready"
    reply = prepare(worker, "broken", FORWARD)
    assert reply == {"status": "failed", "reason": "ValueError: no such shape in layer.py"}


def test_a_batch_that_cannot_be_split_is_not_offered():
    make = partial(_two_devices, naive.batched)
    worker = bench(workers.TWO_DEVICES, split=make)
    assert prepare(worker, "split", FORWARD)["status"] == "not offered"
    four = replace(TINY, B=len(jax.devices()))
    assert prepare(worker, "split", FORWARD, four)["status"] == "ready"


def test_other_dtypes_are_checked_at_their_own():
    described = Listed("jaxrnn, other", "jaxrnn", workers.JAX, "jaxrnn", "bfloat16")
    worker = Bench(JaxSide(workers.JAX, subjects=[described]))
    assert prepare(worker, "jaxrnn, other", BACKWARD)["status"] == "ready"


def test_a_workload_may_have_its_own_dtype():
    worker = bench(jaxrnn=ours.native, scan=naive.batched)
    for name in ("jaxrnn", "scan"):
        assert prepare(worker, name, BACKWARD, replace(TINY, dtype="bfloat16"))["status"] == "ready"
        given = worker.side.given[name]
        leaves = jax.tree.leaves((given.weights, given.xs, given.g))
        assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_derivatives_without_a_reference_are_not_offered():
    leaky = replace(TINY, network=Network(leak=0.2))
    assert prepare(bench(scan=naive.batched), "scan", HVP, leaky)["status"] == "not offered"
    last = replace(TINY, network=Network(last=True))
    for measure in MEASURES:
        assert prepare(bench(scan=naive.batched), "scan", measure, last)["status"] == "ready"


def test_the_roofline_counts_its_products():
    side = JaxSide(workers.JAX, subjects=[Listed("roofline", "jax", workers.JAX, "roofline")])
    for measure, recurrent, of_inputs in ((FORWARD, 1, 1), (BACKWARD, 3, 3), (PARAMETERS, 3, 2)):
        reply = prepare(Bench(side), "roofline", measure)
        assert reply["flops"] == 2 * 3 * 2 * (recurrent * 5 * 5 + of_inputs * 4 * 5)
    assert prepare(Bench(side), "roofline", JVP)["status"] == "not offered"


def test_calls_are_queued_where_they_can_be_waited_for():
    happened = []

    def call():
        happened.append("call")
        return len(happened)

    assert timing.seconds(call, 3, lambda last: happened.append(last)) > 0
    assert happened == ["call"] * 3 + [3]
    repeats, seconds = timing.calibrate(lambda: time.sleep(1e-3), lambda _: None, 5e-3)
    assert 2 <= repeats <= 6 and seconds >= 1e-3
    happened.clear()
    timing.sample(call, 4, lambda last: happened.append(last))
    assert happened == ["call", 1, *["call"] * 4, 6]


def test_peak_memory_is_that_of_one_call():
    found = timing.peak_bytes(lambda: bytearray(50_000_000))
    assert found is None or 45e6 < found < 70e6


def test_the_catalogue_has_everyone_once():
    everyone = listed("cpu")
    names = [subject.name for subject in everyone]
    assert len(set(names)) == len(names) and {"roofline", "jaxrnn", "torch"} <= set(names)
    assert {subject.kind for subject in everyone} == set(workers.KINDS["cpu"])
    assert {subject.kind for subject in listed("cpu", quick=True)} == {"jax", "torch"}
    on_gpu = {subject.name: subject for subject in listed("gpu")}
    assert on_gpu["jaxrnn, kernel, bfloat16"].dtype == "bfloat16" and "torch" not in on_gpu
    kinds = {subject.kind for subject in on_gpu.values()}
    assert kinds == set(workers.KINDS["gpu"])


# Rounds.


class StubCrew:
    """Answers at once, `left` times; sample n of a subject takes what `seconds` says."""

    def __init__(self, seconds, dies=(), left=-1):
        self.seconds, self.dies, self.asked, self.left = seconds, set(dies), [], left
        self.over = False
        self.alive: dict[str, set] = {}

    def late(self):
        return self.over

    def call(self, kind, /, do, subject="", **request):
        if self.left == 0:
            raise workers.TimeIsUpError
        self.left -= 1
        self.asked.append((do, subject))
        alive = self.alive.setdefault(kind, set())
        if do == "prepare":
            alive.add(subject)
            return {"status": "ready", "repeats": 1, "seconds": 1.0, "temporaries": 7}
        if do == "sample":
            n = sum(entry == ("sample", subject) for entry in self.asked)
            if (subject, n) in self.dies:
                alive.clear()
                raise workers.WorkerDiedError("the process was killed by signal 9")
            assert subject in alive
            return {"status": "ready", "seconds": self.seconds(subject, n)}
        return {"status": "ready"}


def trial(crew, *names, kind="jax", **limits):
    subjects = [{"name": name, "kind": kind, "status": "ready"} for name in names]
    quiet = Reporter(Console(file=io.StringIO()), 1)
    limits = Limits(**{"most": 6, "least": 5, **limits})
    return Trial(crew, subjects, TINY, FORWARD, limits, quiet)


def test_subjects_go_in_turn_and_each_begins_a_round():
    crew = StubCrew(lambda subject, n: 1.0)
    trial(crew, "a", "b", "c").run()
    order = [subject for do, subject in crew.asked if do == "sample"]
    assert "".join(order) == "abcbcacababcbcacab"
    assert crew.asked[-1] == ("forget", "")


def test_ratios_are_taken_pair_by_pair():
    # The machine slows down tenfold after three rounds; in each round b takes 1.5 times a.
    pace = {"a": 1.0, "b": 1.5}
    crew = StubCrew(lambda subject, n: pace[subject] * (1 if n <= 3 else 10))
    found = trial(crew, "a", "b")
    found.run()
    ratio = ratios.paired(found.rows["b"], found.rows["a"])
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (1.5, 1.5, 1.5, 6)
    # Rounds that only one of them has are left out.
    late = {"rounds": [4, 5, 6], "seconds": [20.0, 40.0, 1.0]}
    assert ratios.paired(late, found.rows["a"]).median == 3.0
    assert ratios.paired({"rounds": [9], "seconds": [1.0]}, found.rows["a"]) is None


def test_the_budget_ends_rounds_but_not_the_first_five():
    found = trial(StubCrew(lambda subject, n: 1.0), "a", most=50, budget=0.0)
    found.run()
    assert found.rows["a"]["rounds"] == [0, 1, 2, 3, 4]


def test_what_is_not_begun_in_time_is_a_row_that_says_so():
    found = trial(StubCrew(lambda subject, n: 1.0, left=1), "a", "b")
    found.run()
    for row in found.kept():
        assert row["status"] == "not measured"
        assert row["reason"] == "the time of the run was up"
    assert len(found.kept()) == 2


def test_on_a_cpu_what_has_begun_is_finished():
    crew = StubCrew(lambda subject, n: 1.0)
    found = trial(crew, "a", "b")
    prepare = found._prepare

    def first_only(subject):
        prepare(subject)
        crew.over = True

    found._prepare = first_only
    found.run()
    row, left_out = found.kept()
    assert len(row["seconds"]) == 6 and left_out["reason"] == "the time of the run was up"
    with workers.Crew("cpu", noisy, until=time.monotonic()) as crew:
        assert crew.late() and crew.call("jax", do="machine")["threads"] == 1


def test_what_was_measured_in_time_stays():
    found = trial(StubCrew(lambda subject, n: 1.0, left=2 + 2 * 2 + 1), "a", "b")
    found.run()
    assert [len(row["seconds"]) for row in found.kept()] == [3, 2]


def test_a_dead_worker_fails_its_subject_and_loses_no_other():
    found = trial(StubCrew(lambda subject, n: n, dies=[("b", 3)]), "a", "b", "c")
    found.run()
    assert found.rows["b"]["status"] == "failed" and "signal 9" in found.rows["b"]["reason"]
    assert "seconds" not in found.rows["b"]
    assert found.rows["a"]["rounds"] == found.rows["c"]["rounds"] == [0, 1, 2, 3, 4, 5]
    assert [r["subject"] for r in found.kept_records(["temporaries"])] == ["a", "c"]


def test_sweeps_measure_every_point():
    subjects = [{"name": name, "kind": "jax", "status": "ready"} for name in sweeps.SUBJECTS]
    crew, points = StubCrew(lambda subject, n: 1.0), []
    quiet = Reporter(Console(file=io.StringIO()), sweeps.units())
    sweeps.run(crew, subjects, quiet, points, limits=Limits(most=1, least=1))
    assert len(points) == 2 * sweeps.units() == 2 * quiet.done
    found = {(point["axis"], point["value"]) for point in points}
    assert {("T", 4096), ("B", 1), ("H", 1024)} <= found and points[0]["temporaries"] == 7


def test_progress_names_what_is_being_done(monkeypatch):
    monkeypatch.setattr("benchmarks.progress.REFRESH_SECONDS", 0.0)
    screen = io.StringIO()
    with reporter(Console(file=screen, force_terminal=True, width=100), 2) as tell:
        tell.begin("tiny, forward", 3)
        tell.step("flax.nnx")
        tell.end("1 subject")
    assert "tiny, forward: flax.nnx" in screen.getvalue()


# Processes.

NOISY = """
import os, sys
from benchmarks.worker import serve

class Side:
    def healthy(self):
        return True
    def machine(self):
        print("a stray print")
        os.write(1, b"and one past Python\\n")
        assert sys.stdin.read() == ""
        return {"gpu": None, "threads": 1}
    def subjects(self, names):
        sys.stderr.write("out of memory in /home/someone/x.py\\n")
        sys.stderr.flush()
        os._exit(3)

print("while it starts", flush=True) if "early" in sys.argv else None
serve(Side)
"""


def noisy(kind="jax", device="cpu"):
    return workers.Worker(kind, device, [sys.executable, "-c", NOISY])


def ask(worker, **request):
    worker.send(**request)
    return worker.receive()


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_stray_prints_do_not_break_the_protocol(at_root):
    worker = noisy()
    try:
        for _ in range(2):
            assert ask(worker, do="machine")["threads"] == 1
        assert ask(worker, do="nonsense")["status"] == "failed"
    finally:
        worker.close()


def test_a_worker_that_dies_leaves_its_last_words_and_is_started_again(at_root):
    with workers.Crew(make=noisy, lives=2) as crew:
        for _ in range(2):
            assert crew.call("jax", do="machine")["status"] == "ready"
            with pytest.raises(workers.WorkerDiedError, match=r"code 3: out of memory in x\.py"):
                crew.call("jax", do="subjects", names=None)
        with pytest.raises(workers.WorkerDiedError, match="died 2 times before"):
            crew.call("jax", do="machine")


def test_a_worker_ends_when_its_input_does(at_root):
    worker = noisy()
    worker.process.stdin.close()
    assert worker.process.wait(timeout=30) == 0
    worker.close()


PARTIAL = """
import os, time
os.write(1, b'{"status": ')
time.sleep({seconds})
os.write(1, b'"ready"}\\n')
time.sleep({after})
"""


def test_an_answer_is_waited_for_to_its_end(monkeypatch):
    def answer(seconds, after, limit):
        command = [
            sys.executable,
            "-c",
            PARTIAL.replace("{seconds}", str(seconds)).replace("{after}", str(after)),
        ]
        worker = workers.Worker("jax", "gpu", command, seconds={"machine": limit, "compile": 0.0})
        worker.answered.add("compile")
        try:
            return ask(worker, do="machine")
        finally:
            worker.close()

    assert answer(0.2, 100, 30) == {"status": "ready"}
    start = time.monotonic()
    with pytest.raises(workers.WorkerDiedError, match="gave no answer in 3 s"):
        answer(100, 0, 3.0)
    assert time.monotonic() - start < 20
    monkeypatch.setattr(sys.modules[__name__], "PARTIAL", PARTIAL.split("time.sleep")[0])
    with pytest.raises(workers.WorkerDiedError, match="ended with exit code 0"):
        answer(0, 0, 30)


def test_each_kind_of_worker_has_its_flags():
    base = {"XLA_FLAGS": "--xla_mine=1"}
    flags = {k: workers.environment(k, "cpu", base)["XLA_FLAGS"] for k in workers.KINDS["cpu"]}
    assert all(f.startswith("--xla_mine=1") for f in flags.values())
    assert flags["jax"] == flags["torch"] == "--xla_mine=1"
    assert flags[workers.TWO_DEVICES].endswith("--xla_force_host_platform_device_count=2")
    assert "small_while_loop" in flags[workers.ONE_KERNEL]


def test_workers_for_a_gpu_share_what_they_tune_and_find_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.workers.cuda_root", lambda: tmp_path)
    found = workers.environment("jax", "gpu", {"OMP_NUM_THREADS": "99"}, cache="there")
    # Several processes compute references and compile at once.
    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "2"
    assert found["JAX_PLATFORMS"].startswith("cuda")
    assert found["XLA_FLAGS"] == "--xla_gpu_per_fusion_autotune_cache_dir=there"
    assert found["CUDA_ROOT"] == str(tmp_path)
    assert workers.environment("jax", "cpu", {}).keys().isdisjoint({"CUDA_ROOT", "OMP_NUM_THREADS"})


def test_the_cuda_toolkit_has_both_parts(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "usr")
    assert machine.cuda_root() is None
    for root in ("nvidia/cu13", "usr/cuda"):
        (tmp_path / root / "bin").mkdir(parents=True)
        (tmp_path / root / "bin" / "ptxas").touch()
    libdevice = tmp_path / "usr/cuda/nvvm/libdevice/libdevice.10.bc"
    libdevice.parent.mkdir(parents=True)
    libdevice.touch()
    # The packages have a compiler, and lack the library.
    assert machine.cuda_root() == tmp_path / "usr/cuda"
    monkeypatch.setenv("CUDA_ROOT", "/mine")
    assert machine.cuda_root() == pathlib.Path("/mine")


class Answers:
    """Workers that say what they run on, by kind; an exception is a worker that died."""

    def __init__(self, **machines):
        self.machines = machines

    def call_each(self, requests):
        found = {}
        for kind, request in requests.items():
            names = request.get("names", [])
            there = {"status": "ready", "subjects": [{"name": n, "status": "ready"} for n in names]}
            found[kind] = (
                there if "names" in request else self.machines.get(kind, self.machines["jax"])
            )
        return found


def ready(gpu):
    return {"status": "ready", "gpu": gpu, "threads": 1, "flags": ""}


@pytest.mark.parametrize(
    "answer, said",
    [(ready(None), "finds no GPU here"),
     ({"status": "failed", "reason": "RuntimeError: no CUDA"}, "RuntimeError: no CUDA"),
     (workers.WorkerDiedError("it died"), "it died")],
    ids=["CPU", "failed", "died"],
)  # fmt: skip
def test_no_gpu_is_said(answer, said):
    crew, document = (
        Answers(jax=answer, torch=ready("NVIDIA H200")),
        results.new({"gpu": None}, {}, {}),
    )
    with pytest.raises(run.NoDeviceError, match=said):
        run.describe_workers(crew, listed("gpu"), "gpu", document)


def test_a_process_without_the_gpu_does_not_measure():
    document = results.new({"gpu": None}, {}, {})
    crew = Answers(**{workers.KERNELS: ready("NVIDIA H200"), "jax": ready(None)})
    run.describe_workers(crew, listed("gpu"), "gpu", document)
    assert document["device"]["gpu"] == "NVIDIA H200"
    by_kind = {}
    for subject in document["subjects"]:
        by_kind.setdefault(subject["kind"], set()).add(subject["status"])
    there = {kind for kind, found in by_kind.items() if found == {"ready"}}
    assert there == {workers.KERNELS, workers.TORCH} and by_kind[workers.JAX] == {"failed"}


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    out = tmp_path / "kept" / "run.json"
    # A shell that runs the tests in the background has had SIGINT ignored.
    heeding_ctrl_c = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    )
    command = [
        sys.executable, "-c", heeding_ctrl_c, "--workload", "document", "--subject", "naive scan",
        "--subject", "jaxrnn", "--rounds", "5", "--out", str(out),
    ]  # fmt: skip

    lines = []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("[1/5]"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, lines
    assert lines[0].startswith("[1/5] document, forward: 2 subjects, 5 rounds")
    assert lines[-1].startswith("stopped after") and str(out) in lines[-1]
    document = results.read(out)
    assert document["interrupted"] and len(list(out.parent.iterdir())) == 1
    rows = [row for row in document["rows"] if row["measure"] == FORWARD]
    assert [(row["subject"], len(row["seconds"])) for row in rows] == [
        ("jaxrnn", 5), ("naive scan", 5),
    ]  # fmt: skip
    assert document["memory"][0]["temporaries"] > 0 and document["compile"][0]["first_call"] > 0
    text = out.read_text()
    assert str(ROOT) not in text and str(tmp_path) not in text


# Results.


def document(workloads=WORKLOADS, naive=2.0):
    """Each workload takes longer than the one before; everything that can be missing is."""
    device = {"processor": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "gpu": None}
    made = results.new(device, {"python": "3.11.7", "jax": "0.10.2", "keras": None}, {})
    made["subjects"] = [
        {"name": name, "package": package, "kind": kind, "activation": activation}
        for name, package, kind, activation in (
            ("roofline", "jax", "jax", ""), ("jaxrnn", "jaxrnn", "jax", "tanh"),
            ("jaxrnn, vmap", "jaxrnn", "jax", "tanh"), ("naive scan", "jax", "jax", "tanh"),
            ("flax.linen", "flax", "jax", "tanh"), ("keras", "keras", "jax", ""),
            ("jaxrnn, relu", "jaxrnn", "jax", "relu"), ("haiku, relu", "dm-haiku", "jax", "relu"),
            ("torch", "torch", "torch", "tanh"),
        )
    ]  # fmt: skip
    milliseconds = {
        "roofline": 0.5, "jaxrnn": 1.0, "jaxrnn, vmap": 1.05, "naive scan": naive,
        "flax.linen": 1.8, "jaxrnn, relu": 0.8, "haiku, relu": 1.2,
        "jaxrnn, two host devices": 0.6, "naive scan, two host devices": 1.5, "torch": 3.0,
    }  # fmt: skip
    for n, workload in enumerate(workloads):
        for measure, factor in ((FORWARD, 1), (BACKWARD, 3)):
            key = {"workload": asdict(workload), "measure": measure}
            for name, ms in milliseconds.items():
                seconds = [1e-3 * (1 + n) * factor * ms * noise for noise in (1.0, 1.1, 0.9)]
                row = {**key, "subject": name, "status": "ready", "rounds": [0, 1, 2]}
                row |= {"flops": 10**9} if name == "roofline" else {}
                made["rows"].append({**row, "repeats": 1, "seconds": seconds})
                figures = {**key, "subject": name, "trace": 0.1, "compile": 0.2 * ms}
                made["compile"].append({**figures, "first_call": 0.4})
                made["memory"].append({**key, "subject": name, "temporaries": int(1e6 * ms)})
            reason = {"status": "not installed", "reason": "No module named 'keras'"}
            made["rows"].append({**key, "subject": "keras", **reason})
    wrong = {"status": "failed", "reason": "dW is off by 1"}
    made["rows"][-2] = {**key, "subject": "torch", **wrong}
    for axis, workloads in sweeps.AXES.items():
        for workload in workloads:
            for name, power in (("jaxrnn", 1), ("naive scan", 2)):
                value = getattr(workload, axis)
                made["sweeps"].append({
                    "axis": axis, "value": value, "workload": asdict(workload), "subject": name,
                    "measure": BACKWARD, "status": "ready", "rounds": [0], "temporaries": value,
                    "seconds": [1e-5 * value**power],
                })  # fmt: skip
    return made


def test_results_survive_writing_and_reading(tmp_path):
    made, path = document(), tmp_path / "new" / "a.json"
    results.write(made, path)
    again = results.read(path)
    assert again["rows"][0]["seconds"] == pytest.approx(made["rows"][0]["seconds"], rel=1e-5)
    for key in made.keys() - {"rows", "sweeps", "compile"}:
        assert again[key] == made[key], key
    assert len(again["rows"]) == len(made["rows"]) < len(path.read_text().splitlines())
    assert results.new_path(path) == path.with_name("a-2.json")
    assert results.new_path(path, force=True) == path
    assert results.new_path(tmp_path / "b.json") == tmp_path / "b.json"


def test_a_workload_is_read_as_it_was_written():
    workload = replace(TINY, network=Network("relu", leak=0.2), dtype="bfloat16")
    assert Workload(**json.loads(json.dumps(asdict(workload)))) == workload
    old = {name: value for name, value in asdict(TINY).items() if name not in ("network", "dtype")}
    assert Workload(**old) == TINY


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    results.write(document(), path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.write({**document(), "rows": []}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_results_are_refused(tmp_path):
    path = tmp_path / "a.json"
    for text, match in (("{", "is no JSON"), ("[]", "schema 1"), ('{"schema": 1}', "lacks date")):
        path.write_text(text)
        with pytest.raises(results.ResultsError, match=match):
            results.read(path)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_slopes_of_power_laws_are_exact(power):
    xs = [16, 32, 64, 512, 4096]
    ys = [3e-6 * x**power for x in xs]
    assert ratios.slope(xs, ys) == pytest.approx(power, abs=1e-12)
    assert ratios.slope(xs, [1.0, *ys[1:]], last=3) == pytest.approx(power, abs=1e-12)
    assert ratios.slope(xs[:1], ys[:1]) is None


def test_tables_say_who_is_how_many_times_slower():
    text = report.markdown(document())
    blocks = {block.strip("* \n"): body for block, body in zip(
        *[iter(text.split("\n\n")[1:])] * 2, strict=True)}  # fmt: skip
    rows = [line.split(" | ") for line in blocks["forward+backward: others / jaxrnn"].splitlines()]
    header = [cell.strip("| ") for cell in rows[0]]
    cells = dict(zip(header, (cell.strip("| ") for cell in rows[2]), strict=True))
    assert cells["workload (T, B, D, H)"] == "document (4, 1, 4, 1)"
    # haiku is a relu network: 1.2 over 0.8 is less than flax.linen's 1.8 over 1.
    assert cells["best JAX peer"] == "1.50 haiku, relu (1.50–1.50)"
    assert cells["naive scan"] == "2.00 (2.00–2.00)" and cells["vmap"] == "1.05 (1.05–1.05)"
    assert cells["fraction of roofline"] == "0.50 (0.50–0.50)" and cells["memory, naive"] == "2.00"
    assert cells["compile, naive"] == "1.67" and cells["backward / forward"] == "2.00"
    last = [cell.strip("| ") for cell in rows[-1]]
    assert last[:3] == ["geometric mean", "1.50", "2.00"]
    ensemble = [cell.strip("| ") for cell in rows[-2]]
    assert ensemble[0] == "ensemble (100, 8, 16, 64), 64 members"
    assert ensemble[header.index("torch")] == "–"
    times = blocks["forward, milliseconds"].splitlines()
    assert "| jaxrnn | 1.00 | 2.00 |" in times[3] and not any("keras" in line for line in times)
    assert "| torch | 9.00 |" in text and " failed |" in text
    assert "| keras | not installed | No module named 'keras' | document: forward; and 19" in text
    assert "| torch | failed | dW is off by 1 | ensemble: forward+backward |" in text
    assert "| T | naive scan | 64 – 4096 | 41.0 – 167,772 | 2.00 | 2.00 |" in text
    assert "2 cores of AMD EPYC" in text and "keras" not in text.split("\n\n")[0]


def cells_of(text, title):
    """The table of that title: by row, by column."""
    lines = text.split(f"**{title}**")[1].strip().split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_new_rows_have_a_mean_of_their_own():
    new = NEW_WORKLOADS[0], replace(NEW_WORKLOADS[-1], name="bfloat16, T 60")
    made = document((WORKLOADS[3], *new))
    for row in made["rows"]:
        if row["subject"] == "naive scan" and is_new(Workload(**row["workload"])):
            row["seconds"] = [2 * seconds for seconds in row["seconds"]]
    text = report.markdown(made)
    found = cells_of(text, "forward+backward: others / jaxrnn")
    means = {name: row["naive scan"] for name, row in found.items() if "mean" in name}
    assert means == {
        "geometric mean, old rows": "2.00", "geometric mean, new rows": "4.00",
        "geometric mean": f"{2 ** (5 / 3):.2f}",
    }  # fmt: skip
    beyond = {name: row[report.BEYOND] for name, row in found.items()}
    sizes = [4 * 256 * 32 * 128, 4 * 60 * 16 * 64, 2 * 256 * 32 * 128]
    assert list(beyond.values())[:3] == [f"{-1e6 / size:.2f}" for size in sizes]
    assert beyond["geometric mean"] == "–"
    row = found["medium (256, 32, 128, 128)"]
    assert row["two host devices"] == "2.50 (2.50–2.50)" and row["trace, naive"] == "1.00"
    turned = cells_of(text, "forward, milliseconds, new rows")
    assert turned["rate tanh, B 16, H 64 (60, 16, 3, 64)"]["jaxrnn"] == "2.00"
    assert list(cells_of(text, "forward, milliseconds")["jaxrnn"])[1:] == [
        "medium (256, 32, 128, 128)"
    ]


def test_relu_peers_are_paired_with_ours_on_rows_that_are_relu():
    made = document([w for w in NEW_WORKLOADS if w.name == "relu, T 60"])
    made["rows"] = [row for row in made["rows"] if row["subject"] != "jaxrnn, relu"]
    found = cells_of(report.markdown(made), "forward: others / jaxrnn")
    assert found["relu, T 60 (60, 64, 3, 128)"]["best JAX peer"] == "1.20 haiku, relu (1.20–1.20)"


def test_several_runs_show_the_best_and_the_worst(tmp_path, capsys):
    files = []
    workloads = WORKLOADS[0], NEW_WORKLOADS[0]
    for milliseconds, of_run in ((2.0, workloads), (3.0, workloads[:1])):
        files.append(str(tmp_path / f"{len(of_run)}.json"))
        results.write(document(of_run, milliseconds), pathlib.Path(files[-1]))
    assert main(["report", *files, "--markdown"]) == 0
    found = cells_of(capsys.readouterr().out, "forward, best of 2 runs: naive / jaxrnn")
    assert [list(row.values())[1:] for row in found.values()] == [
        ["3.00", "2.00", "2"], ["2.00", "2.00", "1"],
        ["3.00", "2.00", ""], ["2.00", "2.00", ""], ["2.45", "2.00", ""],
    ]  # fmt: skip
    assert main(["report", *files]) == 0 and "best of 2 runs" in capsys.readouterr().out
    assert main(["report", *files, "--plot", str(tmp_path / "a.png")]) == 2
    assert "expected one FILE" in capsys.readouterr().err


def test_the_report_of_a_file_in_a_terminal_and_as_a_picture(tmp_path, capsys):
    path, picture = tmp_path / "a.json", tmp_path / "a.png"
    results.write(document(), path)
    assert main(["report", str(path), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "1.50 haiku, relu" in shown and "Not timed" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(path), "--markdown"]) == 0
    assert capsys.readouterr().out.count("| --- |") > 5


def test_a_picture_and_tables_of_next_to_nothing(tmp_path):
    made = document()
    plot({**made, "sweeps": []}, tmp_path / "a.png")
    plot(document((*WORKLOADS, *NEW_WORKLOADS)), tmp_path / "d.png")
    plot({**made, "rows": []}, tmp_path / "b.png")
    empty = {**made, "rows": [], "sweeps": [], "compile": [], "memory": []}
    plot(empty, tmp_path / "c.png")
    assert len(list(tmp_path.iterdir())) == 4 and "AMD EPYC" in report.markdown(empty)


def test_bad_input_is_one_line(tmp_path, capsys):
    for arguments, expected in (
        (["--subject", "nobody"], "no 'nobody'; there are 'roofline', 'jaxrnn'"),
        (["run", "--workload", "nothing"], "--workload: no 'nothing'; there are 'document'"),
        (["--quick", "--rows", "new"], "expected options that some workload fits"),
        (["report", str(tmp_path / "none.json")], "cannot be read: No such file"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("benchmarks: error: ") and error.count("\n") == 1
        assert expected in error
    for arguments in (["--rounds", "0"], ["--budget", "-1"], ["run", "--device", "tpu"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.count("\n") == 1


def test_nothing_of_the_machine_is_told():
    assert without_directories("in /home/me/x/y.py: 1/2 of a/b") == "in y.py: 1/2 of a/b"
    assert one_line(ValueError("")) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 200


def test_plans_fit_their_time(capsys):
    assert plans.QUICK.minutes < 2 and plans.GPU.minutes < 9 and plans.FULL.minutes is None
    assert plans.FIRST.minutes < 6
    for plan, command in ((plans.FIRST, "first"), (plans.GPU, "run")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"{plan.minutes:g})" in said.split("the run is over by then (default:")[1][:20]
    assert {step.workload.name for step in plans.QUICK.steps} == {
        "document", "char-rnn, ids", "one long stream", "medium",
    }  # fmt: skip


def test_new_rows_have_names_of_their_own_and_take_little_time():
    names = [step.workload.name for step in plans.FULL.steps]
    assert len(set(names)) == len(names) == len(WORKLOADS) + len(NEW_WORKLOADS)
    known = {subject.base for subject in listed("cpu")}
    for step in plans.FULL.steps:
        assert set(step.bases or ()) <= known
        few = plans.FULL.limits_of(step).compiles == 1
        assert is_new(step.workload) == few == (step.workload not in WORKLOADS)


def test_steps_with_measures_of_their_own_keep_to_those_that_are_asked_for():
    plan = plans.FULL.only([FORWARD, JVP])
    assert {plan.measures_of(step) for step in plan.steps} == {(FORWARD, JVP), (FORWARD,)}
    assert [step.workload.name for step in plans.FULL.only([HVP]).steps] == [
        *(workload.name for workload in WORKLOADS), "last state",
    ]  # fmt: skip
    few = plans.FULL.limited(lambda limits: replace(limits, most=2))
    assert {few.limits_of(step).most for step in few.steps} == {2}


def test_imports_go_one_way():
    files = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    imported: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                found.add(node.module.split(".")[1])
        imported[name] = found & files.keys()
    while imported:
        floor = {name for name, found in imported.items() if not found & imported.keys()}
        assert floor, f"a circle among {sorted(imported)}"
        imported = {name: found for name, found in imported.items() if name not in floor}


def test_the_protocol_is_lines_of_json():
    class Side:
        def machine(self):
            return {"gpu": None, "threads": 2}

    reply = Bench(Side()).answer({"do": "machine"})
    assert json.loads(json.dumps(reply))["threads"] == 2
    assert isinstance(naive.batched(), JaxSubject)

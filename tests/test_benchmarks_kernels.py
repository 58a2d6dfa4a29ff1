"""Kernels in the harness: exact, repeatable, in the program, and what "auto" may take."""

import pathlib
from dataclasses import asdict
from functools import partial

import jax
import jax.experimental.pallas.tpu  # its interpreter's setting counts in what JAX has compiled
import numpy as np
import pytest

from benchmarks import crew, dry, kernels, results
from benchmarks.__main__ import main
from benchmarks.kernels import NAMED, doubt, won
from benchmarks.plan import FIRST, GPU, MAIN_BATCH, MOST_OF_A_BLOCK, Plan, Step, on_gpu
from benchmarks.report import View
from benchmarks.run import Run
from benchmarks.subjects import naive, ours
from benchmarks.subjects.registry import (
    ASSOCIATIVE,
    KERNEL,
    LARGEST,
    ON_GPU,
    SCAN,
    Subject,
)
from benchmarks.worker import Bench
from benchmarks.workloads import BACKWARD, BACKWARD_ALONE, FORWARD, Workload
from jaxrnn._backends.select import MEASURED, Measured
from jaxrnn._backends.target import Device, built_for

TPU = "pallas_tpu", Device("tpu", "TPU v5e", interpret=True), "float32"
MOSAIC = "mosaic_gpu", Device("gpu", "NVIDIA H200", "9.0", interpret=True), "bfloat16"
TINY = Workload("tiny", 3, 16, 4, 64, distinct=4)
RECENT = jax.__version_info__ >= (0, 11)  # Pallas interprets GPU kernels
BOTH = FORWARD, BACKWARD
RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _jax_as_users_have_it():
    # Not by context managers: those are for this thread alone.
    settings = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def bench(dtype="float32", **makers):
    """A worker's inside, as on a GPU; "kernel" and "scan" stand for KERNEL and SCAN."""
    long = {"kernel": f"{KERNEL}, {dtype}", "scan": f"{SCAN}, {dtype}"}
    subjects = [Subject(long[n], "stub", make, dtype=dtype) for n, make in makers.items()]
    return Bench("jax", "gpu", subjects)


def prepare(inside, base, measure, workload=TINY, alike=3):
    (subject,) = [s for s in inside.subjects if s.startswith(base)]
    how = {"subject": subject, "measure": measure, "workload": asdict(workload), "alike": alike}
    return inside.answer({"do": "prepare", **how})


def doubt_of(kernel, scan, measure, dtype):
    """Of what `prepare` replied, as if it were a run's."""
    rows = []
    for base, reply in ((KERNEL, kernel), (SCAN, scan)):
        row = {"workload": asdict(TINY), "measure": measure, "subject": f"{base}, {dtype}"}
        rows.append(row | reply)
    return doubt(View({"rows": rows}), TINY, measure, dtype)


@pytest.mark.parametrize("measure", BOTH)
@pytest.mark.parametrize("how", [TPU, MOSAIC], ids=["pallas_tpu", "mosaic_gpu"])
def test_a_kernel_is_compared_with_the_reference_and_with_itself(how, measure):
    implementation, device, dtype = how
    if how is MOSAIC and not RECENT:
        pytest.skip("Pallas interprets GPU kernels from jax 0.11")
    with built_for(device):
        makers = {"kernel": partial(ours.batched, implementation=implementation)}
        inside = bench(dtype, **makers, scan=naive.batched)
        kernel, scan = (prepare(inside, base, measure) for base in (KERNEL, SCAN))
    assert kernel["status"] == scan["status"] == "ready", (kernel, scan)
    arrays = {"hs"} if measure == FORWARD else {"dU", "dW", "db", "dxs"}
    assert kernel["errors"].keys() == scan["errors"].keys() == arrays | {"copies"}
    assert kernel["alike"] and kernel["calls"] == 3 and "alike" not in scan
    assert set(kernel["kernels"]) == set(NAMED[measure]) and scan["kernels"] == []
    assert max(kernel["errors"].values()) > 0 == kernel["errors"]["copies"]
    assert doubt_of(kernel, scan, measure, dtype) is None
    missing = doubt_of(kernel | {"kernels": []}, scan, measure, dtype)
    assert missing.startswith("its program has no jaxrnn_states")


def test_calls_that_differ_and_sequences_that_differ_are_seen():
    calls = []

    def noisy(network):
        layer = naive.batched(network)

        def noise(_):
            calls.append(1)
            return np.float32(1 if len(calls) < 3 else 1.25)

        def unroll(weights, xs):
            hs = layer.unroll(weights, xs)
            return hs * jax.pure_callback(noise, jax.ShapeDtypeStruct((), "float32"), hs[0, 0, 0])

        return layer._replace(unroll=unroll)

    def one_sequence(network, by):
        layer = naive.batched(network)

        # The second of sixteen, of which the reference is compared with 1, 6, 11 and 16.
        def unroll(weights, xs):
            return layer.unroll(weights, xs).at[:, 1].add(by)

        return layer._replace(unroll=unroll)

    reply = prepare(bench(kernel=noisy), KERNEL, FORWARD, alike=5)
    assert reply["status"] == "ready" and not reply["alike"]
    assert doubt_of(reply, reply, FORWARD, "float32") == "5 calls gave different results"
    exact = reply | {"errors": dict.fromkeys(reply["errors"], 0.0)}
    for by, error in ((0.1, pytest.approx(0.1, rel=0.2)), (np.nan, np.inf)):
        reply = prepare(bench(kernel=partial(one_sequence, by=by)), KERNEL, FORWARD)
        assert reply["status"] == "ready" and reply["errors"]["copies"] == error
        assert doubt_of(reply, exact, FORWARD, "float32").startswith("copies is off by")


def test_a_kernel_that_does_not_compile_is_a_row():
    inside = bench("bfloat16", kernel=partial(ours.batched, implementation="mosaic_gpu"))
    reply = prepare(inside, KERNEL, FORWARD)
    assert reply["status"] == "failed" and "mosaic_gpu" in reply["reason"]


# Verdicts.


def document(seconds=0.5, errors=1e-3, **kernel):
    """Results of a run over H and B: the kernel of float32, and a scan that takes a second."""
    made = results.new({})
    made["device"]["gpu"] = "NVIDIA H200"
    for H in (64, 128):
        for B in (16, 64, 128):
            for measure in BOTH:
                row = {"workload": asdict(on_gpu(H, B)), "measure": measure, "status": "ready"}
                row |= {"rounds": [0, 1], "errors": {"hs": 1e-3}, "kernels": list(NAMED[measure])}
                scan = {"subject": f"{SCAN}, float32", "seconds": [1.0, 1.0]}
                took = seconds(H, B) if callable(seconds) else seconds
                mine = {"subject": f"{KERNEL}, float32", "alike": True, "calls": 20, **kernel}
                mine |= {"seconds": [took, took], "errors": {"hs": errors}}
                made["rows"] += [row | scan, row | mine]
    return made


def test_auto_may_take_only_points_that_are_proved():
    def entry(H, low, high):
        return Measured("NVIDIA H200", "float32", (H, H), (low, high), "mosaic_gpu")

    assert [*won(document())] == [entry(64, 16, 128), entry(128, 16, 128)]
    # Never over a point between that lost.
    lost = document(lambda H, B: 2.0 if (H, B) == (64, 64) else 0.5)
    assert [*won(lost)] == [entry(64, 16, 16), entry(64, 128, 128), entry(128, 16, 128)]
    for wrong in (
        {"seconds": 1.0},
        {"errors": 1.0},
        {"errors": float("nan")},
        {"alike": False},
        {"calls": 1},
        {"kernels": []},
        {"status": "failed", "reason": "it hangs"},
    ):
        assert [*won(document(**wrong))] == [], wrong
    assert eval(repr(entry(64, 16, 16)), {"Measured": Measured}) == entry(64, 16, 16)


def test_tables_have_every_verdict_and_time():
    text = "\n".join(kernels.tables(document()))
    assert text.count(": exact") == 12 and text.count("20 calls alike") == 12
    assert "H 128, B 64 |" in text and "2.00 (2.00–2.00)" in text
    assert f"MEASURED: tuple[Measured, ...] = (\n    {next(won(document()))!r},\n" in text
    assert "NOT exact: hs is off by 1.0e+00" in "\n".join(kernels.tables(document(errors=1.0)))


def test_entries_of_the_library_rest_on_committed_results():
    documents = [results.read(path) for path in RESULTS.glob("gpu-*/*.json")]
    proved = {entry for made in documents for entry in won(made)}
    assert set(MEASURED) <= proved


# A kernel that takes its process with it.


class GpuCrew:
    """Answers as workers would; at the rows in `deadly` the kernel's process dies."""

    def __init__(self, deadly):
        self.deadly, self.prepared = deadly, []

    def call(self, kind, /, do, subject="", workload=None, measure="", **how):
        if do == "prepare":
            self.prepared.append((subject, workload["name"], measure))
            if subject.startswith(KERNEL) and workload["name"] in self.deadly:
                raise crew.WorkerDiedError("the process gave no answer in 90 s")
        reply = {"status": "ready", "errors": {"hs": 1e-3}, "repeats": 1}
        reply |= {"alike": True, "calls": 20, "kernels": list(NAMED.get(measure, ()))}
        return {"status": "ready", "seconds": 1e-3} if do == "sample" else reply


def test_a_kernel_that_hangs_is_left_alone_and_others_are_measured():
    names = f"{KERNEL}, bfloat16", f"{SCAN}, bfloat16"
    sizes = (64, 128, 256, 320, 512)
    steps = [Step(on_gpu(H, MAIN_BATCH), BOTH, names, FIRST.steps[0].limits) for H in sizes]
    made, said = results.new({}), []
    stub = GpuCrew({"H 64, B 64", "H 128, B 64"})
    subjects = {s.name: s for s in ON_GPU}
    Run(stub, Plan(tuple(steps)), subjects, made, said.append, lambda: None).go()
    tried = [(name, measure) for subject, name, measure in stub.prepared if subject == names[0]]
    # Not again where it died, and after two deaths no other kernel of one block.
    assert tried == [("H 64, B 64", FORWARD), ("H 128, B 64", FORWARD),
                     ("H 512, B 64", FORWARD), ("H 512, B 64", BACKWARD)]  # fmt: skip
    assert all(row["seconds"] for row in made["rows"] if row["subject"] == names[1])
    reasons = {row["reason"] for row in made["rows"] if "reason" in row}
    assert len(reasons) == 3 and any("2 kernels of this kind" in reason for reason in reasons)
    assert sum(line.startswith(names[0]) for line in said) == 10


# Plans and rehearsals.


def test_the_first_minutes_begin_with_exactness():
    first = FIRST.steps[0]
    assert (first.workload.H, first.workload.B, first.workload.T) == (128, 64, 1024)
    assert first.subjects[:2] == (f"{KERNEL}, bfloat16", f"{SCAN}, bfloat16")
    assert first.limits.alike == 20
    listed = {subject.name for subject in ON_GPU}
    for chosen in (FIRST, GPU):
        assert all(set(step.subjects) <= listed and step.measures for step in chosen.steps)
        assert len({(s.workload, s.subjects) for s in chosen.steps}) == len(chosen.steps)
    linear = [step for step in FIRST.steps if step.measures == (BACKWARD_ALONE,)]
    assert all(f"{ASSOCIATIVE}, float32" in step.subjects for step in linear) and len(linear) == 6


def test_the_whole_run_has_every_kernel():
    points = {(s.subjects[0], s.workload.H, s.workload.B) for s in GPU.steps}
    for dtype, largest in LARGEST.items():
        for H in (64, 128, 256, 320, 512, 768, 1024):
            for B in (16, 64, 128):
                assert ((f"{KERNEL}, {dtype}", H, B) in points) == (H <= largest)
    assert all(s.limits.alike == 100 for s in GPU.steps)
    assert all(s.workload.B % s.workload.distinct**2 == 0 for s in GPU.steps)


@pytest.mark.parametrize("chosen", [FIRST, GPU], ids=["first", "whole"])
def test_a_rehearsal_has_every_kind_of_step(chosen):
    def kinds(some):
        steps = ((step, step.workload) for step in some.steps)
        return {(s.subjects[0], w.H > MOST_OF_A_BLOCK, s.measures) for s, w in steps}

    rehearsed = dry.rehearsal(chosen)
    assert kinds(rehearsed) == kinds(chosen) and rehearsed.minutes == chosen.minutes
    assert max(step.workload.T * step.workload.B for step in rehearsed.steps) <= 100


def rehearsed(arguments, path, capsys):
    """(exit code, tables, lines of progress, rows) of a rehearsal."""
    code = main([*arguments, "--dry", "--out", str(path)])
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines(), results.read(path)["rows"]


def check_rehearsal(code, tables, progress, rows):
    of_kernels = [row for row in rows if row["subject"].startswith(KERNEL)]
    assert code == (0 if RECENT else 1) and of_kernels
    assert sum("] jaxrnn, kernel" in line for line in progress) == len(of_kernels)
    for row in of_kernels:
        if RECENT:
            assert row["status"] == "ready" and row["seconds"] and row["alike"], row
            assert set(row["kernels"]) == set(NAMED[row["measure"]]) and row["errors"]
        else:
            assert "it is written for jax 0.11" in row["reason"]
    others = [row for row in rows if not row["subject"].startswith((KERNEL, "cuDNN"))]
    assert others and all(row["seconds"] for row in others)
    order = ["a dry run", "Kernels beside float64", f"**{FORWARD}: µs a step", "MEASURED: tuple"]
    assert [tables.index(title) for title in order] == sorted(map(tables.index, order))


def test_a_step_is_rehearsed(tmp_path, capsys):
    names = [f"{base}, bfloat16" for base in (KERNEL, SCAN)]
    chosen = [part for name in names for part in ("--subject", name)]
    chosen += ["--device", "gpu", "--workload", "H 128, B 64"]
    check_rehearsal(*rehearsed(chosen, tmp_path / "run.json", capsys))


@pytest.mark.full
@pytest.mark.parametrize("command", [("first",), ("--device", "gpu")], ids=["first", "whole"])
def test_a_whole_run_is_rehearsed(command, tmp_path, capsys):
    code, tables, progress, rows = rehearsed(command, tmp_path / "run.json", capsys)
    check_rehearsal(code, tables, progress, rows)
    cudnn = [row for row in rows if row["subject"].startswith("cuDNN")]
    status = {row["status"] for row in cudnn}
    assert cudnn and status in ({"ready"}, {"not installed"})
    if command == ("first",):
        linear = {
            (r["subject"], r["workload"]["T"]) for r in rows if r["measure"] == BACKWARD_ALONE
        }
        assert linear == {(f"{n}, float32", T) for n in (SCAN, ASSOCIATIVE) for T in (10, 100)}

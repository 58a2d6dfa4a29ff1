"""Kernels in the harness: what is asked of them, and what "auto" may take."""

import pathlib
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.experimental.pallas.tpu  # its interpreter's setting counts in what JAX has compiled
import numpy as np
import pytest

from benchmarks import kernels, plans, reference, report, results, run, workers
from benchmarks.catalogue import Listed, listed
from benchmarks.checks import Checker
from benchmarks.jax_side import JaxSide
from benchmarks.kernels import KERNEL, SCAN, boxes, won
from benchmarks.measures import BACKWARD, BACKWARD_ALONE, FORWARD
from benchmarks.networks import ONE_LAYER
from benchmarks.roofline import flops, least_seconds
from benchmarks.subjects import naive, ours
from benchmarks.subjects.registry import Entry
from benchmarks.tangents import direction
from benchmarks.view import View
from benchmarks.worker import Bench
from benchmarks.workloads import GRID, MAIN_BATCH, Workload, draw, on_gpu, untuned
from jaxrnn._backends.select import LARGEST, MEASURED, Measured
from jaxrnn._backends.target import Device, built_for

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
TPU = "pallas_tpu", Device("tpu", "TPU v5e", interpret=True), "float32"
MOSAIC = "mosaic_gpu", Device("gpu", "NVIDIA H200", "9.0", interpret=True), "bfloat16"
TINY = Workload("tiny", 3, 16, 4, 64, distinct=4)


@pytest.fixture(autouse=True)
def _jax_as_users_have_it():
    # Not by context managers: those are for this thread alone.
    settings = {
        "jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(params=[TPU, MOSAIC], ids=["pallas_tpu", "mosaic_gpu"])
def interpreted(request):
    """(implementation, dtype), with kernels interpreted on the CPU."""
    implementation, device, dtype = request.param
    if implementation == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("Pallas interprets GPU kernels from jax 0.11")
    with built_for(device):
        yield implementation, dtype


def bench(dtype="float32", device="gpu", **subjects):
    """A worker's inside, as on a GPU: functions that make subjects; "kernel" stands for KERNEL."""
    names = {name: KERNEL if name == "kernel" else name for name in subjects}
    entries = {names[name]: Entry("stub", "", make) for name, make in subjects.items()}
    described = [Listed(name, "stub", workers.JAX, names[name], dtype) for name in subjects]
    described.append(Listed("roofline", "jax", workers.JAX, "roofline", dtype))
    return Bench(JaxSide(workers.JAX, device, entries, described))


def prepare(worker, name, measure, workload=TINY, alike=3):
    request = {"subject": name, "measure": measure, "workload": asdict(workload), "compiles": 1}
    return worker.answer({"do": "prepare", **request, "alike": alike})


def doubt(kernel, scan, measure, dtype):
    """Of what `prepare` replied, as if it were a run's."""
    made = results.new({"gpu": "NVIDIA H200"}, {}, {})
    for base, reply in ((KERNEL, kernel), (SCAN, scan)):
        row = {"workload": asdict(TINY), "measure": measure, "subject": f"{base}, {dtype}"}
        made["rows"].append(row | reply)
    return kernels.doubt(View(made), TINY, measure, dtype)


# Exact, repeatable, there.


@pytest.mark.parametrize("measure", [FORWARD, BACKWARD])
def test_a_kernel_is_compared_with_the_reference_and_with_itself(interpreted, measure):
    implementation, dtype = interpreted
    worker = bench(dtype, kernel=lambda: ours.run_by(implementation), scan=naive.batched)
    found, scan = (prepare(worker, name, measure) for name in ("kernel", "scan"))
    assert found["status"] == scan["status"] == "ready", (found, scan)
    arrays = {"hs"} if measure == FORWARD else {"dU", "dW", "db", "dxs"}
    assert found["errors"].keys() == scan["errors"].keys() == arrays | {"copies"}
    assert found["alike"] and found["calls"] == 3 and "alike" not in scan
    assert set(kernels.NAMED[measure]) == set(found["kernels"])
    assert max(found["errors"].values()) > 0 == found["errors"]["copies"]
    assert doubt(found, scan, measure, dtype) is None
    assert doubt(scan | {"alike": True, "calls": 3}, scan, measure, dtype).startswith(
        "its program has no jaxrnn_states"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_starts_from_the_rounded_numbers(dtype):
    worker = bench(dtype, scan=naive.batched)
    assert prepare(worker, "scan", BACKWARD)["status"] == "ready"
    full, used = draw(TINY), worker.side.checker.data
    few = replace(full, xs=full.xs[:, TINY.compared], g=full.g[:, TINY.compared])
    for name in ("U", "W", "b", "xs", "g"):
        array = getattr(few, name)
        rounded = np.asarray(jax.numpy.asarray(array).astype(dtype).astype("float32"))
        assert (getattr(used, name) == rounded).all() and not (rounded == array).all()


def test_wrong_results_are_found():
    calls = []

    def noisy(cell, xs):
        def noise(_):
            calls.append(1)
            return np.float32(1 if len(calls) < 3 else 1.25)

        hs = right.unroll(cell, xs)
        return hs * jax.pure_callback(noise, jax.ShapeDtypeStruct((), "float32"), hs[0, 0, 0])

    def one_sequence(cell, xs, by=0.1):
        # The second of sixteen, of which the reference is compared with 1, 6, 11 and 16.
        return right.unroll(cell, xs).at[:, 1].add(by)

    right = naive.batched()
    worker = bench(kernel=lambda: replace(right, unroll=noisy))
    found = prepare(worker, "kernel", FORWARD, alike=5)
    assert found["status"] == "ready" and not found["alike"] and len(calls) >= 3
    assert doubt(found, found, FORWARD, "float32") == "5 calls gave different results"
    found = prepare(worker, "kernel", FORWARD)
    assert found["status"] == "failed" and found["reason"].startswith("hs is off by 2.5e-01")
    assert found["errors"]["hs"] == pytest.approx(0.25, rel=1e-3)
    assert doubt(found, found, FORWARD, "float32") == found["reason"]
    worker = bench(kernel=lambda: replace(right, unroll=one_sequence))
    found = prepare(worker, "kernel", FORWARD)
    assert found["status"] == "ready" and found["errors"]["copies"] == pytest.approx(0.1, rel=0.2)
    worker = bench(kernel=lambda: replace(right, unroll=partial(one_sequence, by=np.nan)))
    assert prepare(worker, "kernel", FORWARD)["errors"]["copies"] == np.inf
    exact = found | {"errors": dict.fromkeys(found["errors"], 0.0)}
    assert doubt(found, exact, FORWARD, "float32").startswith("copies is off by")


def test_what_cannot_be_compiled_is_a_row():
    reply = prepare(bench("bfloat16", kernel=lambda: ours.run_by("mosaic_gpu")), "kernel", FORWARD)
    assert reply["status"] == "failed" and "mosaic_gpu" in reply["reason"]


def truncated(x):
    """To TF32 as a tensor core reads a float32: the last 13 bits are ignored."""
    return (x.astype(np.float32).view(np.int32) & ~np.int32(0x1FFF)).view(np.float32)


def rounded(x):
    """To the nearest TF32."""
    return truncated((x.astype(np.float32).view(np.int32) + np.int32(0x1000)).view(np.float32))


def error_of_states(workload, of_inputs, of_states):
    """How far states are off whose products have factors in TF32, made so by these functions."""
    data = draw(workload)
    few = replace(data, xs=data.xs[:, :4])
    drive = of_inputs(few.xs).astype(np.float64) @ of_inputs(data.U).T.astype(np.float64) + data.b
    h, hs, W = np.zeros((4, workload.H)), [], of_states(data.W)
    for a in drive:
        h = np.tanh(of_states(h) @ W.T + a)
        hs.append(h)
    return reference.errors((np.stack(hs),), (reference.states(few, ONE_LAYER),))["hs"]


@pytest.mark.parametrize("of_states", [truncated, rounded])
@pytest.mark.parametrize("of_inputs", [truncated, rounded])
def test_factors_may_be_cut_or_rounded_to_tf32(of_inputs, of_states):
    # Which of them XLA's products and the kernel's do; the other is no mistake.
    workload = on_gpu(128, 16)
    error = error_of_states(workload, of_inputs, of_states)
    allowed = reference.tolerance("hs", workload, "float32", tf32=True)
    assert allowed / 8 < error < min(allowed, kernels.allowed(None, "hs", "float32"))
    assert error > 100 * reference.tolerance("hs", workload, "float32")


# Timing.


def test_programs_that_are_compiled_ahead_are_what_is_timed(interpreted, monkeypatch, caplog):
    implementation, dtype = interpreted
    worker = bench(dtype, kernel=lambda: ours.run_by(implementation), scan=naive.unrolled)
    side, names = worker.side, ("kernel", "scan", "roofline")
    pairs = [(name, measure) for name in (*names, "nobody") for measure in (FORWARD, BACKWARD)]
    for workload in (TINY, untuned(TINY)):
        request = {"pairs": pairs, "workload": asdict(workload)}
        reply = worker.answer({"do": "compile", **request})
        assert reply["status"] == "ready" and 0 < reply["seconds"] < 60
        assert len(side.built) == 6
        with monkeypatch.context() as patched:
            patched.setattr("benchmarks.jax_side._build", None)
            for measure in (FORWARD, BACKWARD):
                for name in names:
                    with jax.log_compiles():
                        reply = prepare(worker, name, measure, workload)
                    assert reply["status"] == "ready", reply
                    there = kernels.NAMED[measure] if name == "kernel" else ()
                    assert set(reply["kernels"]) == set(there)
                    assert worker.answer({"do": "sample", "subject": name})["seconds"] > 0
                worker.answer({"do": "forget"})
        assert side.built == {}
    # The first call too found them compiled.
    whole = [f"jit({name})" for name in ("_states", "unroll", "forward", "loss", "both")]
    again = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [text for text in again if any(name in text for name in whole)]


def test_the_backward_pass_by_itself_gives_the_same_gradient():
    worker = bench(scan=lambda: ours.run_by("scan"), associative=lambda: ours.run_by("associative"))
    stream = Workload("stream", 20, 1, 4, 3)
    for name in ("scan", "associative"):
        whole, alone = (prepare(worker, name, m, stream) for m in (BACKWARD, BACKWARD_ALONE))
        assert whole["status"] == alone["status"] == "ready", (whole, alone)
        assert alone["errors"].keys() == {"dU", "dW", "db", "dxs"}
        assert all(error < 1e-5 for error in alone["errors"].values())


def test_a_device_that_computes_no_more_ends_its_process(monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def illegal(cell, xs):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr("os._exit", end)
    worker = bench(kernel=lambda: replace(naive.batched(), unroll=illegal), scan=naive.batched)
    assert prepare(worker, "kernel", FORWARD)["status"] == "failed"
    monkeypatch.setattr(worker.side, "healthy", lambda: False)
    with pytest.raises(Ended, match="1"):
        prepare(worker, "kernel", FORWARD)
    assert capsys.readouterr().err == "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS\n"
    # Where JAX finds no device, the reply says so.
    monkeypatch.setattr(worker.side, "machine", lambda: 1 / 0)
    assert worker.answer({"do": "machine"})["status"] == "failed"


def test_few_sequences_stand_for_all():
    data = draw(TINY)
    few = data.xs[:, TINY.compared]
    assert few.shape == (3, 4, 4) and (np.sort(few[:, :, 0]) == np.sort(data.xs[:, :4, 0])).all()
    everything = draw(Workload("all", *(getattr(TINY, n) for n in "TBDH")))
    assert len(np.unique(everything.xs[0, :, 0])) == 16 and len(np.unique(data.xs[0, :, 0])) == 4
    whole = Checker(Workload("all", 3, 16, 4, 64), data, direction(data))._gradients(ONE_LAYER)
    part = Checker(TINY, data, direction(data))._gradients(ONE_LAYER)
    for all_of_it, from_few in zip(whole[:3], part, strict=False):
        np.testing.assert_allclose(from_few, all_of_it, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(part[3], whole[3][:, TINY.compared])
    assert all(w.B % w.distinct**2 == 0 for w in GRID)


def test_torch_is_compared_on_the_same_sequences():
    torch_rnn = pytest.importorskip("benchmarks.subjects.torch_rnn")
    from benchmarks.subjects.registry import TORCH_SUBJECTS

    data = draw(TINY)
    hs, *gradients = torch_rnn.build(TINY, data, TORCH_SUBJECTS["torch"]).results()
    found = Checker(TINY, data, direction(data)).wrong(BACKWARD, "tanh", tuple(gradients), hs)
    assert found is None and hs.shape == (3, 4, 64)


class GpuCrew:
    """Answers as workers would on a GPU; some kernels take their process with them.

    `deadly` and `hanging` are names of workloads at which the kernel does so when it is prepared,
    `later` of those at which it does when it is timed.
    """

    def __init__(self, deadly=(), hanging=(), later=(), left=None, compiling=1.0):
        self.asked, self.prepared, self.left, self.compiling = [], [], left, compiling
        self.deadly, self.hanging, self.later = set(deadly), set(hanging), set(later)

    def late(self):
        return self.left is not None and len(self.asked) >= self.left

    def call_each(self, requests):
        return {kind: self.answer(kind, **request) for kind, request in requests.items()}

    def call(self, kind, /, **request):
        reply = self.answer(kind, **request)
        if isinstance(reply, workers.WorkerDiedError):
            raise reply
        return reply

    def answer(self, kind, do, subject="", workload=None, measure=None, **request):
        if self.late():
            return workers.TimeIsUpError()
        self.asked.append((kind, do))
        if do == "compile":
            return {"status": "ready", "seconds": self.compiling}
        if do == "sample" and KERNEL in subject and self.prepared[-1][1] in self.later:
            return workers.WorkerDiedError("the process gave no answer in 20 s")
        if do != "prepare":
            return {"status": "ready", "seconds": 1e-3}
        self.prepared.append((subject, workload["name"], measure))
        if subject.startswith(KERNEL) and workload["name"] in self.deadly:
            return workers.WorkerDiedError("the process was killed by signal 6")
        if subject.startswith(KERNEL) and workload["name"] in self.hanging:
            return workers.WorkerDiedError("the process gave no answer in 30 s")
        reply = {"status": "ready", "repeats": 1, "seconds": 1e-3, "errors": {"hs": 1e-3}}
        return reply | (
            {**ALIKE, "kernels": [*kernels.NAMED[measure]]} if KERNEL in subject else {}
        )


ALIKE = {"alike": True, "calls": 100}


class Silent:
    def begin(self, *_): ...

    step = end = say = note = begin


def measured(plan, crew, save=lambda: None, report=Silent()):  # noqa: B008
    """The results of a plan."""
    made = results.new({"gpu": "NVIDIA H200"}, {}, {})
    for subject in listed("gpu"):
        made["subjects"].append({**asdict(subject), "status": "ready", "activation": ""})
    run.run(crew, plan, made, report, save)
    return made


def some_of(plan, *names):
    return replace(plan, steps=tuple(s for s in plan.steps if s.workload.name in names))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("benchmarks.rounds.PAUSE_SECONDS", 0.0)


def test_a_whole_run_on_a_gpu(at_once):
    crew = GpuCrew(deadly=["H 128, B 64"])
    plan = some_of(plans.GPU, "H 128, B 64", "H 320, B 16", "H 512, B 64")
    document = measured(plan, crew)
    subjects = [subject["name"] for subject in document["subjects"]]
    assert len(set(subjects)) == len(subjects)
    tried = [(s, w) for s, w, measure in crew.prepared if KERNEL in s and measure == FORWARD]
    # One dtype after the other; float32 only where it fits.
    assert tried == [
        (f"{KERNEL}, {dtype}", workload)
        for dtype, workloads in {
            "bfloat16": ("H 128, B 64", "H 320, B 16", "H 512, B 64"),
            "float32": ("H 128, B 64",),
            "float16": ("H 128, B 64", "H 320, B 16", "H 512, B 64"),
        }.items()
        for workload in workloads
    ]
    names = {name for name, _, _ in crew.prepared}
    assert {"naive scan, unroll 8, bfloat16", "jaxrnn, command buffers, bfloat16"} <= names
    assert {"cuDNN TF32", "cuDNN float32", "cuDNN bfloat16", "cuDNN float16"} <= names
    assert "jaxrnn, associative, float32" not in names
    assert ("roofline, float16", "H 512, B 64", FORWARD) in crew.prepared
    assert {name for name, where, _ in crew.prepared if where == "H 320, B 16"} == {
        f"{name}, {dtype}" for name in (KERNEL, SCAN) for dtype in ("bfloat16", "float16")
    } | {"cuDNN bfloat16", "cuDNN float16"}
    # A kernel that failed forward is not tried backward.
    of_kernel = [r for r in document["rows"] if r["subject"] == f"{KERNEL}, bfloat16"
                 and r["workload"]["name"] == "H 128, B 64"]  # fmt: skip
    assert [row["status"] for row in of_kernel] == ["failed", "not measured"]
    assert of_kernel[1]["reason"] == "forward it failed: the process was killed by signal 6"
    assert won(document) == ()  # as fast as the scan is not faster


@pytest.mark.parametrize("how", ["hanging", "deadly"])
def test_kernels_that_end_their_process_are_left_alone(at_once, how):
    names = [w.name for w in GRID if w.B == MAIN_BATCH]
    crew = GpuCrew(**{how: names})
    document = measured(some_of(plans.GPU, *names), crew)
    tried = [(s, w) for s, w, _ in crew.prepared if KERNEL in s]
    # Two of each dtype, and of clusters too.
    assert tried == [
        (f"{KERNEL}, {dtype}", f"H {H}, B 64")
        for dtype, hidden in (("bfloat16", (128, 256, 512, 1024)), ("float32", (128, 64)),
                              ("float16", (128, 256, 512, 1024)))
        for H in hidden
    ]  # fmt: skip
    reasons = {r["reason"] for r in document["rows"] if r["status"] == "not measured"}
    assert "2 kernels of this kind took their process with them" in reasons
    # What else there is, is measured and tuned all the same.
    others = [r for r in document["rows"] if KERNEL not in r["subject"]]
    assert {r["status"] for r in others} == {"ready"} and all(
        r["workload"]["tuned"] for r in others
    )


def test_a_kernel_that_ends_its_process_while_it_is_timed_is_told_of(at_once):
    said, saved = [], []

    class Heard(Silent):
        note = staticmethod(said.append)

    crew = GpuCrew(later=["H 256, B 64"])
    document = measured(some_of(plans.FIRST, "H 256, B 64"), crew, lambda: saved.append(1), Heard())
    first, second = (r for r in document["rows"] if r["subject"] == f"{KERNEL}, bfloat16")
    assert first["status"] == "failed" and first["died"] and first["errors"] == {"hs": 1e-3}
    assert second["reason"].startswith("forward it failed: the process gave no answer")
    assert sum("gave no answer in 20 s" in line for line in said) == 2 and len(saved) == 6


def test_nothing_begins_after_the_deadline(at_once):
    plan = some_of(plans.GPU, "H 128, B 64", "H 512, B 64")
    late = measured(plan, GpuCrew(left=0))
    assert {row["status"] for row in late["rows"]} == {"not measured"}
    crew = GpuCrew()
    whole, count = measured(plan, crew), len(crew.asked)
    for left in (count // 4, count // 2):
        crew = GpuCrew(left=left)
        early = measured(plan, crew)
        assert len(crew.asked) == left and len(early["rows"]) == len(whole["rows"])
        statuses = [row["status"] for row in early["rows"]]
        assert set(statuses) == {"ready", "not measured"}
        assert {row["reason"] for row in early["rows"] if "reason" in row} == {
            "the time of the run was up"
        }


def test_results_are_saved_after_each_verdict_and_each_measure(at_once):
    saved = []
    plan = some_of(plans.FIRST, "H 256, B 64")
    document = measured(plan, GpuCrew(), lambda: saved.append(1))
    assert len(document["rows"]) == 6 and len(saved) == 2 + 2 + 1


def test_tuning_ends_where_it_takes_too_long(at_once):
    slow = GpuCrew(compiling=run.TUNING_SECONDS + 1)
    document = measured(some_of(plans.GPU, "H 128, B 64"), slow)
    found = {row["subject"]: row["workload"] for row in document["rows"]}
    assert found[f"{SCAN}, bfloat16"] == asdict(on_gpu(128, 64))
    for dtype in ("float32", "float16"):
        assert found[f"{SCAN}, {dtype}"] == asdict(untuned(on_gpu(128, 64)))
    # What is not tuned may take as long.
    document = measured(some_of(plans.FIRST, "H 128, B 64, not tuned", "H 128, B 64"), slow)
    assert {r["workload"]["tuned"] for r in document["rows"]} == {False, True}


class Dying(GpuCrew):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def answer(self, kind, do, **request):
        if (kind, do) == (self.kind, "compile"):
            return workers.WorkerDiedError("the process gave no answer in 90 s")
        return super().answer(kind, do, **request)


def test_what_hangs_at_tuning_is_tried_without(at_once):
    plan = some_of(plans.FIRST, "H 256, B 64")
    document = measured(plan, Dying(workers.JAX))
    assert {row["workload"]["name"] for row in document["rows"]} == {"H 256, B 64, not tuned"}
    # A kernel tunes nothing of its own.
    document = measured(plan, Dying(workers.KERNELS))
    assert {row["workload"]["name"] for row in document["rows"]} == {"H 256, B 64"}


def test_what_was_not_measured_again_stays_as_it_was():
    made = document(EVERYWHERE)
    before = kernel_row(made, 64, FORWARD, 16)
    again = [{**row, "status": "not measured", "reason": "late", "seconds": []} for row in before]
    made["rows"] += again
    assert won(made) == (entry((64, 256), (16, 128)),)
    made["rows"] = [*again, *made["rows"][:-1]]
    assert won(made) == (entry((64, 256), (16, 128)),)
    # What failed the second time is not trusted for the first.
    made["rows"].append({**again[0], "status": "failed"})
    assert won(made) != (entry((64, 256), (16, 128)),)


def sleeping(kind, device, **how):
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    return workers.Worker(kind, device, command, seconds={"prepare": 0.2, "compile": 0.1}, **how)


def test_a_worker_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(workers, "START_SECONDS", 0.3)
    monkeypatch.setattr(workers, "OTHER_SECONDS", 0.1)
    with workers.Crew("gpu", sleeping) as crew:
        start = time.monotonic()
        # A process that has just started is asked first what it is, and has more time for that.
        with pytest.raises(workers.WorkerDiedError, match="gave no answer in 0 s"):
            crew.call("jax", do="prepare")
        assert 0.4 <= time.monotonic() - start < 5
        crew.start(["jax"])
        crew.workers["jax"].answered |= {"machine", "compile"}
        start = time.monotonic()
        with pytest.raises(workers.WorkerDiedError, match="no answer"):
            crew.call("jax", do="prepare")
        assert 0.2 <= time.monotonic() - start < 5
        cache = pathlib.Path(crew.cache.name)
        assert cache.exists()
    assert not cache.exists()


def test_limits_of_replies_are_those_of_what_is_asked():
    worker = workers.Worker("jax", "gpu", ["true"])
    try:

        def limit(do, **how):
            worker.request = {"do": do, **how}
            return worker._limit()

        assert limit("machine") == workers.OTHER_SECONDS + workers.START_SECONDS
        worker.answered.add("machine")
        assert limit("sample") == workers.OTHER_SECONDS
        assert limit("compile") == workers.SECONDS["compile"]
        # A process that was started again compiles then.
        assert limit("prepare") == sum(workers.SECONDS.values())
        worker.answered.add("compile")
        assert limit("prepare") == workers.SECONDS["prepare"]
        # A scan of 100,000 steps that takes 30 µs for each, ten times.
        long = limit("prepare", workload={"T": 100_000})
        assert long == pytest.approx(workers.SECONDS["prepare"] + 30)
    finally:
        worker.close()
    on_cpu = workers.Worker("jax", "cpu", ["true"])
    on_cpu.request = {"do": "prepare"}
    assert on_cpu._limit() is None
    on_cpu.close()


def test_the_end_of_a_run_ends_what_is_waited_for():
    start = time.monotonic()
    with workers.Crew("gpu", sleeping, until=start + 0.5) as crew:
        both = crew.call_each({"jax": {"do": "machine"}, "torch": {"do": "machine"}})
        assert all(isinstance(reply, workers.TimeIsUpError) for reply in both.values())
        assert 0.5 <= time.monotonic() - start < 5 and crew.late()
        with pytest.raises(workers.TimeIsUpError, match="the time of the run was up"):
            crew.call("jax", do="machine")
        assert crew.workers == {}


def test_the_plan_has_every_size():
    assert {(w.H, w.B) for w in GRID} == {
        (H, B) for H in (64, 128, 256, 320, 512, 768, 1024) for B in (16, 64, 128)
    }
    assert {w.T for w in GRID} == {1024} and all(w.D <= 128 for w in GRID)
    assert max(w.H for w in GRID[:12]) == 320
    assert all(s.bases is None or s.workload.B != MAIN_BATCH for s in plans.GPU.steps)


def test_the_first_minutes_begin_with_what_tells_most():
    first, second, *_ = plans.FIRST.steps
    assert (first.workload, first.dtype) == (untuned(on_gpu(128, 64)), "bfloat16")
    assert (second.workload, second.dtype) == (on_gpu(128, 64), "bfloat16")
    assert first.bases == (KERNEL, SCAN) and second.bases == (KERNEL, SCAN, "cuDNN bfloat16")
    sizes = [(s.dtype, s.workload.H, s.workload.B) for s in plans.FIRST.steps]
    assert sizes[2:7] == [("bfloat16", *size) for size in
                          ((256, 64), (320, 64), (64, 64), (128, 16), (128, 128))]  # fmt: skip
    assert {("float32", 128, 64), ("bfloat16", 512, 64), ("bfloat16", 1024, 64)} <= set(sizes[7:])
    linear = {(s.workload.H, s.workload.T) for s in plans.FIRST.steps if s.measures}
    assert linear == {(H, T) for H in (1, 4, 16) for T in (10_000, 100_000)}
    assert plans.FIRST.limits.alike == 20 and plans.GPU.limits.alike == 100
    names = {subject.base for subject in listed("gpu")}
    assert all(base in names for step in plans.FIRST.steps for base in step.bases)


# What "auto" takes.


def document(points, dtypes=("bfloat16",), kind="NVIDIA H200"):
    """A run whose kernels take half the scan's time at these points, and twice it elsewhere."""
    made = results.new({"processor": "EPYC", "cores": 16, "memory_gib": 1, "gpu": kind}, {}, {})
    for dtype in dtypes:
        for measure, named in kernels.NAMED.items():
            for H in (64, 128, 256):
                for B in (16, 64, 128):
                    slow = 1e-3 if (H, B) in points else 4e-3
                    for name, seconds in ((SCAN, 2e-3), (KERNEL, slow)):
                        row = {"workload": asdict(Workload(f"H {H}, B {B}", 1024, B, 64, H))}
                        row |= {"subject": f"{name}, {dtype}", "measure": measure}
                        row |= {"status": "ready", "rounds": [0, 1, 2], "repeats": 1}
                        row |= {"seconds": [seconds] * 3, "errors": {"hs": 1e-3, "copies": 0.0}}
                        row |= {"kernels": list(named), **ALIKE} if name == KERNEL else {}
                        made["rows"].append(row)
    made["subjects"] = [{"name": n, "package": "jaxrnn", "kind": "jax"}
                        for n in dict.fromkeys(r["subject"] for r in made["rows"])]  # fmt: skip
    return made


def kernel_row(made, H, measure, B=None):
    """Of the bfloat16 kernel, of every batch if B is None."""
    return [r for r in made["rows"] if (r["workload"]["H"], r["measure"], r["subject"])
            == (H, measure, f"{KERNEL}, bfloat16") and B in (None, r["workload"]["B"])]  # fmt: skip


EVERYWHERE = {(H, B) for H in (64, 128, 256) for B in (16, 64, 128)}


def entry(hidden, batch, dtype="bfloat16", kind="NVIDIA H200"):
    return Measured(kind, dtype, hidden, batch, "mosaic_gpu")


def test_points_that_are_won_become_boxes():
    assert won(document(EVERYWHERE)) == (entry((64, 256), (16, 128)),)
    assert won(document(set())) == ()
    assert won(document({(128, 64)})) == (entry((128, 128), (64, 64)),)
    assert won(document(EVERYWHERE - {(256, 128)})) == (
        entry((64, 128), (16, 128)), entry((64, 256), (16, 64)),
    )  # fmt: skip
    assert won(document(EVERYWHERE - {(128, 64)})) == (
        entry((64, 64), (16, 128)), entry((64, 256), (16, 16)), entry((64, 256), (128, 128)),
        entry((256, 256), (16, 128)),
    )  # fmt: skip
    two = won(document({(64, 16)}, ("bfloat16", "float32"), "NVIDIA H100"))
    assert two == tuple(
        entry((64, 64), (16, 16), d, "NVIDIA H100") for d in ("bfloat16", "float32")
    )


def test_nothing_is_known_between_what_was_measured():
    points = {(1, 1), (2, 2), (1, 2)}
    assert boxes(points, points) == [((1, 1), (1, 2)), ((1, 2), (2, 2))]
    assert boxes({(1, 1), (3, 1)}, {(1, 1), (2, 1), (3, 1)}) == [((1, 1), (1, 1)), ((3, 3), (1, 1))]


@pytest.mark.parametrize(
    "flaw",
    [{"errors": {"hs": 1e-3, "copies": 0.1}}, {"errors": {"hs": float("nan")}}, {"alike": False},
     {"kernels": []}, {"calls": 1}, {"seconds": [1e-3, 3e-3, 3e-3]},
     {"seconds": [1e-3, 1.5e-3, 4e-3]}, {"rounds": [7, 8, 9]},
     {"status": "failed", "seconds": [], "reason": "the process was killed by signal 11"}],
    ids=["wrong", "NaN", "unlike", "unnamed", "once", "median", "quartile", "unpaired", "failed"],
)  # fmt: skip
@pytest.mark.parametrize("measure", [FORWARD, BACKWARD])
def test_a_kernel_that_cannot_be_trusted_wins_nothing(flaw, measure):
    made = document(EVERYWHERE)
    for row in kernel_row(made, 256, measure):
        row |= flaw
    assert won(made) == (entry((64, 128), (16, 128)),)
    assert "exact, 100 calls alike" in report.markdown(made)


def test_what_was_not_tuned_wins_nothing():
    made = document({(128, 64)})
    for row in made["rows"]:
        row["workload"] |= {"tuned": False}
    assert won(made) == ()


def test_a_kernel_may_be_off_by_twice_what_the_scan_is():
    made = document(EVERYWHERE)
    (row,) = kernel_row(made, 64, FORWARD, 16)
    row["errors"]["hs"] = 0.09
    assert won(made) != (entry((64, 256), (16, 128)),)
    scan = next(r for r in made["rows"] if r["subject"] == f"{SCAN}, bfloat16")
    scan["errors"]["hs"] = 0.046
    assert won(made) == (entry((64, 256), (16, 128)),)


def test_what_the_library_takes_is_what_was_measured():
    found = {entry for path in RESULTS.glob("gpu-*/*.json") for entry in won(results.read(path))}
    assert set(MEASURED) == found and len(MEASURED) == len(found)


def test_the_report_of_kernels(tmp_path, capsys):
    from benchmarks.cli import main

    made, path = document({(64, 16), (64, 64)}), tmp_path / "a.json"
    (row,) = kernel_row(made, 64, FORWARD, 128)
    died = {"status": "failed", "reason": "the process was killed by signal 11", "seconds": []}
    row |= died
    row.pop("errors")
    results.write(made, path)
    assert main(["report", str(path), "--markdown"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| bfloat16 | 64 | 16 |"))
    lines = text.splitlines()
    assert "| bfloat16 | 64 | 16 | forward | hs | 1.0e-03 | 1.0e-03 | 3.1e-02 | exact" in line
    assert "| bfloat16 | 64 | 128 | forward | – | – | – | – | the process was killed" in text
    title = lines.index("**forward: microseconds a step**")
    header, cells = ([c.strip() for c in lines[n].strip("| ").split("|")]
                     for n in (title + 2, title + 4))  # fmt: skip
    # 4.2 MB to read and write would take 0.87 µs of the millisecond.
    assert dict(zip(header, cells, strict=True)) == {
        "dtype": "bfloat16", "H": "64", "B": "16", "T": "1024", "kernel": "0.977",
        "jaxrnn's scan": "1.95", "scan / kernel": "2.00 (2.00–2.00)",
        "fraction of roofline": "0.000874",
    }  # fmt: skip
    won_here = won(made)
    assert won_here == (entry((64, 64), (16, 64)),)
    assert main(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    assert main(["report", str(path), "--plot", str(tmp_path / "a.png")]) == 0
    namespace = {"Measured": Measured}
    exec(shown[shown.index("MEASURED") :].replace("tuple[Measured, ...]", "tuple"), namespace)
    assert namespace["MEASURED"] == won(made) == (entry((64, 64), (16, 64)),)


def test_the_roofline_is_the_tighter_of_two_limits():
    large, small = Workload("", 10, 10**6, 1, 1024), Workload("", 10, 1, 8, 8)
    size = "NVIDIA H200", large, FORWARD, "bfloat16"
    assert least_seconds(*size) == flops(large, FORWARD) / 989e12
    size = "NVIDIA H100 80GB HBM3", small, FORWARD, "bfloat16"
    assert least_seconds(*size) == 2 * 10 * 16 / 3.35e12
    assert least_seconds("NVIDIA H200", small, FORWARD, "float32") == 4 * 10 * 16 / 4.8e12
    assert least_seconds("NVIDIA A100", small, FORWARD, "float32") is None


def test_old_files_have_no_kernels():
    for path in RESULTS.glob("cpu-*/*.json"):
        made = results.read(path)
        assert not kernels.on_gpu(made) and won(made) == ()


def test_every_dtype_with_a_kernel_is_listed():
    for dtype, most in LARGEST["mosaic_gpu"].items():
        (how,) = (s for s in listed("gpu") if s.name == f"{KERNEL}, {dtype}")
        assert (how.dtype, how.hidden) == (dtype, most)

"""Kernels in the harness: what is asked of them, and what "auto" may take."""

import pathlib
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from benchmarks import kernels, numerics, report, results, run, workers
from benchmarks.catalogue import Listed, listed
from benchmarks.checks import Checker
from benchmarks.jax_side import JaxSide
from benchmarks.kernels import KERNEL, SCAN, boxes, won
from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.roofline import flops, least_seconds
from benchmarks.subjects import naive, ours
from benchmarks.subjects.registry import Entry
from benchmarks.tangents import direction
from benchmarks.worker import Bench
from benchmarks.workloads import GRID, Workload, draw
from jaxrnn._implementation import LARGEST, MEASURED, Measured
from jaxrnn._target import Device, built_for

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


# Exact, repeatable, there.


@pytest.mark.parametrize("measure", [FORWARD, BACKWARD])
def test_a_kernel_is_examined(interpreted, measure):
    implementation, dtype = interpreted
    sizes = {"batch": 16, "steps": 3, "repeats": 3, "implementation": implementation}
    request = {"do": "examine", "dtype": dtype, "hidden": 64, "direction": measure, **sizes}
    row = {**Bench(None).answer(request), "direction": measure}
    assert row["status"] == "ready", row
    assert kernels.doubt(row) is None, row
    assert 0 < row["error"] and set(kernels.NAMED[measure]) == set(row["named"])


def test_a_scan_is_no_kernel():
    row = numerics.examine("float16", 8, BACKWARD, batch=2, steps=3, implementation="scan")
    assert row["error"] == row["scan_error"] > 0 and row["identical"] and row["repeats"] == 100
    row |= {"status": "ready", "direction": BACKWARD}
    assert kernels.doubt(row) == "its program has no jaxrnn_states and no jaxrnn_adjoint"


def test_wrong_results_are_found(monkeypatch):
    calls = []

    def flaky(implementation, cell, xs, h0, g):
        def noise(_):
            calls.append(1)
            return np.float32(1 if len(calls) < 3 else 1.25)

        hs = right(implementation, cell, xs, h0, g)["hs"]
        if implementation == "scan":
            return {"hs": hs}
        one = jax.pure_callback(noise, jax.ShapeDtypeStruct((), "float32"), hs[0, 0, 0])
        return {"hs": hs * one}

    right = numerics._states
    monkeypatch.setattr(numerics, "_states", flaky)
    sizes = {"batch": 2, "steps": 3, "repeats": 5, "implementation": "associative"}
    row = numerics.examine("float32", 8, FORWARD, **sizes)
    assert not row["identical"] and len(calls) == 3
    row = numerics.examine("float32", 8, FORWARD, **sizes)
    assert row["identical"] and row["error"] == pytest.approx(0.25, rel=1e-3)
    doubted = kernels.doubt({**row, "status": "ready", "direction": FORWARD})
    assert doubted.startswith("hs is off by 2.5e-01, allowed is ")


def test_what_cannot_be_compiled_is_a_row():
    request = {"do": "examine", "dtype": "bfloat16", "hidden": 8, "direction": FORWARD,
               "batch": 1, "steps": 2}  # fmt: skip
    row = Bench(None).answer(request)
    assert row["status"] == "failed" and "mosaic_gpu" in row["reason"]


# Timing.


def side(**subjects):
    entries = {name: Entry("stub", "", make) for name, make in subjects.items()}
    described = [Listed(name, "stub", workers.JAX, name) for name in subjects]
    described.append(Listed("roofline, float32", "jax", workers.JAX, "roofline"))
    return JaxSide(workers.JAX, entries=entries, subjects=described)


def test_programs_that_are_compiled_ahead_are_what_is_timed(interpreted, monkeypatch, caplog):
    implementation, dtype = interpreted
    made = side(kernel=lambda: ours.run_by(implementation), scan=naive.unrolled)
    made.listed = {n: Listed(n, "stub", workers.JAX, how.base, dtype)
                   for n, how in made.listed.items()}  # fmt: skip
    worker = Bench(made)
    names = [*made.listed, "nobody"]
    pairs = [(name, measure) for name in names for measure in (FORWARD, BACKWARD)]
    request = {"pairs": pairs, "workload": asdict(TINY)}
    assert worker.answer({"do": "compile", **request}) == {"status": "ready"}
    assert len(made.built) == 6
    monkeypatch.setattr("benchmarks.jax_side._build", None)
    for measure in (FORWARD, BACKWARD):
        for name in made.listed:
            asked = {"subject": name, "measure": measure, "compiles": 1, "workload": asdict(TINY)}
            with jax.log_compiles():
                reply = worker.answer({"do": "prepare", **asked})
            assert reply["status"] == "ready", reply
            assert set(reply["kernels"]) == set(kernels.NAMED[measure] if name == "kernel" else ())
            assert worker.answer({"do": "sample", "subject": name})["seconds"] > 0
        worker.answer({"do": "forget"})
    # The first call too found them compiled.
    whole = [f"jit({name})" for name in ("_states", "unroll", "forward", "loss", "both")]
    again = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [text for text in again if any(name in text for name in whole)]
    assert made.built == {}


def test_few_sequences_stand_for_all():
    data = draw(TINY)
    few = data.xs[:, TINY.compared]
    assert few.shape == (3, 4, 4) and (np.sort(few[:, :, 0]) == np.sort(data.xs[:, :4, 0])).all()
    everything = draw(Workload("all", *(getattr(TINY, n) for n in "TBDH")))
    assert len(np.unique(everything.xs[0, :, 0])) == 16 and len(np.unique(data.xs[0, :, 0])) == 4
    whole = Checker(Workload("all", 3, 16, 4, 64), data, direction(data))._gradients("tanh")
    part = Checker(TINY, data, direction(data))._gradients("tanh")
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
    """Answers as workers would on a GPU; the bfloat16 kernel of H = 128 kills its process."""

    def __init__(self):
        self.asked, self.prepared = [], []

    def call(self, kind, /, do, **request):
        self.asked.append((kind, do))
        if do == "examine":
            if (request["dtype"], request["hidden"]) == ("bfloat16", 128):
                raise workers.WorkerDiedError("the process gave no answer in 60 s")
            return {"status": "ready", **RIGHT, "named": list(kernels.NAMED[request["direction"]])}
        if do == "compile":
            raise workers.WorkerDiedError("the process was killed by signal 9")
        if do == "prepare":
            self.prepared.append((request["subject"], request["workload"]["name"]))
            return {"status": "ready", "repeats": 1, "seconds": 1e-3, "kernels": ["jaxrnn_states"]}
        return {"status": "ready", "seconds": 1e-3}


RIGHT = {
    "array": "hs", "error": 1e-3, "scan_error": 1e-3, "eps": 1e-3, "repeats": 100,
    "identical": True,
}  # fmt: skip


class Silent:
    def begin(self, *_): ...

    step = end = begin


def test_a_whole_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr("benchmarks.rounds.PAUSE_SECONDS", 0.0)
    crew, document = GpuCrew(), results.new({"gpu": "NVIDIA H200"}, {}, {})
    for subject in listed("gpu"):
        document["subjects"].append({**asdict(subject), "status": "ready", "activation": ""})
    assert len({s["name"] for s in document["subjects"]}) == len(document["subjects"])
    wanted = {("H 128, B 64"), ("H 320, B 16"), ("H 512, B 64")}
    workloads = tuple(w for w in GRID if w.name in wanted)
    plan = replace(run.GPU, workloads=workloads, minutes=None)
    run.run(crew, plan, document, Silent(), lambda: None)
    # Each once, and each direction; float32 only where it fits.
    examined = [(r["dtype"], r["H"], r["direction"]) for r in document["kernels"]]
    assert len(set(examined)) == len(examined) == 2 * (3 + 2 + 2)
    assert ("float32", 320, FORWARD) not in examined
    names = {name for name, _ in crew.prepared}
    assert {"naive scan, unroll 8, bfloat16", "jaxrnn, command buffers, bfloat16"} <= names
    assert {"cuDNN TF32", "cuDNN float32", "cuDNN bfloat16", "cuDNN float16"} <= names
    assert (f"{KERNEL}, bfloat16", "H 128, B 64") not in crew.prepared
    assert ("roofline, float16", "H 512, B 64") in crew.prepared
    assert {name for name, where in crew.prepared if where == "H 320, B 16"} == {
        f"{name}, {dtype}" for name in (KERNEL, SCAN) for dtype in ("bfloat16", "float16")
    } | {"cuDNN bfloat16", "cuDNN float16"}
    (row,) = (r for r in document["rows"] if r["subject"] == f"{KERNEL}, bfloat16"
              and r["workload"]["name"] == "H 128, B 64" and r["measure"] == FORWARD)  # fmt: skip
    assert row["status"] == "not measured" and "no answer in 60 s" in row["reason"]
    assert won(document) == ()  # as fast as the scan is not faster
    asked = len(crew.asked)
    late = results.new({"gpu": "NVIDIA H200"}, {}, {}) | {"subjects": document["subjects"]}
    run.run(crew, replace(plan, minutes=-1e-9), late, Silent(), lambda: None)
    assert len(crew.asked) == asked and late["kernels"] == []
    assert {row["status"] for row in late["rows"]} == {"not measured"}


def test_a_worker_that_hangs_is_ended():
    command = ["python", "-c", "import time; time.sleep(100)"]
    worker = workers.Worker("jax", command=command, limit=0.5)
    try:
        with pytest.raises(workers.WorkerDiedError, match="gave no answer in"):
            worker.call(do="machine")
    finally:
        worker.close()


def test_the_plan_has_every_size():
    assert {(w.H, w.B) for w in GRID} == {
        (H, B) for H in (64, 128, 256, 320, 512, 768, 1024) for B in (16, 64, 128)
    }
    assert {w.T for w in GRID} == {1024} and all(w.D <= 128 for w in GRID)
    assert max(w.H for w in GRID[:12]) == 320
    assert run.GPU.minutes < 8.5


# What "auto" takes.


def document(points, dtypes=("bfloat16",), kind="NVIDIA H200"):
    """A run whose kernels take half the scan's time at these points, and twice it elsewhere."""
    made = results.new({"processor": "EPYC", "cores": 16, "memory_gib": 1, "gpu": kind}, {}, {})
    for dtype in dtypes:
        for measure, named in kernels.NAMED.items():
            for H in (64, 128, 256):
                key = {"dtype": dtype, "H": H, "direction": measure, "status": "ready"}
                made["kernels"].append({**key, **RIGHT, "named": list(named)})
                for B in (16, 64, 128):
                    slow = 1e-3 if (H, B) in points else 4e-3
                    for name, seconds in ((SCAN, 2e-3), (KERNEL, slow)):
                        row = {"workload": asdict(Workload(f"H {H}, B {B}", 1024, B, 64, H))}
                        row |= {"subject": f"{name}, {dtype}", "measure": measure}
                        row |= {"status": "ready", "rounds": [0, 1, 2], "repeats": 1}
                        row |= {"seconds": [seconds] * 3}
                        row |= {"kernels": list(named)} if name == KERNEL else {}
                        made["rows"].append(row)
    made["subjects"] = [{"name": n, "package": "jaxrnn", "kind": "jax"}
                        for n in dict.fromkeys(r["subject"] for r in made["rows"])]  # fmt: skip
    return made


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
    [{"error": 5e-3}, {"error": float("nan")}, {"identical": False}, {"named": []},
     {"status": "failed", "reason": "the process was killed by signal 11"}],
    ids=lambda flaw: next(iter(flaw)),
)  # fmt: skip
@pytest.mark.parametrize("measure", [FORWARD, BACKWARD])
def test_a_kernel_that_cannot_be_trusted_wins_nothing(flaw, measure):
    made = document(EVERYWHERE)
    (row,) = (r for r in made["kernels"] if (r["H"], r["direction"]) == (256, measure))
    row |= flaw
    assert won(made) == (entry((64, 128), (16, 128)),)
    assert "exact, 100 calls alike" in report.markdown(made)


@pytest.mark.parametrize("measure", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    "flaw",
    [{"kernels": []}, {"seconds": [1e-3, 3e-3, 3e-3]}, {"seconds": [1e-3, 1.5e-3, 4e-3]},
     {"rounds": [7, 8, 9]}, {"status": "failed", "seconds": []}],
    ids=["unnamed", "median", "quartile", "unpaired", "failed"],
)  # fmt: skip
def test_a_time_that_proves_nothing_wins_nothing(flaw, measure):
    made = document(EVERYWHERE)
    for row in made["rows"]:
        where = row["workload"]["H"], row["measure"], row["subject"]
        if where == (256, measure, f"{KERNEL}, bfloat16"):
            row |= flaw
    assert won(made) == (entry((64, 128), (16, 128)),)


def test_what_the_library_takes_is_what_was_measured():
    found = {entry for path in RESULTS.glob("gpu-*/*.json") for entry in won(results.read(path))}
    assert set(MEASURED) == found and len(MEASURED) == len(found)


def test_the_report_of_kernels(tmp_path, capsys):
    from benchmarks.cli import main

    made, path = document({(64, 16), (64, 64)}), tmp_path / "a.json"
    made["kernels"][0] |= {"status": "failed", "reason": "the process was killed by signal 11"}
    results.write(made, path)
    assert main(["report", str(path), "--markdown"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| bfloat16 | 64 | 16 |"))
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    # 4.2 MB to read and write would take 0.87 µs of the millisecond.
    assert cells[3:5] == ["0.977", "1.95"] and cells[11:] == ["2.00 (2.00–2.00)", "–", "0.000874"]
    assert "| bfloat16 | 64 | forward | – | – | – | the process was killed by signal 11 |" in text
    assert text.endswith("```python\nMEASURED: tuple[Measured, ...] = ()\n```\n")
    made["kernels"].pop(0)
    made["kernels"].append({**RIGHT, "dtype": "bfloat16", "H": 64, "direction": FORWARD,
                            "status": "ready", "named": ["jaxrnn_states"]})  # fmt: skip
    results.write(made, path)
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
        assert results.read(path)["kernels"] == [] and won(results.read(path)) == ()


def test_every_dtype_with_a_kernel_is_listed():
    for dtype, most in LARGEST["mosaic_gpu"].items():
        (how,) = (s for s in listed("gpu") if s.name == f"{KERNEL}, {dtype}")
        assert (how.dtype, how.hidden, how.precision) == (dtype, most, None)

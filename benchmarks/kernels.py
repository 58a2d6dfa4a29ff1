"""What a run on a GPU says of the kernels: exact, repeatable, in the program, and how fast."""

from collections.abc import Iterator
from typing import Any

from benchmarks.programs import KERNEL_NAMES
from benchmarks.report import NOTHING, View, not_timed, number, table
from benchmarks.results import caption
from benchmarks.subjects import registry
from benchmarks.subjects.registry import IMPLEMENTATION, KERNEL, LARGEST, SCAN
from benchmarks.workloads import BACKWARD, FORWARD, Workload
from jaxrnn._backends.select import Measured

# The step between numbers of about 1: of TensorFloat-32 where the dtype is float32.
EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-10, "float16": 2.0**-10}
# How kernels are called in the programs of a measure.
NAMED = {FORWARD: KERNEL_NAMES[:1], BACKWARD: KERNEL_NAMES}
# Columns of times: subjects, in each dtype.
COLUMNS = (
    *(f"{base}, {{}}" for base in (KERNEL, SCAN, registry.ASSOCIATIVE, registry.NAIVE)),
    *("cuDNN {}", "cuDNN TF32"),
)
RATIOS = ((SCAN, KERNEL), (SCAN, registry.ASSOCIATIVE), ("cuDNN", KERNEL))


def verdict(row: dict[str, Any]) -> str:
    """A kernel's row in a line: how far it is off, and whether its calls are alike."""
    where = f"{row['subject']}, {row['workload']['name']}, {row['measure']}"
    if row["status"] != "ready":
        return f"{where}: {row['status']}, {row['reason']}"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    same = "alike" if row["alike"] else "NOT alike"
    return f"{where}: off by {errors}; {row['calls']} calls {same}"


def times(rows: list[dict[str, Any]]) -> str:
    """Rows of one measure in a line: microseconds a step, or what became of them."""
    parts = []
    for row in rows:
        seconds, T = sorted(row["seconds"]), row["workload"]["T"]
        timed = row["status"] == "ready" and seconds
        each = number(1e6 * seconds[len(seconds) // 2] / T) if timed else row["status"]
        parts.append(f"{row['subject']} {each}")
    return f"µs a step: {', '.join(parts)}"


def doubt(view: View, workload: Workload, measure: str, dtype: str) -> str | None:
    """Why the kernel of a dtype cannot be trusted on a workload, or None.

    It may be off by twice the scan's own error, or by a few roundings of the dtype.
    """
    row, scan = (view.row(workload, measure, f"{name}, {dtype}") for name in (KERNEL, SCAN))
    if row.get("status") != "ready" or not row.get("errors"):
        return row.get("reason", "not measured")
    for array, error in row["errors"].items():
        allowed = max(2 * scan.get("errors", {}).get(array, 0.0), 4 * EPS[dtype])
        if not error <= allowed:  # NaN too
            return f"{array} is off by {error:.1e}, allowed is {allowed:.1e}"
    if not row["alike"] or row["calls"] < 2:
        return f"{row['calls']} calls gave different results"
    missing = [name for name in NAMED[measure] if name not in row["kernels"]]
    return f"its program has no {' and no '.join(missing)}" if missing else None


def won(document: dict[str, Any]) -> Iterator[Measured]:
    """Where "auto" may take the kernel: it was exact, repeatable, there, and faster than the scan.

    Faster is: in both directions, of the ratios of the rounds the lower quartile is above 1. Of
    each H, ranges of B whose every measured point is one of these.
    """
    view, kind = View(document), document["device"]["gpu"]
    for dtype in LARGEST:
        points: dict[int, dict[int, bool]] = {}
        for w in view.workloads:
            if any(view.row(w, m, f"{KERNEL}, {dtype}") for m in NAMED):
                proved = all(_proved(view, w, measure, dtype) for measure in NAMED)
                points.setdefault(w.H, {})[w.B] = proved
        for H, batches in sorted(points.items()):
            run: list[int] = []
            for B in (*sorted(batches), None):
                if B is not None and batches[B]:
                    run.append(B)
                elif run:
                    yield Measured(kind, dtype, (H, H), (run[0], run[-1]), IMPLEMENTATION)
                    run = []


def _proved(view: View, workload: Workload, measure: str, dtype: str) -> bool:
    faster = view.ratio(workload, measure, f"{SCAN}, {dtype}", f"{KERNEL}, {dtype}")
    exact = doubt(view, workload, measure, dtype) is None
    return exact and faster is not None and faster.low > 1


def tables(document: dict[str, Any]) -> Iterator[str]:
    """What was found out about each kernel, and times beside those of its rivals."""
    view = View(document)
    points = sorted(view.workloads, key=lambda w: (w.H, w.B, w.T))
    yield caption(document)
    verdicts = ["**Kernels beside float64: errors in terms of the largest entry**", ""]
    for dtype in LARGEST:
        for workload in points:
            for measure in NAMED:
                if row := view.row(workload, measure, f"{KERNEL}, {dtype}"):
                    said = doubt(view, workload, measure, dtype)
                    exact = "exact" if said is None else f"NOT exact: {said}"
                    verdicts.append(f"- {verdict(row)}: {exact}")
    yield "\n".join(verdicts)
    for measure in view.measures:
        rows = [_times(view, w, measure, dtype) for dtype in LARGEST for w in points]
        rows = [row for row in rows if any(cell != NOTHING for cell in row[2:])]
        names = [subject.removesuffix("{}").strip(", ") for subject in COLUMNS]
        header = ["dtype", "row", *names, *(f"{slow} / {fast}" for slow, fast in RATIOS)]
        # Without the columns of those who took no part.
        full = [n for n in range(len(header)) if any(row[n] != NOTHING for row in rows)]
        if rows:
            cells = [[row[n] for n in full] for row in rows]
            yield table(f"{measure}: µs a step", [header[n] for n in full], cells)
    yield from not_timed([document])
    entries = "".join(f"    {entry!r},\n" for entry in won(document))
    yield f"MEASURED: tuple[Measured, ...] = ({chr(10) + entries if entries else ''})"


def _times(view: View, workload: Workload, measure: str, dtype: str) -> list[str]:
    cells = [dtype, workload.name]
    for subject in COLUMNS:
        seconds = view.seconds(workload, measure, subject.format(dtype))
        cell = number(seconds and 1e6 * seconds / workload.T)
        if view.row(workload, measure, subject.format(dtype)).get("status") == "failed":
            cell = "failed"
        cells.append(NOTHING if subject.endswith("TF32") and dtype != "float32" else cell)
    for pair in RATIOS:
        names = [f"{base}, {dtype}" for base in pair]
        if pair[0] == "cuDNN":  # in float32 the kernel and the scan multiply in TF32
            names[0] = "cuDNN TF32" if dtype == "float32" else f"cuDNN {dtype}"
        cells.append(str(view.ratio(workload, measure, *names) or NOTHING))
    return cells

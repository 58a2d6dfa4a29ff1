"""What a run on a GPU says of the kernels: exact, repeatable, in the program, and how fast."""

from collections.abc import Iterator
from typing import Any

from benchmarks.programs import KERNEL_NAMES
from benchmarks.report import NOTHING, Table, View, not_timed, number
from benchmarks.results import caption
from benchmarks.subjects.registry import (
    ASSOCIATIVE,
    IMPLEMENTATION,
    KERNEL,
    LARGEST,
    NAIVE,
    ROOFLINE,
    SCAN,
)
from benchmarks.workloads import BACKWARD, FORWARD, Workload
from jaxrnn._backends.select import Measured

# The step between numbers of about 1: of TensorFloat-32 where the dtype is float32.
EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-10, "float16": 2.0**-10}
# How kernels are called in the programs of a measure.
NAMED = {FORWARD: KERNEL_NAMES[:1], BACKWARD: KERNEL_NAMES}
# Columns of times, and the subjects in them.
COLUMNS = {
    "kernel": f"{KERNEL}, {{}}",
    "scan": f"{SCAN}, {{}}",
    "associative": f"{ASSOCIATIVE}, {{}}",
    "naive scan": f"{NAIVE}, {{}}",
    "naive, unroll 8": "naive scan, unroll 8, {}",
    "products alone": f"{ROOFLINE}, {{}}",
    "cuDNN": "cuDNN {}",
    "cuDNN TF32": "cuDNN TF32",
}


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
        if row["status"] == "ready" and row["seconds"]:
            each = 1e6 * sorted(row["seconds"])[len(row["seconds"]) // 2] / row["workload"]["T"]
            parts.append(f"{row['subject']} {number(each)}")
        else:
            parts.append(f"{row['subject']} {row['status']}")
    return f"µs a step: {', '.join(parts)}"


def allowed(scan: dict[str, Any], array: str, dtype: str) -> float:
    """How large an error of a kernel still counts as exact.

    Args:
      scan: the row of the scan in the same dtype; empty where it was not compared.
      array: which error.
      dtype: of both.

    Returns:
      Twice the scan's own error, or a few roundings of the dtype.
    """
    return max(2 * scan.get("errors", {}).get(array, 0.0), 4 * EPS[dtype])


def worst(row: dict[str, Any], scan: dict[str, Any], dtype: str) -> str:
    """The array whose error is the largest beside what is allowed."""

    def beyond(array):
        excess = row["errors"][array] / allowed(scan, array, dtype)
        return excess if excess == excess else float("inf")  # NaN is worst

    return max(row["errors"], key=beyond)


def doubt(view: View, workload: Workload, measure: str, dtype: str) -> str | None:
    """Why the kernel of a dtype cannot be trusted on a workload, or None."""
    row, scan = (view.row(workload, measure, f"{name}, {dtype}") for name in (KERNEL, SCAN))
    if row.get("status") != "ready" or not row.get("errors"):
        return row.get("reason", "not measured")
    array = worst(row, scan, dtype)
    error, limit = row["errors"][array], allowed(scan, array, dtype)
    if not error <= limit:  # NaN too
        return f"{array} is off by {error:.1e}, allowed is {limit:.1e}"
    if not row["alike"] or row["calls"] < 2:
        return f"{row['calls']} calls gave different results"
    missing = [name for name in NAMED[measure] if name not in row["kernels"]]
    return f"its program has no {' and no '.join(missing)}" if missing else None


def won(document: dict[str, Any]) -> tuple[Measured, ...]:
    """Where "auto" may take the kernel: it was exact, repeatable, there, and faster than the scan.

    Faster is: in both directions, of the ratios of the rounds the lower quartile is above 1.

    Args:
      document: the results of a run.

    Returns:
      Ranges of H and B whose every measured point is one of these: of each H the ranges of B, and
      neighbours in H together where theirs are the same.
    """
    view, found = View(document), []
    for dtype in LARGEST:
        grid: dict[int, dict[int, bool]] = {}
        for w in view.workloads:
            if w.tuned and any(view.row(w, m, f"{KERNEL}, {dtype}") for m in NAMED):
                proved = all(_proved(view, w, measure, dtype) for measure in NAMED)
                grid.setdefault(w.H, {})[w.B] = proved
        entries: list[Measured] = []
        neighbours: dict[tuple, int] = {}
        for H in sorted(grid):
            now = {}
            for batch in _ranges(grid[H]):
                key = batch, tuple(sorted(grid[H]))
                if key in neighbours:
                    n = neighbours[key]
                    entries[n] = entries[n]._replace(hidden=(entries[n].hidden[0], H))
                else:
                    n = len(entries)
                    kind = document["device"]["gpu"]
                    entries.append(Measured(kind, dtype, (H, H), batch, IMPLEMENTATION))
                now[key] = n
            neighbours = now
        found += entries
    return tuple(found)


def _ranges(points: dict[int, bool]) -> list[tuple[int, int]]:
    """(first, last) of each run of neighbouring points that hold."""
    found, start, last = [], None, 0
    for point in sorted(points):
        if points[point]:
            start, last = (point if start is None else start), point
        elif start is not None:
            found.append((start, last))
            start = None
    return found if start is None else [*found, (start, last)]


def _proved(view: View, workload: Workload, measure: str, dtype: str) -> bool:
    faster = view.ratio(workload, measure, f"{SCAN}, {dtype}", f"{KERNEL}, {dtype}")
    exact = doubt(view, workload, measure, dtype) is None
    return exact and faster is not None and faster.low > 1


def tables(document: dict[str, Any]) -> Iterator[str]:
    """What was found out about each kernel, and times beside those of its rivals.

    Args:
      document: the results of a run on a GPU.

    Yields:
      A caption, tables, what was not timed, and the table of jaxrnn/_backends/select.py.
    """
    view = View(document)
    early = " The run was stopped early." if document["interrupted"] else ""
    early += " A dry run: interpreted on the CPU." if document["options"].get("dry") else ""
    yield f"{caption(document)}.{early}"
    points = sorted(view.workloads, key=lambda w: (w.H, w.B, w.T, w.tuned))
    rows = [
        _verdict(view, workload, measure, dtype)
        for dtype in LARGEST
        for workload in points
        for measure in NAMED
        if view.row(workload, measure, f"{KERNEL}, {dtype}")
    ]
    header = ["kernel", "H", "B", "direction", "array", "error", "the scan's", "allowed", "verdict"]
    if rows:
        title = "**Kernels beside float64: errors in terms of the largest entry**"
        yield str(Table(title, header, rows))
    for measure in view.measures:
        rows = [_times(view, w, measure, dtype) for dtype in LARGEST for w in points]
        rows = [row for row in rows if any(cell != NOTHING for cell in row[4:])]
        ratios = ["scan / kernel", "scan / associative", "cuDNN / kernel"]
        header = ["dtype", "H", "B", "T", *COLUMNS, *ratios]
        # Without the columns of those who took no part.
        full = [n for n in range(len(header)) if any(row[n] != NOTHING for row in rows)]
        if full:
            cells = [[row[n] for n in full] for row in rows]
            yield str(Table(f"**{measure}: µs a step**", [header[n] for n in full], cells))
    yield from not_timed([document])
    entries = "".join(f"    {entry!r},\n" for entry in won(document))
    yield f"MEASURED: tuple[Measured, ...] = ({chr(10) + entries if entries else ''})"


def _dtype(dtype: str, workload: Workload) -> str:
    return dtype if workload.tuned else f"{dtype} (not tuned)"


def _verdict(view: View, workload: Workload, measure: str, dtype: str) -> list[str]:
    row, scan = (view.row(workload, measure, f"{name}, {dtype}") for name in (KERNEL, SCAN))
    figures, said = [NOTHING] * 4, doubt(view, workload, measure, dtype)
    if row.get("errors"):
        array = worst(row, scan, dtype)
        of_scan = scan.get("errors", {}).get(array)
        limit = allowed(scan, array, dtype)
        figures = [array, f"{row['errors'][array]:.1e}", number(of_scan), f"{limit:.1e}"]
        said = said or f"exact, {row['calls']} calls alike"
    where = [_dtype(dtype, workload), str(workload.H), str(workload.B), measure]
    return [*where, *figures, str(said)]


def _times(view: View, workload: Workload, measure: str, dtype: str) -> list[str]:
    # In float32 the kernel and the scan multiply in TF32.
    tf32 = dtype == "float32"
    columns = {name: subject.format(dtype) for name, subject in COLUMNS.items()}
    cells = [_dtype(dtype, workload), str(workload.H), str(workload.B), str(workload.T)]
    for name, subject in columns.items():
        seconds = view.seconds(workload, measure, subject)
        failed = view.row(workload, measure, subject).get("status") == "failed"
        cell = "failed" if failed else number(seconds and 1e6 * seconds / workload.T)
        cells.append(NOTHING if name == "cuDNN TF32" and not tf32 else cell)
    kernel, scan = columns["kernel"], columns["scan"]
    cudnn = columns["cuDNN TF32" if tf32 else "cuDNN"]
    for slow, fast in ((scan, kernel), (scan, columns["associative"]), (cudnn, kernel)):
        ratio = view.ratio(workload, measure, slow, fast)
        cells.append(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else NOTHING)
    return cells

"""What a run on a GPU says of the kernels: exact, repeatable, there, and how fast."""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.roofline import least_seconds
from benchmarks.tables import NOTHING, Table, number, ratio
from benchmarks.view import ROOFLINE, View
from benchmarks.workloads import Workload
from jaxrnn._backends.select import LARGEST as ALL_LARGEST
from jaxrnn._backends.select import Measured

KERNEL, SCAN, IMPLEMENTATION = "jaxrnn, kernel", "jaxrnn, scan", "mosaic_gpu"
ASSOCIATIVE = "jaxrnn, associative"
# The largest H of each dtype, in the order in which they are measured: float16 last, whose kernel
# is that of bfloat16, as time may be up by then.
LARGEST = {d: ALL_LARGEST[IMPLEMENTATION][d] for d in ("bfloat16", "float32", "float16")}
# The largest H of a kernel that is one block; above it a cluster of blocks is.
MOST_OF_A_BLOCK = 320
# The step between numbers of about 1: of TensorFloat-32 where the dtype is float32.
EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-10, "float16": 2.0**-10}
# How kernels are called in the programs of a measure.
NAMED = {FORWARD: ("jaxrnn_states",), BACKWARD: ("jaxrnn_states", "jaxrnn_adjoint")}
NAMES = tuple(dict.fromkeys(name for names in NAMED.values() for name in names))
# Columns of times, and the subjects in them.
COLUMNS = {
    "kernel": KERNEL + ", {}", "jaxrnn's scan": SCAN + ", {}",
    "associative": ASSOCIATIVE + ", {}", "naive scan": "naive scan, {}",
    "naive, unroll 8": "naive scan, unroll 8, {}",
    "command buffers": "jaxrnn, command buffers, {}", "products alone": ROOFLINE + ", {}",
    "cuDNN": "cuDNN {}", "cuDNN TF32": "cuDNN TF32",
}  # fmt: skip


def kernels_in(text: str) -> list[str]:
    """The kernels that a program's text names."""
    return sorted(name for name in NAMES if name in text)


def on_gpu(document: dict[str, Any]) -> bool:
    """Whether the results are those of a GPU."""
    return bool(document["device"]["gpu"])


def allowed(scan: dict[str, Any] | None, array: str, dtype: str) -> float:
    """How large an error of a kernel still counts as exact.

    Args:
      scan: the row of the scan in the same dtype; None where it was not compared.
      array: which error.
      dtype: of both.

    Returns:
      Twice the scan's own error, or a few roundings of the dtype.
    """
    of_scan = scan["errors"].get(array, 0.0) if scan else 0.0
    return max(2 * of_scan, 4 * EPS[dtype])


def worst(row: dict[str, Any], scan: dict[str, Any] | None, dtype: str) -> str:
    """The array whose error is the largest beside what is allowed."""

    def beyond(array):
        excess = row["errors"][array] / allowed(scan, array, dtype)
        return excess if excess == excess else float("inf")  # NaN is worst

    return max(row["errors"], key=beyond)


def doubt(view: View, workload: Workload, measure: str, dtype: str) -> str | None:
    """Why the kernel of a dtype cannot be trusted on a workload, or None.

    Args:
      view: the results of a run.
      workload: which.
      measure: FORWARD or BACKWARD.
      dtype: which.
    """
    row, scan = (view.checked(workload, measure, f"{name}, {dtype}") for name in (KERNEL, SCAN))
    if row is None or row["status"] != "ready":
        return view.reason(workload, measure, f"{KERNEL}, {dtype}") or "not measured"
    array = worst(row, scan, dtype)
    error, limit = row["errors"][array], allowed(scan, array, dtype)
    if not error <= limit:  # NaN too
        return f"{array} is off by {error:.1e}, allowed is {limit:.1e}"
    if not row["alike"] or row["calls"] < 2:
        return f"{row['calls']} calls gave different results"
    missing = [name for name in NAMED[measure] if name not in row.get("kernels", [])]
    return f"its program has no {' and no '.join(missing)}" if missing else None


def verdict(row: dict[str, Any]) -> str:
    """A kernel's row in a line: how far it is off, and whether its calls are alike."""
    subject, where = row["subject"], f"{row['workload']['name']}, {row['measure']}"
    if row["status"] != "ready":
        return f"{subject}, {where}: {row['status']}, {row['reason']}"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    alike = "alike" if row["alike"] else "NOT alike"
    return f"{subject}, {where}: off by {errors}; {row['calls']} calls {alike}"


def times(rows: list[dict[str, Any]]) -> str:
    """A trial's rows in a line: microseconds a step, or what became of them."""
    parts = []
    for row in rows:
        if row.get("seconds"):
            each = 1e6 * sorted(row["seconds"])[len(row["seconds"]) // 2] / row["workload"]["T"]
            parts.append(f"{row['subject']} {number(each)}")
        else:
            parts.append(f"{row['subject']} {row['status']}")
    return f"µs a step: {', '.join(parts)}"


def won(document: dict[str, Any]) -> tuple[Measured, ...]:
    """Where "auto" may take the kernel: it was exact, repeatable, there, and faster than the scan.

    Faster is: in both directions, of the ratios of the rounds the lower quartile is above 1.

    Args:
      document: the results of a run.

    Returns:
      As few boxes of (H, B) as hold every such point of the run, and no other one.
    """
    view, found = View(document), []
    for dtype in LARGEST:
        there = [w for w in view.workloads if view.listed(w, KERNEL, dtype) and w.tuned]
        grid = {(w.H, w.B): w for w in there}
        points = {
            (H, B)
            for (H, B), w in grid.items()
            if all(_proved(view, w, measure, dtype) for measure in NAMED)
        }
        for hidden, batch in boxes(points, set(grid)):
            kind = document["device"]["gpu"]
            found.append(Measured(kind, dtype, hidden, batch, IMPLEMENTATION))
    return tuple(found)


def _proved(view: View, workload: Workload, measure: str, dtype: str) -> bool:
    kernel, scan = (f"{name}, {dtype}" for name in (KERNEL, SCAN))
    faster = view.ratio(workload, measure, scan, kernel)
    exact = doubt(view, workload, measure, dtype) is None
    return exact and faster is not None and faster.low > 1


Range = tuple[int, int]


def boxes(points: set[Range], grid: set[Range]) -> list[tuple[Range, Range]]:
    """The fewest boxes that hold all points, and nothing else of the grid.

    A pair of coordinates that the grid lacks, where nothing is known, is in none of them.

    Args:
      points: pairs of coordinates.
      grid: all pairs that were measured.

    Returns:
      ((least, most), (least, most)) of each, in order.
    """
    across, along = (sorted({pair[n] for pair in grid}) for n in (0, 1))

    def inside(box):
        (a, b), (c, d) = box
        return {(x, y) for x, y in product(across, along) if a <= x <= b and c <= y <= d}

    ranges = [[(a, b) for a, b in product(axis, axis) if a <= b] for axis in (across, along)]
    full = [box for box in product(*ranges) if inside(box) <= points]
    largest = [box for box in full if not any(inside(box) < inside(other) for other in full)]
    for count in range(1, len(largest) + 1):
        for chosen in combinations(largest, count):
            if set().union(*map(inside, chosen)) == points:
                return sorted(chosen)
    return []


def pasted(entries: tuple[Measured, ...]) -> str:
    """The table of jaxrnn/_backends/select.py, as Python."""
    lines = [f"    Measured({', '.join(map(_quoted, entry))}),\n" for entry in entries]
    return f"MEASURED: tuple[Measured, ...] = ({''.join(['', chr(10), *lines]) if lines else ''})"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """What was found out about each kernel, and times beside those of its rivals.

    Args:
      document: the results of a run.

    Yields:
      The tables.
    """
    view = View(document)
    rows = []
    for dtype, workload in _kernels(view):
        for measure in NAMED:
            rows.append(_verdict(view, workload, measure, dtype))
    header = ["kernel", "H", "B", "direction", "array", "error", "the scan's", "allowed", "verdict"]
    title = "kernels and scan beside float64: errors in terms of the largest entry"
    if rows:
        yield Table(title, header, rows, left=(3, 4, 8))
    for measure in view.measures:
        rows = [
            _times(view, workload, measure, dtype)
            for dtype in LARGEST
            for workload in sorted(view.workloads, key=lambda w: (w.H, w.B, w.T, w.tuned))
        ]
        rows = [row for row in rows if any(cell != NOTHING for cell in row[4:])]
        header = ["dtype", "H", "B", "T", *COLUMNS, "scan / kernel", "scan / associative",
                  "cuDNN / kernel", "fraction of roofline"]  # fmt: skip
        # Without the columns of those who took no part.
        full = [n for n in range(len(header)) if any(row[n] != NOTHING for row in rows)]
        if full:
            cells = [[row[n] for n in full] for row in rows]
            yield Table(f"{measure}: microseconds a step", [header[n] for n in full], cells)


def _kernels(view: View) -> Iterator[tuple[str, Workload]]:
    """The dtype and the workload of each kernel that was tried."""
    for dtype in LARGEST:
        for workload in sorted(view.workloads, key=lambda w: (w.H, w.B, w.tuned)):
            if view.listed(workload, KERNEL, dtype):
                yield dtype, workload


def _dtype(dtype: str, workload: Workload) -> str:
    return dtype if workload.tuned else f"{dtype} (not tuned)"


def _verdict(view: View, workload: Workload, measure: str, dtype: str) -> list[str]:
    row, scan = (view.checked(workload, measure, f"{name}, {dtype}") for name in (KERNEL, SCAN))
    figures = [NOTHING] * 4
    said = doubt(view, workload, measure, dtype)
    if row is not None:
        array = worst(row, scan, dtype)
        limit = allowed(scan, array, dtype)
        of_scan = f"{scan['errors'][array]:.1e}" if scan else NOTHING
        figures = [array, f"{row['errors'][array]:.1e}", of_scan, f"{limit:.1e}"]
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
        failed = view.status(workload, measure, subject) == "failed"
        cell = "failed" if failed else number(seconds and 1e6 * seconds / workload.T)
        cells.append(NOTHING if name == "cuDNN TF32" and not tf32 else cell)
    kernel, cudnn = columns["kernel"], columns["cuDNN TF32" if tf32 else "cuDNN"]
    scan = columns["jaxrnn's scan"]
    for slow, fast in ((scan, kernel), (scan, columns["associative"]), (cudnn, kernel)):
        cells.append(ratio(view.ratio(workload, measure, slow, fast)))
    took, least = view.seconds(workload, measure, kernel), None
    if measure in NAMED:
        least = least_seconds(view.document["device"]["gpu"], workload, measure, dtype)
    cells.append(number(least / took if least and took else None))
    return cells

"""What a run on a GPU says of the kernels: exact, repeatable, there, and how fast."""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.roofline import least_seconds
from benchmarks.tables import NOTHING, Table, number, ratio
from benchmarks.view import ROOFLINE, View
from benchmarks.workloads import Workload
from jaxrnn._implementation import LARGEST as ALL_LARGEST
from jaxrnn._implementation import Measured

KERNEL, SCAN, IMPLEMENTATION = "jaxrnn, kernel", "jaxrnn, scan", "mosaic_gpu"
# The largest H of each dtype.
LARGEST = ALL_LARGEST[IMPLEMENTATION]
# How kernels are called in the programs of a measure.
NAMED = {FORWARD: ("jaxrnn_states",), BACKWARD: ("jaxrnn_states", "jaxrnn_adjoint")}
# Columns of times, and the subjects in them.
COLUMNS = {
    "kernel": KERNEL + ", {}", "jaxrnn's scan": SCAN + ", {}", "naive scan": "naive scan, {}",
    "naive, unroll 8": "naive scan, unroll 8, {}",
    "command buffers": "jaxrnn, command buffers, {}", "products alone": ROOFLINE + ", {}",
    "cuDNN": "cuDNN {}", "cuDNN TF32": "cuDNN TF32",
}  # fmt: skip


def allowed(row: dict[str, Any]) -> float:
    """How large an error still counts as exact.

    Args:
      row: of "kernels".

    Returns:
      Twice the scan's own error, or a few roundings of the dtype.
    """
    return max(2 * row["scan_error"], 4 * row["eps"])


def doubt(row: dict[str, Any]) -> str | None:
    """Why a kernel cannot be trusted, or None.

    Args:
      row: of "kernels".
    """
    if row["status"] != "ready":
        return row["reason"]
    if not row["error"] <= allowed(row):  # NaN too
        return f"{row['array']} is off by {row['error']:.1e}, allowed is {allowed(row):.1e}"
    if not row["identical"]:
        return f"{row['repeats']} calls gave different results"
    return _not_named(row["direction"], row["named"])


def _not_named(measure: str, named: list[str]) -> str | None:
    missing = [name for name in NAMED[measure] if name not in named]
    return f"its program has no {' and no '.join(missing)}" if missing else None


def won(document: dict[str, Any]) -> tuple[Measured, ...]:
    """Where "auto" may take the kernel: it was exact, repeatable, there, and faster than the scan.

    Faster is: in both directions, of the ratios of the rounds the lower quartile is above 1.

    Args:
      document: the results of a run.

    Returns:
      As few boxes of (H, B) as hold every such point of the run, and no other one.
    """
    trusted = {(r["dtype"], r["H"], r["direction"]) for r in document["kernels"] if not doubt(r)}
    view, found = View(document), []
    for dtype in LARGEST:
        grid = {(w.H, w.B): w for w in view.workloads if view.listed(w, KERNEL, dtype)}
        points = {
            (H, B)
            for (H, B), w in grid.items()
            if all((dtype, H, measure) in trusted for measure in NAMED)
            and all(_faster(view, w, measure, dtype) for measure in NAMED)
        }
        for hidden, batch in boxes(points, set(grid)):
            kind = document["device"]["gpu"]
            found.append(Measured(kind, dtype, hidden, batch, IMPLEMENTATION))
    return tuple(found)


def _faster(view: View, workload: Workload, measure: str, dtype: str) -> bool:
    kernel, scan = (f"{name}, {dtype}" for name in (KERNEL, SCAN))
    row, faster = view.row(workload, measure, kernel), view.ratio(workload, measure, scan, kernel)
    if row is None or faster is None or _not_named(measure, row.get("kernels", [])):
        return False
    return faster.low > 1


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
    """The table of jaxrnn/_implementation.py, as Python."""
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
    rows = []
    for row in document["kernels"]:
        figures = [NOTHING] * 3
        if row["status"] == "ready":
            figures = [f"{x:.1e}" for x in (row["error"], row["scan_error"], allowed(row))]
        verdict = doubt(row) or f"exact, {row['repeats']} calls alike"
        rows.append([row["dtype"], str(row["H"]), row["direction"], *figures, verdict])
    header = ["kernel", "H", "direction", "error", "the scan's", "allowed", "verdict"]
    title = "kernels beside the scan in float64: errors in terms of the largest entry"
    yield Table(title, header, rows, left=(2, 6))
    view = View(document)
    for measure in view.measures:
        rows = [
            _times(view, workload, measure, dtype)
            for dtype in LARGEST
            for workload in sorted(view.workloads, key=lambda w: (w.H, w.B))
            if view.listed(workload, KERNEL, dtype)
        ]
        header = ["dtype", "H", "B", *COLUMNS, "scan / kernel", "cuDNN / kernel",
                  "fraction of roofline"]  # fmt: skip
        if rows:
            yield Table(f"{measure}: microseconds a step", header, rows)


def _times(view: View, workload: Workload, measure: str, dtype: str) -> list[str]:
    # In float32 the kernel and the scan multiply in TF32.
    tf32 = dtype == "float32"
    columns = {name: subject.format(dtype) for name, subject in COLUMNS.items()}
    cells = [dtype, str(workload.H), str(workload.B)]
    for name, subject in columns.items():
        seconds = view.seconds(workload, measure, subject)
        failed = view.status(workload, measure, subject) == "failed"
        cell = "failed" if failed else number(seconds and 1e6 * seconds / workload.T)
        cells.append(NOTHING if name == "cuDNN TF32" and not tf32 else cell)
    kernel, cudnn = columns["kernel"], columns["cuDNN TF32" if tf32 else "cuDNN"]
    for slow in (columns["jaxrnn's scan"], cudnn):
        cells.append(ratio(view.ratio(workload, measure, slow, kernel)))
    took = view.seconds(workload, measure, kernel)
    least = least_seconds(view.document["device"]["gpu"], workload, measure, dtype)
    cells.append(number(least / took if least and took else None))
    return cells

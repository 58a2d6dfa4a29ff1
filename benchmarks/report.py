"""What runs found, as tables: each row, and how many times longer than jaxrnn the others take."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import caption, row_key
from benchmarks.subjects.registry import NAIVE, OURS
from benchmarks.workloads import WORKLOADS, Workload, from_json

NOTHING = "–"
TWO_DEVICES = ", two host devices"
MILLISECONDS, BEST, COMPILING = "jaxrnn, ms", "best JAX peer", "naive scan's compiling"
TEMPORARIES = "temporaries beyond naive, [T, B, H]"
Documents = Sequence[dict[str, Any]]
Value = tuple[float, str]  # and what stands behind it


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, columns padded, so that it reads as well in a terminal."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells, fill=" "):
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1], fill), *(cell.rjust(w, fill) for cell, w in others)]
        return f"| {' | '.join(padded)} |"

    marks = line(["", *[":"] * (len(header) - 1)], "-")
    return "\n".join([f"**{title}**", "", line(header), marks, *map(line, rows)])


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return NOTHING
    if value >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:#.3g}".rstrip(".")
    return text if "e" not in text else f"{value:.1e}"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def paired(slow: dict[str, Any], fast: dict[str, Any]) -> Spread | None:
    """How many times longer one row takes than another, each round by itself.

    What disturbs the machine disturbs neighbours in a round alike, and leaves their ratio. None
    where they have no round in common.
    """
    first = dict(zip(slow["rounds"], slow["seconds"], strict=True))
    second = dict(zip(fast["rounds"], fast["seconds"], strict=True))
    ratios = [first[n] / second[n] for n in sorted(first.keys() & second.keys())]
    return spread(ratios) if ratios else None


class View:
    """The rows of a document, by workload, measure and subject."""

    def __init__(self, document: dict[str, Any]):
        self.document, rows = document, document["rows"]
        self.rows = {row_key(row): row for row in rows}
        self.measures = list(dict.fromkeys(row["measure"] for row in rows))
        by_name = {row["workload"]["name"]: row["workload"] for row in rows}
        self.workloads = [from_json(workload) for workload in by_name.values()]

    def row(self, workload: Workload, measure: str, subject: str) -> dict[str, Any]:
        """A row, with times or without; empty where there is none."""
        return self.rows.get((workload.name, measure, subject), {})

    def seconds(self, workload: Workload, measure: str, subject: str) -> float | None:
        """The median, where it was timed."""
        row = self.row(workload, measure, subject)
        return spread(row["seconds"]).median if _timed(row) else None

    def ratio(self, workload: Workload, measure: str, slow: str, fast: str) -> Spread | None:
        """How many times longer one takes than the other, round by round."""
        rows = [self.row(workload, measure, name) for name in (slow, fast)]
        return paired(*rows) if all(map(_timed, rows)) else None

    def beside_ours(self, workload: Workload, measure: str, subject: str) -> Spread | None:
        """A subject's time over that of jaxrnn with the same network on as many devices."""
        ours = OURS
        if subject.endswith(TWO_DEVICES):
            ours += TWO_DEVICES
        elif subject.endswith(", relu") and workload.network.activation != "relu":
            ours += ", relu"
        return self.ratio(workload, measure, subject, ours)

    def best(self, workload: Workload, measure: str, torch: bool = False) -> tuple | None:
        """Of the other JAX libraries, or of torch: the smallest ratio, and whose it is."""
        found = []
        for subject in self.document["subjects"]:
            ratio = self.beside_ours(workload, measure, subject["name"])
            package = subject["package"]
            wanted = package == "torch" if torch else package not in ("jax", "jaxrnn", "torch")
            if ratio and wanted:
                found.append((ratio, subject["name"]))
        return min(found, default=None)


def _timed(row):
    return row.get("status") == "ready" and bool(row.get("seconds"))


def tables(documents: Documents) -> Iterator[str]:
    """What was measured on a CPU: in one run, or the best and the worst of several."""
    views = [View(document) for document in documents]
    yield "\n".join(caption(document) for document in documents)
    workloads = list({w.name: w for view in views for w in view.workloads}.values())
    ours = (OURS, f"{OURS}, relu", f"{OURS}{TWO_DEVICES}")
    subjects = dict.fromkeys(s["name"] for d in documents for s in d["subjects"])
    others = [name for name in subjects if name not in ours]
    runs = f", best / worst of {len(views)} runs" if len(views) > 1 else ""
    for measure in dict.fromkeys(measure for view in views for measure in view.measures):
        columns: dict[str, list[list[Value]]] = {}
        for name in (MILLISECONDS, BEST, *others, COMPILING, TEMPORARIES):
            found = [[_value(view, w, measure, name) for view in views] for w in workloads]
            if any(cells := [[value for value in cell if value] for cell in found]):
                columns[name] = cells
        rows = []
        for n, workload in enumerate(workloads):
            cells = [column[n] for column in columns.values()]
            if any(cells):
                rows.append([workload.title, *map(_ends, cells, columns)])
        if rows:
            rows += _means(workloads, columns)
            title = f"{measure}: others' time over jaxrnn's{runs}"
            yield table(title, ["row (T, B, D, H)", *columns], rows)
    yield from not_timed(documents)


def _value(view: View, workload: Workload, measure: str, column: str) -> Value | None:
    if column == MILLISECONDS:
        seconds = view.seconds(workload, measure, OURS)
        return seconds and (1e3 * seconds, "")
    if column == BEST:
        best = view.best(workload, measure)
        return best and (best[0].median, best[1])
    twins = [view.row(workload, measure, subject) for subject in (NAIVE, OURS)]
    if column == COMPILING:
        times = [row.get("trace", 0) + row.get("compile", 0) for row in twins]
        return (times[0] / times[1], "") if all(times) else None
    if column == TEMPORARIES:
        theirs, ours = (row.get("temporaries", -1) for row in twins)
        size = np.dtype(workload.dtype or "float32").itemsize * max(workload.members, 1)
        size *= workload.T * workload.B * workload.H
        return ((ours - theirs) / size, "") if min(theirs, ours) >= 0 else None
    found = view.beside_ours(workload, measure, column)
    return found and (found.median, "")


def _ends(cell: list[Value], column: str) -> str:
    """The best and the worst of the runs."""
    if not cell:
        return NOTHING
    show = {MILLISECONDS: number, TEMPORARIES: "{:+.2f}".format}.get(column, "{:.2f}".format)
    values = [value for value, _ in cell]
    ends = dict.fromkeys(map(show, (max(values), min(values))))
    return f"{' / '.join(ends)} {cell[0][1]}".strip()


def _means(workloads: list[Workload], columns: dict[str, list[list[Value]]]) -> Iterator[list[str]]:
    """Geometric means of ratios: of one tanh layer, of the other networks, of all."""
    names = {workload.name for workload in WORKLOADS}
    ours = {n for n, workload in enumerate(workloads) if workload.name in names}
    every = set(range(len(workloads)))
    groups = {"one tanh layer": ours, "others": every - ours, "all": every}
    for group, which in groups.items():
        row = [f"geometric mean, {group}"]
        if not which:
            continue
        for name, column in columns.items():
            cells = [column[n] for n in which if column[n]]
            ends = []
            for end in (max, min) if name not in (MILLISECONDS, TEMPORARIES) and cells else ():
                logs = [math.log(end(value for value, _ in cell)) for cell in cells]
                ends.append((math.exp(sum(logs) / len(logs)), ""))
            row.append(_ends(ends, name))
        yield row


def not_timed(documents: Documents) -> Iterator[str]:
    """What has no times, and why."""
    found: dict[str, list[str]] = {}
    for row in (row for document in documents for row in document["rows"] if "reason" in row):
        line = f"{row['subject']}: {row['status']}, {row['reason']}"
        found.setdefault(line, []).append(f"{row['workload']['name']}: {row['measure']}")
    if found:
        lines = [f"- {line} ({where[0]}; {len(where)} in all)" for line, where in found.items()]
        yield "\n".join(["Not timed:", "", *lines])

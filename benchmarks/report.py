"""What runs found, as tables: each row, and how many times longer than jaxrnn the others take."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import caption
from benchmarks.subjects.registry import NAIVE, OURS
from benchmarks.workloads import TANH, Workload, from_json

NOTHING = "–"
TWO_DEVICES = ", two host devices"


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Text in rows and columns below a title, printed as Markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self):
        """Columns padded, so that it reads as well in a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        padded = [
            [cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(cells)]
            for cells in (zip(row, widths, strict=True) for row in (self.header, *self.rows))
        ]
        marks = ["-" * w if n == 0 else f"{'-' * (w - 1)}:" for n, w in enumerate(widths)]
        lines = [f"| {' | '.join(row)} |" for row in (padded[0], marks, *padded[1:])]
        return "\n".join([f"{self.title}\n", *lines])


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

    What disturbs the machine disturbs neighbours in a round alike, and leaves their ratio.

    Returns:
      The `Spread` of the ratios of the rounds that both have; None where there is none.
    """
    first = dict(zip(slow["rounds"], slow["seconds"], strict=True))
    second = dict(zip(fast["rounds"], fast["seconds"], strict=True))
    ratios = [first[n] / second[n] for n in sorted(first.keys() & second.keys())]
    return spread(ratios) if ratios else None


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


class View:
    """The rows of a document, by workload, measure and subject.

    Args:
      document: the results of a run.
    """

    def __init__(self, document: dict[str, Any]):
        self.document = document
        rows = document["rows"]
        self.rows = {(r["workload"]["name"], r["measure"], r["subject"]): r for r in rows}
        self.measures = list(dict.fromkeys(row["measure"] for row in rows))

    @cached_property
    def workloads(self) -> list[Workload]:
        """In the order in which they were measured."""
        by_name = {row["workload"]["name"]: row["workload"] for row in self.document["rows"]}
        return [from_json(workload) for workload in by_name.values()]

    def row(self, workload: Workload, measure: str, subject: str) -> dict[str, Any]:
        """A row, with times or without; empty where there is none."""
        return self.rows.get((workload.name, measure, subject), {})

    def timed(self, workload: Workload, measure: str, subject: str) -> dict[str, Any] | None:
        """A row that has times, or None."""
        row = self.row(workload, measure, subject)
        return row if row.get("status") == "ready" and row.get("seconds") else None

    def seconds(self, workload: Workload, measure: str, subject: str) -> float | None:
        """The median."""
        row = self.timed(workload, measure, subject)
        return spread(row["seconds"]).median if row else None

    def ratio(self, workload: Workload, measure: str, slow: str, fast: str) -> Spread | None:
        """How many times longer one takes than the other, round by round."""
        rows = [self.timed(workload, measure, name) for name in (slow, fast)]
        return paired(*rows) if all(rows) else None

    def beside_ours(self, workload: Workload, measure: str, subject: str) -> Spread | None:
        """A subject's time over that of jaxrnn with the same network on as many devices."""
        ours = OURS
        if subject.endswith(TWO_DEVICES):
            ours += TWO_DEVICES
        elif subject.endswith(", relu") and workload.network.activation != "relu":
            ours += ", relu"
        return self.ratio(workload, measure, subject, ours)

    def best(
        self, workload: Workload, measure: str, package: str = ""
    ) -> tuple[Spread, str] | None:
        """The library that comes closest to ours, or leaves it farthest behind, and its name.

        Args:
          workload: the row.
          measure: of it.
          package: of these subjects; by default of all other JAX libraries.
        """
        found = []
        for subject in self.document["subjects"]:
            theirs = subject["package"] not in ("jax", "jaxrnn", "torch")
            ratio = self.beside_ours(workload, measure, subject["name"])
            if ratio and (subject["package"] == package if package else theirs):
                found.append((ratio, subject["name"]))
        return min(found, default=None)


class Cell(NamedTuple):
    """A value for each run, what stands behind it, and how it is printed."""

    values: list[float]
    label: str = ""
    show: Callable[[float], str] = number


def tables(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was measured on a CPU.

    Args:
      documents: of a run, or of several of the same rows.

    Yields:
      A caption, a table for each measure, and what was not timed.
    """
    views = [View(document) for document in documents]
    yield "\n".join(caption(document) for document in documents)
    workloads = {w.name: w for view in views for w in view.workloads}
    subjects = [s["name"] for view in views for s in view.document["subjects"]]
    for measure in dict.fromkeys(measure for view in views for measure in view.measures):
        columns = _columns(views, measure, list(dict.fromkeys(subjects)))
        cells = {
            name: [column(workload) for workload in workloads.values()]
            for name, column in columns.items()
        }
        measured = [n for n in range(len(workloads)) if any(c[n].values for c in cells.values())]
        cells = {name: column for name, column in cells.items() if any(c.values for c in column)}
        if not cells:
            continue
        names = [f"{w.name} {w.shape}" for w in workloads.values()]
        rows = [[names[n], *(_text(c[n]) for c in cells.values())] for n in measured]
        rows += _means(list(workloads.values()), cells, measured)
        runs = f", best / worst of {len(views)} runs" if len(views) > 1 else ""
        title = f"**{measure}: others' time over jaxrnn's{runs}**"
        yield str(Table(title, ["row (T, B, D, H)", *cells], rows))
    yield from not_timed(documents)


def _columns(
    views: list[View], measure: str, subjects: list[str]
) -> dict[str, Callable[[Workload], Cell]]:
    def of_each(value, show=number):
        def cell(workload):
            found = [value(view, workload) for view in views]
            return Cell([x for x in found if x is not None], show=show)

        return cell

    def milliseconds(view, workload):
        seconds = view.seconds(workload, measure, OURS)
        return None if seconds is None else 1e3 * seconds

    def ratio_of(subject):
        def ratio(view, workload):
            found = view.beside_ours(workload, measure, subject)
            return None if found is None else found.median

        return of_each(ratio, _ratio)

    def best(workload):
        found = [view.best(workload, measure) for view in views]
        pairs = [pair for pair in found if pair]
        return Cell([ratio.median for ratio, _ in pairs], pairs[0][1] if pairs else "", _ratio)

    def figures(name):
        def pair(view, workload):
            rows = [view.timed(workload, measure, subject) or {} for subject in (NAIVE, OURS)]
            return [row.get(name) for row in rows]

        return pair

    def temporaries(view, workload):
        theirs, ours = figures("temporaries")(view, workload)
        if ours is None or theirs is None:
            return None
        size = np.dtype(workload.dtype or "float32").itemsize * max(workload.members, 1)
        return (ours - theirs) / (size * workload.T * workload.B * workload.H)

    def compiling(view, workload):
        traced, compiled = (figures(name)(view, workload) for name in ("trace", "compile"))
        if None in (*traced, *compiled):
            return None
        return (traced[0] + compiled[0]) / (traced[1] + compiled[1])

    ours = (OURS, f"{OURS}, relu", f"{OURS}{TWO_DEVICES}")
    return {
        "jaxrnn, ms": of_each(milliseconds),
        "best JAX peer": best,
        **{subject: ratio_of(subject) for subject in subjects if subject not in ours},
        "naive scan's compiling": of_each(compiling, _ratio),
        "temporaries beyond naive, [T, B, H]": of_each(temporaries, "{:+.2f}".format),
    }


def _ratio(value):
    return f"{value:.2f}"


def _text(cell):
    if not cell.values:
        return NOTHING
    ends = dict.fromkeys((cell.show(max(cell.values)), cell.show(min(cell.values))))
    return f"{' / '.join(ends)} {cell.label}".strip()


def _means(workloads: list[Workload], cells: dict[str, list[Cell]], measured: list[int]):
    """Geometric means of ratios: of one tanh layer, of the other networks, of all."""
    tanh = {workload.name for workload in TANH}
    first = [n for n in measured if workloads[n].name in tanh]
    others = [n for n in measured if workloads[n].name not in tanh]
    groups = {"one tanh layer": first, "others": others} if first and others else {}
    for name, which in {**groups, "all": measured}.items():
        texts = []
        for column in cells.values():
            values = [column[n].values for n in which if column[n].values]
            if column[0].show is not _ratio or not values:
                texts.append(NOTHING)
                continue
            ends = [geometric_mean(map(end, values)) for end in (max, min)]
            texts.append(_text(Cell(ends, show=_ratio)))
        yield [f"geometric mean, {name}", *texts]


def not_timed(documents: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What has no times, and why."""
    found: dict[str, list[str]] = {}
    for row in (row for document in documents for row in document["rows"] if "reason" in row):
        line = f"{row['subject']}: {row['status']}, {row['reason']}"
        found.setdefault(line, []).append(f"{row['workload']['name']}: {row['measure']}")
    if found:
        lines = [f"- {line} ({where[0]}; {len(where)} in all)" for line, where in found.items()]
        yield "\n".join(["Not timed:", "", *lines])

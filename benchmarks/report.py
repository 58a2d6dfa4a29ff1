"""What a run found, as tables: times, ratios, costs, growth, and who was left out."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from benchmarks import kernels, machine, tables
from benchmarks.kernels import ROOFLINE
from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.ratios import Spread, geometric_mean, slope, spread
from benchmarks.tables import NOTHING, Table, number, ratio
from benchmarks.view import NAIVE, OURS, TWO_DEVICES, Rival, View, means
from benchmarks.workloads import Workload, is_new

MB = 1e6
BEYOND = "temporaries beyond naive, in [T, B, H] arrays"  # a difference: it has no mean
Cell = Rival | Spread | float | None


def show(document: dict[str, Any], console: Console, costs: bool = True) -> None:
    """Print tables in a terminal.

    Args:
      document: the results of a run.
      console: where.
      costs: rooflines, compiling and memory too.
    """
    console.print(caption(document), highlight=False, markup=False)
    for table in all_tables(document, costs):
        console.print()
        tables.show(table, console)
    if kernels.on_gpu(document):
        console.print(f"\n{_proved(document)}", highlight=False, markup=False, soft_wrap=True)


def markdown(document: dict[str, Any]) -> str:
    """All tables as Markdown.

    Args:
      document: the results of a run.

    Returns:
      The text.
    """
    parts = [caption(document), *map(tables.markdown, all_tables(document))]
    if kernels.on_gpu(document):
        parts.append(f"```python\n{_proved(document)}\n```")
    return "\n\n".join(parts)


def _proved(document: dict[str, Any]) -> str:
    return kernels.pasted(kernels.won(document))


def caption(document: dict[str, Any]) -> str:
    """The device, the day and the versions, in a sentence or two."""
    versions = document["versions"]
    names = [f"{name} {versions[name]}" for name in versions if versions[name] is not None]
    counts = [len(row["seconds"]) for row in document["rows"] if row.get("seconds")]
    few, many = min(counts, default=0), max(counts, default=0)
    rounds = f"Medians of {few if few == many else f'{few} to {many}'} rounds. " if many else ""
    dtype = "" if kernels.on_gpu(document) else f"{document['dtype']}, "
    early = " The run was stopped early." if document.get("interrupted") else ""
    early += " A dry run: interpreted on the CPU." if document["options"].get("dry") else ""
    return (
        f"{machine.describe(document['device'])}, {dtype}{document['date']}; "
        f"{', '.join(names)}. {rounds}A ratio is the median over rounds, quartiles in "
        f"parentheses; above 1 jaxrnn is faster.{early}"
    )


def all_tables(document: dict[str, Any], costs: bool = True) -> Iterator[Table]:
    """Every table that has something to say.

    Args:
      document: the results of a run.
      costs: rooflines, compiling and memory too.

    Yields:
      The tables: ratios first.
    """
    view = View(document)
    if kernels.on_gpu(document):
        yield from kernels.tables(document)
        yield from _left_out(view)
        return
    for measure in view.measures:
        if any(view.row(w, measure, OURS) for w in view.workloads):
            yield _summary(view, measure)
    for measure in view.measures:
        title = f"{measure}, milliseconds"
        yield from _by_subject(view, measure, title, 1e3, view.seconds)
    counted = (FORWARD, BACKWARD) if costs else ()
    for measure in counted:
        yield from _rooflines(view, measure)
    for measure in counted:
        yield from _costs(view, measure)
    yield from _growth(document)
    yield from _left_out(view)


def _summary(view: View, measure: str) -> Table:
    """How many times longer than ours the others take, with geometric means."""

    def named(rival: Rival | None) -> str:
        return ratio(rival.ratio, rival.name) if rival else NOTHING

    def against(slow: str) -> Callable[[Workload], Cell]:
        return lambda w: view.ratio(w, measure, slow, OURS)

    columns: dict[str, Callable[[Workload], Cell]] = {
        "best JAX peer": lambda w: view.best(w, measure, view.jax_peers),
        "naive scan": against(NAIVE),
        "torch": lambda w: view.best(w, measure, view.torch_peers),
        "vmap": against("jaxrnn, vmap"),
        "vmap axis 1": against("jaxrnn, vmap axis 1"),
        "fraction of roofline": against(ROOFLINE),
        TWO_DEVICES: lambda w: view.ratio(
            w, measure, f"{NAIVE}, {TWO_DEVICES}", f"{OURS}, {TWO_DEVICES}"
        ),
        "memory, naive": lambda w: view.figures_ratio("memory", w, measure, "temporaries"),
        BEYOND: lambda w: view.beyond_naive(w, measure),
        "trace, naive": lambda w: view.figures_ratio("compile", w, measure, "trace"),
        "compile, naive": lambda w: view.figures_ratio("compile", w, measure, "trace", "compile"),
    }
    if measure == BACKWARD:
        columns["backward / forward"] = view.backward_over_forward
    measured = [w for w in view.workloads if view.row(w, measure, OURS)]
    found = {name: [cell(w) for w in measured] for name, cell in columns.items()}
    found = {name: cells for name, cells in found.items() if any(c is not None for c in cells)}
    rows = []
    for n, workload in enumerate(measured):
        cells = [cells[n] for cells in found.values()]
        texts = [named(c) if isinstance(c, Rival) else ratio(c) for c in cells]
        rows.append([f"{workload.name} {workload.shape}", *texts])
    for mean, which in means(measured).items():
        texts = []
        for name, cells in found.items():
            some = [cell for cell in (cells[n] for n in which) if cell is not None]
            values = [_middle(cell) for cell in some if name != BEYOND]
            texts.append(ratio(geometric_mean(value for value in values if value > 0)))
        rows.append([mean, *texts])
    return Table(f"{measure}: others / jaxrnn", ["workload (T, B, D, H)", *found], rows)


def _middle(cell: Rival | Spread | float) -> float:
    cell = cell.ratio if isinstance(cell, Rival) else cell
    return cell.median if isinstance(cell, Spread) else cell


def _by_subject(view, measure, title, scale, value) -> Iterator[Table]:
    """A row for each subject: names are long, and numbers are not. New rows are many: turned."""
    for new in (False, True):
        workloads = [w for w in view.workloads if is_new(w) == new]
        columns = {}
        for subject in view.subjects:
            values = [value(w, measure, subject) for w in workloads]
            if all(v is None for v in values):
                continue
            columns[subject] = texts = []
            for workload, found in zip(workloads, values, strict=True):
                failed = view.status(workload, measure, subject) == "failed"
                figure = number(None if found is None else scale * found)
                texts.append("failed" if failed else figure)
        names = [f"{w.name} {w.shape}" for w in workloads]
        if columns and new:
            turned = zip(names, *columns.values(), strict=True)
            yield Table(f"{title}, new rows", ["", *columns], [list(row) for row in turned])
        elif columns:
            yield Table(title, ["", *names], [[name, *texts] for name, texts in columns.items()])


def _rooflines(view: View, measure: str) -> Iterator[Table]:
    rows = []
    for w in view.workloads:
        flops, limit = view.flops(w, measure), view.seconds(w, measure, ROOFLINE)
        ours, naive = (view.seconds(w, measure, subject) for subject in (OURS, NAIVE))
        if flops and limit:
            speeds = [None if s is None else flops / s / 1e9 for s in (limit, ours, naive)]
            part = view.ratio(w, measure, ROOFLINE, OURS)
            name = f"{w.name} {w.shape}"
            rows.append([name, number(flops / 1e9), *map(number, speeds), ratio(part)])
    if rows:
        header = ["workload", "GFLOP", "products alone, GFLOP/s", OURS, NAIVE, "fraction"]
        yield Table(f"{measure}: the matrix products alone", header, rows)


def _costs(view: View, measure: str) -> Iterator[Table]:
    """What compiling takes, and what memory."""
    figures = [
        ("seconds to trace and compile", 1, "compile", ("trace", "compile")),
        ("seconds of the first call", 1, "compile", ("first_call",)),
        ("megabytes of temporaries", 1 / MB, "memory", ("temporaries",)),
        ("megabytes more at the peak of a call", 1 / MB, "memory", ("peak_bytes",)),
    ]
    for title, scale, table, names in figures:

        def value(workload, measure, subject, table=table, names=names):
            return view.figure(table, workload, measure, subject, *names)

        yield from _by_subject(view, measure, f"{measure}, {title}", scale, value)


def _growth(document: dict[str, Any]) -> Iterator[Table]:
    """Exponents of T, B and H in time and memory."""
    rows = []
    for axis, subject, points in curves(document):
        values = [value for value, _, _ in points]
        times, sizes = [t for _, t, _ in points], [m or 0 for _, _, m in points]
        fitted = [slope(values, ys, last) for ys in (times, sizes) for last in (None, 3)]
        ends = [f"{number(scale * ys[0])} – {number(scale * ys[-1])}"
                for ys, scale in ((times, 1e3), (sizes, 1 / MB))]  # fmt: skip
        slopes = [ratio(found) for found in fitted]
        span = f"{values[0]} – {values[-1]}"
        rows.append([axis, subject, span, ends[0], *slopes[:2], ends[1], *slopes[2:]])
    if rows:
        header = ["axis", "subject", "from – to", "ms", "slope", "of the last three",
                  "MB of temporaries", "slope", "of the last three"]  # fmt: skip
        yield Table(f"{BACKWARD}: growth, slopes in log-log", header, rows, left=(1,))


def curves(document: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple]]]:
    """The sweeps, a curve at a time.

    Args:
      document: the results of a run.

    Yields:
      axis, subject, and (value, median seconds, bytes of temporaries) in the order of values.
    """
    found: dict[tuple[str, str], list[tuple]] = {}
    for point in document["sweeps"]:
        if point.get("seconds"):
            figures = point["value"], spread(point["seconds"]).median, point["temporaries"]
            found.setdefault((point["axis"], point["subject"]), []).append(figures)
    for (axis, subject), points in found.items():
        yield axis, subject, sorted(points)


def _left_out(view: View) -> Iterator[Table]:
    rows = []
    for subject, status, reason, where in view.without_times():
        places = "; ".join(where) if len(where) <= 3 else f"{where[0]}; and {len(where) - 1} more"
        rows.append([subject, status, reason, places])
    if rows:
        header = ["subject", "status", "reason", "where"]
        yield Table("Not timed", header, rows, left=(1, 2, 3))

"""A run as a picture: ratios per workload, and how time grows with T, B and H."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.measures import BACKWARD
from benchmarks.ratios import Spread, geometric_mean, slope
from benchmarks.report import curves
from benchmarks.view import NAIVE, OURS, View, means

COLORS = {"best JAX peer": "tab:blue", "naive scan": "tab:orange", "torch": "tab:green"}
CROWD = 20  # of so many workloads each gets one line
SUBJECT_COLORS = {OURS: "tab:blue", NAIVE: "tab:orange"}


def plot(document: dict[str, Any], path: Path, measure: str = BACKWARD) -> None:
    """Draw a PNG file: ratios on the left, scaling curves on the right where there are sweeps.

    Args:
      document: the results of a run.
      path: the file.
      measure: of the ratios.
    """
    view = View(document)
    by_axis: dict[str, list] = {}
    for axis, subject, points in curves(document):
        by_axis.setdefault(axis, []).append((subject, points))
    lines = len(view.workloads) + len(means(view.workloads))
    inches = 0.3 if len(view.workloads) > CROWD else 0.55
    height = max(4.0, 1.6 + inches * lines, 2.3 * len(by_axis))
    figure = Figure((13 if by_axis else 8, height), layout="constrained")
    parts = figure.subfigures(1, 2, width_ratios=(1.45, 1)) if by_axis else [figure]
    _ratios(parts[0].subplots(), view, measure)
    if by_axis:
        axes = parts[1].subplots(len(by_axis), 1, squeeze=False)[:, 0]
        for ax, (axis, lines) in zip(axes, by_axis.items(), strict=True):
            _scaling(ax, axis, lines)
        title = f"{BACKWARD}, milliseconds; slopes of the last three points"
        axes[0].set_title(title, loc="left", fontsize=10)
    where = f"{machine.describe(document['device'])}, {document['dtype']}, {document['date']}"
    figure.suptitle(where, fontsize=10)
    figure.savefig(path, format="png", dpi=150)


def _ratios(axes: Any, view: View, measure: str) -> None:
    """A dot for each rival, whiskers from quartile to quartile, workloads from the top down."""
    found: dict[str, list[tuple[int, Spread]]] = {name: [] for name in COLORS}
    for n, workload in enumerate(view.workloads):
        rivals = {
            "best JAX peer": view.best(workload, measure, view.jax_peers),
            "torch": view.best(workload, measure, view.torch_peers),
        }
        spreads = {name: rival.ratio for name, rival in rivals.items() if rival}
        naive = view.ratio(workload, measure, NAIVE, OURS)
        if naive is not None:
            spreads["naive scan"] = naive
        for name, spread in spreads.items():
            found[name].append((n, spread))
    last, groups = len(view.workloads), means(view.workloads)
    for offset, (name, points) in zip((-0.22, 0.0, 0.22), found.items(), strict=True):
        if not points:
            continue
        xs = [spread.median for _, spread in points]
        whiskers = [
            [spread.median - spread.low for _, spread in points],
            [spread.high - spread.median for _, spread in points],
        ]
        ys = [n + offset for n, _ in points]
        color = COLORS[name]
        axes.errorbar(xs, ys, xerr=whiskers, fmt="o", color=color, markersize=5, label=name)
        for y, which in enumerate(groups.values(), last):
            mean = geometric_mean(spread.median for n, spread in points if n in which)
            if mean is None:
                continue
            axes.plot([mean], [y + offset], "D", color=color, markersize=6)
            axes.annotate(
                f"{mean:.2f}", (mean, y + offset), (7, 0), textcoords="offset points",
                va="center", fontsize=8, color=color,
            )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    if last > 1:
        axes.axhline(last - 0.5, color="gray", linewidth=0.5)
    between = " " if last > CROWD else "\n"
    names = [f"{workload.name}{between}{workload.shape}" for workload in view.workloads]
    axes.set_yticks(range(last + len(groups)), [*names, *groups], fontsize=8)
    axes.set_ylim(last + len(groups) - 0.5, -0.5)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel("how many times longer than jaxrnn")
    axes.set_title(measure, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    if any(found.values()):
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


def _plain_ticks(axes: Any) -> None:
    """1, 1.5, 2, 3 … instead of powers of ten, as many as there is room for."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    every = [0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000]
    wide = high / low > 30
    ticks = [t for t in every if not (wide and t in (1.5, 3, 7))]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)


def _scaling(axes: Any, axis: str, lines: list) -> None:
    for subject, points in lines:
        xs, ys = [x for x, _, _ in points], [1e3 * y for _, y, _ in points]
        fitted = slope(xs, ys, 3)
        label = subject if fitted is None else f"{subject}, slope {fitted:.2f}"
        axes.plot(xs, ys, "o-", color=SUBJECT_COLORS.get(subject), markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = sorted({x for _, points in lines for x, _, _ in points})
    axes.set_xticks(values, [str(value) for value in values], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(axis, labelpad=1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)

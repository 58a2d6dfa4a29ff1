"""A run as a picture: how many times longer than jaxrnn the others take, row by row."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.report import Spread, View
from benchmarks.results import caption
from benchmarks.subjects.registry import NAIVE
from benchmarks.workloads import BACKWARD

COLORS = {"best JAX peer": "tab:blue", "naive scan": "tab:orange", "torch": "tab:green"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def plot(document: dict[str, Any], path: Path, measure: str = BACKWARD) -> None:
    """Draw a PNG file: a dot for each rival, whiskers from quartile to quartile.

    Args:
      document: the results of a run on a CPU.
      path: the file.
      measure: which.
    """
    view = View(document)
    workloads = [w for w in view.workloads if any(_spreads(view, w, measure).values())]
    figure = Figure((8, 1.6 + 0.3 * max(len(workloads), 6)), layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        found = [_spreads(view, w, measure)[name] for w in workloads]
        points = [(n, spread) for n, spread in enumerate(found) if spread]
        if points:
            xs = [spread.median for _, spread in points]
            low = [spread.median - spread.low for _, spread in points]
            high = [spread.high - spread.median for _, spread in points]
            offset = 0.22 * (list(COLORS).index(name) - 1)
            ys = [n + offset for n, _ in points]
            axes.errorbar(xs, ys, xerr=[low, high], fmt="o", color=color, markersize=4, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(workloads)), [f"{w.name} {w.shape}" for w in workloads], fontsize=8)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xscale("log")
    limits = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(limits)
    axes.set_xlabel("how many times longer than jaxrnn")
    axes.grid(axis="x", alpha=0.3)
    where = caption(document).partition(";")[0]
    axes.set_title(f"{measure}; {where}", loc="left", fontsize=9)
    if workloads:
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def _spreads(view: View, workload: Any, measure: str) -> dict[str, Spread | None]:
    best = view.best(workload, measure), view.best(workload, measure, "torch")
    peer, torch = (found[0] if found else None for found in best)
    naive = view.beside_ours(workload, measure, NAIVE)
    return {"best JAX peer": peer, "naive scan": naive, "torch": torch}

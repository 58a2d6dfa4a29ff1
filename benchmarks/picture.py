"""A run as a picture: how many times longer than jaxrnn the others take, row by row."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import View
from benchmarks.results import caption
from benchmarks.subjects.registry import NAIVE
from benchmarks.workloads import BACKWARD

COLORS = {"best JAX peer": "tab:blue", "torch": "tab:green", "naive scan": "tab:orange"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def plot(document: dict[str, Any], path: Path, measure: str = BACKWARD) -> None:
    """Draw a PNG file: a dot for each rival, whiskers from quartile to quartile."""
    view = View(document)
    figure = Figure((8, 2 + 0.3 * len(view.workloads)), layout="constrained")
    axes = figure.subplots()
    for n, workload in enumerate(view.workloads):
        best = (view.best(workload, measure, torch) for torch in (False, True))
        spreads = [*(found and found[0] for found in best)]
        spreads.append(view.beside_ours(workload, measure, NAIVE))
        for k, (spread, color) in enumerate(zip(spreads, COLORS.values(), strict=True)):
            if spread:
                whiskers = [[spread.median - spread.low], [spread.high - spread.median]]
                where = spread.median, n + 0.22 * (k - 1)
                axes.errorbar(*where, xerr=whiskers, fmt="o", color=color, markersize=4)
    for name, color in COLORS.items():
        axes.plot([], [], "o", color=color, label=name)
    axes.legend(fontsize=8, loc="lower right")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(view.workloads)), [w.title for w in view.workloads], fontsize=8)
    axes.set_ylim(len(view.workloads) - 0.5, -0.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks(ticks := [t for t in TICKS if low <= t <= high], [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times longer than jaxrnn")
    axes.set_title(f"{measure}; {caption(document).partition(';')[0]}", loc="left", fontsize=9)
    figure.savefig(path, format="png", dpi=110)

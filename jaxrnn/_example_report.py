"""The worked example on the terminal and as a plot: each printed number beside the computed one."""

import os
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrnn import worked_example
from jaxrnn._api import checks
from jaxrnn._plots import new_figure, save_png
from jaxrnn._types import Params
from jaxrnn.worked_example import PRINTED, Comparison, agreeing, four_digits

TOTALS = PRINTED["totals"]
EPOCHS = max(TOTALS)
IRREPRODUCIBLE = TOTALS[EPOCHS]


def run(
    console: Console,
    members: int = 512,
    plot: str | os.PathLike | None = None,
    *,
    start: Params | None = None,
) -> bool:
    """Print the whole comparison and the ensemble, and plot the ensemble where asked.

    Args:
      console: to print on.
      members: how many runs the ensemble has.
      plot: a PNG file to write, or None.
      start: what to compare with the source; `worked_example.recovered_params` by default.

    Returns:
      Whether every number agrees that can: all but the total loss of epoch 1000.

    Raises:
      TypeError, ValueError: as `worked_example.ensemble`, `worked_example.compare` and
        `plot_ensemble`.
    """
    if plot is not None:
        plot = _writable("--plot", plot)
    losses = worked_example.ensemble(members, EPOCHS)
    start = worked_example.recovered_params() if start is None else start
    comparisons = worked_example.compare(start)
    rounded = worked_example.compare(worked_example.printed_params())
    print_report(console, comparisons, rounded, losses)
    if plot is not None:
        plot_ensemble(losses, plot)
        _line(console, f"The ensemble's loss curves: {plot}")
    return all(comparison.agrees for comparison in comparisons)


def print_report(
    console: Console,
    comparisons: list[Comparison],
    rounded: list[Comparison],
    losses: np.ndarray,
) -> None:
    """Print sections 5 and 6 beside the computed numbers, and what can be said of epoch 1000.

    Args:
      console: to print on; 80 columns are enough.
      comparisons: what `worked_example.compare` returned.
      rounded: the same from the printed, rounded start.
      losses: `[1001, members]`, from `worked_example.ensemble`.

    Raises:
      ValueError: losses of another shape.
    """
    losses = _all_epochs(losses)
    for number, title in (("5", "Forward pass"), ("6", "Backpropagation through time")):
        within = [c for c in comparisons if c.section.startswith(number)]
        _line(console, f"{number} {title}", style="bold")
        console.print(_vectors([c for c in within if c.group != worked_example.TOTALS]))
        console.print(_totals([c for c in within if c.group == worked_example.TOTALS]), "")
    _print_counts(console, comparisons, rounded)
    _print_ensemble(console, losses)


def plot_ensemble(losses: np.ndarray, path: str | os.PathLike) -> None:
    """Write the ensemble's loss curves and the source's four totals to a PNG file.

    Args:
      losses: `[1001, members]`, from `worked_example.ensemble`.
      path: the file; an old one is replaced at once, when the new one is complete.

    Raises:
      ValueError: losses of another shape, or a path that cannot be written.
    """
    path = _writable("path", path)
    save_png(_figure(_all_epochs(losses)), path)


def _writable(name, path):
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise checks.InputError(f"{name}: expected a file in a folder that exists, got {path}")
    return path


def _all_epochs(losses):
    losses = np.asarray(losses)
    if losses.ndim != 2 or losses.shape[0] != EPOCHS + 1 or losses.size == 0:
        checks.bad_value("losses", f"shape [{EPOCHS + 1}, members]", list(losses.shape))
    return losses


def _line(console, text, style=None):
    console.print(text, style=style, markup=False, highlight=False)


def _mark(agrees):
    return Text("✓", style="green") if agrees else Text("✗", style="bold red")


def _table(header):
    return Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header)


def _vectors(comparisons):
    """A row for each vector; a number that disagrees has its own mark."""
    table = _table(header=True)
    for column, width in (("", 3), ("", 7), ("printed", 32), ("computed", 32), ("", 1)):
        table.add_column(column, width=width, no_wrap=True)
    shown = None
    for (section, quantity), group in groupby(comparisons, lambda c: (c.section, c.quantity)):
        vector = list(group)
        printed = " ".join(f"{four_digits(c.printed):>7}" for c in vector)
        computed = Text()
        for c in vector:
            computed.append(f"{four_digits(c.computed):>7}", "" if c.agrees else "bold red")
            computed.append(" " if c.agrees else "✗")
        agree = _mark(all(c.agrees for c in vector))
        table.add_row("" if section == shown else section, quantity, printed, computed, agree)
        shown = section
    return table


def _totals(comparisons):
    table = _table(header=False)
    for column, width in (("", 3), ("", 40), ("", 7), ("", 24), ("", 1)):
        table.add_column(column, width=width)
    for c in comparisons:
        printed, computed = four_digits(c.printed), four_digits(c.computed)
        table.add_row(c.section, c.quantity, printed, computed, _mark(c.agrees))
    return table


def _print_counts(console, comparisons, rounded):
    def of(comparisons, group):
        return "{} of {}".format(*agreeing(comparisons, group))

    first, deltas, epoch_1, totals = (of(comparisons, group) for group in worked_example.GROUPS)
    _line(console, f"{first} printed numbers agree at 4 digits")
    _line(console, f"Beyond them: {deltas} output deltas, {epoch_1} of epoch 1, {totals} totals")
    from_printed = of(rounded, worked_example.FIRST_UPDATE)
    _line(console, f"From the start as printed, rounded to 4 digits: {from_printed}")


def _print_ensemble(console, losses):
    quantiles = worked_example.end_quantiles(losses)
    members = losses.shape[1]
    title = f"\nEpoch {EPOCHS}: total loss of {members} runs whose starts round to the printed one"
    _line(console, title, style="bold")
    table = _table(header=True)
    names = {0.0: "min", 1.0: "max"}
    for q in quantiles:
        table.add_column(names.get(q, f"{q:.0%}"), justify="right")
    table.add_row(*map(four_digits, quantiles.values()))
    console.print(table)
    below = worked_example.fraction_below(losses)
    _line(console, f"{below:.0%} of them end below the printed {IRREPRODUCIBLE}.")
    parting = worked_example.parting_epoch(losses)
    until = "" if parting is None else f" until epoch {parting}, where they part"
    _line(console, f"They stay within 0.01 of each other{until}.")
    inside = "inside" if quantiles[0.0] <= IRREPRODUCIBLE <= quantiles[1.0] else "outside"
    _line(
        console,
        f"Nobody can reproduce {IRREPRODUCIBLE}, because training is chaotic there: it lies "
        f"{inside} this spread, and no more is claimed.",
    )


def _figure(losses):
    figure = new_figure(10, 5)
    whole, end = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for axes in (whole, end):
        _draw(axes, losses)
        axes.set_xlabel("epoch")
    whole.set_ylabel("total loss (nats)")
    whole.set_title("all epochs, logarithmic")
    whole.set_xscale("symlog", linthresh=1)
    whole.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    whole.set_xlim(-0.15, 4 * EPOCHS)
    end.set_title("the last epochs, linear")
    end.set_xlim(0.6 * EPOCHS, 1.09 * EPOCHS)
    end.set_ylim(0, 1.04 * losses.max())
    end.legend(loc="upper right")
    return figure


def _draw(axes, losses):
    from matplotlib.collections import LineCollection

    epochs = np.arange(losses.shape[0])
    members = losses.shape[1]
    runs = [np.column_stack((epochs, run)) for run in losses.T]
    alpha = min(0.5, 8 / members)
    axes.add_collection(LineCollection(runs, colors="tab:blue", linewidths=0.4, alpha=alpha))
    axes.plot([], [], color="tab:blue", linewidth=0.6, label=f"{members} runs")
    low, median, high = np.quantile(losses, (0.05, 0.5, 0.95), axis=1)
    band = dict(color="tab:orange", linewidth=0.8)
    axes.plot(epochs, low, label="5% and 95% of them", **band)
    axes.plot(epochs, high, **band)
    axes.plot(epochs, median, color="navy", linewidth=1.4, label="their median")
    parting = worked_example.parting_epoch(losses)
    if parting is not None:
        axes.axvline(parting, color="gray", linestyle=":", label=f"they part: epoch {parting}")
    axes.plot(
        list(TOTALS), list(TOTALS.values()),
        "o", color="tab:red", zorder=3, label="printed by the source",
    )  # fmt: skip
    for epoch, total in TOTALS.items():
        axes.annotate(
            four_digits(total), (epoch, total), xytext=(7, 5), textcoords="offset points",
            color="tab:red", annotation_clip=True,
        )  # fmt: skip

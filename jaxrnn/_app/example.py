"""`jaxrnn example`: the numbers that the source prints beside the computed ones, and a plot."""

from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from jaxrnn import worked_example
from jaxrnn._api.checks import InputError
from jaxrnn._app.directory import first_line
from jaxrnn._app.terminal import Console, new_figure, save_png
from jaxrnn._types import Params
from jaxrnn.worked_example import PRINTED, Comparison, agreeing, four_digits

TOTALS = PRINTED["totals"]
EPOCHS = max(TOTALS)
IRREPRODUCIBLE = TOTALS[EPOCHS]


def example(args: Any) -> int:
    return 0 if report(Console(), plot=args.plot) else 1


def report(
    console: Console, members: int = 512, plot: Any = None, start: Params | None = None
) -> bool:
    """Print the comparison and the ensemble, and plot the latter; return whether all agree."""
    if plot is not None:
        try:
            import_module("matplotlib.figure")  # fails now, before anything is computed
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of many types
            raise InputError(f"--plot: cannot be drawn: {first_line(error)}") from error
        if Path(plot).is_dir() or not Path(plot).parent.is_dir():
            raise InputError(f"--plot: expected a file in a folder that exists, got {plot}")
    losses = worked_example.ensemble(members, EPOCHS)
    comparisons = worked_example.compare(start or worked_example.recovered_params())
    for number, title in (("5", "Forward pass"), ("6", "Backpropagation through time")):
        console.print(f"{number} {title}", style="bold")
        console.print(_table([c for c in comparisons if c.section.startswith(number)]), "")
    first, deltas, epoch_1, totals = (
        "{} of {}".format(*agreeing(comparisons, group)) for group in worked_example.GROUPS
    )
    rounded = worked_example.compare(worked_example.printed_params())
    from_printed = "{} of {}".format(*agreeing(rounded, worked_example.FIRST_UPDATE))
    console.print(f"{first} printed numbers agree at 4 digits")
    console.print(f"Beyond them: {deltas} output deltas, {epoch_1} of epoch 1, {totals} totals")
    console.print(f"From the start as printed, rounded to 4 digits: {from_printed}")
    print_ensemble(console, losses)
    if plot is not None:
        plot_ensemble(losses, Path(plot))
        console.print(f"The ensemble's loss curves: {plot}")
    return all(comparison.agrees for comparison in comparisons)


def _table(comparisons: list[Comparison]) -> Table:
    """A row for each vector or total; numbers that disagree are marked."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in (("", 3), ("", 7), ("printed", 31), ("computed", 34), ("", 1)):
        table.add_column(name, width=width)
    shown = None
    for (section, quantity), group in groupby(comparisons, lambda c: (c.section, c.quantity)):
        quantity, _, of = quantity.partition(" of ")
        vector, computed = list(group), Text()
        for c in vector:
            computed.append(f"{four_digits(c.computed):>7}", "" if c.agrees else "bold red")
            computed.append(" " if c.agrees else "✗")
        printed = " ".join(f"{four_digits(c.printed):>7}" for c in vector)
        agree = all(c.agrees for c in vector)
        mark = Text("✓", style="green") if agree else Text("✗", style="bold red")
        name = "" if section == shown else section
        table.add_row(name, quantity, printed, computed.append(of), mark)
        shown = section
    return table


def print_ensemble(console: Console, losses: np.ndarray) -> None:
    quantiles, members = worked_example.end_quantiles(losses), losses.shape[1]
    title = f"\nEpoch {EPOCHS}: total loss of {members} runs whose starts round to the printed one"
    console.print(title, style="bold")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for q in quantiles:
        table.add_column({0.0: "min", 1.0: "max"}.get(q, f"{q:.0%}"), justify="right")
    table.add_row(*map(four_digits, quantiles.values()))
    console.print(table)
    parting = worked_example.parting_epoch(losses)
    until = "" if parting is None else f" until epoch {parting}, where they diverge"
    inside = "inside" if quantiles[0.0] <= IRREPRODUCIBLE <= quantiles[1.0] else "outside"
    console.print(
        f"{worked_example.fraction_below(losses):.0%} of them end below the printed "
        f"{IRREPRODUCIBLE}.\nThey stay within 0.01 of each other{until}.\n"
        f"Nobody can reproduce {IRREPRODUCIBLE}, because training is chaotic there: it lies "
        f"{inside} this spread."
    )


def plot_ensemble(losses: np.ndarray, path: Path) -> None:
    """Draw the ensemble's losses and the source's four totals: all epochs, and the last 400."""
    figure, epochs = new_figure(10, 5), np.arange(EPOCHS + 1)
    whole, end = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    bands = np.quantile(losses, (0.05, 0.95), axis=1).T
    parting = worked_example.parting_epoch(losses)
    for axes in (whole, end):
        alpha = min(0.5, 8 / losses.shape[1])
        axes.plot(epochs, losses, color="tab:blue", linewidth=0.4, alpha=alpha, rasterized=True)
        axes.plot([], [], color="tab:blue", linewidth=0.6, label=f"{losses.shape[1]} runs")
        labels = ["5% and 95% of them", None]
        axes.plot(epochs, bands, color="tab:orange", linewidth=0.8, label=labels)
        axes.plot(epochs, np.median(losses, axis=1), color="navy", label="their median")
        if parting is not None:
            axes.axvline(parting, color="gray", linestyle=":", label=f"they part: epoch {parting}")
        red = {"color": "tab:red", "zorder": 3}
        axes.plot(list(TOTALS), list(TOTALS.values()), "o", label="printed by the source", **red)
        how = {"textcoords": "offset points", "color": "tab:red", "annotation_clip": True}
        for at in TOTALS.items():
            axes.annotate(four_digits(at[1]), at, xytext=(7, 5), **how)
        axes.set_xlabel("epoch")
    whole.set_xscale("symlog", linthresh=1)
    whole.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    whole.set(ylabel="total loss (nats)", title="all epochs, logarithmic", xlim=(-0.15, 4 * EPOCHS))
    end.set(title="the last epochs, linear", xlim=(0.6 * EPOCHS, 1.09 * EPOCHS))
    end.set_ylim(0, 1.04 * losses.max())
    end.legend(loc="upper right")
    save_png(figure, path)

"""Pictures: how a figure is made and written, and that of a training run, also as text."""

import math
import os
from pathlib import Path
from typing import Any

from jaxrnn._files import whole_file, writing

LN_2 = 0.6931471805599453
# The curves, in the order in which they are drawn: what they are called in the metrics, and here.
CURVES = {"bits": ("training", "."), "held_out_bits": ("held-out", "o")}
# Characters left of a plot of text.
MARGIN = 10
# Rows of metrics.
FEW = 20


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Not pyplot's: that would choose a back end for the caller and keep the figure alive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all; an old file is replaced when the new one is complete.

    Raises:
      InputError: it cannot be written.
    """
    with whole_file(path, f".{os.getpid()}") as file, writing(path):
        figure.savefig(file, format="png", dpi=150)


def _nats(bits: Any) -> Any:
    return bits * LN_2


def _bits(nats: Any) -> Any:
    return nats / LN_2


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and figures, where they were measured; NaN where no update of a row counted."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [math.nan if y is None else y for _, y in found]


def plot_run(
    rows: list[dict[str, Any]], references: dict[str, float], path: Path, unit: str = "character"
) -> None:
    """Draw bits per character by step, of training and held-out text, as a PNG file.

    Args:
      rows: the metrics of a run.
      references: bits per character of other predictors, drawn as lines.
      path: the file.
      unit: what an id stands for.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    # Of a few rows a line is hardly there.
    axes.plot(*_curve(rows, "bits"), "-" if len(rows) > FEW else ".-", label="training")
    steps, held_out = _curve(rows, "held_out_bits")
    if steps:
        axes.plot(steps, held_out, "o-", label=f"held-out, at last {held_out[-1]:.3f}")
    for style, (name, bits) in zip(("--", ":"), references.items(), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, label=f"{name}, {bits:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"bits per {unit}")
    axes.set_ylim(bottom=0)
    nats = axes.secondary_yaxis("right", functions=(_nats, _bits))
    nats.set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def text_plot(
    rows: list[dict[str, Any]], width: int, unit: str = "character", height: int = 16
) -> list[str]:
    """Draw the same curves with characters that every terminal has.

    Args:
      rows: the metrics of a run.
      width: of the lines, in characters.
      unit: what an id stands for.
      height: how many lines the curves have.

    Returns:
      The lines; none where nothing was measured.
    """
    points = [
        (step, bits, mark)
        for name, (_, mark) in CURVES.items()
        for step, bits in zip(*_curve(rows, name), strict=True)
        if math.isfinite(bits)
    ]
    if not points:
        return []
    columns = max(20, width - MARGIN)
    steps, values = [step for step, *_ in points], [bits for _, bits, _ in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    canvas = [[" "] * columns for _ in range(height)]
    for step, bits, mark in points:
        x = (step - first) / (last - first or 1)
        y = (high - bits) / (high - low or 1)
        canvas[round(y * (height - 1))][round(x * (columns - 1))] = mark
    labels = [""] * height
    for n in (0, height // 2, height - 1):
        labels[n] = f"{high - (high - low) * n / (height - 1):.4g}"
    lines = [
        f"{label:>{MARGIN - 2}} |{''.join(line)}".rstrip()
        for label, line in zip(labels, canvas, strict=True)
    ]
    ends = f"step {first}", f"{last}"
    legend = "   ".join(f"{mark} {name}" for name, mark in CURVES.values())
    return [
        f"bits per {unit}   {legend}",
        *lines,
        " " * (MARGIN - 1) + "+" + "-" * columns,
        " " * MARGIN + ends[0] + ends[1].rjust(columns - len(ends[0])),
    ]

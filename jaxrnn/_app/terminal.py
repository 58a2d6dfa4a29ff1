"""Output of the commands: lines, a progress bar, curves as text and as a picture."""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console as RichConsole

from jaxrnn._app.directory import write

# Name in the metrics -> (name in pictures, mark in text plots).
CURVES = {"bits": ("training", "."), "held_out_bits": ("held-out", "o")}
MARGIN = 10  # characters left of a text plot


class Console(RichConsole):
    """rich's console without highlighting and markup."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "markup": False, **options})

    def on_broken_pipe(self) -> None:
        """Re-raise the BrokenPipeError, where rich would exit silently."""
        raise


@contextmanager
def reporter(
    console: Console, steps: int, begun: int, unit: str
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a row of metrics, in a bar, or as a line if it has a held-out loss."""
    held_out, printed, at = "–", begun, time.perf_counter()

    def words(row):
        nonlocal held_out
        loss, bits, measured = (
            "–" if row.get(name) is None else f"{row[name]:.3f}"
            for name in ("loss", "bits", "held_out_bits")
        )
        held_out = measured if "held_out_bits" in row else held_out
        pace = row["characters_per_second"]
        speed = "–" if pace is None else f"{pace / 1000:.0f}k"
        skipped = f" skipped {row['skipped']}" if row.get("skipped") else ""
        return f"loss {loss} bits {bits} held-out {held_out} {speed} {unit}/s{skipped}"

    def line(row):
        nonlocal printed, at
        text, step, clock = words(row), row["step"], time.perf_counter()
        if "held_out_bits" in row:
            # This pace includes evaluation and checkpoints.
            seconds = (clock - at) / (step - printed) * (steps - step)
            printed, at = step, clock
            text = f"step {step:>{len(str(steps))}}/{steps}  {text}"
            console.print(f"{text}  {timedelta(seconds=round(seconds))} left", soft_wrap=True)

    if not console.is_terminal or console.is_dumb_terminal or console.quiet:
        yield line
        return
    columns = (
        "{task.completed}/{task.total}", progress.BarColumn(bar_width=None),
        "{task.fields[figures]}", progress.TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with progress.Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=steps, completed=begun, figures="compiling")
        yield lambda row: bar.update(task, completed=row["step"], figures=words(row))


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, in rows that have it; None becomes NaN."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [math.nan if y is None else y for _, y in points]


def text_plot(
    rows: list[dict[str, Any]], width: int, unit: str = "character", height: int = 16
) -> list[str]:
    """The curves of a run as lines of text; an empty list without data."""
    points = [
        (step, bits, mark)
        for name, (_, mark) in CURVES.items()
        for step, bits in zip(*_curve(rows, name), strict=True)
        if math.isfinite(bits)
    ]
    if not points:
        return []
    columns = max(20, width - MARGIN)
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    canvas = [[" "] * columns for _ in range(height)]
    for step, bits, mark in points:
        x, y = (step - first) / (last - first or 1), (high - bits) / (high - low or 1)
        canvas[round(y * (height - 1))][round(x * (columns - 1))] = mark
    lines = []
    for n, line in enumerate(map("".join, canvas)):
        bits = high - (high - low) * n / (height - 1)
        label = f"{bits:.4g}" if n in (0, height // 2, height - 1) else ""
        lines.append(f"{label:>{MARGIN - 2}} |{line}".rstrip())
    legend = "   ".join(f"{mark} {name}" for name, mark in CURVES.values())
    ends = f"step {first}{last:>{columns - len(f'step {first}')}}"
    axis = [" " * (MARGIN - 1) + "+" + "-" * columns, " " * MARGIN + ends]
    return [f"bits per {unit}   {legend}", *lines, *axis]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; not pyplot's, which would not be freed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write(path, content.getvalue(), f".{os.getpid()}")


def plot_run(
    rows: list[dict[str, Any]], references: dict[str, float], path: Path, unit: str
) -> None:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    # With few rows, mark the points.
    axes.plot(*_curve(rows, "bits"), "-" if len(rows) > 20 else ".-", label="training")
    steps, held_out = _curve(rows, "held_out_bits")
    if steps:
        axes.plot(steps, held_out, "o-", label=f"held-out, at last {held_out[-1]:.3f}")
    for style, (name, bits) in zip(("--", ":"), references.items(), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, label=f"{name}, {bits:.2f}")
    axes.set(xlabel="step", ylabel=f"bits per {unit}", ylim=(0, None))
    nats = (lambda bits: bits * math.log(2)), (lambda nats: nats / math.log(2))
    axes.secondary_yaxis("right", functions=nats).set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)

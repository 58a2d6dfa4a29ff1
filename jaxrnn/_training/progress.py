"""What a training run shows while it runs: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Keeps the latest held-out figure and shows each row of metrics."""

    def __init__(self, console: Console, steps: int, bar: Progress | None):
        self.console, self.steps, self.bar = console, steps, bar
        self.held_out = "–"
        self.before = {"step": 0, "seconds": 0.0}
        if bar is not None:
            self.task = bar.add_task("", total=steps, figures="compiling")

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""
        if "held_out_bits" in row:
            self.held_out = f"{row['held_out_bits']:.3f}"
        speed = f"{row['characters_per_second'] / 1000:.0f}k char/s"
        figures = f"loss {row['loss']:.3f} bits {row['bits']:.3f} held-out {self.held_out} {speed}"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], figures=figures)
        elif "held_out_bits" in row:
            pace = (row["seconds"] - self.before["seconds"]) / (row["step"] - self.before["step"])
            left = timedelta(seconds=round(pace * (self.steps - row["step"])))
            step = f"step {row['step']:>{len(str(self.steps))}}/{self.steps}"
            self.console.print(f"{step}  {figures}  {left} left", highlight=False, soft_wrap=True)
        self.before = row


@contextmanager
def reporter(console: Console, steps: int) -> Iterator[Reporter]:
    """A function to call with each row of metrics."""
    if not console.is_terminal:
        yield Reporter(console, steps, None)
        return
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield Reporter(console, steps, bar)

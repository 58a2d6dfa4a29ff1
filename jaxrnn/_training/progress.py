"""What a training run shows while it runs: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxrnn._console import Console


class Reporter:
    """Keeps the latest held-out figure and shows each row of metrics."""

    def __init__(self, console: Console, steps: int, begun: int, level: str, bar: Progress | None):
        self.console, self.steps, self.unit, self.bar = console, steps, level, bar
        self.held_out = "–"
        # The last line that was printed, by a clock that evaluation and checkpoints count for too.
        self.printed, self.at = begun, time.perf_counter()
        if bar is not None:
            self.task = bar.add_task("", total=steps, completed=begun, figures="compiling")

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row."""
        if "held_out_bits" in row:
            bits = row["held_out_bits"]
            self.held_out = "–" if bits is None else f"{bits:.3f}"
        pace = row["characters_per_second"]
        speed = "–" if pace is None else f"{pace / 1000:.0f}k"
        loss, bits = ("–" if row[k] is None else f"{row[k]:.3f}" for k in ("loss", "bits"))
        figures = f"loss {loss} bits {bits} held-out {self.held_out} {speed} {self.unit}/s"
        if row.get("skipped"):
            figures += f" skipped {row['skipped']}"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], figures=figures)
        elif "held_out_bits" in row:
            now = time.perf_counter()
            pace = (now - self.at) / (row["step"] - self.printed)
            left = timedelta(seconds=round(pace * (self.steps - row["step"])))
            self.printed, self.at = row["step"], now
            step = f"step {row['step']:>{len(str(self.steps))}}/{self.steps}"
            self.console.print(f"{step}  {figures}  {left} left", soft_wrap=True)


@contextmanager
def reporter(console: Console, steps: int, begun: int, level: str) -> Iterator[Reporter]:
    """A function to call with each row of metrics of a run that begins at some step."""
    if not console.is_terminal or console.is_dumb_terminal or console.quiet:
        yield Reporter(console, steps, begun, level, None)
        return
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield Reporter(console, steps, begun, level, bar)


@contextmanager
def of_bytes(console: Console, what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function to call with the bytes read and those there are: a bar, on a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not console.is_terminal or console.quiet
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""What a run shows while it runs: a bar on a terminal, a line for each measure elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.2


class Reporter:
    """Told what is being done, it shows it.

    Args:
      console: where to.
      units: how many measures of a workload there are in all.
      bar: on a terminal.
      lines: whether each measure leaves a line; by default where there is no bar.
    """

    def __init__(
        self, console: Console, units: int, bar: Progress | None = None, lines: bool = False
    ):
        self.console, self.units, self.bar, self.lines = console, units, bar, lines or bar is None
        self.done, self.steps, self.step_now, self.shown = 0, 1, 0, 0.0
        self.title = ""
        self.started = self.since = time.monotonic()
        if bar is not None:
            self.task = bar.add_task("", total=units)

    def begin(self, title: str, steps: int) -> None:
        """A measure of a workload begins, of so many steps at most."""
        self.title, self.steps, self.step_now = title, max(steps, 1), 0
        self.since = time.monotonic()

    def step(self, subject: str) -> None:
        """A subject's turn begins. Shown from here alone: a thread would disturb what is timed."""
        now = time.monotonic()
        if self.bar is not None and now - self.shown >= REFRESH_SECONDS:
            self.shown = now
            completed = self.done + min(self.step_now / self.steps, 1)
            self.bar.update(self.task, completed=completed, description=f"{self.title}: {subject}")
            self.bar.refresh()
        self.step_now += 1

    def end(self, summary: str) -> None:
        """The measure has ended."""
        self.done += 1
        if self.lines:
            took = time.monotonic() - self.since
            self.say(f"[{self.done}/{self.units}] {self.title}: {summary} ({took:.0f} s)")

    def note(self, line: str) -> None:
        """A line that stays, with the seconds since the start."""
        self.say(f"[{time.monotonic() - self.started:4.0f} s] {line}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def reporter(console: Console, units: int, lines: bool = False) -> Iterator[Reporter]:
    """What a run tells its progress to.

    Args:
      console: on standard error.
      units: how many measures of a workload there are in all.
      lines: whether each measure leaves a line on a terminal too.

    Yields:
      The `Reporter`.
    """
    if not console.is_terminal:
        yield Reporter(console, units)
        return
    columns = (
        BarColumn(bar_width=20), TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        yield Reporter(console, units, bar, lines)

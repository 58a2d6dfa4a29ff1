"""Tables that are printed in a terminal or written as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.ratios import Spread

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Args:
      title: what it shows.
      header: one for each column; the first column is aligned to the left, the others not.
      rows: as many cells each.
      left: columns more that are aligned to the left.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = ()


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return NOTHING
    if value >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:#.3g}".rstrip(".")
    return text if "e" not in text else f"{value:.1e}"


def ratio(value: Spread | float | None, name: str = "") -> str:
    """Two decimals, a name, and the quartiles where there are some."""
    if value is None:
        return NOTHING
    if isinstance(value, Spread):
        return f"{value.median:.2f} {name}".strip() + f" ({value.low:.2f}–{value.high:.2f})"
    return f"{value:.2f}"


def show(table: Table, console: Console) -> None:
    """Print a table in a terminal.

    Args:
      table: what.
      console: where.
    """
    drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
    for n, name in enumerate(table.header):
        justify = "left" if n == 0 or n in table.left else "right"
        drawn.add_column(_lines(name), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(_lines, row))
    console.print(drawn, markup=False)


def _lines(cell: str) -> Text:
    """What stands in parentheses on a line of its own, to keep columns narrow."""
    return Text(cell.replace(" (", "\n("))


def markdown(table: Table) -> str:
    """A table as Markdown, below its title.

    Args:
      table: what.

    Returns:
      Its lines.
    """
    marks = ["---" if n == 0 or n in table.left else "--:" for n in range(len(table.header))]
    lines = [table.header, marks, *table.rows]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in lines]
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"**{table.title}**\n\n{body}"

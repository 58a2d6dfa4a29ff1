"""`jaxrnn show`: the options, progress and curves of a run, from its files alone."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxrnn._app import directory, run
from jaxrnn._app.corpus import UNITS, Text
from jaxrnn._app.run import Config
from jaxrnn._app.terminal import Console, plot_run, text_plot

SHOWN, CUT = 120, 60  # characters of an alphabet to show, and characters in a line


def show(args: Any) -> int:
    """Run the command, which changes only the picture of a run."""
    out = Path(args.directory)
    (config, _), rows = run.read_begun(out), directory.read_metrics(out)
    # A run that was stopped while reading its text has no text.json.
    encoded = (out / directory.TEXT).exists()
    text, references = run.read_text(out) if encoded else (None, {})
    console, unit = Console(), UNITS[config.level]
    console.print(f"{out}: {_standing(out, config, rows)}\n", soft_wrap=True)
    console.print(_options(config), "")
    console.print(_facts(out, text, references, unit), "")
    if not rows:
        console.print("no metrics yet, so no curves to show")
        return 0
    for line in (
        *text_plot(rows, console.width, unit), _latest(rows), picture(out, rows, references, unit)
    ):  # fmt: skip
        console.print(line, soft_wrap=True)
    return 0


def _standing(out: Path, config: Config, rows: list[dict[str, Any]]) -> str:
    training = directory.is_locked(out)  # before its progress is read
    newest = max(directory.checkpoint_steps(out), default=None)
    if newest == config.steps:
        return f"finished, {newest} updates"
    if training:
        return f"being trained, at step {rows[-1]['step'] if rows else 0} of {config.steps}"
    where = f"at step {newest} of {config.steps}" if newest else "before its first checkpoint"
    go_on = shlex.join(["jaxrnn", "train", "--resume", str(out)])
    return f"stopped {where}\nto continue: {go_on}"


def _options(config: Config) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for field in fields(Config):
        value = getattr(config, field.name)
        other = value != field.default
        table.add_row(
            "*" if other else "", field.name.replace("_", "-"), f"{value}",
            f"default: {field.default}" if other else "", style="bold" if other else "",
        )  # fmt: skip
    return table


def _facts(out: Path, text: Text | None, references: dict[str, float], unit: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if text is None:
        table.add_row("text", "not fully read yet")
    else:
        table.add_row("text", text.name)
        table.add_row("size", f"{text.length:,} {unit}s")
        table.add_row("alphabet", _alphabet(text))
        counted = ", ".join(f"{name} {bits:.2f}" for name, bits in references.items())
        table.add_row("reference", f"{counted} bits per held-out {unit}")
    steps, best = directory.checkpoint_steps(out), directory.best_checkpoint(out)
    listed = "at step " + ", ".join(map(str, steps)) if steps else "none yet"
    if best is not None:
        listed += f"; the best is {best[0]}, with {best[1]:.3f} held-out bits per {unit}"
    table.add_row("checkpoints", listed)
    return table


def _alphabet(text: Text) -> str:
    if text.level == "byte":
        return "256 bytes"
    # repr escapes line breaks and what terminals do not show.
    shown = repr("".join(text.characters[:SHOWN]))
    more = " …" if len(text.characters) > SHOWN else ""
    shown_text = f"{len(text.characters)} distinct: {shown}{more}"
    # rich would break lines at spaces, and drop them.
    return "\n".join(shown_text[n : n + CUT] for n in range(0, len(shown_text), CUT))


def _latest(rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    summary = f"step {last['step']}: training " + (f"{b:.3f}" if (b := last["bits"]) else "–")
    held_out = [row for row in rows if row.get("held_out_bits") is not None]
    if held_out:
        summary += f", held-out {held_out[-1]['held_out_bits']:.3f}"
        summary += "" if held_out[-1] is last else f" at step {held_out[-1]['step']}"
    skipped = last.get("skipped", 0)
    return f"{summary}; {skipped} updates skipped" if skipped else summary


def picture(out: Path, rows: list[dict[str, Any]], references: dict[str, float], unit: str) -> str:
    """Draw the curves of a run; say where, or why that failed."""
    path = out / "loss.png"
    try:
        plot_run(rows, references, path, unit)
    except Exception as error:  # of many types
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("matplotlib"):
            return "no picture: matplotlib is missing; pip install 'jaxrnn[plot]'"
        return f"no picture: {directory.first_line(error)}"
    return f"picture: {path}"

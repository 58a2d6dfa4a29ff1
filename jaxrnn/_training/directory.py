"""A run directory's plain files: options, alphabet and metrics as JSON, ids of the text.

`config.json` is written first: where it is there is a run. Each file is replaced whole or not
at all, and `metrics.jsonl` grows by a line each time the run reports.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrnn import _checks

CONFIG, TEXT, IDS, METRICS = "config.json", "text.json", "ids.npy", "metrics.jsonl"


@contextmanager
def claimed(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Make an empty or new directory that of a run; undo it where the block fails.

    Raises:
      InputError: it holds something, is a file, or cannot be written.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in out.iterdir()}
        if CONFIG in found:
            raise _checks.InputError(
                f"--out: expected an empty or new directory, got {out}, which is a run; "
                f"to go on with it: jaxrnn train --resume {out}"
            )
        # What a start that was killed leaves behind is nobody's work.
        if found - {_partial(out / CONFIG).name}:
            raise _checks.InputError(f"--out: expected an empty or new directory, got {out}")
        write_json(out / CONFIG, config)
    except OSError as error:
        raise _checks.InputError(f"--out: cannot write to {out}: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            path.unlink()
        for folder in made:
            folder.rmdir()
        raise


def check_writable(*folders: Path) -> None:
    """Refuse a run that could not be saved, before anything of it is changed.

    Raises:
      InputError: a folder in which no file can be made.
    """
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _checks.InputError(f"{folder}: expected a directory that can be written")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, parse: Callable[[Any], Any], what: str) -> Any:
    """What a JSON file of a run says.

    Args:
      path: the file.
      parse: of the value that stands there; raises TypeError, KeyError or ValueError.
      what: what is expected there.

    Raises:
      InputError: it is not there or is damaged.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise _checks.InputError(
            f"{path.parent}: expected a run directory, got no {path.name} in it"
        ) from None
    except OSError as error:
        raise _checks.InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _checks.InputError(f"{path}: expected {what}: {error}") from error


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    """Add one line to the metrics, on the disk before any checkpoint that is past it."""
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All rows of the metrics; one that was cut short, which can only be the last, is none.

    Raises:
      InputError: a line that is no row.
    """
    path, rows = out / METRICS, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _checks.InputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or "bits" not in row:
                raise KeyError("bits")
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            got = f"{line.strip()[:40]!r} in line {number}"
            raise _checks.InputError(f"{path}: expected a row of metrics, got {got}") from None
        rows.append(row)
    return rows


def trim_metrics(out: Path, step: int) -> None:
    """Drop the rows past a step."""
    kept = [row for row in read_metrics(out) if row["step"] <= step]
    _write(out / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write(path: Path, text: str) -> None:
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

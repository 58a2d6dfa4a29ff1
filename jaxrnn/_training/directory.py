"""A run directory's plain files: options, alphabet and metrics as JSON, ids of the text.

`config.json` is written first: where it is there is a run. Each file is replaced whole or not
at all, and `metrics.jsonl` grows by a line each time the run reports.
"""

import json
import os
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jaxrnn._api import checks
from jaxrnn._files import partial, whole_file, writing
from jaxrnn._training.lock import locked

CONFIG, TEXT, IDS, METRICS = "config.json", "text.json", "ids.npy", "metrics.jsonl"
MARK = ".together"


@contextmanager
def claimed(out: Path, config: dict[str, Any], held: ExitStack) -> Iterator[None]:
    """Make an empty or new directory that of a run; undo it where the block fails.

    Args:
      out: the directory.
      config: what config.json shall hold.
      held: gets the lock on it, which outlives the block.

    Raises:
      InputError: it holds something, is a file, or cannot be written.
    """
    made: list[Path] = []
    try:
        made += [folder for folder in (out, *out.parents) if not folder.exists()]
        _utf8(out)
        out.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in out.iterdir()]
        if CONFIG in names:
            raise checks.InputError(
                f"--out: expected an empty or new directory, got {out}, which is a run; "
                f"to go on with it: {shlex.join(['jaxrnn', 'train', '--resume', str(out)])}"
            )
        # What a start that was killed leaves behind is nobody's work.
        if not all(fnmatch(name, partial(out / CONFIG, ".*").name) for name in names):
            raise checks.InputError(f"--out: expected an empty or new directory, got {out}")
    except OSError as error:
        raise checks.InputError(f"--out: cannot write to {out}: {error.strerror}") from error
    begun = False
    try:
        _begin(out / CONFIG, config, held)
        begun = True
        yield
    except BaseException:
        for name in (IDS, TEXT, CONFIG) if begun else ():
            (out / name).unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # not empty, for another run stands beside it
                folder.rmdir()
        raise


def _begin(path, config, held):
    """Write config.json, with the lock on it from the first, unless there is one."""
    new = partial(path, f".{os.getpid()}")
    try:
        with writing(path), new.open("w", encoding="ascii") as file:
            file.write(_as_text(config))
            file.flush()
            os.fsync(file.fileno())
        held.enter_context(locked(new))
        with writing(path):
            try:
                os.link(new, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                os.replace(new, path)
    finally:
        with suppress(OSError):
            new.unlink()


def _utf8(out):
    # orbax takes no other name.
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise checks.InputError(f"--out: expected a name that is UTF-8, got {out}") from error


def is_run(folder: Path) -> bool:
    """Whether a directory is that of a run, one that has just been claimed included."""
    try:
        values = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.keys() == {"sources", "options"}


def check_writable(*folders: Path) -> None:
    """Refuse a run that could not be saved, before anything of it is changed.

    Raises:
      InputError: a folder in which no file can be made.
    """
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise checks.InputError(f"{folder}: expected a directory that can be written")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    _write(path, _as_text(value))


def _as_text(value):
    return json.dumps(value, indent=2) + "\n"  # in ASCII: a name may be no UTF-8


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
        raise checks.InputError(
            f"{path.parent}: expected a run directory, got no {path.name} in it"
        ) from None
    except OSError as error:
        raise checks.InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise checks.InputError(f"{path}: expected {what}: {error}") from error


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
        raise checks.InputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or not {"bits", "seconds"} <= row.keys():
                raise KeyError
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            got = f"{line.strip()[:40]!r} in line {number}"
            raise checks.InputError(f"{path}: expected a row of metrics, got {got}") from None
        rows.append(row)
    return rows


def trim_metrics(out: Path, step: int) -> None:
    """Drop the rows past a step."""
    kept = [row for row in read_metrics(out) if row["step"] <= step]
    _write(out / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def put_mark(out: Path) -> None:
    """Leave something in a run directory by which all processes know that they see the same."""
    _write(out / MARK, secrets.token_hex())


def read_mark(out: Path) -> str | None:
    """What `put_mark` left in the directory that this process sees."""
    with suppress(OSError):
        return (out / MARK).read_text(encoding="utf-8")
    return None


def remove_mark(out: Path) -> None:
    """Take away what `put_mark` left."""
    with suppress(OSError):  # where nothing could be begun there is none
        (out / MARK).unlink()


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file, writing(path):
        file.write(text.encode())

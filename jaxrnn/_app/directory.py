"""The files of a run: each is written whole or not at all, and one process at a time trains it.

`config.json` makes a directory a run; it is written first, and locked during training.
`metrics.jsonl` grows by a line per report; orbax names `checkpoints/<step>` when it is complete.
"""

import json
import math
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from jaxrnn._api.checks import InputError, bad_input

CONFIG, TEXT, IDS, METRICS = "config.json", "text.json", "ids.npy", "metrics.jsonl"
CHECKPOINTS, MARK = "checkpoints", ".together"
PATIENCE = 1.0  # seconds to retry a lock, which `show` holds for an instant


def first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def whole_file(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A file under a temporary name, renamed if the block succeeds and removed otherwise.

    `mark` distinguishes processes that may write the same file. Writes may raise OSError.
    """
    unfinished, file = partial(path, mark), None
    try:
        with writing(path):
            file = unfinished.open("w+b")
        yield file
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):  # a full disk refuses the buffer again
            if file is not None:
                file.close()
        with suppress(OSError):
            unfinished.unlink()
        raise


def partial(path: Path, mark: str = "") -> Path:
    return path.with_name(f".{path.name}{mark}.partial")


def _lock(file: BinaryIO, seconds: float = PATIENCE, shared: bool = False) -> bool | None:
    """Lock a file until it is closed: whether that worked, or None if locks are not supported."""
    end = time.monotonic() + seconds
    while True:
        try:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        except (ImportError, OSError):  # not supported by the system or file system
            return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a run; an InputError if another process has the lock."""
    path = out / CONFIG
    # On NFS only a writable file can be locked.
    with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:
        if _lock(file) is False or not _is_at(file, path):
            raise InputError(f"{out}: expected a run that is not being trained, got one that is")
        yield


def is_locked(out: Path) -> bool:
    """Whether a process is training a run. The lock is shared, so callers do not see each other."""
    with (out / CONFIG).open("rb") as file:
        return _lock(file, 0, shared=True) is False


class TakenError(InputError):
    """A directory that is not empty."""


@contextmanager
def claimed(out: Path, config: dict[str, Any], held: ExitStack) -> Iterator[None]:
    """Make a new or empty directory a run, and undo that if the block fails.

    The lock goes to `held` and outlives the block. A TakenError if the directory is not empty.
    """
    made, begun = [], False
    try:
        try:
            made += [folder for folder in (out, *out.parents) if not folder.exists()]
            check_name(out, "--out")
            out.mkdir(parents=True, exist_ok=True)
            # A killed start may leave a partial file.
            if not {path.name for path in out.iterdir()} <= {partial(out / CONFIG).name}:
                raise _taken(out)
        except OSError as error:
            raise InputError(f"--out: cannot write to {out}: {error.strerror}") from error
        while not begun:
            out.mkdir(parents=True, exist_ok=True)
            begun = _begin(out, config, held)
        yield
    except BaseException:
        for name in (IDS, TEXT, CONFIG) if begun else ():
            (out / name).unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # not empty: another run is in it
                folder.rmdir()
        raise


def _begin(out: Path, config: dict[str, Any], held: ExitStack) -> bool:
    """Write config.json, locking it before it gets its name; False to try again.

    Of several processes one creates the temporary file; one left by a killed process is not locked.
    """
    path, new = out / CONFIG, partial(out / CONFIG)
    with writing(path), ExitStack() as undo, suppress(FileNotFoundError):
        if new.is_symlink():
            raise _taken(out)
        made = not new.exists()
        with suppress(FileExistsError):
            file = undo.enter_context(new.open("xb" if made else "r+b"))
            ours = _lock(file)
            if not _is_at(file, new):
                return False  # renamed or removed meanwhile
            if not (ours or (made and ours is None)):
                raise _taken(out, f", where another process begins a run; if none does, rm {new}")
            undo.callback(new.unlink, missing_ok=True)
            if path.exists():
                raise _taken(out)
            file.truncate()
            file.write(_as_text(config))
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
            undo.pop_all()
            held.enter_context(file)
            return True
    return False


def _taken(out, why=""):
    if (out / CONFIG).exists():
        go_on = shlex.join(["jaxrnn", "train", "--resume", str(out)])
        why = f", which is a run; to continue it: {go_on}"
    return TakenError(f"--out: expected an empty or new directory, got {out}{why}")


def check_name(out: Path, argument: str = "RUN") -> None:
    """Refuse a name that orbax does not support."""
    if any("\ud800" <= character <= "\udfff" for character in str(out.absolute())):
        bad_input(argument, "a name that is UTF-8", out)


def is_run(folder: Path) -> bool:
    try:
        values = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.keys() == {"sources", "options"}


def _as_text(value) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()  # ASCII, since names may not be UTF-8


def write(path: Path, content: Any, mark: str = "") -> None:
    with whole_file(path, mark) as file, writing(path):
        file.write(content if isinstance(content, bytes) else _as_text(content))


def read_json(path: Path, parse: Callable[[Any], Any], what: str) -> Any:
    """`parse` of a JSON file; an InputError if that fails."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        bad_input(path.parent, "a run directory", f"no {path.name} in it")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected {what}: {error}") from error


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All rows of the metrics, without an incomplete last line."""
    path, rows = out / METRICS, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or not {"bits", "seconds"} <= row.keys():
                raise KeyError
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            bad_input(path, "a row of metrics", f"{line.strip()[:40]!r} in line {number}")
        rows.append(row)
    return rows


def trim_metrics(out: Path, step: int) -> None:
    rows = [row for row in read_metrics(out) if row["step"] <= step]
    write(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


@contextmanager
def marked(out: Path) -> Iterator[None]:
    """Write a file by which several processes check that they see the same directory."""
    write(out / MARK, secrets.token_hex().encode())
    try:
        yield
    finally:
        with suppress(OSError):
            (out / MARK).unlink()


def read_mark(out: Path) -> str | None:
    with suppress(OSError):
        return (out / MARK).read_text()
    return None


def checkpoint_steps(out: Path) -> list[int]:
    try:
        names = os.listdir(out / CHECKPOINTS)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise InputError(f"{out / CHECKPOINTS}: cannot be read: {error.strerror}") from error
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))


def best_checkpoint(out: Path) -> tuple[int, float] | None:
    """(step, bits) of the checkpoint of least held-out loss, or None."""
    measured, steps = [], checkpoint_steps(out)
    for step, name in product(steps, ("about/metadata", "metrics/metrics")):  # the latter: old runs
        with suppress(OSError, ValueError, TypeError, KeyError):
            about = json.loads((out / CHECKPOINTS / str(step) / name).read_bytes())
            measured.append((float(about["held_out_bits"]), step))
    if steps != checkpoint_steps(out):  # one may have been dropped before it was read
        return best_checkpoint(out)
    bits, step = min(measured, default=(math.inf, 0))
    return (step, bits) if math.isfinite(bits) else None

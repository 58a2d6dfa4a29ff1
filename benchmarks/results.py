"""What a run leaves behind: one JSON document, written whole or not at all.

schema      1
date        day of the run
device      processor, cores, memory_gib, gpu
versions    of Python and each distribution; null where it is not installed
threads     of each worker
flags       XLA_FLAGS of each worker
dtype       of weights, inputs and results, where a subject's name says no other
options     of the run
interrupted whether it ended early
subjects    name, package, activation, kind (of worker) of each
rows        workload, subject, measure, status: "ready" with seconds (per call, one for each of
            the rounds) and the kernels in its program; or "failed", "not installed", "not
            offered", "not measured" with a reason. On a GPU also errors, by array and in terms of
            its largest entry ("copies": how far sequences that are equal differ); of kernels
            alike, whether the results of so many calls were, bit by bit; died, where it took
            the process with it
compile     workload, subject, measure, and seconds of trace, compile, first_call
memory      workload, subject, measure, and bytes of temporaries and at the peak of a call
sweeps      axis, value, and a row with its bytes of temporaries

Of one program each: texts, bytes of memory by the size of a text (`text_memory`), and training,
beside torch (`torch_training`).
"""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

SCHEMA = 1
LISTS = ("subjects", "rows", "compile", "memory", "sweeps")
KEYS = ("schema", "date", "device", "versions", "threads", "flags", "dtype", "options", *LISTS)


class ResultsError(ValueError):
    """A file that is none of ours; the message says what was expected."""


def new(device: dict, versions: dict, options: dict, dtype: str = "float32") -> dict[str, Any]:
    """An empty document of today.

    Args:
      device: see `machine.device`.
      versions: see `machine.versions`.
      options: what was asked for.
      dtype: of all arrays.

    Returns:
      The document.
    """
    return {
        "schema": SCHEMA, "date": date.today().isoformat(), "device": device,
        "versions": versions, "threads": {}, "flags": {}, "dtype": dtype, "options": options,
        "interrupted": False, **{name: [] for name in LISTS},
    }  # fmt: skip


def measured(document: dict[str, Any]) -> bool:
    """Whether there is anything worth keeping."""
    return bool(document["rows"] or document["sweeps"])


def check_writable(path: Path) -> None:
    """Make the file's directory, and find out whether it can be written before hours are spent.

    Args:
      path: the file.

    Raises:
      OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def write(document: dict[str, Any], path: Path) -> None:
    """Write the document whole or not at all; an old file is replaced when the new one is complete.

    Args:
      document: what to write.
      path: the file; its directory is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(_compact(document) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _compact(document: dict[str, Any]) -> str:
    """Indented, but one line for each row, and six digits of each second."""
    text = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(_rounded(row), ensure_ascii=False)}" for row in value)
            text.append(f'"{key}": [\n{rows}\n]')
        else:
            text.append(f'"{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(text) + "\n}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """The document of a file.

    Args:
      path: what `write` wrote.

    Returns:
      The document.

    Raises:
      ResultsError: it cannot be read, or is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultsError(f"{path}: is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: expected the results of a run, schema {SCHEMA}")
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise ResultsError(f"{path}: lacks {', '.join(missing)}")
    return document


def new_path(wanted: Path, force: bool = False) -> Path:
    """Where to write without overwriting: the wanted path, or the first free of -2, -3 and so on.

    Args:
      wanted: the path.
      force: take it even where a file is.

    Returns:
      The path.
    """
    path, n = wanted, 1
    while path.exists() and not force:
        n += 1
        path = wanted.with_name(f"{wanted.stem}-{n}{wanted.suffix}")
    return path

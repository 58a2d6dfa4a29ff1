"""A run directory: an orbax checkpoint beside JSON files that a person can read.

config.json, vocabulary.json and metrics.jsonl (a line each time the run reports) are plain
JSON; `checkpoint/` is orbax's. Nothing is pickled.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxrnn import _checks
from jaxrnn._text import Vocabulary

CONFIG, VOCABULARY, METRICS, CHECKPOINT = (
    "config.json", "vocabulary.json", "metrics.jsonl", "checkpoint",
)  # fmt: skip


def claim(out: Path) -> None:
    """Make the directory of a new run, or require it to be empty.

    Raises:
      InputError: it holds something, is a file, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise _checks.InputError(f"--out: expected an empty or new directory, got {out}")
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _checks.InputError(f"--out: cannot write to {out}: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    """Add one line to the metrics."""
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All rows of the metrics."""
    with (out / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save_state(out: Path, state: Any) -> None:
    """Write a pytree of arrays with orbax, whole or not at all."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((out / CHECKPOINT).absolute(), state)


def load_state(out: Path, template: Any) -> Any:
    """Read the pytree back.

    Args:
      out: the run directory.
      template: the same tree of arrays, or of `jax.ShapeDtypeStruct`.

    Raises:
      InputError: there is no checkpoint, or it cannot be read as this tree.
    """
    import orbax.checkpoint as ocp

    path = (out / CHECKPOINT).absolute()
    if not path.is_dir():
        raise _checks.InputError(f"{out}: expected a run directory, got no {CHECKPOINT}/ in it")
    device = jax.local_devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), template
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, template)
    except Exception as error:  # orbax raises many kinds; each means an unreadable checkpoint
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _checks.InputError(f"{path}: the checkpoint cannot be read: {line}") from error


def load_json(out: Path, name: str) -> Any:
    """Read one of a run's JSON files.

    Raises:
      InputError: it is not there or is damaged.
    """
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _checks.InputError(f"{out}: expected a run directory, got no {name} in it") from None
    except (OSError, ValueError) as error:
        raise _checks.InputError(f"{out / name}: cannot be read: {error}") from error


def load_vocabulary(out: Path) -> Vocabulary:
    """The vocabulary of a run."""
    try:
        return Vocabulary(load_json(out, VOCABULARY))
    except _checks.InputError:
        raise
    except (TypeError, ValueError) as error:
        raise _checks.InputError(f"{out / VOCABULARY}: {error}") from error

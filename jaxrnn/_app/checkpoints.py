"""The checkpoints of a run, by orbax: the last few and the best, each complete or absent.

`checkpoints/<step>/` has the arrays (`state`) and JSON (`about`). Nothing is pickled.
"""

import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn._api.checks import InputError
from jaxrnn._app import directory
from jaxrnn._app.devices import LostError, are_several, is_first

KEPT = 3
# Messages of errors in writing, which orbax wraps in other exceptions.
REFUSED = [os.strerror(n) for n in (EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS)]


class FailedError(Exception):
    """A run that cannot continue, with the reason in one line."""


class GoneError(InputError):
    """A checkpoint that was dropped before it was read."""


class Checkpoints:
    """The checkpoints in a run directory; other processes may read while one saves."""

    def __init__(self, out: Path):
        import orbax.checkpoint as ocp

        directory.check_name(out)
        self.folder, self._out, self._args = out / directory.CHECKPOINTS, out, ocp.args
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def prepare(self) -> None:
        """Remove incomplete checkpoints; an InputError if the directory is not writable."""
        for folder in (self._out, self.folder):
            with directory.writing(folder):
                folder.mkdir(exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise InputError(f"{folder}: expected a directory that can be written")
        for pattern in ("*.orbax-checkpoint-tmp*", "*.deleted"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, state: Any, about: dict[str, Any], held_out_bits: float | None):
        """Save a checkpoint, then drop all but the last few and the best."""
        path, args = self.folder / str(step), self._args
        about = {**about, "held_out_bits": held_out_bits, "fingerprint": int(fingerprint(state))}
        items = args.Composite(state=args.StandardSave(state), about=args.JsonSave(about))
        try:
            with _quiet():
                self._orbax.save(path.absolute(), args=items)
            if is_first():
                best = directory.best_checkpoint(self._out)
                for old in {*directory.checkpoint_steps(self._out)[:-KEPT]} - {best and best[0]}:
                    # Renamed first, so that no half-deleted checkpoint is read.
                    gone = (self.folder / str(old)).rename(self.folder / f"{old}.deleted")
                    shutil.rmtree(gone, ignore_errors=True)
        except Exception as error:  # of many types
            of_the_disk = isinstance(error, OSError) or any(why in str(error) for why in REFUSED)
            if are_several() and not of_the_disk:
                raise LostError(error) from error
            raise FailedError(f"{path}: cannot be written: {_line(error)}") from error

    def about(self, step: int) -> dict[str, Any]:
        about = self._read(step, about=self._args.JsonRestore())["about"]
        if not isinstance(about, dict):
            raise self._damaged(step, f"expected its description, got {about!r:.40}")
        return about

    def state(self, step: int, shapes: Any) -> Any:
        """The arrays, for a tree of `jax.ShapeDtypeStruct` with shardings."""
        state = self._read(step, state=self._args.StandardRestore(shapes))["state"]
        if int(fingerprint(state)) != self.about(step).get("fingerprint"):
            raise self._damaged(step, "its numbers are not those that were saved")
        return state

    def _read(self, step, **items):
        path = (self.folder / str(step)).absolute()
        try:
            with _quiet():
                return self._orbax.restore(path, args=self._args.Composite(**items))
        except Exception as error:  # of many types; each means an unreadable checkpoint
            raise self._damaged(step, error) from error

    def _damaged(self, step, error):
        path = self.folder / str(step)
        if not os.path.lexists(path):
            return GoneError(f"{path}: the checkpoint is gone")
        older = [n for n in directory.checkpoint_steps(self._out) if n < step]
        way = f"; without it {self.folder / str(older[-1])} is the newest" if older else ""
        return InputError(f"{path}: the checkpoint cannot be read: {_line(error)}{way}")


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A checksum of all arrays, which orbax lacks: Σ (2 i + 1) bits_i, uint32.

    It does not depend on the order of summation, and any change of a single number changes it.
    """
    total = jnp.zeros((), jnp.uint32)
    for n, leaf in enumerate(jax.tree.leaves(tree)):
        size = min(leaf.dtype.itemsize, 4)
        words = jnp.ravel(jax.lax.bitcast_convert_type(leaf, f"uint{8 * size}"))
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + jnp.uint32(1)
        words = words.astype(jnp.uint32) * weights
        total += jnp.uint32(2 * n + 1) * jnp.sum(words, dtype=jnp.uint32)
    return total


def _line(error):
    text = getattr(error, "strerror", None) or directory.first_line(error)
    return re.split(r" \[|\. See full", text)[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax; after an error for good, because its threads go on printing."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook
    (ignoring := warnings.catch_warnings(action="ignore")).__enter__()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    yield
    sys.unraisablehook = hook
    ignoring.__exit__(None, None, None)
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)

"""The checkpoints of a run, through orbax: the last few and the best, each whole or not there.

`checkpoints/<step>/` holds the arrays (`state`), JSON beside them (`about`) and what the best is
chosen by (`metrics`). orbax writes under another name and renames. Nothing is pickled.
"""

import errno
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn._api import checks
from jaxrnn._training import kept
from jaxrnn._training.kept import FOLDER

KEPT = 3
# Old checkpoints are moved here before they are deleted: a half-deleted one is none.
DELETED = "deleted"
# How a system refuses to write.
REFUSED = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS,
)  # fmt: skip


class SaveError(Exception):
    """A checkpoint that cannot be written; those before it are untouched."""

    @property
    def is_of_the_disk(self) -> bool:
        """Whether the system refused; else the other processes did not do their part."""
        # Some of those who write have kinds of errors of their own, with its words in them.
        words = str(self.__cause__)
        return isinstance(self.__cause__, OSError) or any(os.strerror(n) in words for n in REFUSED)


class Checkpoints:
    """The checkpoints in a run directory.

    Args:
      out: the run directory.
      write: whether any will be saved; what a save that was cut short has left is removed then.

    Raises:
      InputError: they cannot be read, or not be written.
    """

    def __init__(self, out: Path, write: bool = False):
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        self.folder, self._out, self._ocp = out / FOLDER, out, ocp
        few = policies.AnyPreservationPolicy([
            policies.LatestN(KEPT),
            policies.BestN(get_metric_fn=_held_out_bits, reverse=True, n=1),
        ])  # fmt: skip
        options = ocp.CheckpointManagerOptions(
            preservation_policy=few, best_fn=_held_out_bits, best_mode="min",
            enable_async_checkpointing=False, read_only=not write,
            todelete_subdir=DELETED if write else None, create=write,
            save_interval_steps=int(write),
        )  # fmt: skip
        if write:
            self._clean("*orbax-checkpoint-tmp*")
        try:
            with _quiet():
                self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        except Exception as error:  # orbax raises many kinds
            damaged = [n for n in self.steps() if math.isnan(kept.held_out_bits(out, n))]
            if damaged:
                raise self._damaged(damaged[0], _line(error)) from error
            raise checks.InputError(f"{self.folder}: cannot be used: {_line(error)}") from error

    def _clean(self, *unfinished):
        # Not by orbax: it does so in a thread, which the end of a short process takes by surprise.
        if jax.process_index() == 0:
            for pattern in (DELETED, *unfinished):
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Of all finished checkpoints, in order."""
        return kept.steps(self._out)

    def best(self) -> int | None:
        """The step of the least held-out loss; None where none was measured."""
        return kept.best(self._out)

    def save(self, step: int, state: Any, about: dict[str, Any], held_out_bits: float | None):
        """Save a checkpoint, and drop those that are no longer among the last or the best.

        Args:
          step: how many updates have been made.
          state: a pytree of arrays.
          about: what JSON can say.
          held_out_bits: if they were measured at this step.

        Raises:
          SaveError: it cannot be written.
        """
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(state),
            about=args.JsonSave({**about, "fingerprint": int(fingerprint(state))}),
        )
        metrics = {"held_out_bits": math.inf if held_out_bits is None else held_out_bits}
        try:
            with _quiet():
                self._manager.save(step, args=items, metrics=metrics, force=True)
            self._clean()
        except Exception as error:  # of many kinds, by what went wrong
            raise SaveError(
                f"{self.folder / str(step)}: cannot be written: {_line(error)}"
            ) from error

    def about(self, step: int) -> dict[str, Any]:
        """What JSON said beside the arrays.

        Raises:
          InputError: it is damaged.
        """
        about = self._read(step, about=self._ocp.args.JsonRestore())["about"]
        if not isinstance(about, dict):
            raise self._damaged(step, f"expected what it is of, got {about!r:.40}")
        return about

    def state(self, step: int, shapes: Any) -> Any:
        """The arrays.

        Args:
          step: of which checkpoint.
          shapes: the same tree of `jax.ShapeDtypeStruct` with the shardings it is wanted in.

        Raises:
          InputError: it is damaged, or of another tree.
        """
        state = self._read(step, state=self._ocp.args.StandardRestore(shapes))["state"]
        if int(fingerprint(state)) != self.about(step).get("fingerprint"):
            raise self._damaged(step, "it holds other numbers than were saved")
        return state

    def _read(self, step, **items):
        try:
            with _quiet():
                return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except Exception as error:  # orbax raises many kinds; each means an unreadable checkpoint
            raise self._damaged(step, _line(error)) from error

    def _damaged(self, step, line):
        path = self.folder / str(step)
        older = [str(self.folder / str(other)) for other in self.steps() if other < step]
        way = f"; without it {older[-1]} is the newest" if older else ""
        return checks.InputError(f"{path}: the checkpoint cannot be read: {line}{way}")


def _held_out_bits(metrics):
    return metrics["held_out_bits"]


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A number of all bits of all arrays, which no split over devices changes: uint32.

    Σ (2 i + 1) bits_i modulo 2³²: integers, so that the order of a sum is of no account, and odd
    weights, so that no change of one number goes unseen. What orbax reads it does not check.
    """
    total = jnp.zeros((), jnp.uint32)
    for n, leaf in enumerate(jax.tree.leaves(tree)):
        words = jnp.ravel(_words(leaf))
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + jnp.uint32(1)
        total += jnp.uint32(2 * n + 1) * jnp.sum(words * weights, dtype=jnp.uint32)
    return total


def _words(x):
    """The bits of an array as uint32."""
    size = x.dtype.itemsize
    if size < 4:
        return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _line(error):
    """The first line of what an error says, without the pages that may follow."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return re.split(r" \[|\. See full", first[0])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error but the one line of what is raised.

    Where orbax fails, its threads go on and print pages, some of them later: then this stays.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    yield
    sys.unraisablehook = hook
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)

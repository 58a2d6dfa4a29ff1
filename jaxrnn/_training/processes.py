"""A run of several processes, on one machine or many, through `jax.distributed`."""

import os
import socket
import sys
import threading
import time
import zlib
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrnn import _checks

# A process that has not been heard of for so many seconds is lost, and the others end.
HEARTBEAT = 30
# So many seconds each waits for the others to start.
PATIENCE = 300
# And so many for the first one to write the ids of a text.
PREPARATION = 24 * 3600
# The first process ends so many seconds after the others, which JAX aborts when it is gone.
LAST = 5


class LostError(Exception):
    """Another process is gone, or the way to it."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one process of several; all None where JAX finds out by itself (TPU pods, Slurm).

    Raises:
      InputError: they did not find each other.
    """
    if coordinator is not None and process == 0:
        _check_free(coordinator)
    # It would take SIGTERM for itself, and complain of every loss.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator or "what JAX knows of this cluster"
    # JAX would abort, with a stack of C++; and while it waits nothing can be raised here.
    expected = f"all processes at {where} within {PATIENCE} s"
    alarm = threading.Timer(PATIENCE, _give_up, [f"expected {expected}, not all came"])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process,
            initialization_timeout=PATIENCE + 60, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise _checks.InputError(
            f"--coordinator: cannot join the others by {where}: {line}"
        ) from error
    finally:
        alarm.cancel()


def _check_free(coordinator):
    # JAX would end in a fault of memory where it cannot listen.
    port = coordinator.rpartition(":")[2]
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, OverflowError, ValueError) as error:
        expected = "HOST:PORT with a port to listen on"
        raise _checks.InputError(
            f"--coordinator: expected {expected}, got {coordinator} ({error})"
        ) from error


def _give_up(line):
    print(f"jaxrnn train: error: --coordinator: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether the run has other processes."""
    return jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Return when every process has come here.

    Not by a collective of the devices: the first of these gives up after half a minute.

    Raises:
      LostError: one will not come.
    """
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    if barrier is None:
        return
    try:
        barrier(key=f"jaxrnn {name}", timeout_ms=PREPARATION * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from error


def largest(number: int) -> int:
    """The largest of the numbers that all processes have; each must ask at the same place."""
    if not are_several():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def agree(error: Exception | None, options: object) -> None:
    """Go on together or not at all; each must ask at the same place, soon after a `wait_for_all`.

    Args:
      error: what keeps this process from going on.
      options: what all must have alike.

    Raises:
      InputError: that error; or another process has one, or other options.
      LostError: one did not come.
    """
    mark = zlib.crc32(repr(options).encode()) >> 1
    try:
        failed, most, least = largest(error is not None), largest(mark), -largest(-mark)
    except jax.errors.JaxRuntimeError as gone:
        raise _lost(gone) from gone
    if error is not None:
        raise error
    if failed:
        raise _checks.InputError("--process: another process cannot begin this run, and says why")
    if most != least:
        raise _checks.InputError(
            f"--process: expected the same options in all processes, got {options} here"
        )


def leave(code: int) -> NoReturn:
    """End without a word to the others, for a tidy end would wait for the one that is gone."""
    if is_first():
        time.sleep(LAST)
    os._exit(code)


def _lost(error):
    line = str(error).strip().splitlines()[0]
    return LostError(f"another process is gone, or the way to it ({line[-200:]})")

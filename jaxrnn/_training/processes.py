"""A run of several processes, on one machine or many, through `jax.distributed`."""

import os
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrnn._api import checks
from jaxrnn._training import signals

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

    def __init__(self, error: object):
        line = str(error).strip().splitlines()[0]
        super().__init__(f"another process is gone, or the way to it ({line:.200})")


class RefusedError(checks.InputError):
    """A run that cannot begin, in all processes alike."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one process of several; all None where JAX finds out by itself (TPU pods, Slurm).

    Raises:
      InputError: they did not find each other.
    """
    if coordinator is not None:
        _check_address(coordinator, listens=process == 0)
    # It would take SIGTERM for itself, and complain of every loss.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator or "what JAX knows of this cluster"
    # JAX would abort, with a stack of C++; and while it waits nothing can be raised here.
    expected = f"all processes at {where} within {PATIENCE} s"
    alarm = threading.Timer(PATIENCE, _give_up, [f"expected {expected}, not all came"])
    alarm.daemon = True
    alarm.start()
    # All that a cluster knows of its processes it would say of their devices too.
    by_hand = "deactivate" if None not in (coordinator, processes, process) else None
    try:
        with signals.at_once():
            jax.distributed.initialize(
                coordinator, processes, process, cluster_detection_method=by_hand,
                initialization_timeout=PATIENCE + 60, heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise checks.InputError(
            f"--coordinator: cannot join the others by {where}: {line}"
        ) from error
    finally:
        alarm.cancel()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise RefusedError(
            "--processes: expected as many devices in each process, got "
            + ", ".join(str(devices[process]) for process in sorted(devices))
        )


def _check_address(coordinator, listens):
    host, _, port = coordinator.rpartition(":")
    expected = f"HOST:PORT{' with a port to listen on' * listens}"
    try:
        if not host or not 0 < int(port) < 2**16:
            raise ValueError("a port is a number below 65536")
        if listens:  # JAX would end in a fault of memory where it cannot
            socket.create_server(("", int(port))).close()
    except (OSError, ValueError) as error:
        raise checks.InputError(
            f"--coordinator: expected {expected}, got {coordinator} ({error})"
        ) from error


def _give_up(line):
    complain(f"--coordinator: {line}")
    os._exit(2)


def complain(line: object) -> None:
    """Say on standard error what keeps the command from its end."""
    print(f"jaxrnn train: error: {line}", file=sys.stderr, flush=True)


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
        with signals.at_once():
            barrier(key=f"jaxrnn {name}", timeout_ms=PREPARATION * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise LostError(error) from error


def largest(number: int) -> int:
    """The largest of the numbers that all processes have; each must ask at the same place."""
    if not are_several():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def agree(error: Exception | None, alike: Mapping[str, object]) -> None:
    """Go on together or not at all; each must ask at the same place, soon after a `wait_for_all`.

    Args:
      error: what keeps this process from going on.
      alike: what all must have alike, by what is said where they have not.

    Raises:
      RefusedError: this process or another one has an error, or they differ.
      LostError: one did not come.
    """
    try:
        failed = largest(error is not None)
        if error is not None:
            raise RefusedError(error) from error
        if failed:
            raise RefusedError("--process: another process cannot begin this run, and says why")
        for said, value in alike.items():
            mark = zlib.crc32(repr(value).encode()) >> 1
            if largest(mark) != -largest(-mark):
                raise RefusedError(f"{said}, got {value} here")
    except jax.errors.JaxRuntimeError as gone:
        raise LostError(gone) from gone


def leave(code: int) -> NoReturn:
    """End without a word to the others, for a tidy end would wait for them.

    What is sent to a process that is gone fails, and so they end as well.
    """
    with suppress(OSError):
        sys.stdout.flush()
    if is_first():
        time.sleep(LAST)
    os._exit(code)

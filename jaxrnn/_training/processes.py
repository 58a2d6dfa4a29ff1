"""A run of several processes, on one machine or many, through `jax.distributed`."""

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


class LostError(Exception):
    """Another process is gone, or the way to it."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one process of several; all None where JAX finds out by itself (TPU pods, Slurm).

    Raises:
      InputError: they did not find each other.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, process,
            initialization_timeout=PATIENCE, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        where = coordinator or "what JAX knows of this cluster"
        raise _checks.InputError(
            f"--coordinator: cannot join the others by {where}: {line}"
        ) from error


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether the run has other processes."""
    return jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Return when every process has come here.

    Not by a collective of the devices: the first of these gives up after half a minute.
    """
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    if barrier is not None:
        barrier(key=f"jaxrnn {name}", timeout_ms=PREPARATION * 1000)


def largest(number: int) -> int:
    """The largest of the numbers that all processes have; each must ask at the same place."""
    if not are_several():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))

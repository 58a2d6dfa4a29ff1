"""The devices of a training run: its batch is split over them, its parameters are on each."""

import math
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_cores_devices() -> None:
    """Let JAX see each core as a device, if it runs on the CPU and has not started yet.

    A step of a small network is too short to be shared between cores; half of the batch in all
    steps is not. Does nothing where the number of devices has been chosen.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", cores or 1)
    except RuntimeError:
        pass  # JAX has started


class Placement:
    """Where the arrays of a run are, for a batch of this size.

    Args:
      batch_size: sequences in a batch; split over as many devices as divide it.
    """

    def __init__(self, batch_size: int):
        devices = jax.local_devices()
        self.devices = devices[: math.gcd(batch_size, len(devices))]
        mesh = Mesh(np.array(self.devices), ("data",))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = [NamedSharding(mesh, PartitionSpec(*(None,) * n, "data")) for n in (0, 1)]

    def everywhere(self, tree):
        """A copy on each device."""
        return jax.device_put(tree, self._everywhere)

    def split(self, x, axis: int = 0):
        """The batch, which is that axis, split over the devices."""
        return jax.device_put(x, self._split[axis])

    def together(self, tree):
        """On the first device."""
        return jax.device_put(tree, self.devices[0])

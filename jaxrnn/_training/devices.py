"""The devices of a training run: a mesh, over which its batch and its weights are split."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrnn._api import checks
from jaxrnn.train import DATA as DATA

# The other axis of the mesh, over which hidden units are split.
MODEL = "model"
# How each array of the parameters, and of what an optimiser keeps for it, is split.
SPLIT = {
    "U": PartitionSpec(MODEL, None),
    "W": PartitionSpec(MODEL, None),
    "b": PartitionSpec(MODEL),
    "leak": PartitionSpec(MODEL),
    "V": PartitionSpec(None, MODEL),
}


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
    """Where the arrays of a run are.

    Args:
      batch_size: sequences in a batch.
      hidden_size: units of a layer.
      model: over how many devices the units are split. The batch is split over the others: in one
        process over as many as divide it, of several processes over all.

    Raises:
      InputError: devices, units or sequences that cannot be split so.
    """

    def __init__(self, batch_size: int, hidden_size: int, model: int = 1):
        devices, processes = jax.devices(), jax.process_count()
        if len(devices) % model:
            expected = f"a divisor of the {len(devices)} devices"
            raise checks.InputError(f"--model-devices: expected {expected}, got {model}")
        if hidden_size % model:
            expected = f"a divisor of --hidden-size {hidden_size}"
            raise checks.InputError(f"--model-devices: expected {expected}, got {model}")
        data = len(devices) // model
        if processes == 1:
            data = math.gcd(batch_size, data)
        elif batch_size % data:
            raise checks.InputError(
                f"--batch-size: expected a multiple of {data}, over so many devices it is split, "
                f"got {batch_size}"
            )
        auto = (AxisType.Auto, AxisType.Auto)
        self.mesh = jax.make_mesh(
            (data, model), (DATA, MODEL), axis_types=auto, devices=devices[: data * model]
        )
        self.devices = data * model

    def of_state(self, state: Any) -> Any:
        """How a `TrainState`, or one of shapes, is split: a tree of shardings."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: NamedSharding(self.mesh, self._spec(path, x)), state
        )

    def _spec(self, path, x):
        names = [getattr(part, "name", "") for part in path]
        if names[0] == "h":
            return PartitionSpec(DATA, MODEL)
        spec = SPLIT.get(names[-1], PartitionSpec())
        return spec if len(spec) == np.ndim(x) else PartitionSpec()

    def put_state(self, state: Any) -> Any:
        """A state of which every process has the same numbers, split over the devices."""
        return jax.tree.map(lambda x, how: _place(np.asarray(x), how), state, self.of_state(state))

    def share(self, sequences: int) -> int:
        """How many of a batch are on each device, as `split` puts them there."""
        whole, rest = divmod(sequences, self.mesh.shape[DATA])
        return sequences if rest else whole

    def split(self, x: Any, axis: int) -> jax.Array:
        """An array of the host whose axis is the batch; ids become int32.

        Where the batch is no multiple of the devices it is split over, each has all of it.
        """
        data = DATA if x.shape[axis] % self.mesh.shape[DATA] == 0 else None
        ids = np.issubdtype(x.dtype, np.integer)
        sharding = NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, data))
        return _place(x, sharding, np.int32 if ids else x.dtype)


def _place(x, sharding, dtype=None):
    # Each process reads its own part, and none asks the others whether theirs is the same.
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.asarray(x[part], dtype))

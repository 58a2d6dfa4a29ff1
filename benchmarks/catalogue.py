"""Who takes part in a run, in which worker, and in which dtype."""

from dataclasses import dataclass

from benchmarks import workers
from benchmarks.kernels import ASSOCIATIVE, KERNEL, LARGEST, ROOFLINE, SCAN
from benchmarks.subjects.registry import (
    COMMAND_BUFFERS,
    GPU_SUBJECTS,
    JAX_SUBJECTS,
    KERNELS,
    SMALL_LOOPS,
    TORCH_SUBJECTS,
    TWO_DEVICES,
)
from benchmarks.workloads import Workload

# The largest H of the associative scan: it multiplies matrices [H, H] of all steps.
ASSOCIATIVE_HIDDEN = 16
# What a quick run leaves out: who does the same as another in the tables.
NOT_QUICK = (
    "jaxrnn, vmap axis 1", "naive scan, vmap", "naive scan, relu", "flax.linen", "equinox",
)  # fmt: skip
KIND = {
    "": workers.JAX, TWO_DEVICES: workers.TWO_DEVICES, SMALL_LOOPS: workers.ONE_KERNEL,
    COMMAND_BUFFERS: workers.COMMAND_BUFFERS, KERNELS: workers.KERNELS,
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A subject before it is built.

    Args:
      name: how the tables call it.
      package: the distribution that it comes from.
      kind: the worker that it runs in.
      base: its name in the registry.
      dtype: of weights, inputs and results.
      hidden: the largest H that it is measured with; None for any.
    """

    name: str
    package: str
    kind: str
    base: str
    dtype: str = "float32"
    hidden: int | None = None

    def dtype_on(self, workload: Workload) -> str:
        """That of a workload that has its own, or the subject's."""
        return workload.dtype or self.dtype


def listed(device: str, quick: bool = False) -> list[Listed]:
    """Everyone, in the order of the tables.

    Args:
      device: "cpu" or "gpu".
      quick: only what runs in a plain environment and compiles in seconds.

    Returns:
      The subjects, after the roofline.
    """
    if device == "gpu":
        return _on_gpu()
    kinds = (workers.JAX, workers.TORCH) if quick else workers.KINDS[device]
    found = [Listed(ROOFLINE, "jax", workers.JAX, ROOFLINE)]
    for name, entry in JAX_SUBJECTS.items():
        if KIND[entry.variant] not in kinds or (quick and name in NOT_QUICK):
            continue
        found.append(Listed(name, entry.package, KIND[entry.variant], name))
    for name, options in TORCH_SUBJECTS.items():
        if options.device == "cpu" and not (quick and options.compile):
            found.append(Listed(name, "torch", workers.TORCH, name, options.dtype))
    return found


def _on_gpu() -> list[Listed]:
    """The kernel of each dtype, and its rivals."""
    found = []
    for dtype, hidden in LARGEST.items():
        for name, entry in GPU_SUBJECTS.items():
            most = hidden
            if name == ASSOCIATIVE:
                if dtype != "float32":
                    continue
                most = ASSOCIATIVE_HIDDEN
            elif name not in (KERNEL, SCAN) and dtype != "bfloat16":
                continue
            kind = KIND[entry.variant]
            found.append(Listed(f"{name}, {dtype}", entry.package, kind, name, dtype, most))
        name = f"{ROOFLINE}, {dtype}"
        found.append(Listed(name, "jax", workers.JAX, ROOFLINE, dtype, hidden))
        for name, options in TORCH_SUBJECTS.items():
            if (options.device, options.dtype) == ("cuda", dtype):
                found.append(Listed(name, "torch", workers.TORCH, name, dtype))
    return found

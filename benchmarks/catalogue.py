"""Who takes part in a run, in which worker, and at which precision."""

from dataclasses import dataclass

from benchmarks import workers
from benchmarks.subjects.registry import (
    JAX_SUBJECTS,
    SMALL_LOOPS,
    TORCH_SUBJECTS,
    TWO_DEVICES,
)

ROOFLINE = "roofline"
# What a quick run leaves out: who does the same as another in the tables.
NOT_QUICK = (
    "jaxrnn, vmap axis 1", "naive scan, vmap", "naive scan, relu", "flax.linen", "equinox",
)  # fmt: skip
KIND = {"": workers.JAX, TWO_DEVICES: workers.TWO_DEVICES, SMALL_LOOPS: workers.ONE_KERNEL}


@dataclass(frozen=True)
class Listed:
    """A subject before it is built.

    Args:
      name: how the tables call it.
      package: the distribution that it comes from.
      kind: the worker that it runs in.
      base: its name in the registry.
      dtype: of weights, inputs and results.
      precision: of JAX's products; None for JAX's own choice, which on a GPU is TF32.
    """

    name: str
    package: str
    kind: str
    base: str
    dtype: str = "float32"
    precision: str | None = None


def listed(device: str, quick: bool = False) -> list[Listed]:
    """Everyone, in the order of the tables.

    Args:
      device: "cpu" or "gpu".
      quick: only what runs in a plain environment and compiles in seconds.

    Returns:
      The subjects, after the roofline.
    """
    kinds = (workers.JAX, workers.TORCH) if quick else workers.KINDS[device]
    found = [Listed(ROOFLINE, "jax", workers.JAX, ROOFLINE)]
    for name, entry in JAX_SUBJECTS.items():
        if KIND[entry.variant] not in kinds or (quick and name in NOT_QUICK):
            continue
        found.append(Listed(name, entry.package, KIND[entry.variant], name))
        if device == "gpu" and name in ("jaxrnn", "naive scan"):
            full = Listed(f"{name}, no TF32", entry.package, workers.JAX, name, precision="highest")
            half = Listed(f"{name}, bfloat16", entry.package, workers.JAX, name, "bfloat16")
            found += [full, half]
    where = {"cpu": "cpu", "gpu": "cuda"}[device]
    for name, options in TORCH_SUBJECTS.items():
        if options.device == where and not (quick and options.compile):
            found.append(Listed(name, "torch", workers.TORCH, name, options.dtype))
    return found

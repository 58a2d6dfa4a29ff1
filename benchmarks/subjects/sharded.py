"""A time-first subject with its batch split over all devices, the weights on each."""

from dataclasses import replace

import jax
from jax.sharding import Mesh, PartitionSpec

from benchmarks.subjects import JaxSubject


def split_batch(subject: JaxSubject, name: str, variant: str) -> JaxSubject:
    """The same layer inside `jax.shard_map`: each device unrolls its part of the batch.

    Args:
      subject: a `JaxSubject` with time in front.
      name: how the tables call the result.
      variant: the environment that has the devices.

    Returns:
      A `JaxSubject` whose unroll raises ValueError where the batch does not split evenly.
    """
    mesh = Mesh(jax.devices(), "batch")
    whole, split = PartitionSpec(), PartitionSpec(None, "batch")
    # The weights' gradient is added up over the devices once, at the border of the map. With
    # sharding constraints instead, a plain scan adds it up at every step of the backward.
    # Unchecked, because the naive scan's zero state is not marked as varying over the batch.
    mapped = jax.shard_map(
        subject.unroll, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )

    def unroll(weights, xs):
        batch = xs.shape[1]
        if batch % mesh.size:
            raise ValueError(f"batch of {batch} does not split over {mesh.size} devices")
        return mapped(weights, xs)

    return replace(subject, name=name, unroll=unroll, variant=variant, of=None)

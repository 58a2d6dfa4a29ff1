"""Who is measured, in the order of the tables, and in which worker."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from benchmarks.subjects import Layer, NotOfferedError, naive, only_plain, ours, peers
from benchmarks.workloads import Network
from jaxrnn._backends import select

# Workers: XLA reads its flags once, when it starts, and what a kernel breaks, it breaks for its
# own process alone.
JAX, TWO_DEVICES, KERNELS, TORCH = "jax", "jax, two host devices", "jax, kernels", "torch"

OURS, NAIVE = "jaxrnn", "naive scan"
KERNEL, SCAN, ASSOCIATIVE = "jaxrnn, kernel", "jaxrnn, scan", "jaxrnn, associative"
IMPLEMENTATION = "mosaic_gpu"
# The largest H of the kernel of each dtype, in the order in which they are measured: float16
# last, whose kernel is that of bfloat16, as time may be up by then.
LARGEST = {d: select.LARGEST[IMPLEMENTATION][d] for d in ("bfloat16", "float32", "float16")}


@dataclass(frozen=True)
class Subject:
    """One who is measured."""

    name: str
    package: str  # the distribution that it comes from
    make: Callable[[Network], Layer] | None = None  # where it is a layer of JAX
    kind: str = JAX  # of worker
    dtype: str = "float32"
    relu: bool = False  # its network is a relu network, whatever the row's is
    tf32: bool = False  # torch may round factors of float32 products to ten bits of mantissa


def _over_two_devices(make: Callable[[Network], Layer], network: Network) -> Layer:
    """The same layer, each device unrolling its part of the batch inside `jax.shard_map`."""
    only_plain(network)
    layer, mesh = make(network), Mesh(jax.devices(), "batch")
    whole, split = PartitionSpec(), PartitionSpec(None, "batch")
    # The weights' gradient is added up over the devices once, at the border of the map. With
    # sharding constraints instead, a plain scan adds it up at every step of the backward.
    # Unchecked, because the naive scan's zero state is not marked as varying over the batch.
    mapped = jax.shard_map(
        layer.unroll, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )

    def unroll(weights, xs):
        if xs.shape[1] % mesh.size:
            raise NotOfferedError(f"a batch of {xs.shape[1]} does not split over two devices")
        return mapped(weights, xs)

    return layer._replace(unroll=unroll)


def _split(subject: Subject) -> Subject:
    make = partial(_over_two_devices, subject.make)
    return replace(subject, name=f"{subject.name}, two host devices", make=make, kind=TWO_DEVICES)


_OURS, _NAIVE = Subject(OURS, "jaxrnn", ours.batched), Subject(NAIVE, "jax", naive.batched)
ON_CPU = (
    _OURS,
    Subject("jaxrnn, vmap", "jaxrnn", ours.mapped),
    Subject("jaxrnn, vmap axis 1", "jaxrnn", partial(ours.mapped, axis=1)),
    _NAIVE,
    Subject("flax.nnx", "flax", peers.flax_nnx),
    Subject("equinox", "equinox", peers.equinox),
    Subject("keras", "keras", peers.keras),
    replace(_OURS, name=f"{OURS}, relu", relu=True),
    replace(_NAIVE, name=f"{NAIVE}, relu", relu=True),
    Subject("haiku, relu", "dm-haiku", peers.haiku, relu=True),
    _split(_OURS),
    _split(_NAIVE),
    Subject("torch", "torch", kind=TORCH),
)


def _run_by(implementation: str) -> Callable[[Network], Layer]:
    return partial(ours.batched, implementation=implementation)


def _on_gpu(dtype: str) -> list[Subject]:
    """The kernel of a dtype, and its rivals."""
    found = [
        Subject(KERNEL, "jaxrnn", _run_by(IMPLEMENTATION), KERNELS),
        Subject(SCAN, "jaxrnn", _run_by("scan")),
    ]
    if dtype == "float32":
        found.append(Subject(ASSOCIATIVE, "jaxrnn", _run_by("associative")))
    if dtype == "bfloat16":
        found.append(_NAIVE)
    named = [replace(subject, name=f"{subject.name}, {dtype}", dtype=dtype) for subject in found]
    named.append(Subject(f"cuDNN {dtype}", "torch", kind=TORCH, dtype=dtype))
    if dtype == "float32":
        named.append(Subject("cuDNN TF32", "torch", kind=TORCH, tf32=True))
    return named


ON_GPU = tuple(subject for dtype in LARGEST for subject in _on_gpu(dtype))
SUBJECTS = {"cpu": ON_CPU, "gpu": ON_GPU}

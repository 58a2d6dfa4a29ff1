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

OURS, NAIVE, ROOFLINE = "jaxrnn", "naive scan", "roofline"
KERNEL, SCAN, ASSOCIATIVE = "jaxrnn, kernel", "jaxrnn, scan", "jaxrnn, associative"
IMPLEMENTATION = "mosaic_gpu"
# The largest H of the kernel of each dtype, in the order in which they are measured: float16
# last, whose kernel is that of bfloat16, as time may be up by then.
LARGEST = {d: select.LARGEST[IMPLEMENTATION][d] for d in ("bfloat16", "float32", "float16")}


@dataclass(frozen=True)
class Subject:
    """One who is measured.

    Args:
      name: in the tables.
      package: the distribution that it comes from.
      kind: the worker that it runs in.
      make: the layer of a network, where it is one of JAX; ImportError where its library is not
        installed, NotOfferedError where it has no such network.
      dtype: of weights, inputs and results.
      relu: whether its network is a relu network, whatever the row's is.
      tf32: whether float32 products of torch may round their factors to ten bits of mantissa.
      compile: whether torch's layer goes through `torch.compile`.
    """

    name: str
    package: str
    kind: str = JAX
    make: Callable[[Network], Layer] | None = None
    dtype: str = "float32"
    relu: bool = False
    tf32: bool = False
    compile: bool = False

    def network(self, network: Network) -> Network:
        """The network that it runs on a row."""
        return replace(network, activation="relu") if self.relu else network


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
            raise NotOfferedError(
                f"a batch of {xs.shape[1]} does not split over {mesh.size} devices"
            )
        return mapped(weights, xs)

    return replace(layer, unroll=unroll)


ON_CPU = (
    Subject(ROOFLINE, "jax"),
    Subject(OURS, "jaxrnn", make=ours.batched),
    Subject("jaxrnn, vmap", "jaxrnn", make=ours.mapped),
    Subject("jaxrnn, vmap axis 1", "jaxrnn", make=partial(ours.mapped, axis=1)),
    Subject(NAIVE, "jax", make=naive.batched),
    Subject("naive scan, vmap", "jax", make=naive.mapped),
    Subject("flax.nnx", "flax", make=peers.flax_nnx),
    Subject("flax.linen", "flax", make=peers.flax_linen),
    Subject("equinox", "equinox", make=peers.equinox),
    Subject("keras", "keras", make=peers.keras),
    Subject("jaxrnn, relu", "jaxrnn", make=ours.batched, relu=True),
    Subject("naive scan, relu", "jax", make=naive.batched, relu=True),
    Subject("haiku, relu", "dm-haiku", make=peers.haiku, relu=True),
    Subject(
        f"{OURS}, two host devices", "jaxrnn", TWO_DEVICES, partial(_over_two_devices, ours.batched)
    ),
    Subject(
        f"{NAIVE}, two host devices", "jax", TWO_DEVICES, partial(_over_two_devices, naive.batched)
    ),
    Subject("torch", "torch", TORCH),
    Subject("torch.compile", "torch", TORCH, compile=True),
)


def _on_gpu(dtype: str) -> list[Subject]:
    """The kernel of a dtype, and its rivals."""

    def run_by(implementation):
        return partial(ours.batched, implementation=implementation)

    found = [
        Subject(KERNEL, "jaxrnn", KERNELS, run_by(IMPLEMENTATION)),
        Subject(SCAN, "jaxrnn", make=run_by("scan")),
        Subject(ROOFLINE, "jax"),
    ]
    if dtype == "float32":
        found.append(Subject(ASSOCIATIVE, "jaxrnn", make=run_by("associative")))
    if dtype == "bfloat16":
        found.append(Subject(NAIVE, "jax", make=naive.batched))
        unrolled = partial(naive.batched, unroll=8)
        found.append(Subject("naive scan, unroll 8", "jax", make=unrolled))
    named = [replace(subject, name=f"{subject.name}, {dtype}", dtype=dtype) for subject in found]
    named.append(Subject(f"cuDNN {dtype}", "torch", TORCH, dtype=dtype))
    if dtype == "float32":
        named.append(Subject("cuDNN TF32", "torch", TORCH, tf32=True))
    return named


ON_GPU = tuple(subject for dtype in LARGEST for subject in _on_gpu(dtype))


def listed(device: str) -> tuple[Subject, ...]:
    """Everyone on "cpu" or "gpu"."""
    return ON_GPU if device == "gpu" else ON_CPU

"""Who is measured, in the order of the tables."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from benchmarks.kernels import ASSOCIATIVE, KERNEL, SCAN
from benchmarks.subjects import JaxSubject, naive, ours, peers, sharded

TWO_DEVICES = "two host devices"
SMALL_LOOPS = "one kernel per small loop"
COMMAND_BUFFERS = "loops in command buffers"
KERNELS = "kernels"


class Entry(NamedTuple):
    """A JAX subject that is not built yet.

    Args:
      package: the distribution whose version is recorded.
      variant: the environment its process must have; "" for the plain one.
      make: builds the subject; ImportError where its library is not installed.
    """

    package: str
    variant: str
    make: Callable[[], JaxSubject]


class TorchOptions(NamedTuple):
    """How `torch.nn.RNN` runs.

    Args:
      name: how the tables call it.
      device: "cpu" or "cuda".
      dtype: "float32", "bfloat16" or "float16".
      tf32: whether float32 products may round their factors to ten bits of mantissa.
      compile: whether the layer goes through `torch.compile`.
    """

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    tf32: bool = False
    compile: bool = False


def _two_devices(make: Callable[[], JaxSubject]) -> JaxSubject:
    subject = make()
    return sharded.split_batch(subject, f"{subject.name}, {TWO_DEVICES}", TWO_DEVICES)


def _small_loops(make: Callable[[], JaxSubject]) -> JaxSubject:
    subject = make()
    return replace(subject, name=f"{subject.name}, small loops", variant=SMALL_LOOPS)


JAX_SUBJECTS: dict[str, Entry] = {
    "jaxrnn": Entry("jaxrnn", "", ours.native),
    "jaxrnn, vmap": Entry("jaxrnn", "", ours.mapped),
    "jaxrnn, vmap axis 1": Entry("jaxrnn", "", ours.mapped_axis_1),
    "naive scan": Entry("jax", "", naive.batched),
    "naive scan, vmap": Entry("jax", "", naive.mapped),
    "flax.nnx": Entry("flax", "", peers.flax_nnx),
    "flax.linen": Entry("flax", "", peers.flax_linen),
    "equinox": Entry("equinox", "", peers.equinox),
    "keras": Entry("keras", "", peers.keras),
    "jaxrnn, relu": Entry("jaxrnn", "", partial(ours.native, "relu")),
    "naive scan, relu": Entry("jax", "", partial(naive.batched, "relu")),
    "haiku, relu": Entry("dm-haiku", "", peers.haiku),
    "jaxrnn, two host devices": Entry("jaxrnn", TWO_DEVICES, partial(_two_devices, ours.native)),
    "naive scan, two host devices": Entry("jax", TWO_DEVICES, partial(_two_devices, naive.batched)),
    "jaxrnn, small loops": Entry("jaxrnn", SMALL_LOOPS, partial(_small_loops, ours.native)),
    "naive scan, small loops": Entry("jax", SMALL_LOOPS, partial(_small_loops, naive.batched)),
}

# Subjects of a run on a GPU, in each dtype that has a kernel.
GPU_SUBJECTS: dict[str, Entry] = {
    KERNEL: Entry("jaxrnn", KERNELS, partial(ours.run_by, "mosaic_gpu")),
    SCAN: Entry("jaxrnn", "", partial(ours.run_by, "scan")),
    ASSOCIATIVE: Entry("jaxrnn", "", partial(ours.run_by, "associative")),
    "naive scan": JAX_SUBJECTS["naive scan"],
    "naive scan, unroll 8": Entry("jax", "", naive.unrolled),
    "jaxrnn, command buffers": Entry("jaxrnn", COMMAND_BUFFERS, partial(ours.run_by, "scan")),
}

TORCH_SUBJECTS: dict[str, TorchOptions] = {
    options.name: options
    for options in (
        TorchOptions("torch"),
        TorchOptions("torch.compile", compile=True),
        TorchOptions("cuDNN float32", "cuda"),
        TorchOptions("cuDNN TF32", "cuda", tf32=True),
        TorchOptions("cuDNN bfloat16", "cuda", "bfloat16"),
        TorchOptions("cuDNN float16", "cuda", "float16"),
    )
}

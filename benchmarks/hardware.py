"""What data sheets say of accelerators, for `benchmarks.scaling`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """What data sheets say of a device and of what joins it to others.

    Args:
      name: the device.
      flops: bfloat16 operations a second, without sparsity.
      float32_flops: those of float32 as JAX multiplies by default.
      memory: bytes.
      memory_bandwidth: bytes a second.
      on_chip: bytes; a share of W that fits is read from memory at no step.
      step: least seconds from one step to the next.
      joined: devices of a host, or of a pod, that links join.
      torus: whether links go to neighbours in a 3D torus; else to a switch.
      link_bandwidth: bytes a second that one link sends; a switch has one link for each device.
      start: seconds that any collective takes.
      hop: seconds more for each hop over a link.
      network_bandwidth: bytes a second that a device sends beyond those joined.
      network_hop: seconds for each hop there.
    """

    name: str
    flops: float
    float32_flops: float
    memory: float
    memory_bandwidth: float
    on_chip: float
    step: float
    joined: int
    torus: bool
    link_bandwidth: float
    start: float
    hop: float
    network_bandwidth: float
    network_hop: float


# FLOPs, memory, L2, NVLink (900 GB/s, half of it each way): NVIDIA's data sheet, as on
# archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html. Network: one 400 Gbit/s InfiniBand port
# for each of 8 GPUs, as in github.com/mlcommons/inference_results_v3.1, closed/Dell/systems/
# XE9680_H100_SXM_80GBx8_TRT.json. Latencies are assumed, and low: start and hop are those by which
# NCCL chose when the A100 was new (protocol LL, ring: baseLat and hwLat in github.com/NVIDIA/nccl,
# commit 01afd20, src/graph/tuning.cc); its rings take n - 1 hops, here they are the log2(n) of a
# tree. Assumed as well: the step, one kernel that waits for another. float32 is multiplied as TF32.
H100 = Hardware(
    "H100 SXM", flops=989e12, float32_flops=494e12, memory=80e9, memory_bandwidth=3.35e12,
    on_chip=50e6, step=2e-6, joined=8, torus=False, link_bandwidth=450e9, start=3.6e-6, hop=0.47e-6,
    network_bandwidth=50e9, network_hop=2.7e-6,
)  # fmt: skip

# FLOPs, memory, network (50 Gbit/s): Google's docs.cloud.google.com/tpu/docs/v5p. Links: 1,200 GB/s
# there, of six links and both ways together, so 100 each and one way; github.com/jax-ml/
# scaling-book, tpus.md, has that in earlier and 90 in later versions. VMEM: jax/_src/pallas/mosaic/
# tpu_info.py, 64 MiB for each of two cores. float32 is multiplied as bfloat16
# (jax.lax.Precision.DEFAULT). Hop: about 1 µs, sharding.md of the same book. Assumed: the step; the
# network hop, which nothing here reaches (a slice has up to 6,144 chips; of powers of two 4,096).
V5P = Hardware(
    "TPU v5p", flops=459e12, float32_flops=459e12, memory=95 * 2**30, memory_bandwidth=2.765e12,
    on_chip=2**27, step=1e-6, joined=4096, torus=True, link_bandwidth=100e9, start=0.0, hop=1e-6,
    network_bandwidth=6.25e9, network_hop=10e-6,
)  # fmt: skip

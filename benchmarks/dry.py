"""A run on a GPU rehearsed on the CPU: tiny, kernels interpreted, the GPU pretended.

Every line of such a run is run, but for what only a GPU's driver does. `python -m benchmarks.dry
KIND` is a worker that pretends. It can fail on purpose: DRY_FAULTS is a list of HOW:DTYPE:H with
commas, where HOW is what the kernel of that dtype and H does when it is called first, "hang",
"abort", or "illegal": it raises, and from then on the device computes no more.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from benchmarks import worker
from benchmarks.kernels import MOST_OF_A_BLOCK
from benchmarks.plans import Plan, Step
from benchmarks.workers import KERNELS, TORCH, Worker
from benchmarks.workloads import Workload, untuned
from jaxrnn._backends.target import Device, built_for

KIND = "NVIDIA H100 80GB HBM3"
# A kernel that is interpreted takes as long for a step as a GPU for thousands.
BLOCK, CLUSTER = 64, 384
SECONDS, HANGING = {"compile": 120.0, "prepare": 60.0}, {"compile": 120.0, "prepare": 15.0}
FAULTS = "DRY_FAULTS"


def rehearsal(plan: Plan) -> Plan:
    """A plan of the same kinds of steps, each once, and few rounds.

    Args:
      plan: for a GPU.

    Returns:
      The plan to rehearse it with.
    """
    steps: dict[Any, Step] = {}
    for step in plan.steps:
        tiny = _tiny(step.workload)
        steps.setdefault((tiny, step.dtype, step.measures), replace(step, workload=tiny))
    limits = replace(plan.limits, most=1, least=1, budget=0.0, alike=2)
    return replace(plan, steps=tuple(steps.values()), limits=limits)


def _tiny(workload: Workload) -> Workload:
    if not workload.distinct:
        T = workload.T // 1000
        return replace(workload, name=f"H 4, T {T}", T=T, H=4)
    H, T = (BLOCK, 2) if workload.H <= MOST_OF_A_BLOCK else (CLUSTER, 1)
    tiny = replace(workload, name=f"H {H}, B 16", T=T, B=16, D=8, H=H, tuned=True)
    return tiny if workload.tuned else untuned(tiny)


def make_worker(kind: str, device: str, **how: Any) -> Worker:
    """As `Worker`: one that pretends to have the device."""
    command = [sys.executable, "-m", "benchmarks.dry", kind]
    seconds = HANGING if "hang" in os.environ.get(FAULTS, "") else SECONDS
    return Worker(kind, device, command, seconds=seconds, **how)


class Pretended:
    """A device of JAX that says it is a GPU."""

    platform, device_kind = "gpu", KIND

    def __init__(self):
        self.peak = 0

    def memory_stats(self) -> dict[str, int]:
        """More at each look."""
        self.peak += 1
        return {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}


def _side(kind: str, device: str) -> Any:
    side = worker.side_of(kind, device)
    if kind == TORCH:
        _pretend_torch()
        return side
    pretended = Pretended()
    side.accelerator = lambda: pretended
    if kind == KERNELS:
        _break(side, os.environ.get(FAULTS, ""))
    return side


def _break(side: Any, faults: str) -> None:
    """Let programs of some kernels fail at their first call."""
    compiled: Callable[..., Any] = side._compiled
    chosen = {tuple(fault.split(":")[1:]): fault.split(":")[0] for fault in faults.split(",")}

    def fail(*args: Any) -> Any:
        workload, dtype = side.drawn
        how = chosen.get((dtype, str(workload.H)))
        if how == "hang":
            time.sleep(1000)
        if how == "abort":
            os.abort()
        if how == "illegal":
            side.healthy = lambda: False
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
        return compiled(*args)

    side._compiled = fail


def _pretend_torch() -> None:
    """Let torch find a GPU, and use the CPU for it."""
    try:
        import torch
    except ImportError:
        return
    from benchmarks.subjects import torch_rnn

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *_: KIND
    for name in ("synchronize", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 1
    for name in ("_layer", "_tensor"):
        real = getattr(torch_rnn, name)

        def on_cpu(what, options, *more, real=real):
            return real(what, options._replace(device="cpu"), *more)

        setattr(torch_rnn, name, on_cpu)


def main(arguments: list[str]) -> int:
    """Run a worker that pretends; its only argument is its KIND."""
    jax.config.update("jax_platforms", "cpu")
    with built_for(Device("gpu", KIND, "9.0", interpret=True)):
        return worker.main([*arguments, "gpu"], _side)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

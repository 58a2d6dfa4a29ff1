"""A run on a GPU rehearsed on the CPU: tiny, kernels interpreted, the GPU pretended.

Every line of such a run is run, but for what only a GPU's driver does. `python -m benchmarks.dry
KIND` is a worker that pretends. It can fail on purpose: DRY_FAULTS is a list of HOW:DTYPE:H with
commas, where HOW is what the kernel of that dtype and H does when it is prepared, "hang", "abort",
or "illegal": it raises, and from then on the device computes no more.
"""

import os
import sys
import time
from dataclasses import replace
from typing import Any

import jax

from benchmarks import programs, worker
from benchmarks.crew import Worker
from benchmarks.plan import MOST_OF_A_BLOCK, Plan, Step, untuned
from benchmarks.subjects.registry import KERNEL, TORCH
from benchmarks.workloads import Workload
from jaxrnn._backends.target import Device, built_for

GPU = "NVIDIA H100 80GB HBM3"
# A kernel that is interpreted takes as long for a step as a GPU for thousands.
BLOCK, CLUSTER = 64, 384
FAULTS = "DRY_FAULTS"


def rehearsal(plan: Plan) -> Plan:
    """A plan of the same kinds of steps, each once, and one round.

    Args:
      plan: for a GPU.

    Returns:
      The plan to rehearse it with.
    """
    steps: dict[Any, Step] = {}
    for step in plan.steps:
        tiny = replace(step, workload=_tiny(step.workload))
        steps.setdefault((tiny.workload, step.subjects[0], step.measures), tiny)
    plan = replace(plan, steps=tuple(steps.values()))
    return plan.limited(lambda limits: replace(limits, most=1, least=1, budget=0.0, alike=2))


def _tiny(workload: Workload) -> Workload:
    if not workload.distinct:
        T = workload.T // 1000
        return replace(workload, name=f"H 4, T {T}", T=T, H=4)
    H, T = (BLOCK, 2) if workload.H <= MOST_OF_A_BLOCK else (CLUSTER, 1)
    tiny = replace(workload, name=f"H {H}, B 16", T=T, B=16, D=8, H=H, tuned=True)
    return tiny if workload.tuned else untuned(tiny)


def make_worker(kind: str, device: str) -> Worker:
    """As `Worker`: one that pretends to have the device."""
    seconds = 15.0 if "hang" in os.environ.get(FAULTS, "") else 120.0
    limits = {"prepare": seconds, "other": 60.0, "start": 120.0}
    return Worker(kind, device, [sys.executable, "-m", "benchmarks.dry", kind], limits)


class _Pretended:
    """A device of JAX that says it is a GPU."""

    platform, device_kind = "gpu", GPU


class _Bench(worker.Bench):
    """Its kernels fail where they are told to."""

    def do_prepare(self, subject: str, workload: dict[str, Any], **how: Any) -> dict[str, Any]:
        """As on a GPU, but for the faults."""
        chosen = dict(
            (where, fault)
            for fault, _, where in (
                each.partition(":") for each in os.environ.get(FAULTS, "").split(",")
            )
        )
        fault = None
        if subject.startswith(KERNEL):
            fault = chosen.get(f"{self.subjects[subject].dtype}:{workload['H']}")
        if fault == "hang":
            time.sleep(1000)
        if fault == "abort":
            os.abort()
        if fault == "illegal":
            programs.healthy = lambda: False
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
        return super().do_prepare(subject, workload, **how)


def _make_bench(kind: str) -> _Bench:
    pretended = _Pretended()
    programs.device = lambda: pretended
    bench = _Bench(kind, "gpu")
    if kind == TORCH and bench.side is not None:
        bench.side.DEVICE = "cpu"
        bench.side.machine = lambda: {"gpu": GPU, "threads": 1}
    return bench


def main(arguments: list[str]) -> int:
    """Run a worker that pretends; its only argument is its KIND."""
    (kind,) = arguments
    jax.config.update("jax_platforms", "cpu")
    with built_for(Device("gpu", GPU, "9.0", interpret=True)):
        worker.serve(lambda: _make_bench(kind))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

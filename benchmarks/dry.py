"""A run on a GPU rehearsed on the CPU: tiny, kernels interpreted, the GPU pretended.

Every line of such a run is run, but for what only a GPU's driver does. `python -m benchmarks.dry
KIND` is a worker that pretends.
"""

import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax

from benchmarks import programs, worker
from benchmarks.crew import Worker
from benchmarks.plan import MOST_OF_A_BLOCK, Plan, Step
from benchmarks.subjects.registry import TORCH
from benchmarks.workloads import Workload
from jaxrnn._backends.target import Device, built_for

GPU = "NVIDIA H100 80GB HBM3"
# A kernel that is interpreted takes as long for a step as a GPU for thousands.
BLOCK, CLUSTER = 64, 384
SECONDS = {"prepare": 120.0, "sample": 60.0}


def rehearsal(plan: Plan) -> Plan:
    """A plan for a GPU with each kind of step once, and one round."""
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
    return replace(workload, name=f"H {H}, B 16", T=T, B=16, D=8, H=H)


def make_worker(kind: str, device: str) -> Worker:
    """As `Worker`: one that pretends to have the device."""
    return Worker(kind, device, [sys.executable, "-m", "benchmarks.dry", kind], SECONDS)


def _make_bench(kind: str) -> worker.Bench:
    programs.device = lambda: SimpleNamespace(platform="gpu", device_kind=GPU)
    bench = worker.Bench(kind, "gpu")
    if kind == TORCH:
        with suppress(ImportError):  # its rows say so
            bench.side.DEVICE = "cpu"
    return bench


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with built_for(Device("gpu", GPU, "9.0", interpret=True)):
        worker.serve(lambda: _make_bench(*sys.argv[1:]))

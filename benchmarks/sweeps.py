"""How time and memory grow with T, B and H, one at a time."""

from collections.abc import Sequence
from typing import Any

from benchmarks.measures import BACKWARD
from benchmarks.progress import Reporter
from benchmarks.rounds import Caller, Limits, Trial
from benchmarks.workloads import Workload

SUBJECTS = ("jaxrnn", "naive scan")
MEASURE = BACKWARD
LIMITS = Limits(most=7, least=5, budget=3.0, compiles=1)
AXES = {
    "T": [Workload(f"T = {T}", T, 16, 64, 64) for T in (64, 128, 256, 512, 1024, 2048, 4096)],
    "B": [Workload(f"B = {B}", 64, B, 64, 64) for B in (1, 4, 16, 64, 128, 256)],
    "H": [Workload(f"H = {H}", 64, 16, 64, H) for H in (16, 32, 64, 128, 256, 512, 1024)],
}


def units() -> int:
    """How many measures of a workload the sweeps are."""
    return sum(len(workloads) for workloads in AXES.values())


def run(
    crew: Caller,
    subjects: Sequence[dict[str, Any]],
    report: Reporter,
    keep: list[dict[str, Any]],
    axes: dict[str, list[Workload]] = AXES,
    limits: Limits = LIMITS,
) -> None:
    """Measure every point of every axis.

    Args:
      crew: the workers.
      subjects: those of SUBJECTS that take part, as the workers describe them.
      report: is told each step.
      keep: where points go as they are measured: axis, value, and a row of results with the
        bytes of temporaries.
      axes: the workloads of each axis.
      limits: how much is measured.
    """
    for axis, workloads in axes.items():
        for workload in workloads:
            trial = Trial(crew, subjects, workload, MEASURE, limits, report)
            try:
                trial.run()
            finally:
                for row in trial.kept():
                    record = trial.records.get(row["subject"], {})
                    bytes_ = {"temporaries": record.get("temporaries")}
                    keep.append({"axis": axis, "value": getattr(workload, axis), **row, **bytes_})

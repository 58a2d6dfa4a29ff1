"""A whole run: which workloads, measures and subjects, in what time; saved as it goes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import sweeps
from benchmarks.catalogue import ROOFLINE, Listed
from benchmarks.measures import BACKWARD, COUNTED, FORWARD, MEASURES
from benchmarks.progress import Reporter
from benchmarks.results import measured
from benchmarks.rounds import COMPILE, MEMORY, Caller, Limits, Trial
from benchmarks.text import without_directories
from benchmarks.workers import JAX, WorkerDiedError
from benchmarks.workloads import WORKLOADS, Workload


class NoDeviceError(Exception):
    """The device that was asked for is not there; the message says so."""


DEFAULT = Limits()


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
      workloads: in order.
      measures: of each workload.
      limits: how much.
      sweeps: whether T, B and H are varied too.
      minutes: what is not begun by then is left out; None for no limit.
    """

    workloads: tuple[Workload, ...] = WORKLOADS
    measures: tuple[str, ...] = MEASURES
    limits: Limits = DEFAULT
    sweeps: bool = True
    minutes: float | None = None

    def units(self) -> int:
        """How many measures of a workload there are."""
        return len(self.workloads) * len(self.measures) + (sweeps.units() if self.sweeps else 0)


def _named(*names: str) -> tuple[Workload, ...]:
    by_name = {workload.name: workload for workload in WORKLOADS}
    return tuple(by_name[name] for name in names)


FULL = Plan()
QUICK = Plan(
    _named("char-rnn, ids", "one long stream", "medium", "document"), (FORWARD, BACKWARD),
    Limits(most=7, least=5, budget=3.0, compiles=1), sweeps=False, minutes=1.7,
)  # fmt: skip
# A step costs a GPU some microseconds, whatever its size: 100,000 of them would take a minute.
GPU = Plan(
    _named(
        "medium", "char-rnn, ids", "char-rnn, one-hot", "one long stream", "large", "wide",
        "sequential MNIST", "ensemble",
    ),
    (FORWARD, BACKWARD), Limits(most=11, least=5, budget=4.0, compiles=1), sweeps=False,
    minutes=8.3,
)  # fmt: skip


def describe_workers(
    crew: Caller, listed: Sequence[Listed], device: str, document: dict[str, Any]
) -> None:
    """Ask the workers for accelerator, threads, flags and subjects, and note them.

    Args:
      crew: the workers.
      listed: who takes part.
      device: "cpu" or "gpu".
      document: the results.

    Raises:
      NoDeviceError: there is no GPU where one is asked for.
    """
    described: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(subject.kind for subject in listed):
        names = [subject.name for subject in listed if subject.kind == kind]
        try:
            about = crew.call(kind, do="machine")
            if about["status"] == "ready":
                document["threads"][kind] = about["threads"]
                document["flags"][kind] = without_directories(about["flags"])
                document["device"]["gpu"] = document["device"]["gpu"] or about["gpu"]
            if device == "gpu" and kind == JAX and not about.get("gpu"):
                raise NoDeviceError(about.get("reason", "JAX finds no GPU here"))
            found = crew.call(kind, do="subjects", names=names)["subjects"]
        except WorkerDiedError as error:
            found = [{"name": name, "status": "failed", "reason": str(error)} for name in names]
        described |= {subject["name"]: subject for subject in found}
    for subject in listed:
        about = {"activation": "", **asdict(subject), **described[subject.name]}
        document["subjects"].append(about)


def run(
    crew: Caller,
    plan: Plan,
    document: dict[str, Any],
    report: Reporter,
    save: Callable[[], None],
    started: float | None = None,
) -> None:
    """Measure all that is planned.

    Args:
      crew: the workers.
      plan: what.
      document: the results so far; what is measured goes into it.
      report: is told each step.
      save: called after each workload, and at the end, however it comes.
      started: when the run began, by `time.monotonic`.
    """
    until = None
    if plan.minutes is not None:
        until = (time.monotonic() if started is None else started) + 60 * plan.minutes
    subjects = document["subjects"]

    trials: list[Trial] = []

    def keep():
        # Put together anew each time: Ctrl-C may come in the middle of it.
        document["rows"] = [row for trial in trials for row in trial.kept()]
        for table, names in (("compile", COMPILE), ("memory", MEMORY)):
            document[table] = [row for trial in trials for row in trial.kept_records(names)]
        if measured(document):
            save()

    try:
        for workload in plan.workloads:
            for measure in plan.measures:
                compiles = plan.limits.compiles if measure in (FORWARD, BACKWARD) else 1
                limits = replace(plan.limits, compiles=compiles, until=until)
                taking_part = [s for s in subjects if s["name"] != ROOFLINE or measure in COUNTED]
                trials.append(Trial(crew, taking_part, workload, measure, limits, report))
                trials[-1].run()
            keep()
        if plan.sweeps:
            both = [subject for subject in subjects if subject["name"] in sweeps.SUBJECTS]
            sweeps.run(crew, both, report, document["sweeps"])
    except KeyboardInterrupt:
        document["interrupted"] = True
        raise
    finally:
        keep()

"""A whole run: which workloads, measures and subjects, in what time; saved as it goes."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import sweeps
from benchmarks.catalogue import Listed
from benchmarks.kernels import KERNEL, ROOFLINE
from benchmarks.measures import BACKWARD, COUNTED, FORWARD, MEASURES
from benchmarks.progress import Reporter
from benchmarks.results import measured
from benchmarks.rounds import COMPILE, MEMORY, Caller, Limits, Trial
from benchmarks.text import without_directories
from benchmarks.workers import COMMAND_BUFFERS, JAX, NUMERICS, WorkerDiedError
from benchmarks.workloads import GRID, WORKLOADS, Workload


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
      kernels: whether kernels are examined before they are timed, and a workload's programs
        compiled side by side.
    """

    workloads: tuple[Workload, ...] = WORKLOADS
    measures: tuple[str, ...] = MEASURES
    limits: Limits = DEFAULT
    sweeps: bool = True
    minutes: float | None = None
    kernels: bool = False

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
GPU = Plan(
    GRID, (FORWARD, BACKWARD), Limits(most=9, least=5, budget=1.0, compiles=1), sweeps=False,
    minutes=8.0, kernels=True,
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
            taking_part = {m: _taking_part(subjects, workload, m) for m in plan.measures}
            if plan.kernels and not _late(until):
                report.begin(f"{workload.name}, before it is timed", 1)
                for measure, them in taking_part.items():
                    if not _late(until):
                        _examine(crew, them, workload, measure, document["kernels"], report)
                _compile(crew, taking_part, workload, report)
            for measure, them in taking_part.items():
                compiles = plan.limits.compiles if measure in (FORWARD, BACKWARD) else 1
                limits = replace(plan.limits, compiles=compiles, until=until)
                trials.append(Trial(crew, them, workload, measure, limits, report))
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


def _late(until: float | None) -> bool:
    return until is not None and time.monotonic() > until


def _taking_part(
    subjects: Sequence[dict[str, Any]], workload: Workload, measure: str
) -> list[dict[str, Any]]:
    """Copies of those that are measured there."""
    return [
        dict(subject) for subject in subjects
        if (subject["base"] != ROOFLINE or measure in COUNTED)
        and workload.H <= (subject["hidden"] or workload.H)
        and workload.B == (subject["batch"] or workload.B)
    ]  # fmt: skip


def _examine(
    crew: Caller,
    subjects: Sequence[dict[str, Any]],
    workload: Workload,
    measure: str,
    found: list[dict[str, Any]],
    report: Reporter,
) -> None:
    """Look at each kernel before it is timed; one that does not run is not timed."""
    for subject in subjects:
        if subject["base"] != KERNEL or subject["status"] != "ready":
            continue
        key = {"dtype": subject["dtype"], "H": workload.H, "direction": measure}
        rows = {
            r["direction"]: r for r in found if (r["dtype"], r["H"]) == (key["dtype"], key["H"])
        }
        row, forward = rows.get(measure), rows.get(FORWARD)
        if row is None and forward and forward["status"] != "ready":
            # The gradient begins with the states, and what hangs takes its time.
            row = forward | key
            found.append(row)
        elif row is None:
            report.step(f"is {subject['name']} exact?")
            asked = {"dtype": key["dtype"], "hidden": workload.H, "direction": measure}
            try:
                row = key | crew.call(NUMERICS, do="examine", **asked)
            except WorkerDiedError as error:
                row = key | {"status": "failed", "reason": str(error)}
            found.append(row)
        if row["status"] != "ready":
            subject |= {"status": "not measured", "reason": row["reason"]}


def _compile(
    crew: Caller,
    subjects: dict[str, list[dict[str, Any]]],
    workload: Workload,
    report: Reporter,
) -> None:
    """Compile what is timed next side by side. One that fails at it does so again, by itself."""
    for kind in (JAX, COMMAND_BUFFERS):
        pairs = [
            (subject["name"], measure)
            for measure, them in subjects.items()
            for subject in them
            if subject["kind"] == kind and subject["status"] == "ready"
        ]
        if pairs:
            report.step(f"{len(pairs)} programs are compiled")
            with suppress(WorkerDiedError):
                crew.call(kind, do="compile", pairs=pairs, workload=asdict(workload))

"""A whole run: each step of a plan measured in turn, and saved as it goes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks import kernels, sweeps
from benchmarks.catalogue import Listed
from benchmarks.kernels import KERNEL, MOST_OF_A_BLOCK, ROOFLINE
from benchmarks.measures import BACKWARD, COUNTED, FORWARD
from benchmarks.plans import Plan, Step
from benchmarks.progress import Reporter
from benchmarks.results import measured
from benchmarks.rounds import COMPILE, MEMORY, Trial
from benchmarks.text import without_directories
from benchmarks.workers import (
    COMMAND_BUFFERS,
    JAX,
    KERNELS,
    TORCH,
    Crew,
    TimeIsUpError,
    WorkerDiedError,
)
from benchmarks.workloads import Workload, untuned

# Kernels of one kind that hang or crash before the others of it are left alone: each costs time.
DEATHS = 2
# Where one program takes longer to compile, XLA's tuning takes the time of what is to follow.
TUNING_SECONDS = 40.0


class NoDeviceError(Exception):
    """The device that was asked for is not there; the message says so."""


def describe_workers(
    crew: Crew, listed: Sequence[Listed], device: str, document: dict[str, Any]
) -> None:
    """Ask the workers for accelerator, threads, flags and subjects, and note them.

    Args:
      crew: the workers.
      listed: who takes part.
      device: "cpu" or "gpu".
      document: the results.

    Raises:
      NoDeviceError: there is no GPU where one is asked for.
      TimeIsUpError: the time was up before a worker had started.
    """
    asked = {s.kind: [other.name for other in listed if other.kind == s.kind] for s in listed}
    machines = crew.call_each({kind: {"do": "machine"} for kind in asked})
    if all(isinstance(about, TimeIsUpError) for about in machines.values()):
        raise TimeIsUpError
    lacking: dict[str, str] = {}
    for kind, about in machines.items():
        if isinstance(about, WorkerDiedError):
            lacking[kind] = str(about)
        elif about["status"] != "ready" or (device == "gpu" and not about["gpu"]):
            package = "torch" if kind == TORCH else "JAX"
            lacking[kind] = about.get("reason", f"{package} finds no GPU here")
        else:
            document["threads"][kind] = about["threads"]
            document["flags"][kind] = without_directories(about["flags"])
            document["device"]["gpu"] = document["device"]["gpu"] or about["gpu"]
            if about.get("cudnn"):
                document["versions"]["cuDNN of torch"] = about["cudnn"]
    if device == "gpu" and lacking.keys() >= (asked.keys() - {TORCH} or {TORCH}):
        raise NoDeviceError(next(iter(lacking.values())))
    # torch itself says what it lacks: CUDA, or all of it.
    there = {kind: names for kind, names in asked.items() if kind not in lacking or kind == TORCH}
    replies = crew.call_each({k: {"do": "subjects", "names": n} for k, n in there.items()})
    described: dict[str, dict[str, Any]] = {}
    for kind, names in asked.items():
        reply = replies.get(kind, lacking.get(kind))
        failed = [{"name": n, "status": "failed", "reason": str(reply)} for n in names]
        found = reply["subjects"] if isinstance(reply, dict) else failed
        described |= {subject["name"]: subject for subject in found}
    for subject in listed:
        about = {"activation": "", **asdict(subject), **described[subject.name]}
        document["subjects"].append(about)


def run(
    crew: Crew,
    plan: Plan,
    document: dict[str, Any],
    report: Reporter,
    save: Callable[[], None],
) -> None:
    """Measure all that is planned.

    Args:
      crew: the workers.
      plan: what.
      document: the results so far; what is measured goes into it.
      report: is told each step.
      save: called after each measure and each verdict on a kernel, and at the end, however it
        comes.
    """
    trials: list[Trial] = []
    refused = Refused()

    def keep():
        # Put together anew each time: Ctrl-C may come in the middle of it.
        document["rows"] = [row for trial in trials for row in trial.kept()]
        for table, names in (("compile", COMPILE), ("memory", MEMORY)):
            document[table] = [row for trial in trials for row in trial.kept_records(names)]
        if measured(document):
            save()

    def checked(row):
        refused.note(row)
        report.note(kernels.verdict(row))
        keep()

    tuned = True
    try:
        for step in plan.steps:
            workload = step.workload if tuned else untuned(step.workload)
            taking_part = {
                measure: refused.without(
                    _taking_part(document["subjects"], step, measure), workload, measure
                )
                for measure in plan.measures_of(step)
            }
            if plan.ahead and not crew.late():
                workload, in_time = _get_ready(crew, taking_part, workload, report)
                tuned = tuned and in_time
            for measure, them in taking_part.items():
                if not them:
                    continue
                them = refused.without(them, workload, measure)
                limits = plan.limits_of(step)
                if measure not in (FORWARD, BACKWARD):
                    limits = replace(limits, compiles=1)  # no table shows what they cost
                trial = Trial(crew, them, workload, measure, limits, report, checked)
                trials.append(trial)
                if plan.ahead:
                    trial.summary = kernels.times
                if crew.late():
                    trial.leave_out(str(TimeIsUpError()))
                else:
                    trial.run()
                    keep()
        if plan.sweeps:
            both = [s for s in document["subjects"] if s["name"] in sweeps.SUBJECTS]
            sweeps.run(crew, both, report, document["sweeps"])
    except KeyboardInterrupt:
        document["interrupted"] = True
        raise
    finally:
        keep()


class Refused:
    """Which kernels are not tried any more, after others took their process with them."""

    def __init__(self):
        self.deaths: Counter[tuple[str, bool]] = Counter()
        self.died: dict[tuple[str, str], str] = {}

    def note(self, row: dict[str, Any]) -> None:
        """See a kernel's row."""
        key = row["subject"], row["workload"]["name"]
        if row.get("died"):
            self.died[key] = row["reason"]
            self.deaths[_family(row["subject"], row["workload"]["H"])] += 1
        elif row["status"] == "ready":
            self.died.pop(key, None)

    def without(
        self, subjects: Sequence[dict[str, Any]], workload: Workload, measure: str
    ) -> list[dict[str, Any]]:
        """The subjects, where they are kernels only those that are still tried."""
        found = []
        for subject in subjects:
            name, reason = subject["name"], None
            if self.deaths[_family(name, workload.H)] >= DEATHS:
                reason = f"{DEATHS} kernels of this kind took their process with them"
            elif measure == BACKWARD and (name, workload.name) in self.died:
                # A gradient begins with the states.
                reason = f"forward it failed: {self.died[name, workload.name]}"
            if subject["base"] == KERNEL and subject["status"] == "ready" and reason:
                subject = subject | {"status": "not measured", "reason": reason}
            found.append(subject)
        return found


def _family(name: str, hidden: int) -> tuple[str, bool]:
    """Kernels that fail for the same reason: of one block, or of a cluster of them."""
    return name, hidden > MOST_OF_A_BLOCK


def _taking_part(
    subjects: Sequence[dict[str, Any]], step: Step, measure: str
) -> list[dict[str, Any]]:
    """Those that are measured there."""
    workload = step.workload
    return [
        subject for subject in subjects
        if (step.dtype or subject["dtype"]) == subject["dtype"]
        and (step.bases is None or subject["base"] in step.bases)
        and (subject["base"] != ROOFLINE or measure in COUNTED)
        and workload.H <= (subject["hidden"] or workload.H)
    ]  # fmt: skip


def _get_ready(
    crew: Crew,
    subjects: dict[str, list[dict[str, Any]]],
    workload: Workload,
    report: Reporter,
) -> tuple[Workload, bool]:
    """Let all workers compile, and find what is right.

    They work side by side; but what is tuned is tuned in one process after the other: they would
    disturb each other, and all but the first would not find what was tuned. What fails to compile
    does so again, by itself.

    Returns:
      (the workload to measure, without tuning where a worker did not survive that; whether to go on
      tuning).
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for measure, them in subjects.items():
        for subject in them:
            if subject["status"] == "ready":
                pairs.setdefault(subject["kind"], []).append((subject["name"], measure))
    report.begin(f"{workload.name}, before it is timed", 1)
    report.step(f"{sum(map(len, pairs.values()))} programs are compiled")
    how = {"do": "compile", "workload": asdict(workload)}
    requests = {kind: {**how, "pairs": names} for kind, names in pairs.items()}
    reply = None
    for kinds in ((JAX, TORCH), (KERNELS,), (COMMAND_BUFFERS,)) if workload.tuned else (requests,):
        replies = crew.call_each({kind: requests[kind] for kind in kinds if kind in requests})
        reply = replies.get(JAX, reply)
    if not workload.tuned or isinstance(reply, TimeIsUpError):
        return workload, True
    if isinstance(reply, WorkerDiedError):
        return untuned(workload), False
    return workload, reply is None or reply.get("seconds", 0.0) < TUNING_SECONDS

"""A whole run: each step of a plan in turn, its subjects round by round, saved as it goes."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks import kernels
from benchmarks.crew import TimeIsUpError, WorkerDiedError
from benchmarks.plan import MOST_OF_A_BLOCK, Limits, Plan
from benchmarks.subjects.registry import KERNEL, TORCH, Subject
from benchmarks.worker import without_directories
from benchmarks.workloads import Workload

# An idle worker's threads go on spinning for a moment after its last call, and would take a core
# from the next worker. They are waited for rather than told not to spin (OMP_WAIT_POLICY=PASSIVE),
# which would cost torch alone.
PAUSE_SECONDS = 0.02
# Kernels of one kind that hang or crash before the others of it are left alone: each costs time.
DEATHS = 2


class NoDeviceError(Exception):
    """The device is not there; the message says so."""


class Caller(Protocol):
    """What answers requests: `crew.Crew`."""

    def call(self, kind: str, /, **request: Any) -> dict[str, Any]:
        """One request to the worker of a kind."""
        ...


def describe_workers(crew: Caller, kinds: Sequence[str], device: str, document: dict) -> None:
    """Ask the workers for accelerator, threads and flags, and note them.

    Raises:
      NoDeviceError: JAX finds no GPU where the run is on one.
      TimeIsUpError: the time was up before a worker had started.
    """
    for kind in kinds:
        try:
            about = crew.call(kind, do="machine")
        except TimeIsUpError:
            raise
        except WorkerDiedError as error:
            about = {"reason": str(error)}
        if kind != TORCH and device == "gpu" and not about.get("gpu"):
            raise NoDeviceError(about.get("reason", "JAX finds no GPU here"))
        if "threads" in about:
            document["threads"][kind] = about["threads"]
            document["flags"][kind] = without_directories(about.get("flags", ""))
            document["device"]["gpu"] = document["device"]["gpu"] or about["gpu"]
        if about.get("cudnn"):
            document["versions"]["cuDNN of torch"] = about["cudnn"]


class Run:
    """Measures all that is planned.

    Args:
      crew: the workers.
      plan: what.
      subjects: of the plan, by name.
      document: the results so far; rows are added as they are begun.
      say: is told a line for each measure, and one for each verdict on a kernel.
      save: called after each of them, and at the end, however it comes.
    """

    def __init__(
        self,
        crew: Caller,
        plan: Plan,
        subjects: dict[str, Subject],
        document: dict[str, Any],
        say: Callable[[str], None],
        save: Callable[[], None],
    ):
        self.crew, self.plan, self.subjects = crew, plan, subjects
        self.document, self.say, self.save = document, say, save
        self.deaths: Counter[tuple[str, bool]] = Counter()
        self.died: dict[tuple[str, str], str] = {}

    def go(self) -> None:
        """Measure; an interruption leaves what was measured."""
        count, done = sum(len(step.measures) for step in self.plan.steps), 0
        try:
            for step in self.plan.steps:
                for measure in step.measures:
                    done, start = done + 1, time.monotonic()
                    rows = self.measure(step.workload, measure, step.subjects, step.limits)
                    title = f"[{done}/{count}] {step.workload.name}, {measure}"
                    self.say(f"{title}: {kernels.times(rows)} ({time.monotonic() - start:.0f} s)")
                    self.save()
        except KeyboardInterrupt:
            self.document["interrupted"] = True
            raise
        finally:
            if self.document["rows"]:
                self.save()

    def measure(
        self, workload: Workload, measure: str, names: Sequence[str], limits: Limits
    ) -> list[dict[str, Any]]:
        """Prepare every subject, then go round: one sample from each, and again.

        Args:
          workload: the shapes.
          measure: what.
          names: the subjects.
          limits: how much.

        Returns:
          The rows, which are in the document too.
        """
        rows: dict[str, dict[str, Any]] = {}
        for name in names:
            row = {"workload": asdict(workload), "subject": name, "measure": measure}
            reason = "the run was stopped"
            rows[name] = row | {"status": "not measured", "reason": reason, **_no_times()}
            self.document["rows"].append(rows[name])
        for row in rows.values():
            self._prepare(row, rows, limits)
        start = time.monotonic()
        for n in range(limits.most):
            if n >= limits.least and time.monotonic() - start > limits.budget:
                break
            if not self._round(n, rows, limits):
                break
        for row in _live(rows):
            if not row["seconds"]:
                row |= {"status": "not measured", "reason": str(TimeIsUpError())}
        for kind in {self._kind(row) for row in _live(rows)}:
            self._call(kind, do="forget")
        return list(rows.values())

    def _prepare(self, row: dict[str, Any], rows: dict[str, Any], limits: Limits) -> None:
        name, kernel = row["subject"], row["subject"].startswith(KERNEL)
        reason = self._refused(row)
        if reason is not None:
            row |= {"status": "not measured", "reason": reason}
        else:
            reply = self._call(
                self._kind(row),
                do="prepare",
                subject=name,
                workload=row["workload"],
                measure=row["measure"],
                alike=limits.alike,
            )
            if reply["status"] == "not measured" and row["seconds"]:
                return  # what was measured before its worker was started again stays
            row |= reply
            if reply["status"] == "ready":
                row.pop("reason", None)
            if reply.get("died"):
                self._died(row, rows, limits)
        if kernel:
            self.say(kernels.verdict(row))
            self.save()

    def _round(self, n: int, rows: dict[str, Any], limits: Limits) -> bool:
        """One sample of each, another one first in each round; whether there was time for it."""
        live = _live(rows)
        first, before = n % max(len(live), 1), None
        for row in live[first:] + live[:first]:
            if row["status"] != "ready":  # its worker died in this round
                continue
            kind = self._kind(row)
            if before not in (None, kind):
                time.sleep(PAUSE_SECONDS)
            before = kind
            reply = self._call(kind, do="sample", subject=row["subject"])
            if reply["status"] == "not measured":
                return False
            if reply["status"] == "ready":
                row["rounds"].append(n)
                row["seconds"].append(reply["seconds"])
                continue
            row |= {**reply, **_no_times()}
            if reply.get("died"):
                self._died(row, rows, limits)
            if row["subject"].startswith(KERNEL):
                self.say(kernels.verdict(row))
        return True

    def _died(self, row: dict[str, Any], rows: dict[str, Any], limits: Limits) -> None:
        """Its worker died over it: the others of that worker are prepared again, in a new one."""
        self.deaths[_family(row)] += 1
        self.died[row["subject"], row["workload"]["name"]] = row["reason"]
        for other in _live(rows):
            # Looked at again: a worker that dies over one of them takes that one's turn.
            if self._kind(other) == self._kind(row) and other["status"] == "ready":
                self._prepare(other, rows, limits)

    def _refused(self, row: dict[str, Any]) -> str | None:
        """Why a subject is left alone, after it took its process with it."""
        reason = self.died.get((row["subject"], row["workload"]["name"]))
        if reason is not None:
            return f"before it failed here: {reason}"
        if self.deaths[_family(row)] >= DEATHS and row["subject"].startswith(KERNEL):
            return f"{DEATHS} kernels of this kind took their process with them"
        return None

    def _kind(self, row: dict[str, Any]) -> str:
        return self.subjects[row["subject"]].kind

    def _call(self, kind: str, /, **request: Any) -> dict[str, Any]:
        try:
            return self.crew.call(kind, **request)
        except TimeIsUpError as error:
            return {"status": "not measured", "reason": str(error)}
        except WorkerDiedError as error:
            return {"status": "failed", "reason": str(error), "died": True}


def _no_times() -> dict[str, list]:
    return {"rounds": [], "seconds": []}


def _live(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows.values() if row["status"] == "ready"]


def _family(row: dict[str, Any]) -> tuple[str, bool]:
    """Kernels that fail for the same reason: of one block, or of a cluster of them."""
    return row["subject"], row["workload"]["H"] > MOST_OF_A_BLOCK

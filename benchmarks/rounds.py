"""Subjects in turn: one sample from each, then the next round, so that rounds can be paired."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.kernels import KERNEL
from benchmarks.progress import Reporter
from benchmarks.workers import TimeIsUpError, WorkerDiedError
from benchmarks.workloads import Workload

# An idle worker's threads go on spinning for a moment after its last call, and would take a core
# from the next worker. They are waited for rather than told not to spin (OMP_WAIT_POLICY=PASSIVE),
# which would cost torch alone.
PAUSE_SECONDS = 0.02

COMPILE = ("trace", "compile", "first_call")
MEMORY = ("temporaries", "peak_bytes")
# What a row keeps of a reply.
KEPT = ("flops", "kernels", "errors", "alike", "calls", "died")


class Caller(Protocol):
    """What answers requests: `workers.Crew`."""

    def call(self, kind: str, /, **request: object) -> dict[str, Any]:
        """One request to the worker of a kind."""
        ...

    def late(self) -> bool:
        """Whether the run is over."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Args:
      most: rounds at most.
      least: rounds at least, whatever they take.
      budget: seconds for the rounds of one measure.
      compiles: how often each program is compiled.
      alike: calls of a kernel whose results are compared bit by bit.
    """

    most: int = 15
    least: int = 5
    budget: float = 25.0
    compiles: int = 3
    alike: int = 0


DEFAULT = Limits()


def counted(rows: list[dict[str, Any]]) -> str:
    """How many rows have times, of how many rounds."""
    counts = [len(row["seconds"]) for row in rows if row.get("seconds")]
    failed = sum(row["status"] == "failed" for row in rows)
    also = f", {failed} failed" if failed else ""
    return f"{len(counts)} subjects{also}, {max(counts, default=0)} rounds"


@dataclass
class Trial:
    """One measure of one workload, of all subjects.

    Args:
      crew: the workers.
      subjects: name, kind (of worker) and status of each.
      workload: the shapes.
      measure: what.
      limits: how much.
      report: is told each step.
      checked: is told the row of each kernel once it was compared with the reference, or failed.
      summary: of the rows, what the report is told at the end.
    """

    crew: Caller
    subjects: Sequence[dict[str, Any]]
    workload: Workload
    measure: str
    limits: Limits
    report: Reporter
    checked: Callable[[dict[str, Any]], None] = lambda row: None
    summary: Callable[[list[dict[str, Any]]], str] = counted
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> None:
        """Prepare every subject, then go round. An interruption leaves what was measured."""
        title = f"{self.workload.name}, {self.measure}"
        self.report.begin(title, len(self.subjects) * (1 + self.limits.most))
        for subject in self.subjects:
            self.report.step(subject["name"])
            self._prepare(subject)
        start = time.monotonic()
        for n in range(self.limits.most):
            if n >= self.limits.least and time.monotonic() - start > self.limits.budget:
                break
            if not self._round(n):
                break
        for subject in self._live():
            if not self.rows[subject["name"]]["seconds"]:
                self._end(subject["name"], "not measured", str(TimeIsUpError()))
        for kind in {subject["kind"] for subject in self._live()}:
            self._ask(None, kind, do="forget")
        self.report.end(self.summary(list(self.rows.values())))

    def leave_out(self, reason: str) -> None:
        """Note of every subject that it was not measured."""
        for subject in self.subjects:
            self._end(subject["name"], "not measured", reason)

    def timed(self) -> list[dict[str, Any]]:
        """The rows that have times."""
        return [row for row in self.rows.values() if row.get("seconds")]

    def kept(self) -> list[dict[str, Any]]:
        """The rows that say something: times, why there are none, or what a check found."""
        return [r for r in self.rows.values() if "reason" in r or "errors" in r or r["seconds"]]

    def kept_records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """What was found out while preparing the rows that have times, of those figures."""
        found = []
        for row in self.timed():
            record = self.records[row["subject"]]
            figures = {name: record[name] for name in names if record.get(name) is not None}
            if figures:
                found.append({**self._key(row["subject"]), **figures})
        return found

    def _key(self, name: str) -> dict[str, Any]:
        return {"workload": asdict(self.workload), "subject": name, "measure": self.measure}

    def _live(self) -> list[dict[str, Any]]:
        return [
            subject for subject in self.subjects
            if self.rows.get(subject["name"], {}).get("status") == "ready"
        ]  # fmt: skip

    def _prepare(self, subject: dict[str, Any]) -> None:
        name, reply = subject["name"], subject
        if self.crew.late():
            reply = {"status": "not measured", "reason": str(TimeIsUpError())}
        elif subject["status"] == "ready":
            reply = self._ask(
                subject, subject["kind"], do="prepare", subject=name, measure=self.measure,
                workload=asdict(self.workload), compiles=self.limits.compiles,
                alike=self.limits.alike,
            )  # fmt: skip
        before = self.rows.get(name, {})
        if reply["status"] == "not measured" and before.get("seconds"):
            return
        row = {**self._key(name), "status": reply["status"], **_kept(reply)}
        if reply["status"] == "ready":
            # Of a worker that was started again the rounds before count too.
            measured = {key: before.get(key, []) for key in ("rounds", "seconds")}
            row |= {"repeats": reply["repeats"], **measured}
            self.records[name] = reply
        else:
            row["reason"] = reply["reason"]
        self.rows[name] = row
        if subject.get("base") == KERNEL:
            self.checked(row)

    def _round(self, n: int) -> bool:
        """One sample of each; whether there was time for it."""
        live = self._live()
        first = n % max(len(live), 1)
        before = None
        for subject in live[first:] + live[:first]:
            if subject not in self._live():  # its worker died in this round
                continue
            self.report.step(subject["name"])
            if before not in (None, subject["kind"]):
                time.sleep(PAUSE_SECONDS)
            before = subject["kind"]
            reply = self._ask(subject, before, do="sample", subject=subject["name"])
            row = self.rows[subject["name"]]
            if reply["status"] == "not measured":
                return False
            if reply["status"] == "ready":
                row["rounds"].append(n)
                row["seconds"].append(reply["seconds"])
            else:
                self._end(subject["name"], "failed", reply["reason"], **_kept(reply))
                if subject.get("base") == KERNEL:
                    self.checked(self.rows[subject["name"]])
        return True

    def _end(self, name: str, status: str, reason: str, **more: Any) -> None:
        """A row that will have no times."""
        before = _kept(self.rows.get(name, {})) | more
        self.rows[name] = {**self._key(name), "status": status, **before, "reason": reason}

    def _ask(self, asked: dict[str, Any] | None, kind: str, /, **request: object) -> dict[str, Any]:
        """A reply; where the worker dies, a failure of that subject, the others prepared again."""
        try:
            return self.crew.call(kind, **request)
        except TimeIsUpError as error:
            return {"status": "not measured", "reason": str(error)}
        except WorkerDiedError as error:
            if asked is not None:
                self._end(asked["name"], "failed", str(error), died=True)
                for other in self._live():
                    # Looked at again: a worker that dies over one of them takes that one's turn.
                    if other["kind"] == kind and other in self._live():
                        self._prepare(other)
            return {"status": "failed", "reason": str(error), "died": True}


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in KEPT if found.get(key) is not None}

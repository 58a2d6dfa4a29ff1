"""Subjects in turn: one sample from each, then the next round, so that rounds can be paired."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.progress import Reporter
from benchmarks.workers import WorkerDiedError
from benchmarks.workloads import Workload

# An idle worker's threads go on spinning for a moment after its last call, and would take a core
# from the next worker. They are waited for rather than told not to spin (OMP_WAIT_POLICY=PASSIVE),
# which would cost torch alone.
PAUSE_SECONDS = 0.02

COMPILE = ("trace", "compile", "first_call")
MEMORY = ("temporaries", "peak_bytes")


class Caller(Protocol):
    """What answers requests: `workers.Crew`."""

    def call(self, kind: str, /, **request: object) -> dict[str, Any]:
        """One request to the worker of a kind."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Args:
      most: rounds at most.
      least: rounds at least, whatever they take.
      budget: seconds for the rounds of one measure.
      compiles: how often each program is compiled.
      until: what is not prepared by then, by `time.monotonic`, is left out.
    """

    most: int = 15
    least: int = 5
    budget: float = 25.0
    compiles: int = 3
    until: float | None = None


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
    """

    crew: Caller
    subjects: Sequence[dict[str, Any]]
    workload: Workload
    measure: str
    limits: Limits
    report: Reporter
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
            self._round(n)
        for kind in {subject["kind"] for subject in self._live()}:
            self._ask(None, kind, do="forget")
        count = max((len(row["seconds"]) for row in self.timed()), default=0)
        failed = sum(row["status"] == "failed" for row in self.rows.values())
        also = f", {failed} failed" if failed else ""
        self.report.end(f"{len(self.timed())} subjects{also}, {count} rounds")

    def timed(self) -> list[dict[str, Any]]:
        """The rows that have times."""
        return [row for row in self.rows.values() if row.get("seconds")]

    def kept(self) -> list[dict[str, Any]]:
        """The rows that say something: times, or why there are none."""
        return [row for row in self.rows.values() if "reason" in row or row["seconds"]]

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
        if self.limits.until is not None and time.monotonic() > self.limits.until:
            reply = {"status": "not measured", "reason": "the time of the run was up"}
        elif subject["status"] == "ready":
            reply = self._ask(
                subject, subject["kind"], do="prepare", subject=name, measure=self.measure,
                workload=asdict(self.workload), compiles=self.limits.compiles,
            )  # fmt: skip
        row = {**self._key(name), "status": reply["status"]}
        if reply["status"] != "ready":
            self.rows[name] = {**row, "reason": reply["reason"]}
            return
        more = {key: reply[key] for key in ("flops", "kernels") if reply.get(key)}
        # Of a worker that was started again the rounds before count too.
        before = self.rows.get(name, {})
        measured = {key: before.get(key, []) for key in ("rounds", "seconds")}
        self.rows[name] = {**row, **more, "repeats": reply["repeats"], **measured}
        self.records[name] = reply

    def _round(self, n: int) -> None:
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
            if reply["status"] == "ready":
                row["rounds"].append(n)
                row["seconds"].append(reply["seconds"])
            else:
                self._fail(subject["name"], reply["reason"])

    def _fail(self, name: str, reason: str) -> None:
        self.rows[name] = {**self._key(name), "status": "failed", "reason": reason}

    def _ask(self, asked: dict[str, Any] | None, kind: str, /, **request: object) -> dict[str, Any]:
        """A reply; where the worker dies, a failure of that subject, the others prepared again."""
        try:
            return self.crew.call(kind, **request)
        except WorkerDiedError as error:
            if asked is not None:
                self._fail(asked["name"], str(error))
                for other in self._live():
                    # Looked at again: a worker that dies over one of them takes that one's turn.
                    if other["kind"] == kind and other in self._live():
                        self._prepare(other)
            return {"status": "failed", "reason": str(error)}

"""A whole run: each step of a plan in turn, its subjects round by round, saved as it goes."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import kernels
from benchmarks.crew import Crew, TimeIsUpError, WorkerDiedError
from benchmarks.plan import MOST_OF_A_BLOCK, Plan, Step
from benchmarks.results import InputError
from benchmarks.subjects.registry import KERNEL, TORCH, Subject
from benchmarks.worker import one_line

# An idle worker's threads go on spinning for a moment after its last call, and would take a core
# from the next worker. They are waited for rather than told not to spin (OMP_WAIT_POLICY=PASSIVE),
# which would cost torch alone.
PAUSE_SECONDS = 0.02
# Kernels of one block, or of a cluster, that hang before the others of it are left alone: each
# costs time.
DEATHS = 2
Row = dict[str, Any]


def describe_workers(crew: Crew, kinds: Sequence[str], device: str, document: Row) -> None:
    """Ask the workers for accelerator, threads and flags, and note them."""
    for kind in kinds:  # side by side
        crew.start(kind)
    for kind in kinds:
        try:
            about = crew.call(kind, do="machine")
        except TimeIsUpError as error:
            raise InputError("--minutes: the time was up before a worker had started") from error
        except WorkerDiedError as error:
            about = {"reason": str(error)}
        needed = device == "gpu" and (kind != TORCH or len(kinds) == 1)
        if needed and not about.get("gpu"):
            raise InputError(f"--device gpu: {about.get('reason', f'{kind} finds no GPU here')}")
        if "threads" in about:
            document["threads"][kind] = about["threads"]
            document["flags"][kind] = one_line(about["flags"])
            document["device"]["gpu"] = document["device"]["gpu"] or about["gpu"]
        if about.get("cudnn"):
            document["versions"]["cuDNN of torch"] = about["cudnn"]


@dataclass
class Run:
    """Measures all that is planned, adding rows to the document as they are begun.

    `say` gets a line for each measure, and one for each verdict on a kernel; `save` is called
    after each of them, and at the end, however it comes.
    """

    crew: Crew
    plan: Plan
    subjects: dict[str, Subject]
    document: dict[str, Any]
    say: Callable[[str], None]
    save: Callable[[], None]
    deaths: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by `_family`
    died: dict[tuple[str, str], str] = field(default_factory=dict)  # why, by subject and row

    def go(self) -> None:
        """Measure; an interruption leaves what was measured."""
        steps = [(step, measure) for step in self.plan.steps for measure in step.measures]
        try:
            for n, (step, measure) in enumerate(steps, 1):
                rows = self.measure(step, measure)
                title = f"[{n}/{len(steps)}] {step.workload.name}, {measure}"
                self.say(f"{title}: {kernels.times(rows)}")
                self.save()
        except KeyboardInterrupt:
            self.document["interrupted"] = True
            raise
        finally:
            if self.document["rows"]:
                self.save()

    def measure(self, step: Step, measure: str) -> list[Row]:
        """Prepare every subject, then go round: one sample from each, and again."""
        row = {"workload": asdict(step.workload), "subject": "", "measure": measure}
        row |= _not_measured("the run was stopped")
        rows = [row | {"subject": name, "rounds": [], "seconds": []} for name in step.subjects]
        self.document["rows"] += rows
        for row in rows:
            self._prepare(row, rows, step.limits.alike)
        start, limits = time.monotonic(), step.limits
        for n in range(limits.most):
            enough = n >= limits.least and time.monotonic() - start > limits.budget
            if enough or not self._round(n, rows, limits.alike):
                break
        for row in _live(rows):
            if not row["seconds"]:
                row |= _not_measured(str(TimeIsUpError()))
        for kind in {self._kind(row) for row in _live(rows)}:
            self._call(kind, do="forget")
        return rows

    def _prepare(self, row: Row, rows: list[Row], alike: int) -> None:
        where, is_kernel = (row["subject"], row["workload"]["name"]), _is_kernel(row)
        if where in self.died:
            reply = _not_measured(f"before it failed here: {self.died[where]}")
        elif self.deaths[_family(row)] >= DEATHS and is_kernel:
            reply = _not_measured(f"{DEATHS} kernels of this kind took their process with them")
        else:
            what = {key: row[key] for key in ("subject", "workload", "measure")}
            reply = self._call(self._kind(row), do="prepare", alike=alike, **what)
        if reply["status"] == "not measured" and row["seconds"]:
            return  # what was measured before its worker was started again stays
        row.pop("reason", None)
        self._note(row, reply, rows, alike)
        if is_kernel:
            self.say(kernels.verdict(row))
            self.save()

    def _round(self, n: int, rows: list[Row], alike: int) -> bool:
        """One sample of each, another one first in each round; whether there was time for it."""
        live, before = _live(rows), None
        first = n % max(len(live), 1)
        for row in live[first:] + live[:first]:
            if row["status"] != "ready":  # its worker died in this round
                continue
            if before not in (None, self._kind(row)):
                time.sleep(PAUSE_SECONDS)
            before = self._kind(row)
            reply = self._call(before, do="sample", subject=row["subject"])
            if reply["status"] == "not measured":
                return False
            if reply["status"] == "ready":
                row["rounds"].append(n)
                row["seconds"].append(float(f"{reply['seconds']:.6g}"))
                continue
            self._note(row, reply | {"rounds": [], "seconds": []}, rows, alike)
            if _is_kernel(row):
                self.say(kernels.verdict(row))
        return True

    def _note(self, row: Row, reply: Row, rows: list[Row], alike: int) -> None:
        """A reply; where the worker died, its other subjects are prepared in a new one."""
        row |= reply
        if not reply.get("died"):
            return
        self.deaths[_family(row)] += 1
        self.died[row["subject"], row["workload"]["name"]] = row["reason"]
        for other in _live(rows):
            # Looked at again: a worker that dies over one of them takes that one's turn.
            if self._kind(other) == self._kind(row) and other["status"] == "ready":
                self._prepare(other, rows, alike)

    def _kind(self, row: Row) -> str:
        return self.subjects[row["subject"]].kind

    def _call(self, kind: str, /, **request: Any) -> Row:
        try:
            return self.crew.call(kind, **request)
        except TimeIsUpError as error:
            return _not_measured(str(error))
        except WorkerDiedError as error:
            return {"status": "failed", "reason": str(error), "died": True}


def _not_measured(reason: str) -> Row:
    return {"status": "not measured", "reason": reason}


def _is_kernel(row: Row) -> bool:
    return row["subject"].startswith(KERNEL)


def _family(row: Row) -> tuple[str, bool]:
    return row["subject"], row["workload"]["H"] > MOST_OF_A_BLOCK


def _live(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ready"]

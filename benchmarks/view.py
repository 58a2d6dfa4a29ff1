"""Questions to the results of a run: who was how many times slower than whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.ratios import Spread, paired, spread
from benchmarks.workloads import Workload, is_new

OURS, NAIVE, ROOFLINE = "jaxrnn", "naive scan", "roofline"
TWO_DEVICES = "two host devices"
MEAN = "geometric mean"


def means(workloads: Sequence[Workload]) -> dict[str, list[int]]:
    """Which rows go into which mean, by its name; all into the last.

    Args:
      workloads: of the rows.

    Returns:
      The rows' numbers.
    """
    new = [n for n, workload in enumerate(workloads) if is_new(workload)]
    old = [n for n, workload in enumerate(workloads) if not is_new(workload)]
    parts = {f"{MEAN}, old rows": old, f"{MEAN}, new rows": new} if old and new else {}
    return {**parts, MEAN: [*range(len(workloads))]}


@dataclass(frozen=True)
class Rival:
    """How many times longer than ours a rival takes, and which rival that is."""

    ratio: Spread
    name: str


class View:
    """The rows of a document, found by workload, measure and subject.

    Args:
      document: the results of a run.
    """

    def __init__(self, document: dict[str, Any]):
        self.document = document

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in self.document["rows"]:
            key = row["workload"]["name"], row["measure"], row["subject"]
            # What was to be measured again, and was not, stays as it was; what failed then, failed.
            if key not in found or row["status"] != "not measured":
                found[key] = row
        return found

    @cached_property
    def workloads(self) -> list[Workload]:
        """In the order in which they were measured."""
        found = {row["workload"]["name"]: row["workload"] for row in self.document["rows"]}
        return [Workload(**workload) for workload in found.values()]

    @cached_property
    def measures(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(row["measure"] for row in self.document["rows"]))

    @cached_property
    def subjects(self) -> list[str]:
        """Names, in the order of the catalogue."""
        return [subject["name"] for subject in self.document["subjects"]]

    def row(self, workload: Workload, measure: str, subject: str) -> dict[str, Any] | None:
        """A row that has times, or None."""
        row = self._rows.get((workload.name, measure, subject))
        return row if row is not None and row.get("seconds") else None

    def checked(self, workload: Workload, measure: str, subject: str) -> dict[str, Any] | None:
        """A row that was compared with the reference, timed or not; or None."""
        row = self._rows.get((workload.name, measure, subject), {})
        return row if "errors" in row else None

    def reason(self, workload: Workload, measure: str, subject: str) -> str | None:
        """Why a row has no times; None where it has, or where there is no row."""
        return self._rows.get((workload.name, measure, subject), {}).get("reason")

    def listed(self, workload: Workload, what: str, dtype: str) -> bool:
        """Whether some measure has a row, with times or without, of a subject in a dtype."""
        name = f"{what}, {dtype}"
        return any((workload.name, measure, name) in self._rows for measure in self.measures)

    def status(self, workload: Workload, measure: str, subject: str) -> str:
        """Of a row; "" where there is none."""
        return self._rows.get((workload.name, measure, subject), {}).get("status", "")

    def seconds(self, workload: Workload, measure: str, subject: str) -> float | None:
        """The median."""
        row = self.row(workload, measure, subject)
        return spread(row["seconds"]).median if row else None

    def ratio(self, workload: Workload, measure: str, slow: str, fast: str) -> Spread | None:
        """How many times longer one takes than the other, round by round."""
        rows = [self.row(workload, measure, name) for name in (slow, fast)]
        return paired(*rows) if all(rows) else None

    @cached_property
    def jax_peers(self) -> dict[str, str]:
        """Each layer of another JAX library, and the subject of ours with its activation."""
        found = {}
        for subject in self.document["subjects"]:
            if subject["kind"] == "jax" and subject["package"] not in ("jax", "jaxrnn"):
                activation = subject.get("activation") or "tanh"
                ours = OURS if activation == "tanh" else f"{OURS}, {activation}"
                found[subject["name"]] = ours
        return found

    @cached_property
    def torch_peers(self) -> dict[str, str]:
        """Each of torch's layers, and ours."""
        names = [s["name"] for s in self.document["subjects"] if s["package"] == "torch"]
        return dict.fromkeys(names, OURS)

    def best(self, workload: Workload, measure: str, peers: dict[str, str]) -> Rival | None:
        """The peer that comes closest to ours, or leaves it farthest behind."""
        # Where the row itself is a relu network, so is what else is measured there.
        relu = workload.network.activation == "relu"
        ratios = [
            Rival(ratio, name)
            for name, ours in peers.items()
            if (ratio := self.ratio(workload, measure, name, OURS if relu else ours)) is not None
        ]
        return min(ratios, key=lambda rival: rival.ratio.median, default=None)

    def figure(
        self, table: str, workload: Workload, measure: str, subject: str, *names: str
    ) -> float | None:
        """The sum of some figures from "compile" or "memory"; None where one is missing."""
        for row in self.document[table]:
            where = row["workload"]["name"], row["measure"], row["subject"]
            if where == (workload.name, measure, subject) and all(n in row for n in names):
                return sum(row[name] for name in names)
        return None

    def figures_ratio(
        self, table: str, workload: Workload, measure: str, *names: str
    ) -> float | None:
        """A figure of the naive scan over ours; None where one is missing or 0."""
        naive, ours = (self.figure(table, workload, measure, s, *names) for s in (NAIVE, OURS))
        return naive / ours if naive and ours else None

    def beyond_naive(self, workload: Workload, measure: str) -> float | None:
        """Our temporaries less the naive scan's, in arrays of all states."""
        ours, naive = (
            self.figure("memory", workload, measure, subject, "temporaries")
            for subject in (OURS, NAIVE)
        )
        if ours is None or naive is None:
            return None
        itemsize = 4 if workload.dtype is None else np.dtype(workload.dtype).itemsize
        states = workload.T * workload.B * workload.H * max(workload.members, 1)
        return (ours - naive) / (states * itemsize)

    def backward_over_forward(self, workload: Workload) -> float | None:
        """What the backward pass takes beyond the forward one, in forward passes."""
        both = self.seconds(workload, BACKWARD, OURS)
        forward = self.seconds(workload, FORWARD, OURS)
        return both / forward - 1 if both and forward else None

    def flops(self, workload: Workload, measure: str) -> int | None:
        """Floating-point operations of the products, from the roofline's row."""
        row = self.row(workload, measure, ROOFLINE)
        return row.get("flops") if row else None

    def without_times(self) -> list[tuple[str, str, str, list[str]]]:
        """(subject, status, reason, where) of all that was not timed."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for row in self.document["rows"] + self.document["sweeps"]:
            if "reason" in row:
                key = row["subject"], row["status"], row["reason"]
                found.setdefault(key, []).append(f"{row['workload']['name']}: {row['measure']}")
        return [(*key, where) for key, where in found.items()]

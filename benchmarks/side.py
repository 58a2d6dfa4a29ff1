"""What a worker needs of a framework."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.workloads import Workload


class NotOfferedError(Exception):
    """A subject lacks what is measured; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """One subject, ready to be timed.

    Args:
      call: computes once; without `wait`, returns when the result is there.
      check: a line that says where the result differs from the reference, or None.
      record: what was found out on the way: seconds of tracing, compiling and the first call,
        bytes of temporaries; on a GPU, once it was checked, errors, and of a kernel whether calls
        are alike.
      wait: returns when the result of a call is there; None where `call` does.
    """

    call: Callable[[], Any]
    check: Callable[[], str | None]
    record: dict[str, Any] = field(default_factory=dict)
    wait: Callable[[Any], object] | None = None


class Side(Protocol):
    """A framework and its subjects."""

    def machine(self) -> dict[str, Any]:
        """The accelerator's name or None as "gpu", and the "threads"."""
        ...

    def subjects(self, names: list[str] | None) -> list[dict[str, Any]]:
        """Name, package, activation and status of those subjects, or of all."""
        ...

    def compile(self, pairs: list[list[str]], workload: Workload) -> float:
        """Do what can be done ahead for (subject, measure)s; the longest compilation's seconds."""
        ...

    def prepare(
        self, name: str, workload: Workload, measure: str, compiles: int, alike: int
    ) -> Prepared:
        """A subject's program, compiled so many times; a kernel's result compared so often."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """How far one call raises the memory in use, where that can be asked."""
        ...

    def healthy(self) -> bool:
        """Whether the device still computes: after an illegal address it never does again."""
        ...

    def forget(self) -> None:
        """Give back what belongs to a workload."""
        ...

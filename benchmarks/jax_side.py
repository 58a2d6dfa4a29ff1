"""JAX's side of a worker: programs compiled ahead of time, and what compiling costs."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import machine, programs, roofline, timing
from benchmarks.catalogue import ROOFLINE, Listed, listed
from benchmarks.checks import Checker
from benchmarks.measures import FORWARD
from benchmarks.programs import Program
from benchmarks.side import NotOfferedError, Prepared
from benchmarks.subjects import JaxSubject
from benchmarks.subjects.registry import JAX_SUBJECTS, TWO_DEVICES, Entry
from benchmarks.tangents import direction
from benchmarks.text import one_line
from benchmarks.workloads import Workload, draw

Compiled = tuple[Callable[..., Any], tuple, dict[str, Any]]


class JaxSide:
    """The subjects of one kind of JAX worker.

    Args:
      kind: of `workers.KINDS`.
      device: "cpu" or "gpu".
      entries: who there is; by default all of the registry.
      subjects: how they run; by default as the catalogue lists them.
    """

    def __init__(
        self,
        kind: str,
        device: str = "cpu",
        entries: dict[str, Entry] | None = None,
        subjects: list[Listed] | None = None,
    ):
        self.device = device
        self.entries = JAX_SUBJECTS if entries is None else entries
        subjects = listed(device) if subjects is None else subjects
        self.listed = {subject.name: subject for subject in subjects if subject.kind == kind}
        self.made: dict[str, JaxSubject] = {}
        self.workload: Workload | None = None

    def machine(self) -> dict[str, Any]:
        """The accelerator's name, and how many threads XLA has."""
        device = jax.devices()[0]
        threads = int(os.environ.get("NPROC") or machine.cores())
        return {"gpu": device.device_kind if device.platform == "gpu" else None, "threads": threads}

    def subjects(self, names: list[str] | None) -> list[dict[str, Any]]:
        """Name, package, activation and status of those subjects, or of all."""
        found = []
        for name, how in self.listed.items():
            if names is not None and name not in names:
                continue
            about = {"name": name, "package": how.package, "status": "ready"}
            try:
                activation = "" if name == ROOFLINE else self._subject(how.base).activation
                found.append({**about, "activation": activation})
            except ImportError as error:
                found.append({**about, "status": "not installed", "reason": one_line(error)})
            except Exception as error:
                found.append({**about, "status": "failed", "reason": one_line(error)})
        return found

    def _subject(self, base: str) -> JaxSubject:
        if base not in self.made:
            self.made[base] = self.entries[base].make()
        return self.made[base]

    def prepare(self, name: str, workload: Workload, measure: str, compiles: int) -> Prepared:
        """A subject's program, compiled so many times; figures are medians."""
        how = self.listed[name]
        if name == ROOFLINE:
            program = roofline.make(workload, measure)
            call, _, record = self._compiled(program, how.precision, compiles)
            record["flops"] = roofline.flops(workload, measure)
            return Prepared(call, lambda: None, record)
        subject = self._subject(how.base)
        if subject.variant == TWO_DEVICES and workload.B % len(jax.devices()):
            raise NotOfferedError(f"a batch of {workload.B} does not split over two devices")
        given = self._arguments(name, workload)
        program = programs.make(subject, workload, measure, given)
        call, result, record = self._compiled(program, how.precision, compiles)

        def check() -> str | None:
            found = programs.unloaded(subject, workload, measure, result)
            if measure == FORWARD:
                self.states[name] = found[0]
            elif name not in self.states:
                states = programs.make(subject, workload, FORWARD, given)
                hs = self._compiled(states, how.precision, 1)[1]
                (self.states[name],) = programs.unloaded(subject, workload, FORWARD, hs)
            hs, tf32 = self.states[name], self.device == "gpu" and how.precision is None
            return self.checker.wrong(measure, subject.activation, found, hs, how.dtype, tf32)

        return Prepared(call, check, record)

    def _arguments(self, name: str, workload: Workload) -> programs.Arguments:
        """What a subject is called with, kept while the workload is the same."""
        if workload != self.workload:
            self.workload, self.data = workload, draw(workload)
            self.checker = Checker(workload, self.data, direction(self.data))
            self.given: dict[str, programs.Arguments] = {}
            self.states: dict[str, np.ndarray] = {}
        if name not in self.given:
            how = self.listed[name]
            self.given[name] = programs.arguments(self._subject(how.base), self.data, how.dtype)
        return self.given[name]

    def _compiled(self, program: Program, precision: str | None, compiles: int) -> Compiled:
        figures: dict[str, list[float]] = {"trace": [], "compile": [], "first_call": []}
        for _ in range(compiles):
            jax.clear_caches()
            times = [time.perf_counter()]
            jitted = jax.jit(program.function)
            with _precision(precision):
                lowered = jitted.lower(*program.args)
            times.append(time.perf_counter())
            compiled = lowered.compile()
            times.append(time.perf_counter())
            # Where a program wants its arguments on several devices, they lie there beforehand.
            args = jax.device_put(program.args, compiled.input_shardings[0])
            jax.block_until_ready(args)
            start = time.perf_counter()
            # As a user calls it: `compiled` itself is called by slower Python.
            with _precision(precision):
                result = jax.block_until_ready(jitted(*args))
            run = time.perf_counter() - start
            steps = np.diff(times)
            for key, value in zip(figures, (*steps, steps.sum() + run), strict=True):
                figures[key].append(float(value))
        record: dict[str, Any] = {k: statistics.median(values) for k, values in figures.items()}
        analysis = compiled.memory_analysis()
        if analysis is not None:
            record["temporaries"] = analysis.temp_size_in_bytes
        return partial(_call, jitted, args, precision), result, record

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """How far one call raises the memory in use.

        A GPU's high-water mark cannot be set back: None where an earlier call reached higher.
        """
        if self.device == "cpu":
            return timing.peak_bytes(call)
        before = jax.devices()[0].memory_stats()
        call()
        after = jax.devices()[0].memory_stats()
        if not before or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return after["peak_bytes_in_use"] - before["bytes_in_use"]

    def forget(self) -> None:
        """Give compiled programs back."""
        jax.clear_caches()


def _call(jitted, args: tuple, precision: str | None) -> object:
    if precision is None:
        return jax.block_until_ready(jitted(*args))
    with _precision(precision):
        return jax.block_until_ready(jitted(*args))


def _precision(precision: str | None):
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)

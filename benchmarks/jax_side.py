"""JAX's side of a worker: programs compiled ahead of time, and what compiling costs."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import machine, numerics, programs, roofline, timing
from benchmarks.catalogue import Listed, listed
from benchmarks.checks import Checker
from benchmarks.kernels import ROOFLINE
from benchmarks.measures import FORWARD
from benchmarks.programs import Program
from benchmarks.side import NotOfferedError, Prepared
from benchmarks.subjects import JaxSubject
from benchmarks.subjects.registry import GPU_SUBJECTS, JAX_SUBJECTS, TWO_DEVICES, Entry
from benchmarks.tangents import direction
from benchmarks.text import one_line
from benchmarks.workloads import Workload, draw

Compiled = tuple[Callable[..., Any], tuple, dict[str, Any]]
# A function for calls, the same compiled, the kernels in its program, and seconds to trace and
# to compile it.
Built = tuple[Callable[..., Any], Any, list[str], tuple[float, float]]


class JaxSide:
    """The subjects of one kind of JAX worker.

    Args:
      kind: of `workers.KINDS`.
      device: "cpu" or "gpu".
      entries: who there is; by default all of the registry for the device.
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
        on_device = GPU_SUBJECTS if device == "gpu" else JAX_SUBJECTS
        self.entries = on_device if entries is None else entries
        subjects = listed(device) if subjects is None else subjects
        self.listed = {subject.name: subject for subject in subjects if subject.kind == kind}
        self.made: dict[str, JaxSubject] = {}
        self.built: dict[tuple[str, str], tuple[Program, Built]] = {}
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
                activation = "" if how.base == ROOFLINE else self._subject(how.base).activation
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
        program, built = None, None
        if workload == self.workload:
            program, built = self.built.pop((name, measure), (None, None))
        if how.base == ROOFLINE:
            program = program or self._program(name, workload, measure)
            call, _, record = self._compiled(program, how.precision, compiles, built)
            record["flops"] = roofline.flops(workload, measure)
            return Prepared(call, lambda: None, record)
        subject = self._subject(how.base)
        if subject.variant == TWO_DEVICES and workload.B % len(jax.devices()):
            raise NotOfferedError(f"a batch of {workload.B} does not split over two devices")
        program = program or self._program(name, workload, measure)
        call, result, record = self._compiled(program, how.precision, compiles, built)

        def check() -> str | None:
            found = programs.unloaded(subject, workload, measure, result)
            if measure == FORWARD:
                self.states[name] = found[0]
            elif name not in self.states:
                states = self._program(name, workload, FORWARD)
                hs = self._compiled(states, how.precision, 1)[1]
                (self.states[name],) = programs.unloaded(subject, workload, FORWARD, hs)
            tf32 = (self.device, how.dtype, how.precision) == ("gpu", "float32", None)
            hs = self.states[name]
            return self.checker.wrong(measure, subject.activation, found, hs, how.dtype, tf32)

        return Prepared(call, check, record)

    def compile(self, pairs: list[list[str]], workload: Workload) -> None:
        """Compile (subject, measure)s side by side; `prepare` says why some do not compile."""
        self.built.clear()
        with ThreadPoolExecutor(machine.cores()) as pool:
            jobs = {}
            for name, measure in pairs:
                with contextlib.suppress(Exception):
                    program = self._program(name, workload, measure)
                    job = pool.submit(_build, program, self.listed[name].precision)
                    jobs[name, measure] = program, job
        for key, (program, job) in jobs.items():
            if job.exception() is None:
                self.built[key] = program, job.result()

    def _program(self, name: str, workload: Workload, measure: str) -> Program:
        how = self.listed[name]
        if how.base == ROOFLINE:
            return roofline.make(workload, measure, how.dtype)
        given = self._arguments(name, workload)
        return programs.make(self._subject(how.base), workload, measure, given)

    def _arguments(self, name: str, workload: Workload) -> programs.Arguments:
        """What a subject is called with, kept while the workload is the same."""
        if workload != self.workload:
            self.workload, self.data = workload, draw(workload)
            self.tangent = direction(self.data)
            self.checker = Checker(workload, self.data, self.tangent)
            self.given: dict[str, programs.Arguments] = {}
            self.states: dict[str, np.ndarray] = {}
        if name not in self.given:
            how = self.listed[name]
            subject = self._subject(how.base)
            self.given[name] = programs.arguments(subject, self.data, how.dtype, self.tangent)
        return self.given[name]

    def _compiled(
        self, program: Program, precision: str | None, compiles: int, built: Built | None = None
    ) -> Compiled:
        figures: dict[str, list[float]] = {"trace": [], "compile": [], "first_call": []}
        for n in range(compiles):
            if built is None or n > 0:
                # Where programs are compiled ahead, it would take them too.
                if self.device == "cpu" or n > 0:
                    jax.clear_caches()
                built = _build(program, precision)
            jitted, compiled, named, steps = built
            args, wanted = program.args, compiled.input_shardings[0]
            # Where a program wants its arguments on several devices, they lie there beforehand.
            # On one they stay as they are: for arguments that are put somewhere, JAX compiles anew.
            if any(len(where.device_set) > 1 for where in jax.tree.leaves(wanted)):
                args = jax.device_put(args, wanted)
            jax.block_until_ready(args)
            start = time.perf_counter()
            # As a user calls it: `compiled` itself is called by slower Python.
            with _precision(precision):
                result = jax.block_until_ready(jitted(*args))
            run = time.perf_counter() - start
            for key, value in zip(figures, (*steps, sum(steps) + run), strict=True):
                figures[key].append(float(value))
        record: dict[str, Any] = {k: statistics.median(values) for k, values in figures.items()}
        record["kernels"] = named
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
        """Give compiled programs back, but those that are yet to be prepared."""
        if not self.built:
            jax.clear_caches()


def _build(program: Program, precision: str | None) -> Built:
    times = [time.perf_counter()]
    jitted = jax.jit(program.function)
    with _precision(precision):
        lowered = jitted.lower(*program.args)
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    named = numerics.kernels_in(numerics.program_text(lowered, compiled))
    trace, compiling = (float(seconds) for seconds in np.diff(times))
    return jitted, compiled, named, (trace, compiling)


def _call(jitted, args: tuple, precision: str | None) -> object:
    if precision is None:
        return jax.block_until_ready(jitted(*args))
    with _precision(precision):
        return jax.block_until_ready(jitted(*args))


def _precision(precision: str | None):
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)

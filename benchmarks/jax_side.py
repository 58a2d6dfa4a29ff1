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

from benchmarks import kernels, machine, programs, roofline, timing
from benchmarks.catalogue import Listed, listed
from benchmarks.checks import Checker
from benchmarks.kernels import KERNEL, ROOFLINE
from benchmarks.measures import BACKWARD, FORWARD
from benchmarks.networks import ONE_LAYER, Network
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
        # On a GPU calls are queued.
        self.wait = jax.block_until_ready if device == "gpu" else None
        on_device = GPU_SUBJECTS if device == "gpu" else JAX_SUBJECTS
        self.entries = on_device if entries is None else entries
        subjects = listed(device) if subjects is None else subjects
        self.listed = {subject.name: subject for subject in subjects if subject.kind == kind}
        self.made: dict[tuple[str, Network], JaxSubject] = {}
        self.built: dict[tuple[str, str], tuple[Program, Built]] = {}
        self.drawn: tuple[Workload, str] | None = None

    def machine(self) -> dict[str, Any]:
        """The accelerator's name, and how many threads XLA has."""
        device = self.accelerator()
        threads = int(os.environ.get("NPROC") or machine.cores())
        return {"gpu": device.device_kind if device.platform == "gpu" else None, "threads": threads}

    def accelerator(self) -> Any:
        """The device that JAX computes on."""
        return jax.devices()[0]

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

    def _subject(self, base: str, network: Network = ONE_LAYER) -> JaxSubject:
        if (base, ONE_LAYER) not in self.made:
            self.made[base, ONE_LAYER] = self.entries[base].make()
        if (base, network) not in self.made:
            self.made[base, network] = self.made[base, ONE_LAYER].on(network)
        return self.made[base, network]

    def prepare(
        self, name: str, workload: Workload, measure: str, compiles: int, alike: int = 0
    ) -> Prepared:
        """A subject's program, compiled so many times; figures are medians.

        A kernel's result is compared bit by bit with that of `alike` calls.
        """
        how = self.listed[name]
        dtype = how.dtype_on(workload)
        program, built = None, None
        if (workload, dtype) == self.drawn:
            program, built = self.built.pop((name, measure), (None, None))
        if how.base == ROOFLINE:
            program = program or self._program(name, workload, measure)
            call, _, record = self._compiled(program, workload.tuned, compiles, built)
            record["flops"] = roofline.flops(workload, measure)
            return Prepared(call, lambda: None, record, self.wait)
        subject = self._subject(how.base, workload.network)
        if subject.variant == TWO_DEVICES and workload.B % len(jax.devices()):
            raise NotOfferedError(f"a batch of {workload.B} does not split over two devices")
        program = program or self._program(name, workload, measure)
        call, result, record = self._compiled(program, workload.tuned, compiles, built)

        def check() -> str | None:
            found = programs.unloaded(subject, workload, measure, result)
            if measure == FORWARD:
                self.states[name] = found[0]
            elif name not in self.states:
                states = self._program(name, workload, FORWARD)
                hs = self._compiled(states, False, 1)[1]  # never timed
                (self.states[name],) = programs.unloaded(subject, workload, FORWARD, hs)
            tf32 = (self.device, dtype) == ("gpu", "float32")
            hs = self.states[name]
            if self.device == "gpu":
                errors = self.checker.errors(measure, found)
                if measure in (FORWARD, BACKWARD):
                    errors["copies"] = programs.difference_of_copies(workload, measure, result)
                record["errors"] = errors
            if how.base == KERNEL:
                record["alike"], record["calls"] = _alike(call, result, alike), alike
            return self.checker.wrong(measure, subject.activation, found, hs, dtype, tf32)

        return Prepared(call, check, record, self.wait)

    def compile(self, pairs: list[list[str]], workload: Workload) -> float:
        """Compile (subject, measure)s side by side; `prepare` says why some do not compile.

        Returns:
          The seconds that the slowest took XLA.
        """
        self.built.clear()
        with ThreadPoolExecutor(machine.cores()) as pool:
            jobs = {}
            for name, measure in pairs:
                with contextlib.suppress(Exception):
                    program = self._program(name, workload, measure)
                    job = pool.submit(_build, program, workload.tuned)
                    jobs[name, measure] = program, job
            if self.drawn is not None:
                self.checker.ahead()
        for key, (program, job) in jobs.items():
            if job.exception() is None:
                self.built[key] = program, job.result()
        return max((seconds for _, (*_, (_, seconds)) in self.built.values()), default=0.0)

    def _program(self, name: str, workload: Workload, measure: str) -> Program:
        how = self.listed[name]
        if how.base == ROOFLINE:
            return roofline.make(workload, measure, how.dtype_on(workload))
        subject = self._subject(how.base, workload.network)
        return programs.make(subject, workload, measure, self._arguments(name, workload))

    def _arguments(self, name: str, workload: Workload) -> programs.Arguments:
        """What a subject is called with, kept while the workload is the same."""
        how = self.listed[name]
        dtype = how.dtype_on(workload)
        if (workload, dtype) != self.drawn:
            self.drawn, self.data = (workload, dtype), draw(workload, dtype=dtype)
            self.tangent = direction(self.data)
            self.checker = Checker(workload, self.data, self.tangent)
            self.given: dict[str, programs.Arguments] = {}
            self.states: dict[str, np.ndarray] = {}
        if name not in self.given:
            subject = self._subject(how.base, workload.network)
            self.given[name] = programs.arguments(subject, self.data, dtype, self.tangent)
        return self.given[name]

    def _compiled(
        self,
        program: Program,
        tuned: bool,
        compiles: int,
        built: Built | None = None,
    ) -> Compiled:
        figures: dict[str, list[float]] = {"trace": [], "compile": [], "first_call": []}
        for n in range(compiles):
            if built is None or n > 0:
                # Where programs are compiled ahead, it would take them too.
                if self.device == "cpu" or n > 0:
                    jax.clear_caches()
                built = _build(program, tuned)
            jitted, compiled, named, steps = built
            args, wanted = program.args, compiled.input_shardings[0]
            # Where a program wants its arguments on several devices, they lie there beforehand.
            # On one they stay as they are: for arguments that are put somewhere, JAX compiles anew.
            if any(len(where.device_set) > 1 for where in jax.tree.leaves(wanted)):
                args = jax.device_put(args, wanted)
            jax.block_until_ready(args)
            # As a user calls it: `compiled` itself is called by slower Python. But `jitted` would
            # be compiled anew where this one was compiled without tuning.
            call = partial(jitted if tuned else compiled, *args)
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            run = time.perf_counter() - start
            for key, value in zip(figures, (*steps, sum(steps) + run), strict=True):
                figures[key].append(float(value))
        record: dict[str, Any] = {k: statistics.median(values) for k, values in figures.items()}
        record["kernels"] = named
        analysis = compiled.memory_analysis()
        if analysis is not None:
            record["temporaries"] = analysis.temp_size_in_bytes
        return (call if self.wait else lambda: jax.block_until_ready(call())), result, record

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """How far one call raises the memory in use.

        A GPU's high-water mark cannot be set back: None where an earlier call reached higher.
        """
        if self.device == "cpu":
            return timing.peak_bytes(call)
        before = self.accelerator().memory_stats()
        call()
        after = self.accelerator().memory_stats()
        if not before or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return after["peak_bytes_in_use"] - before["bytes_in_use"]

    def healthy(self) -> bool:
        """Whether the device still computes: after an illegal address it never does again."""
        try:
            return float(jax.block_until_ready(jax.numpy.ones(4)).sum()) == 4
        except Exception:
            return False

    def forget(self) -> None:
        """Give compiled programs back, but those that are yet to be prepared."""
        if not self.built:
            jax.clear_caches()


def _build(program: Program, tuned: bool) -> Built:
    times = [time.perf_counter()]
    jitted = jax.jit(program.function)
    lowered = jitted.lower(*program.args)
    times.append(time.perf_counter())
    compiled = lowered.compile(compiler_options=None if tuned else programs.NOT_TUNED)
    times.append(time.perf_counter())
    named = kernels.kernels_in(f"{lowered.as_text()}\n{compiled.as_text()}")
    trace, compiling = (float(seconds) for seconds in np.diff(times))
    return jitted, compiled, named, (trace, compiling)


def _alike(call: Callable[[], Any], first: Any, calls: int) -> bool:
    """Whether so many results are the same bit by bit, the first included."""

    @jax.jit
    def same(result, first):
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(first), strict=True)
        return jax.numpy.all(jax.numpy.stack([jax.numpy.array_equal(x, y) for x, y in pairs]))

    # Waited for one by one: results that are still to come would fill the memory.
    return all(bool(same(call(), first)) for _ in range(calls - 1))

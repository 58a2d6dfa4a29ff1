"""A process that measures: `python -m benchmarks.worker KIND DEVICE`, driven by `crew`.

Each line on standard input is a request, a JSON object whose `do` names it; each gets one line
on standard output. Whatever else the process or its libraries print goes to standard error. It
ends when its input does.
"""

import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import jax

from benchmarks import programs
from benchmarks.reference import Reference
from benchmarks.subjects import NotOfferedError, Prepared, registry
from benchmarks.subjects.registry import KERNEL, TORCH, Subject
from benchmarks.workloads import direction, draw, from_json

# A sample lasts at least this long, so that the clock and its reading do not matter.
SAMPLE_SECONDS = 5e-3
Call = Callable[[], Any]
Wait = Callable[[Any], object] | None


def seconds(call: Call, repeats: int = 1, wait: Wait = None) -> float:
    """Seconds per call; with `wait`, calls are queued, and the last one is waited for."""
    gc.disable()  # with so many libraries imported, a collection takes longer than a sample
    try:
        start, result = time.perf_counter(), None
        for _ in range(repeats):
            result = call()
        if wait is not None:
            wait(result)
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def calibrate(call: Call, wait: Wait = None) -> int:
    """How often to call for a sample of at least SAMPLE_SECONDS."""
    repeats, each = 1, seconds(call, 1, wait)
    while repeats * each < SAMPLE_SECONDS:
        # A little more than it takes, at most ten times more: the first guess is a rough one.
        repeats = min(10 * repeats, int(1.2 * SAMPLE_SECONDS / max(each, 1e-9)) + 1)
        each = seconds(call, repeats, wait)
    return repeats


def sample(call: Call, repeats: int, wait: Wait = None) -> float:
    """One sample. Where calls are short one goes untimed: it finds another's data in the caches."""
    if repeats > 1:
        seconds(call, 1, wait)
    return seconds(call, repeats, wait)


def one_line(text: str) -> str:
    """The first line of a text, its absolute paths cut down to the files' names."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@~-]+/)+", "", text.strip().partition("\n")[0])[:200]


class Bench:
    """Answers requests: what the subjects of a kind of worker cost on a workload."""

    def __init__(self, kind: str, device: str = "cpu", subjects: list[Subject] | None = None):
        listed = registry.SUBJECTS[device] if subjects is None else subjects
        self.device, self.kind = device, kind
        self.subjects = {subject.name: subject for subject in listed if subject.kind == kind}
        self.ready: dict[str, tuple[Prepared, int]] = {}

    @cached_property
    def side(self) -> Any:
        """What prepares subjects: of JAX, or of torch, ImportError where it is not installed."""
        if self.kind != TORCH:
            return programs
        module = import_module("benchmarks.subjects.torch_rnn")
        module.DEVICE = "cuda" if self.device == "gpu" else "cpu"
        return module

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request: never an exception, but for the interpreter's own end."""
        request = dict(request)
        do = request.pop("do")
        try:
            return {"status": "ready", **getattr(self, f"do_{do}")(**request)}
        except NotOfferedError as error:
            return {"status": "not offered", "reason": one_line(str(error))}
        except ImportError as error:
            return {"status": "not installed", "reason": one_line(str(error))}
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            try:
                self.side.check_device()
            except Exception:  # only a new process can use the device again
                print(reason, file=sys.stderr, flush=True)
                os._exit(1)
            return {"status": "failed", "reason": reason}

    def do_machine(self) -> dict[str, Any]:
        """The accelerator, threads and flags of this process."""
        return {"flags": os.environ.get("XLA_FLAGS", ""), **self.side.machine()}

    def do_prepare(
        self, subject: str, workload: dict[str, Any], measure: str, alike: int = 0
    ) -> dict[str, Any]:
        """Compile, compare with the reference, and find out how often to call for a sample.

        The results of `alike` calls of a kernel are compared bit by bit.
        """
        self.ready.pop(subject, None)
        which, shapes = self.subjects[subject], from_json(workload)
        dtype = shapes.dtype or which.dtype
        # On a GPU, JAX multiplies in TF32 where the dtype is float32.
        tf32 = which.tf32 or (self.device == "gpu" and self.kind != TORCH and dtype == "float32")
        data, tangent, reference = _numbers(shapes, dtype, tf32)
        if which.relu:
            shapes = replace(shapes, network=replace(shapes.network, activation="relu"))
        prepared = self.side.prepare(which, shapes, measure, data, tangent)
        record, arrays, wrong = dict(prepared.record), prepared.arrays(), None
        if arrays:
            activation = shapes.network.activation
            record["errors"], wrong = reference.compare(measure, activation, arrays)
            if "copies" in arrays:
                record["errors"]["copies"] = arrays["copies"]
        if subject.startswith(KERNEL):
            record |= {"alike": programs.alike(prepared.call, alike), "calls": alike}
        if wrong is not None:
            return {**record, "status": "failed", "reason": wrong}
        self.ready[subject] = prepared, calibrate(prepared.call, prepared.wait)
        return {"repeats": self.ready[subject][1], **record}

    def do_sample(self, subject: str) -> dict[str, Any]:
        """One sample, in seconds per call."""
        prepared, repeats = self.ready[subject]
        return {"seconds": sample(prepared.call, repeats, prepared.wait)}

    def do_forget(self) -> dict[str, Any]:
        """Give back all that was prepared."""
        self.ready.clear()
        jax.clear_caches()
        return {}


@lru_cache(2)
def _numbers(workload, dtype, tf32):
    """A workload's numbers, a direction and the reference, kept while the workload is the same."""
    data, tangent = draw(workload, dtype), direction(draw(workload, dtype))
    return data, tangent, Reference(workload, data, tangent, dtype, tf32)


def serve(make_bench: Callable[[], Bench]) -> None:
    """Answer requests until there are no more."""
    # Both ends of the pipe, out of reach of everything else in the process.
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.flush()
    os.dup2(2, 1)  # a library's own prints, from C too
    bench = make_bench()
    for line in requests:
        replies.write(json.dumps(bench.answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    serve(lambda: Bench(*sys.argv[1:]))

"""The processes that measure, as the parent sees them: a request is a line, and so is the reply."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from benchmarks.results import cuda_root
from benchmarks.subjects.registry import TWO_DEVICES
from benchmarks.worker import one_line

# Only the end of a process ends what hangs. Seconds for the reply to a request, more for the first
# one, as JAX is imported and the device found, and more for each step of a workload: some ten
# calls of a scan that takes 30 µs a step.
SECONDS = {"cpu": {"prepare": 900.0, "sample": 300.0}, "gpu": {"prepare": 90.0, "sample": 20.0}}
OTHER_SECONDS, START_SECONDS, STEP_SECONDS = 20.0, 120.0, 3e-4
# How long a process that was killed may take to end: the driver can hold it.
KILL_SECONDS = 5.0
# How often a kind of worker may die.
LIVES = 12


class WorkerDiedError(Exception):
    """A worker ended without an answer; the message is its last words."""


class TimeIsUpError(WorkerDiedError):
    """The time of the run was up before the answer came."""

    def __str__(self):
        return "the time of the run was up"


def environment(kind: str, device: str) -> dict[str, str]:
    """What a worker runs under."""
    more = {
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiling is measured
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX and torch share the GPU's memory
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if kind == TWO_DEVICES:
        flag = "--xla_force_host_platform_device_count=2"
        more["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if device == "gpu" and (root := cuda_root()) is not None:
        more["CUDA_ROOT"] = str(root)  # where JAX and Mosaic look for ptxas and libdevice
    return {**os.environ, **more}


class Worker:
    """One process, started at once: by default `python -m benchmarks.worker KIND DEVICE`."""

    def __init__(
        self,
        kind: str,
        device: str = "cpu",
        command: list[str] | None = None,
        seconds: dict[str, float] | None = None,
    ):
        self.seconds, self.answered = seconds or SECONDS[device], False
        self.noise = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "benchmarks.worker", kind, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
            env=environment(kind, device),
            # Ctrl-C in a terminal is for the parent alone, which then ends the workers.
            process_group=0 if os.name == "posix" else None,
        )

    def ask(self, request: dict[str, Any], until: float = float("inf")) -> dict[str, Any]:
        """The reply to a request, before the run is over: WorkerDiedError where there is none."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # a process that has ended shows at the reply
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        limit = self.seconds.get(request["do"], OTHER_SECONDS)
        limit += STEP_SECONDS * request.get("workload", {}).get("T", 0)
        limit += 0.0 if self.answered else START_SECONDS
        end = min(time.monotonic() + limit, until)
        try:
            line = self._line(end)
        except TimeoutError as error:
            self.process.kill()
            if end == until:
                raise TimeIsUpError from error
            raise WorkerDiedError(f"the process gave no answer in {limit:.0f} s") from error
        if not line.endswith(b"\n"):
            raise WorkerDiedError(self._last_words())
        self.answered = True
        return json.loads(line)

    def _line(self, end: float) -> bytes:
        """What the process writes, to the end of a line, or to its own end."""
        assert self.process.stdout
        # Not by a timer that kills: a process that the driver holds keeps its pipe open.
        line, pipe = b"", self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0.0))[0]:
                raise TimeoutError
            part = os.read(pipe, 2**16)
            if not part:
                break
            line += part
        return line

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").strip().splitlines() or ["no words"]
        return one_line(f"the process ended with code {self.process.returncode}: {lines[-1]}")

    def close(self) -> None:
        """End the process: it holds nothing that is worth waiting for."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.noise):
            with suppress(BrokenPipeError):  # a request that was not read any more
                stream.close()


class Crew:
    """The workers of a run, each started when it is first needed, and again when it died.

    After `until`, by `time.monotonic`, nothing is asked, and nothing waited for.
    """

    def __init__(
        self, device: str, make: Callable[..., Worker] = Worker, until: float = float("inf")
    ):
        self.device, self.make, self.until = device, make, until
        self.workers: dict[str, Worker] = {}
        self.deaths: Counter[str] = Counter()

    def call(self, kind: str, /, **request: Any) -> dict[str, Any]:
        """The reply of the worker of a kind to one request; `do` names the request."""
        if time.monotonic() > self.until:
            raise TimeIsUpError
        if self.deaths[kind] >= LIVES:
            raise WorkerDiedError(f"its process died {LIVES} times before")
        worker = self.start(kind)
        try:
            if not worker.answered and request["do"] != "machine":
                # To start takes longer than what hangs may take.
                worker.ask({"do": "machine"}, self.until)
            return worker.ask(request, self.until)
        except WorkerDiedError:
            self.workers.pop(kind).close()
            self.deaths[kind] += 1
            raise

    def start(self, kind: str) -> Worker:
        """The worker of a kind, which may still be starting."""
        if kind not in self.workers:
            self.workers[kind] = self.make(kind, self.device)
        return self.workers[kind]

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.process.kill()  # all at once: each may take its time
        for worker in self.workers.values():
            worker.close()

"""The processes that measure, as the parent sees them: a request is a line, and so is the reply."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from benchmarks.machine import cuda_root
from benchmarks.text import one_line, without_directories

JAX, TWO_DEVICES, ONE_KERNEL = "jax", "jax, two host devices", "jax, one kernel per small loop"
COMMAND_BUFFERS, KERNELS = "jax, loops in command buffers", "jax, kernels"
TORCH = "torch"

# XLA reads its flags once, when it starts: whatever differs in them runs in another process.
XLA_FLAGS = {
    TWO_DEVICES: "--xla_force_host_platform_device_count=2",
    ONE_KERNEL: (
        "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000"
    ),
    COMMAND_BUFFERS: (
        "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true"
    ),
}  # fmt: skip
KINDS = {
    "cpu": (JAX, TWO_DEVICES, ONE_KERNEL, TORCH),
    # What a kernel breaks, it breaks for its own process alone.
    "gpu": (KERNELS, JAX, COMMAND_BUFFERS, TORCH),
}
# On a GPU only the end of a process ends what hangs. Seconds for a reply, by what is requested,
# and more for the first one: JAX is imported, and the device found.
SECONDS = {"compile": 90.0, "prepare": 30.0}
OTHER_SECONDS, START_SECONDS = 20.0, 120.0
# More for each step of a workload: some ten calls of a scan that takes 30 µs a step.
STEP_SECONDS = 3e-4
# How long a process that was killed may take to end: the driver can hold it.
KILL_SECONDS = 5.0
# How often a kind of worker may die; on a GPU the run leaves alone what makes them die.
LIVES = {"cpu": 4, "gpu": 99}
# NumPy's threads in each of several processes that compute references and compile side by side.
BLAS_THREADS = "2"


class WorkerDiedError(Exception):
    """A worker ended without an answer; the message is its last words."""


class TimeIsUpError(WorkerDiedError):
    """The time of the run was up before the answer came."""

    def __init__(self):
        super().__init__("the time of the run was up")


def environment(
    kind: str, device: str, base: Mapping[str, str] = os.environ, cache: str | None = None
) -> dict[str, str]:
    """What a worker runs under.

    Args:
      kind: one of KINDS.
      device: "cpu" or "gpu".
      base: the environment to add to.
      cache: a directory in which XLA keeps how it tuned a product: the next process that has the
        same one need not tune it.

    Returns:
      The whole environment.
    """
    flags = [base.get("XLA_FLAGS", ""), XLA_FLAGS.get(kind, "")]
    if cache is not None:
        flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={cache}")
    on_gpu = {}
    if device == "gpu":
        names = "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"
        on_gpu = dict.fromkeys(names, BLAS_THREADS)
        if (root := cuda_root()) is not None:
            on_gpu["CUDA_ROOT"] = str(root)  # where JAX and Mosaic look for ptxas and libdevice
    return {
        **base,
        **on_gpu,
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",
        # Compiling is measured, so nothing may come from a disk.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # JAX and torch share the GPU's memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "KERAS_BACKEND": "jax",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


class Worker:
    """One process of `benchmarks.worker`, started at once.

    Args:
      kind: one of KINDS.
      device: "cpu" or "gpu".
      command: what to run; by default `python -m benchmarks.worker KIND DEVICE`.
      cache: see `environment`.
      seconds: for the reply to each request, as SECONDS, and to others; by default none on a CPU.
    """

    def __init__(
        self,
        kind: str,
        device: str = "cpu",
        command: list[str] | None = None,
        cache: str | None = None,
        seconds: Mapping[str, float] | None = None,
    ):
        self.seconds = SECONDS if seconds is None and device == "gpu" else seconds
        self.answered: set[object] = set()
        self.noise = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "benchmarks.worker", kind, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise,
            env=environment(kind, device, cache=cache), encoding="utf-8",
            # Ctrl-C in a terminal is for the parent alone, which then ends the workers.
            process_group=0 if os.name == "posix" else None,
        )  # fmt: skip

    def send(self, **request: Any) -> None:
        """Ask; a process that has ended shows at the reply."""
        assert self.process.stdin
        self.request = request
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def receive(self, until: float | None = None) -> dict:
        """The reply to what was sent last.

        Args:
          until: when the run is over, by `time.monotonic`.

        Returns:
          The reply.

        Raises:
          WorkerDiedError: the process ended before it answered, or was killed for taking too long.
          TimeIsUpError: it was killed because the run is over.
        """
        limit, left = self._limit(), None if until is None else max(until - time.monotonic(), 0)
        wait = min((seconds for seconds in (limit, left) if seconds is not None), default=None)
        try:
            line = self._line(wait)
        except TimeoutError as error:
            self.process.kill()
            if wait == left:
                raise TimeIsUpError from error
            raise WorkerDiedError(f"the process gave no answer in {limit:.0f} s") from error
        if not line.endswith(b"\n"):
            raise WorkerDiedError(self._last_words())
        self.answered.add(self.request["do"])
        return json.loads(line)

    def _line(self, wait: float | None) -> bytes:
        """What the process writes, to the end of a line, or to its own end."""
        assert self.process.stdout
        # Not by a timer that kills: a process that the driver holds keeps its pipe open.
        line, pipe = b"", self.process.stdout.fileno()
        end = None if wait is None else time.monotonic() + wait
        while not line.endswith(b"\n"):
            if end is not None:
                left = max(end - time.monotonic(), 0)
                if not select.select([pipe], [], [], left)[0]:
                    raise TimeoutError
            part = os.read(pipe, 2**16)
            if not part:
                break
            line += part
        return line

    def _limit(self) -> float | None:
        if self.seconds is None:
            return None
        do, workload = self.request["do"], self.request.get("workload", {})
        limit = self.seconds.get(do, OTHER_SECONDS) + STEP_SECONDS * workload.get("T", 0)
        if not self.answered:
            limit += START_SECONDS
        elif do == "prepare" and "compile" not in self.answered:
            limit += self.seconds["compile"]  # a process that was started again
        return limit

    def _last_words(self) -> str:
        try:
            code = self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "the process closed its output and did not end"
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = f": {without_directories(lines[-1].strip())}" if lines else ""
        return f"the process {how}{said}"[:200]

    def close(self) -> None:
        """End the process: it holds nothing that is worth waiting for."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except BrokenPipeError:  # a request that was not read any more
                pass
        self.noise.close()


class Crew:
    """The workers of a run, each started when it is first needed, and again when it died.

    Args:
      device: "cpu" or "gpu".
      make: starts a worker.
      lives: how often a kind of worker may die.
      until: when the run is over, by `time.monotonic`. On a GPU nothing is requested after it, and
        nothing waited for; on a CPU it is for others to ask `late`.
    """

    def __init__(
        self,
        device: str = "cpu",
        make: Callable[..., Worker] = Worker,
        lives: int | None = None,
        until: float | None = None,
    ):
        self.device, self.make, self.until = device, make, until
        self.workers: dict[str, Worker] = {}
        self.lives: dict[str, int] = {}
        self.most = lives or LIVES[device]
        self.cache = None
        if device == "gpu":
            # A compiler that outlives its process may still write into it.
            self.cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def call(self, kind: str, /, **request: object) -> dict:
        """One request to the worker of a kind.

        Args:
          kind: which worker.
          **request: what it reads; `do` names the request.

        Returns:
          The reply.

        Raises:
          WorkerDiedError: it died, now or too often before.
          TimeIsUpError: the run is over.
        """
        reply = self.call_each({kind: request})[kind]
        if isinstance(reply, WorkerDiedError):
            raise reply
        return reply

    def call_each(
        self, requests: Mapping[str, Mapping[str, object]]
    ) -> dict[str, dict | WorkerDiedError]:
        """A request to each of several workers, who work on them side by side.

        Args:
          requests: by kind.

        Returns:
          By kind the reply, or why there is none.
        """
        replies: dict[str, dict | WorkerDiedError] = {}
        fresh = []
        for kind, request in requests.items():
            try:
                self._start(kind)
            except WorkerDiedError as error:
                replies[kind] = error
                continue
            if not self.workers[kind].answered and request["do"] != "machine":
                fresh.append(kind)
        if fresh and self.device == "gpu":
            # To start takes longer than what hangs may take.
            machines = self.call_each({kind: {"do": "machine"} for kind in fresh})
            replies |= {k: r for k, r in machines.items() if isinstance(r, WorkerDiedError)}
        left = [kind for kind in requests if kind not in replies]
        for kind in left:
            self.workers[kind].send(**requests[kind])
        for kind in left:
            try:
                replies[kind] = self.workers[kind].receive(self._end())
            except WorkerDiedError as error:
                self.workers.pop(kind).close()
                replies[kind] = error
        return replies

    def _end(self) -> float | None:
        return self.until if self.device == "gpu" else None

    def start(self, kinds: Iterable[str]) -> None:
        """Start workers side by side; what goes wrong shows at their first call."""
        for kind in kinds:
            with suppress(WorkerDiedError):
                self._start(kind)

    def late(self) -> bool:
        """Whether the run is over."""
        return self.until is not None and time.monotonic() > self.until

    def _start(self, kind: str) -> None:
        if self.device == "gpu" and self.late():
            raise TimeIsUpError
        if kind not in self.workers:
            if self.lives.setdefault(kind, self.most) == 0:
                raise WorkerDiedError(f"its process died {self.most} times before")
            self.lives[kind] -= 1
            cache = {} if self.cache is None else {"cache": self.cache.name}
            try:
                self.workers[kind] = self.make(kind, self.device, **cache)
            except OSError as error:
                raise WorkerDiedError(one_line(error)) from error

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.process.kill()  # all at once: each may take its time
        for worker in self.workers.values():
            worker.close()
        if self.cache is not None:
            self.cache.cleanup()

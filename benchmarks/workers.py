"""The processes that measure, as the parent sees them: a request is a line, and so is the reply."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress

from benchmarks.text import one_line, without_directories

JAX, TWO_DEVICES, ONE_KERNEL = "jax", "jax, two host devices", "jax, one kernel per small loop"
COMMAND_BUFFERS, NUMERICS = "jax, loops in command buffers", "jax, numerics"
TORCH = "torch"

# XLA reads its flags once, when it starts: whatever differs in them runs in another process.
XLA_FLAGS = {
    JAX: "",
    TWO_DEVICES: "--xla_force_host_platform_device_count=2",
    ONE_KERNEL: (
        "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000"
    ),
    COMMAND_BUFFERS: (
        "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_command_buffer_unroll_loops=true"
    ),
    NUMERICS: "",
    TORCH: "",
}  # fmt: skip
KINDS = {
    "cpu": (JAX, TWO_DEVICES, ONE_KERNEL, TORCH),
    "gpu": (JAX, COMMAND_BUFFERS, NUMERICS, TORCH),
}
# What a GPU hangs at, only the end of the process ends: no request should take half as long.
GPU_SECONDS, GPU_LIVES = 45.0, 6


class WorkerDiedError(Exception):
    """A worker ended without an answer; the message is its last words."""


def environment(kind: str, device: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a worker runs under.

    Args:
      kind: one of KINDS.
      device: "cpu" or "gpu".
      base: the environment to add to.

    Returns:
      The whole environment.
    """
    flags = f"{base.get('XLA_FLAGS', '')} {XLA_FLAGS[kind]}".strip()
    return {
        **base,
        "XLA_FLAGS": flags,
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
      limit: seconds for a reply; by default none on a CPU.
    """

    def __init__(
        self,
        kind: str,
        device: str = "cpu",
        command: list[str] | None = None,
        limit: float | None = None,
    ):
        self.kind, self.late = kind, False
        self.limit = GPU_SECONDS if limit is None and device == "gpu" else limit
        self.noise = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "benchmarks.worker", kind, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise,
            env=environment(kind, device), encoding="utf-8",
            # Ctrl-C in a terminal is for the parent alone, which then ends the workers.
            process_group=0 if os.name == "posix" else None,
        )  # fmt: skip

    def call(self, **request: object) -> dict:
        """One request and its reply.

        Args:
          **request: what the worker reads; `do` names the request.

        Returns:
          The reply.

        Raises:
          WorkerDiedError: the process ended before it answered, or was ended for taking too long.
        """
        if self.limit is None:
            return self._ask(request)
        timer = threading.Timer(self.limit, self._end)
        timer.start()
        try:
            return self._ask(request)
        finally:
            timer.cancel()

    def _end(self) -> None:
        self.late = True
        self.process.kill()

    def _ask(self, request: dict[str, object]) -> dict:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDiedError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self.process.wait()
        if self.late:
            return f"the process gave no answer in {self.limit:.0f} s"
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = f": {without_directories(lines[-1].strip())}" if lines else ""
        return f"the process {how}{said}"[:200]

    def close(self) -> None:
        """End the process: it holds nothing that is worth waiting for."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except BrokenPipeError:  # a request that was not read any more
                pass
        self.noise.close()


class Crew:
    """The workers of a run, each started when it is first needed, and again when it died."""

    def __init__(self, device: str = "cpu", make=Worker, lives: int | None = None):
        self.device, self.make = device, make
        self.workers: dict[str, Worker] = {}
        self.lives: dict[str, int] = {}
        self.most = lives or (GPU_LIVES if device == "gpu" else 4)

    def call(self, kind: str, /, **request: object) -> dict:
        """One request to the worker of a kind.

        Args:
          kind: which worker.
          **request: what it reads.

        Returns:
          The reply.

        Raises:
          WorkerDiedError: it died, now or too often before.
        """
        self._start(kind)
        try:
            return self.workers[kind].call(**request)
        except WorkerDiedError:
            self.workers.pop(kind).close()
            raise

    def start(self, kinds: Iterable[str]) -> None:
        """Start workers side by side; what goes wrong shows at their first call."""
        for kind in kinds:
            with suppress(WorkerDiedError):
                self._start(kind)

    def _start(self, kind: str) -> None:
        if kind not in self.workers:
            if self.lives.setdefault(kind, self.most) == 0:
                raise WorkerDiedError(f"its process died {self.most} times before")
            self.lives[kind] -= 1
            try:
                self.workers[kind] = self.make(kind, self.device)
            except OSError as error:
                raise WorkerDiedError(one_line(error)) from error

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

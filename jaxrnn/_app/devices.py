r"""The devices of a run, its processes and their signals.

All devices of all processes form one mesh: "data" splits the batch, and "model" the hidden units
(`--model-devices M`, 1 by default). Several hosts run the same command, with text and run directory
on storage that all of them see, which the workers of a TPU pod do not have by default. Process 0 is
the coordinator, at an address that the others reach, and writes the metrics:

    jaxrnn train text.txt --out /shared/run --coordinator host0:8476 --processes 4 --process 0
    jaxrnn train text.txt --out /shared/run --processes auto
    jaxrnn train --resume /shared/run --coordinator host0:8476 --processes 2 --process 0
    gcloud compute tpus tpu-vm ssh NAME --worker=all \
        --command='jaxrnn train text.txt --out /shared/run --processes auto'

The first line is for host 0; on the others `--process` is 1 to 3. With `--processes auto` JAX finds
the coordinator and numbers itself: on a TPU pod (`gcloud` needs `--zone` if none is configured),
under Slurm (`srun`) and Open MPI (`mpirun`; version 5 needs jax 0.11 and `mpi4py`). Under these two
a process has one device, so start as many per host as it has GPUs: `srun --ntasks-per-node=8`. If a
process fails, the others end, at once if the connection breaks and within half a minute if it
hangs, with a line that says so (or JAX's own, that another task died). `--resume` continues from
the last checkpoint, with any number of processes or devices. Runs of several processes agree with
those of one to rounding. They were tested on the CPU of one machine, with Gloo, and nowhere else.

What limits scaling, of which nothing was measured: over "data" an update sends one all-reduce of
all gradients and the loss, after the loops. Over "model" it sends an all-gather of h_t in every
step and an all-reduce of Wᵀ δ_t in every step back, `[B / data, H]` each, so the latencies of 2T
collectives add up; after the loops, an all-gather of the states and an all-reduce of the logits. An
update is at least 2T steps, one after the other, so more devices are for larger batches. "model"
pays if W does not fit on the chip and each device has few sequences, on fast links.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn._api.checks import InputError, bad_input
from jaxrnn._app.directory import first_line
from jaxrnn.train import DATA as DATA

MODEL = "model"
# How each parameter, and the optimiser's state of it, is split.
SPLIT = {"U": P(MODEL, None), "W": P(MODEL, None), "b": P(MODEL), "leak": P(MODEL),
         "V": P(None, MODEL)}  # fmt: skip
# Seconds: without a heartbeat before a process is lost; to wait for all processes to start, and for
# the first to read the text; that the first outlives the others, which JAX aborts when it ends.
HEARTBEAT, PATIENCE, PREPARATION, LAST = 30, 300, 24 * 3600, 5

_HANG_UP = getattr(signal, "SIGHUP", None)  # not everywhere
SIGNALS = tuple(each for each in (signal.SIGINT, signal.SIGTERM, _HANG_UP) if each is not None)


def use_cores() -> None:
    """Make each CPU core a device, unless the user chose their number or JAX has started."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
        with suppress(RuntimeError):
            cores = len(affinity(0)) if affinity else os.cpu_count()
            jax.config.update("jax_num_cpu_devices", cores or 1)


def start() -> None:
    """Initialise JAX's devices; an InputError if JAX_PLATFORMS names missing ones."""
    try:
        jax.devices()
    except Exception as error:  # of many types
        got = f"{getattr(jax.config, 'jax_platforms', None) or 'none named'}: {first_line(error)}"
        bad_input("JAX_PLATFORMS", "devices that JAX can use", got)


class Placement:
    """How the arrays of a run are split.

    The hidden units over `model` devices, the batch over the others: in one process over as many as
    divide it, with several processes over all.
    """

    def __init__(self, batch_size: int, hidden_size: int, model: int = 1):
        devices, processes = jax.devices(), jax.process_count()
        if len(devices) % model:
            bad_input("--model-devices", f"a divisor of the {len(devices)} devices", model)
        if hidden_size % model:
            bad_input("--model-devices", f"a divisor of --hidden-size {hidden_size}", model)
        data = len(devices) // model
        if processes == 1:
            data = math.gcd(batch_size, data)
        elif batch_size % data:
            expected = f"a multiple of {data}, the number of devices that share it"
            bad_input("--batch-size", expected, batch_size)
        self.devices = data * model
        self.mesh = jax.make_mesh(
            (data, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices[: data * model]
        )

    def __str__(self) -> str:
        count, processes = self.devices, jax.process_count()
        text = f"{count} {jax.devices()[0].platform} device{'s' * (count > 1)}"
        text += f" in {processes} processes" if processes > 1 else ""
        for axis, what in ((DATA, "the batch"), (MODEL, "hidden units")):
            if self.mesh.shape[axis] > 1:
                text += f", {what} over {self.mesh.shape[axis]}"
        return text

    def of_state(self, state: Any) -> Any:
        def sharding(path, x):
            names = [getattr(part, "name", "") for part in path]
            spec = P(DATA, MODEL) if names[0] == "h" else SPLIT.get(names[-1], P())
            return NamedSharding(self.mesh, spec if len(spec) == np.ndim(x) else P())

        return jax.tree_util.tree_map_with_path(sharding, state)

    def put_state(self, state: Any) -> Any:
        return jax.tree.map(lambda x, how: _place(np.asarray(x), how), state, self.of_state(state))

    def split(self, x: Any, axis: int) -> jax.Array:
        """Split a host array along its batch axis, if that is divisible; ids become int32."""
        data = DATA if x.shape[axis] % self.mesh.shape[DATA] == 0 else None
        ids = np.issubdtype(x.dtype, np.integer)
        sharding = NamedSharding(self.mesh, P(*(None,) * axis, data))
        return _place(x, sharding, np.int32 if ids else x.dtype)


def _place(x, sharding, dtype=None):
    # Unlike device_put, this does not compare the arrays of all processes.
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.asarray(x[part], dtype))


class LostError(Exception):
    def __init__(self, error: BaseException):
        super().__init__(f"lost another process, or the connection to it ({first_line(error)})")


class RefusedError(InputError):
    """A run that cannot begin, raised in all processes."""


def check_processes(args: Any) -> bool:
    """Whether the options ask for several processes; an InputError if they are incomplete."""
    several = args.coordinator is not None or args.processes is not None
    if several and args.processes != "auto" and None in (
        args.coordinator, args.processes, args.process
    ):  # fmt: skip
        bad_input("--coordinator", "--processes N and --process I with it, or auto", "not both")
    if several and not (args.out or args.resume):
        bad_input("--out", "a directory that all processes see", "none")
    if not several and args.process is not None:
        bad_input("--process", "--coordinator HOST:PORT with it", "none")
    if isinstance(args.processes, int) and (args.process or 0) >= args.processes:
        bad_input("--process", f"a number from 0 to {args.processes - 1}", args.process)
    return several


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; all None if JAX detects the cluster (TPU pods, Slurm)."""
    if coordinator is not None:
        _check_address(coordinator, listens=process == 0)
    # The service would handle SIGTERM itself, and report every lost process.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator or "the address that JAX has detected"
    expected = f"all processes at {where} within {PATIENCE} s"

    def give_up():
        complain(f"--coordinator: expected {expected}, but not all came")
        os._exit(2)

    # JAX would abort with a C++ stack trace, and while it waits nothing can be raised here.
    alarm = threading.Timer(PATIENCE, give_up)
    alarm.daemon = True
    alarm.start()
    # A detected cluster would also assign the devices.
    by_hand = "deactivate" if None not in (coordinator, processes, process) else None
    try:
        with handled(signal.SIG_DFL):  # Python cannot raise while JAX waits
            jax.distributed.initialize(
                coordinator, processes, process, cluster_detection_method=by_hand,
                initialization_timeout=PATIENCE + 60, heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        problem = f"cannot join the other processes at {where}: {first_line(error)}"
        raise InputError(f"--coordinator: {problem}") from error
    finally:
        alarm.cancel()
    start()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        got = ", ".join(str(devices[process]) for process in sorted(devices))
        raise RefusedError(f"--processes: expected as many devices in each process, got {got}")


def _check_address(coordinator, listens):
    host, _, port = coordinator.rpartition(":")
    try:
        if not host or not 0 < int(port) < 2**16:
            raise ValueError("a port is a number below 65536")
        if listens:  # if it cannot, JAX would end in a segmentation fault
            socket.create_server(("", int(port))).close()
    except (OSError, ValueError) as error:
        expected = f"HOST:PORT{' with a port to listen on' * listens}"
        bad_input("--coordinator", expected, f"{coordinator} ({error})")


def complain(line: object) -> None:
    print(f"jaxrnn train: error: {line}", file=sys.stderr, flush=True)


def is_first() -> bool:
    return jax.process_index() == 0


def are_several() -> bool:
    return jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Wait until every process has called this; a LostError if one does not."""
    # Not by a collective: the first of these times out after half a minute.
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    if barrier is not None:
        try:
            with handled(signal.SIG_DFL):
                barrier(key=f"jaxrnn {name}", timeout_ms=PREPARATION * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise LostError(error) from error


def largest(number: int) -> int:
    """The largest of the numbers of all processes, which must call this together."""
    if not are_several():
        return number
    try:
        return int(np.max(multihost_utils.process_allgather(np.int32(number))))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise LostError(error) from error


def agree(error: Exception | None, alike: Mapping[str, object]) -> None:
    """Require that no process has an error and that values are alike; all must call this together.

    A RefusedError in all of them if one has an error or if a value of `alike` (message -> value)
    differs; a LostError if a process is lost.
    """
    failed = largest(error is not None)
    if error is not None:
        raise RefusedError(error) from error
    if failed:
        raise RefusedError("--process: another process cannot start this run; its message says why")
    for message, value in alike.items():
        mark = zlib.crc32(repr(value).encode()) >> 1
        if largest(mark) != -largest(-mark):
            raise RefusedError(f"{message}, got {value} here")


def leave(code: int) -> NoReturn:
    """Exit at once, because an orderly exit would wait for the other processes."""
    with suppress(OSError):
        sys.stdout.flush()
    if is_first():
        time.sleep(LAST)
    os._exit(code)


@contextmanager
def handled(handler: Any) -> Iterator[Sequence[int]]:
    """Handle Ctrl-C, SIGTERM and a closed terminal with this handler; yield those signals."""
    # Under nohup, SIGHUP stays ignored.
    ours = [n for n in SIGNALS if n != _HANG_UP or signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, handler) for number in ours]
    try:
        yield ours
    finally:
        for number, old in zip(ours, before, strict=True):
            signal.signal(number, old)


def raising(number: int, frame: Any) -> NoReturn:
    """A signal handler that raises, so that `finally` clauses run."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """A function that returns the signal that asked to stop, or 0; a second signal raises."""
    received = 0

    def first(number, frame):
        nonlocal received
        received = number
        for each in ours:
            signal.signal(each, raising)

    with handled(first) as ours:
        yield lambda: received

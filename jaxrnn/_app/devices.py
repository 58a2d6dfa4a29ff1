"""The devices of a run, over which batch and weights are split, its processes, and their signals.

All devices of all processes are one mesh. What a process cannot do ends the others.
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

# The other axis of the mesh, over which hidden units are split.
MODEL = "model"
# How each array of the parameters, and of what an optimiser keeps for it, is split.
SPLIT = {"U": P(MODEL, None), "W": P(MODEL, None), "b": P(MODEL), "leak": P(MODEL),
         "V": P(None, MODEL)}  # fmt: skip
# Seconds: after which a process that is not heard of is lost; to wait for all to start, and for the
# first one to read the text; by which it ends after the others, which JAX aborts when it is gone.
HEARTBEAT, PATIENCE, PREPARATION, LAST = 30, 300, 24 * 3600, 5

_HANG_UP = getattr(signal, "SIGHUP", None)  # not everywhere
SIGNALS = tuple(each for each in (signal.SIGINT, signal.SIGTERM, _HANG_UP) if each is not None)


def use_cores() -> None:
    """Make each core of a CPU a device, unless their number has been chosen or JAX has started."""
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
        with suppress(RuntimeError):
            cores = len(affinity(0)) if affinity else os.cpu_count()
            jax.config.update("jax_num_cpu_devices", cores or 1)


def start() -> None:
    """Let JAX find its devices; an InputError where JAX_PLATFORMS names what is not there."""
    try:
        jax.devices()
    except Exception as error:  # of many kinds, by what is missing
        got = f"{getattr(jax.config, 'jax_platforms', None) or 'none named'}: {first_line(error)}"
        bad_input("JAX_PLATFORMS", "devices that JAX can use", got)


class Placement:
    """Where the arrays of a run are.

    The hidden units are split over `model` devices, the batch over the others: in one process over
    as many as divide it, of several processes over all.
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
            expected = f"a multiple of {data}, over so many devices it is split"
            bad_input("--batch-size", expected, batch_size)
        self.devices = data * model
        self.mesh = jax.make_mesh(
            (data, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices[: data * model]
        )

    def __str__(self) -> str:
        count, processes = self.devices, jax.process_count()
        said = f"{count} {jax.devices()[0].platform} device{'s' * (count > 1)}"
        said += f" in {processes} processes" if processes > 1 else ""
        for axis, what in ((DATA, "the batch"), (MODEL, "hidden units")):
            if self.mesh.shape[axis] > 1:
                said += f", {what} over {self.mesh.shape[axis]}"
        return said

    def of_state(self, state: Any) -> Any:
        """How a `TrainState`, or one of shapes, is split: a tree of shardings."""

        def sharding(path, x):
            names = [getattr(part, "name", "") for part in path]
            spec = P(DATA, MODEL) if names[0] == "h" else SPLIT.get(names[-1], P())
            return NamedSharding(self.mesh, spec if len(spec) == np.ndim(x) else P())

        return jax.tree_util.tree_map_with_path(sharding, state)

    def put_state(self, state: Any) -> Any:
        """A state of which every process has the same numbers, split over the devices."""
        return jax.tree.map(lambda x, how: _place(np.asarray(x), how), state, self.of_state(state))

    def split(self, x: Any, axis: int) -> jax.Array:
        """An array of the host, split along the batch's axis if that divides; ids as int32."""
        data = DATA if x.shape[axis] % self.mesh.shape[DATA] == 0 else None
        ids = np.issubdtype(x.dtype, np.integer)
        sharding = NamedSharding(self.mesh, P(*(None,) * axis, data))
        return _place(x, sharding, np.int32 if ids else x.dtype)


def _place(x, sharding, dtype=None):
    # Each process reads its own part, and none asks the others whether theirs is the same.
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.asarray(x[part], dtype))


class LostError(Exception):
    """Another process is gone, or the way to it."""

    def __init__(self, error: BaseException):
        super().__init__(f"another process is gone, or the way to it ({first_line(error)})")


class RefusedError(InputError):
    """A run that cannot begin, in all processes alike."""


def check_processes(args: Any) -> bool:
    """Whether several processes are asked for, with all that they need."""
    several = args.coordinator is not None or args.processes is not None
    if several and args.processes != "auto" and None in (
        args.coordinator, args.processes, args.process
    ):  # fmt: skip
        bad_input("--coordinator", "--processes N and --process I with it, or auto", "less")
    if several and not (args.out or args.resume):
        bad_input("--out", "a directory that all processes see", "none")
    if not several and args.process is not None:
        bad_input("--process", "--coordinator HOST:PORT with it", "none")
    if isinstance(args.processes, int) and (args.process or 0) >= args.processes:
        bad_input("--process", f"a number from 0 to {args.processes - 1}", args.process)
    return several


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one process of several; all None where JAX finds out by itself (TPU pods, Slurm)."""
    if coordinator is not None:
        _check_address(coordinator, listens=process == 0)
    # It would take SIGTERM for itself, and complain of every loss.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator or "what JAX knows of this cluster"
    expected = f"all processes at {where} within {PATIENCE} s"

    def give_up():
        complain(f"--coordinator: expected {expected}, not all came")
        os._exit(2)

    # JAX would abort, with a stack of C++; and while it waits nothing can be raised here.
    alarm = threading.Timer(PATIENCE, give_up)
    alarm.daemon = True
    alarm.start()
    # All that a cluster knows of its processes it would say of their devices too.
    by_hand = "deactivate" if None not in (coordinator, processes, process) else None
    try:
        with handled(signal.SIG_DFL):  # which end a process where Python can raise nothing
            jax.distributed.initialize(
                coordinator, processes, process, cluster_detection_method=by_hand,
                initialization_timeout=PATIENCE + 60, heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        said = f"cannot join the others by {where}: {first_line(error)}"
        raise InputError(f"--coordinator: {said}") from error
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
        if listens:  # JAX would end in a fault of memory where it cannot
            socket.create_server(("", int(port))).close()
    except (OSError, ValueError) as error:
        expected = f"HOST:PORT{' with a port to listen on' * listens}"
        bad_input("--coordinator", expected, f"{coordinator} ({error})")


def complain(line: object) -> None:
    """Say on standard error what keeps the command from its end."""
    print(f"jaxrnn train: error: {line}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether the run has other processes."""
    return jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Return when every process has come here; a LostError where one will not."""
    # Not by a collective of the devices: the first of these gives up after half a minute.
    import orbax.checkpoint as ocp

    barrier = ocp.multihost.get_barrier_sync_fn()
    if barrier is not None:
        try:
            with handled(signal.SIG_DFL):
                barrier(key=f"jaxrnn {name}", timeout_ms=PREPARATION * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise LostError(error) from error


def largest(number: int) -> int:
    """The largest of the numbers that all processes have; each must ask at the same place."""
    if not are_several():
        return number
    try:
        return int(np.max(multihost_utils.process_allgather(np.int32(number))))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise LostError(error) from error


def agree(error: Exception | None, alike: Mapping[str, object]) -> None:
    """Go on together or not at all; each must ask at the same place, soon after a `wait_for_all`.

    A RefusedError in all of them if one has an error, or if they have something not alike: by what
    is said then. A LostError if one did not come.
    """
    failed = largest(error is not None)
    if error is not None:
        raise RefusedError(error) from error
    if failed:
        raise RefusedError("--process: another process cannot begin this run, and says why")
    for said, value in alike.items():
        mark = zlib.crc32(repr(value).encode()) >> 1
        if largest(mark) != -largest(-mark):
            raise RefusedError(f"{said}, got {value} here")


def leave(code: int) -> NoReturn:
    """End without a word to the others, for a tidy end would wait for them; so they end as well."""
    with suppress(OSError):
        sys.stdout.flush()
    if is_first():
        time.sleep(LAST)
    os._exit(code)


@contextmanager
def handled(handler: Any) -> Iterator[Sequence[int]]:
    """With this handler of Ctrl-C, SIGTERM and a terminal that closes, of the signals it yields."""
    # But not of what nohup asks to be ignored.
    ours = [n for n in SIGNALS if n != _HANG_UP or signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, handler) for number in ours]
    try:
        yield ours
    finally:
        for number, old in zip(ours, before, strict=True):
            signal.signal(number, old)


def raising(number: int, frame: Any) -> NoReturn:
    """The handler that raises where the program is, so that what has begun is undone."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Which signal has asked to stop, 0 if none; a second one raises where the program is."""
    asked = 0

    def first(number, frame):
        nonlocal asked
        asked = number
        for each in ours:
            signal.signal(each, raising)

    with handled(first) as ours:
        yield lambda: asked

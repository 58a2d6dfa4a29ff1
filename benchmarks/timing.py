"""Seconds per call, and how much memory one call needs at its peak."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A sample lasts at least this long, so that the clock and its reading do not matter.
SAMPLE_SECONDS = 5e-3


def seconds(
    call: Callable[[], Any], repeats: int = 1, wait: Callable[[Any], object] | None = None
) -> float:
    """Seconds per call, over so many calls.

    Python's collector waits: with so many libraries imported, one full collection takes longer
    than a sample, and would fall to whoever is measured just then.

    Args:
      call: computes once; without `wait`, returns when that is done.
      repeats: how often.
      wait: returns when the result of a call is there. Calls are queued then, as a GPU takes
        them: to start one takes no time while another runs.
    """
    gc.disable()
    try:
        start, result = time.perf_counter(), None
        for _ in range(repeats):
            result = call()
        if wait is not None:
            wait(result)
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def calibrate(
    call: Callable[[], Any],
    wait: Callable[[Any], object] | None = None,
    at_least: float = SAMPLE_SECONDS,
) -> tuple[int, float]:
    """How often to call for a sample of at least so many seconds.

    Returns:
      (repeats, seconds per call as found on the way).
    """
    seconds(call, 1, wait)  # the first call allocates
    repeats, found = 1, seconds(call, 1, wait)
    while repeats * found < at_least:
        # A little more than it takes, at most ten times more: the first guess is a rough one.
        repeats = min(10 * repeats, int(1.2 * at_least / max(found, 1e-9)) + 1)
        found = seconds(call, repeats, wait)
    return repeats, found


def sample(
    call: Callable[[], Any], repeats: int, wait: Callable[[Any], object] | None = None
) -> float:
    """One sample. Where calls are short one goes untimed: it finds another's data in the caches."""
    if repeats > 1:
        seconds(call, 1, wait)
    return seconds(call, repeats, wait)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far one call raises the memory of this process above what it holds at rest.

    Linux's own high-water mark; the result of the call is part of it. None elsewhere.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    try:
        # What the allocator keeps from earlier calls would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # the high-water mark becomes what is resident now
        before = _kib(status, "VmRSS")
        call()
        return 1024 * max(_kib(status, "VmHWM") - before, 0)
    except (OSError, AttributeError, TypeError):
        return None


def _kib(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), re.M)
    if found is None:
        raise OSError(f"{status} has no {name}")
    return int(found[1])

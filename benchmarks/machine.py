"""What the measurements depend on and a reader must know: the machine, versions, threads."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTIONS = (
    "jax", "jaxlib", "numpy", "jaxrnn", "flax", "dm-haiku", "equinox", "keras", "torch",
)  # fmt: skip


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's model, without the marks and the frequency."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM|tm|r)\)|\bCPU\b|@.*$", " ", name).split())


def memory_gib() -> float | None:
    """The machine's memory, or None where it cannot be asked."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def device(gpu: str | None = None) -> dict:
    """What was measured on; nothing that names this very machine or its user.

    Args:
      gpu: the accelerator's name, where the run is on one.

    Returns:
      processor, cores, memory_gib and gpu.
    """
    return {"processor": processor(), "cores": cores(), "memory_gib": memory_gib(), "gpu": gpu}


def slug(device: dict) -> str:
    """A directory's name for a device, such as `cpu-amd-epyc-2-cores` or `gpu-nvidia-h200`."""
    if device["gpu"]:
        text = f"gpu {device['gpu']}"
    else:
        text = f"cpu {device['processor']} {device['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(device: dict) -> str:
    """The device in words, for a table's caption."""
    count = device["cores"]
    cpu = f"{count} core{'s' if count > 1 else ''} of {device['processor']}"
    return f"{device['gpu']} ({cpu})" if device["gpu"] else cpu


def versions() -> dict[str, str | None]:
    """The version of Python and of each distribution; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found

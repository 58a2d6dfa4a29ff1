"""What the measurements depend on and a reader must know: the machine, versions, threads."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTIONS = (
    "jax", "jaxlib", "numpy", "jaxrnn", "flax", "dm-haiku", "equinox", "keras", "torch",
)  # fmt: skip
ON_GPU = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

# Where NVIDIA's installer puts toolkits.
SYSTEM = Path("/usr/local")


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


def versions(names: Iterable[str] = DISTRIBUTIONS) -> dict[str, str | None]:
    """The version of Python and of each distribution; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def gpu_versions() -> dict[str, str | None]:
    """`versions`, and those of JAX's CUDA plugin, of cuDNN, of the driver and of ptxas."""
    plugins = {name: found for name, found in versions(ON_GPU).items() if found}
    root = cuda_root()
    ptxas = root / "bin" / "ptxas" if root else "ptxas"
    said = _output(str(ptxas), "--version")
    release = re.search(r"release [\d.]+, V([\d.]+)", said)
    query = "--query-gpu=driver_version", "--format=csv,noheader"
    driver = _output("nvidia-smi", *query).splitlines()
    also = {"driver": driver[0] if driver else None, "ptxas": release[1] if release else None}
    return {**versions(), **plugins, **also}


def cuda_root() -> Path | None:
    """The CUDA toolkit that XLA and Mosaic compile with: where both ptxas and libdevice are.

    JAX by itself takes the directory of NVIDIA's packages as soon as one of them is installed,
    whether or not these two are in it. CUDA_ROOT goes before.
    """
    if "CUDA_ROOT" in os.environ:
        return Path(os.environ["CUDA_ROOT"])
    packages = sorted(Path(path) / "nvidia" for path in sys.path)
    roots = [root for path in packages for root in sorted(path.glob("c*"))]
    roots += sorted(SYSTEM.glob("cuda*"))
    for root in roots:
        parts = ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc")
        if all((root / part).exists() for part in parts):
            return root
    return None


def _output(*command: str) -> str:
    """What a program prints; nothing where there is none, or it takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

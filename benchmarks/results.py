"""What a run leaves behind: one JSON document, written whole or not at all.

schema      1
date        day of the run
device      processor, cores, gpu
versions    of Python and each distribution; null where it is not installed
threads     of each worker
flags       XLA_FLAGS of each worker
dtype       of weights, inputs and results, where a subject's name says no other
options     of the run
interrupted whether it ended early
subjects    name, package and kind (of worker) of each
rows        workload, subject, measure, status: "ready" with seconds (per call, one for each of
            the rounds), or "failed", "not installed", "not offered", "not measured" with a reason;
            errors, by array and in terms of its largest entry ("copies": of equal sequences);
            seconds to trace and to compile, bytes of temporaries; of kernels their names in the
            program, whether so many calls are alike bit by bit, and whether the process died
"""

import json
import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

KEYS = ("device", "date", "versions", "options", "subjects", "rows")
PACKAGES = "jax jaxlib numpy jaxrnn flax dm-haiku equinox keras torch".split()
PACKAGES += "jax-cuda12-plugin jax-cuda13-plugin nvidia-cudnn-cu12 nvidia-cudnn-cu13".split()
RESULTS = Path(__file__).parent / "results"
SYSTEM = Path("/usr/local")  # where NVIDIA's installer puts toolkits


class InputError(Exception):
    """Bad input; the message says in one line what was expected."""


def new(options: dict[str, Any]) -> dict[str, Any]:
    """An empty document of today and this machine."""
    return {
        "schema": 1,
        "date": date.today().isoformat(),
        "device": {"processor": _processor(), "cores": cores(), "gpu": None},
        "versions": _versions(),
        "threads": {},
        "flags": {},
        "dtype": "float32",
        "options": options,
        "interrupted": False,
        "subjects": [],
        "rows": [],
    }


def write(document: dict[str, Any], path: Path) -> None:
    """Write the document; an old file is replaced when the new one is complete."""
    # A line for each row.
    text = json.dumps(document, ensure_ascii=False).replace('{"workload"', '\n{"workload"')
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The document of a file.

    Raises:
      OSError: it cannot be read.
      InputError: it holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no JSON: {error}") from error
    missing = [key for key in KEYS if not isinstance(document, dict) or key not in document]
    if missing:
        raise InputError(f"{path}: expected the results of a run, lacks {', '.join(missing)}")
    return document


def row_key(row: dict[str, Any]) -> tuple[str, str, str]:
    """The names of the workload, measure and subject."""
    return row["workload"]["name"], row["measure"], row["subject"]


def new_path(wanted: Path) -> Path:
    """Where to write without overwriting: the path, or the first free of -2, -3 and so on."""
    path, n = wanted, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while path.exists():
        n += 1
        path = wanted.with_name(f"{wanted.stem}-{n}{wanted.suffix}")
    return path


def directory(device: dict[str, Any]) -> Path:
    """That of a device's results, such as `cpu-amd-epyc-2-cores` or `gpu-nvidia-h200`."""
    text = f"cpu {device['processor']} {device['cores']} cores"
    text = f"gpu {device['gpu']}" if device["gpu"] else text
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def caption(document: dict[str, Any]) -> str:
    """The device, the day and the versions of a run."""
    device, versions = document["device"], document["versions"]
    where = f"{device['cores']} cores of {device['processor']}"
    where = f"{device['gpu']} ({where})" if device["gpu"] else where
    names = ", ".join(f"{name} {versions[name]}" for name in versions if versions[name])
    early = "; stopped early" if document.get("interrupted") else ""
    dry = "; a dry run, interpreted on the CPU" if document["options"].get("dry") else ""
    return f"{where}, {document['date']}; {names}{early}{dry}"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    """The processor's model, without the marks and the frequency."""
    try:
        line = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        line = None
    name = line[1] if line else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM|tm|r)\)|\bCPU\b|@.*$", " ", name).split())


def _versions() -> dict[str, str | None]:
    installed = {found.name: found.version for found in distributions()}
    return {"python": platform.python_version(), **{n: installed.get(n) for n in PACKAGES}}


def cuda_root() -> Path | None:
    """The CUDA toolkit to compile with: CUDA_ROOT, or where both ptxas and libdevice are.

    JAX by itself takes the directory of NVIDIA's packages as soon as one of them is installed.
    """
    if "CUDA_ROOT" in os.environ:
        return Path(os.environ["CUDA_ROOT"])
    packages = sorted(Path(path) / "nvidia" for path in sys.path)
    roots = [root for path in packages for root in sorted(path.glob("c*"))]
    for root in (*roots, *sorted(SYSTEM.glob("cuda*"))):
        parts = ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc")
        if all((root / part).exists() for part in parts):
            return root
    return None

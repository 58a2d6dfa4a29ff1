"""How the memory of `jaxrnn train` grows with its text: `python -m benchmarks.text_memory`."""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, results
from benchmarks.cli import EXIT_BAD_INPUT, EXIT_FAILED_ROWS, EXIT_INTERRUPTED
from benchmarks.tables import Table, number, show
from benchmarks.text import without_directories

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZES = "1MB,100MB,1GB"
TRAINING = ("--steps", "300", "--hidden-size", "64", "--eval-every", "300")
# Seconds between two looks at the process.
PAUSE = 0.05
# What Linux says of a process, in kB: resident, of that its own and mapped from files, the most.
FIELDS = {
    "resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "high_water": "VmHWM",
}  # fmt: skip


def parse_sizes(text: str) -> dict[str, int]:
    """Bytes by how they are written.

    Args:
      text: such as 1MB,2GB.

    Raises:
      argparse.ArgumentTypeError: anything else.
    """
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(KB|MB|GB)", part.strip(), re.IGNORECASE)
        if not match:
            raise argparse.ArgumentTypeError(f"expected sizes such as {SIZES}, got {text}")
        found[part.strip().upper()] = int(match[1]) * UNITS[match[2].upper()]
    return found


def make_text(path: Path, size: int) -> None:
    """Write CPython's documentation again and again, its lines in another order each time.

    Args:
      path: the file.
      size: in bytes, to within a line.
    """
    from pydoc_data.topics import topics

    lines = "".join(topics.values()).encode().splitlines(keepends=True)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            part = b"".join(lines[n] for n in generator.permutation(len(lines)))
            file.write(part if len(part) <= left else part[: part.rfind(b"\n", 0, left) + 1])
            if len(part) > left:
                return


def memory(pid: int) -> dict[str, int] | None:
    """Bytes of a process by FIELDS; None where it has none any more."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = {name: re.search(rf"^{field}:\s+(\d+) kB$", status, re.M)
                 for name, field in FIELDS.items()}  # fmt: skip
        if all(found.values()):
            return {name: int(match[1]) * 1024 for name, match in found.items() if match}
    return None


def measure(name: str, size: int, options: Sequence[str]) -> dict[str, Any]:
    """Train on a text of that size as a process of its own, and watch it.

    Args:
      name: of the size.
      size: in bytes.
      options: of `jaxrnn train`.

    Returns:
      size, bytes, status, seconds, and the peaks of FIELDS in bytes; or status "failed" with a
      reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, run, errors = Path(folder, "text"), Path(folder, "run"), Path(folder, "errors")
        make_text(text, size)
        row = {"size": name, "bytes": text.stat().st_size}
        command = [sys.executable, "-m", "jaxrnn", "train", str(text), *options, "--out", str(run)]
        peaks = dict.fromkeys(FIELDS, 0)
        begun = time.perf_counter()
        with errors.open("wb") as told, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=told
        ) as process:  # fmt: skip
            try:
                while process.poll() is None:
                    for field, value in (memory(process.pid) or {}).items():
                        peaks[field] = max(peaks[field], value)
                    time.sleep(PAUSE)
            except BaseException:
                process.kill()
                raise
        seconds = time.perf_counter() - begun
        if process.returncode:
            lines = errors.read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            return {**row, "status": "failed", "reason": without_directories(reason)}
        return {**row, "status": "ready", "seconds": seconds, **peaks}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What was found, in megabytes."""
    names = {
        "high_water": "peak resident, MB", "anonymous": "peak anonymous, MB",
        "files": "peak of mapped files, MB",
    }  # fmt: skip
    cells = []
    for row in rows:
        figures = [row.get(name) for name in names]
        millions = [number(None if figure is None else figure / 1e6) for figure in figures]
        cells.append([row["size"], *millions, number(row.get("seconds")), row.get("reason", "")])
    header = ["text", *names.values(), "seconds", "failed"]
    if not any(row["status"] == "failed" for row in rows):
        header, cells = header[:-1], [line[:-1] for line in cells]
    return Table("memory of jaxrnn train by the size of its text", header, cells, left=(5,))


def main(argv: Sequence[str] | None = None) -> int:
    """Train once for each size and print what memory it took.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      0; 1 where training failed; 2 for bad input; 130 after Ctrl-C, which keeps what was
      measured.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_memory", description=__doc__)
    parser.add_argument("--sizes", type=parse_sizes, default=SIZES, metavar="SIZE,SIZE",
                        help="of the texts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--level", choices=("char", "byte"), help="(default: that of the command)")
    parser.add_argument("--output", metavar="FILE.json", help="keep the figures")
    args = parser.parse_args(argv)
    from rich.console import Console

    if not Path("/proc/self/status").exists():
        print("benchmarks: error: expected Linux, got no /proc/self/status", file=sys.stderr)
        return EXIT_BAD_INPUT
    options = [*TRAINING, *(["--level", args.level] if args.level else [])]
    path = Path(args.output) if args.output else None
    if path is not None:
        try:
            results.check_writable(path)
        except OSError as error:
            print(f"benchmarks: error: cannot write the results: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
    rows: list[dict[str, Any]] = []
    asked = {"train": options, "seconds between samples": PAUSE}
    document = results.new(machine.device(), machine.versions(), asked) | {"texts": rows}
    stopped = False
    for name, size in args.sizes.items():
        try:
            rows.append(measure(name, size, options))
        except KeyboardInterrupt:
            stopped = True
            break
        if path is not None:
            results.write(document, path)
    show(table(rows), Console())
    if stopped:
        return EXIT_INTERRUPTED
    return EXIT_FAILED_ROWS if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

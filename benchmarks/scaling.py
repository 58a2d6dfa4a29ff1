"""What an update costs at least on many devices, as tables: `python -m benchmarks.scaling`."""

import sys
from dataclasses import replace

from benchmarks.collectives import collective
from benchmarks.hardware import H100, V5P, Hardware
from benchmarks.tables import NOTHING, Table, markdown, number
from benchmarks.update_cost import (
    BYTES,
    FLOAT32,
    OF_PARAMETERS,
    SIZES,
    K,
    T,
    best,
    model_axis_from,
    parameters,
)  # fmt: skip

STRONG_BATCH, WEAK_BATCH = 4096, 64  # sequences of an update; sequences for each device
DEVICES = (1, 8, 64, 1024)


def _sizes(hardware: Hardware) -> Table:
    """What stands against what: an update, and a step."""
    many, group, rows = 64, 8, WEAK_BATCH
    header = (
        "H", "parameters", "GB with gradients and Adam", "MFLOP a character", "MB of gradients",
        f"ms to add them up on {many}", "MB of W", "µs to read W", f"µs of W h_t, {rows} rows",
        f"µs to gather h_t, {group * rows} rows on {group}",
    )  # fmt: skip
    cells = []
    for H in SIZES:
        count, weights, sent = parameters(H), BYTES * H * H, BYTES * group * rows * H
        near = min(many, hardware.joined)
        added, _ = collective(hardware, FLOAT32 * count, near, many // near, passes=2)
        gathered, _ = collective(hardware, sent, group, 1, passes=1)
        values = (
            OF_PARAMETERS * FLOAT32 * count / 1e9, 6 * H * (H + K) / 1e6, FLOAT32 * count / 1e6,
            added * 1e3, weights / 1e6, weights / hardware.memory_bandwidth * 1e6,
            2 * rows * H * H / hardware.flops * 1e6, gathered * 1e6,
        )  # fmt: skip
        cells.append((f"{H:,}", f"{count:,}", *map(number, values)))
    return Table(f"{hardware.name}: bytes and operations against time", header, cells)


def scaling_table(hardware: Hardware, weak: bool) -> Table:
    """The best split for each H and number of devices.

    Args:
      hardware: the devices.
      weak: with WEAK_BATCH sequences for each device; else STRONG_BATCH sequences in all.

    Returns:
      In each cell data×model, milliseconds of an update, sequences a second and device beside
      those on the fewest devices that can hold it, and the largest part; a dash where none can.
    """
    batch = f"{WEAK_BATCH} sequences for each device" if weak else f"{STRONG_BATCH:,} sequences"
    rows = []
    for H in SIZES:
        first, row = None, [f"{H:,}"]
        for devices in DEVICES:
            B = WEAK_BATCH * devices if weak else STRONG_BATCH
            cost = best(H, B, devices, hardware)
            if cost is None:
                row.append(NOTHING)
                continue
            each = cost.total * devices / B
            first = each if first is None else first
            split = f"{cost.data}×{cost.model}"
            milliseconds = number(cost.total * 1e3)
            row.append(f"{split}: {milliseconds} ms, {first / each:.0%}, {cost.bound_by}")
        rows.append(row)
    percent = "%: of a device's speed on the fewest that hold it"
    title = f"{hardware.name}: an update of {batch}, T = {T}, K = {K} ({percent})"
    return Table(title, ("H", *(f"{n:,}" for n in DEVICES)), rows)


def _crossovers(hardware: Hardware) -> Table:
    """From which H on the model axis is used, and how that hangs on what is not known."""
    cases = {
        "as above": (hardware, BYTES),
        "W read from memory at every step": (replace(hardware, on_chip=0.0), BYTES),
        "a collective takes 10 µs more": (replace(hardware, start=hardware.start + 1e-5), BYTES),
        "float32 throughout": (hardware, FLOAT32),
    }
    many = DEVICES[1:]
    batches = [(n, STRONG_BATCH) for n in many] + [(n, WEAK_BATCH * n) for n in many]
    rows = []
    for name, (device, size) in cases.items():
        found = [model_axis_from(device, B, n, size) for n, B in batches]
        rows.append((name, *(NOTHING if H is None else f"{H:,}" for H in found)))
    kinds = (f"{STRONG_BATCH:,} on", f"{WEAK_BATCH} on each of")
    header = ("sequences", *(f"{kind} {n:,}" for kind in kinds for n in many))
    return Table(f"{hardware.name}: from which H on `model` pays", header, rows)


def report() -> str:
    """All tables as Markdown."""
    blocks = []
    for hardware in (H100, V5P):
        blocks += [markdown(_sizes(hardware))]
        blocks += [markdown(scaling_table(hardware, weak)) for weak in (False, True)]
        blocks += [markdown(_crossovers(hardware))]
    return "\n\n".join(blocks)


def main() -> int:
    """Print the tables."""
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The checkpoints that a run directory keeps, read without orbax, which would start JAX's devices.

orbax gives a checkpoint its name, its step, once it is whole.
"""

import json
import math
from pathlib import Path

FOLDER = "checkpoints"


def steps(out: Path) -> list[int]:
    """Of the finished checkpoints, in order."""
    names = [path.name for path in (out / FOLDER).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def held_out_bits(out: Path, step: int) -> float:
    """What the best is chosen by; infinite where not measured, NaN where it cannot be read."""
    try:
        path = out / FOLDER / str(step) / "metrics" / "metrics"
        return float(json.loads(path.read_text(encoding="utf-8"))["held_out_bits"])
    except (OSError, ValueError, TypeError, KeyError):
        return math.nan


def best(out: Path) -> int | None:
    """The step of the least held-out loss; None where none was measured."""
    bits = {step: held_out_bits(out, step) for step in steps(out)}
    measured = [step for step, each in bits.items() if math.isfinite(each)]
    return min(measured, key=lambda step: bits[step], default=None)

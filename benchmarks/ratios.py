"""Medians, ratios taken pair by pair, and fitted slopes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it, of so many values."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Args:
      values: at least one.

    Returns:
      The `Spread`.
    """
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(middle), float(low), float(high), len(values))


def paired(slow: dict[str, Any], fast: dict[str, Any]) -> Spread | None:
    """How many times longer one subject takes than another, each round by itself.

    What disturbs the machine disturbs neighbours in a round alike, and leaves their ratio.

    Args:
      slow: a row of results, the numerator.
      fast: the denominator.

    Returns:
      The `Spread` of the ratios of the rounds that both have; None where there is none.
    """
    first = dict(zip(slow.get("rounds", ()), slow.get("seconds", ()), strict=True))
    second = dict(zip(fast.get("rounds", ()), fast.get("seconds", ()), strict=True))
    ratios = [first[n] / second[n] for n in sorted(first.keys() & second.keys())]
    return spread(ratios) if ratios else None


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def slope(xs: Sequence[float], ys: Sequence[float], last: int | None = None) -> float | None:
    """The exponent p of y ≈ c·xᵖ, by least squares in the logarithms.

    Args:
      xs: positive.
      ys: as many; points that are not positive are left out.
      last: use only so many points at the end.

    Returns:
      The slope; None from fewer than two points.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    points = points[-last:] if last else points
    if len({x for x, _ in points}) < 2:
        return None
    logs = np.log(np.asarray(points, np.float64))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])

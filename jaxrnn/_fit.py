"""The loop of training: update after update, with a look at the figures now and then."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrnn import _checks
from jaxrnn._update import Figures, TrainState, start_over


# So many updates are under way at most. With some dozens that several devices share, XLA's CPU runs
# into a deadlock.
AHEAD = 8


class DivergedError(Exception):
    """The loss, the gradient or what an update makes of it is no number any more."""


@dataclass(frozen=True)
class Report:
    """What `fit` has to say since it last said something.

    Args:
      state: the `TrainState`; the next update consumes it.
      step: how many updates it has seen.
      loss: the mean over the updates since the last report, in nats per character; NaN where all
        of them were skipped.
      gradient_norm: of the last update.
      parameter_norm: of the last update, before it.
      skipped: how many updates since the last report were not finite.
      updates_per_second: since the last report; without the first update, which compiles.
    """

    state: TrainState
    step: int
    loss: float
    gradient_norm: float
    parameter_norm: float
    skipped: int
    updates_per_second: float


def fit(
    state: TrainState,
    update: Callable[[TrainState, Any, Any], tuple[TrainState, Figures]],
    windows: Iterator[tuple[Any, Any, bool]],
    steps: int,
    *,
    every: int | tuple[int, ...] = 25,
    skip_nonfinite: bool = False,
    stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[Report]:
    """The loop: update after update, with a word now and then.

    Args:
      state: to begin with, or to go on from; it is consumed.
      update: from `make_checked_update`.
      windows: (inputs, targets, first) each time, as `windows` yields.
      steps: up to which step, counted from the very first update.
      every: report at each step that this divides, or one of these; and after the last one.
      skip_nonfinite: leave an update that is not finite out, instead of ending.
      stop: asked with the step after each update; after a yes comes the last report.

    Yields:
      A `Report`. Between reports the devices are a few updates behind.

    Raises:
      DivergedError: an update was not finite; the step and the norms are in its message.
    """
    intervals = every if isinstance(every, tuple) else (every,)
    for n in intervals:
        _checks.positive("every", n)
    step, since, timed, unseen = int(state.step), None, 0, []
    done = step >= steps
    while not done:
        inputs, targets, first = next(windows)
        state, figures = update(start_over(state) if first else state, inputs, targets)
        unseen.append(figures)
        if len(unseen) > AHEAD:
            unseen[-1 - AHEAD].loss.block_until_ready()
        step += 1
        if since is None:
            figures.loss.block_until_ready()
            since = time.perf_counter()
        else:
            timed += 1
        done = stop(step) or step == steps
        if done or any(step % n == 0 for n in intervals):
            figures = jax.device_get(unseen)
            pace = timed / (time.perf_counter() - since)
            finite = _finite_losses(figures, step, skip_nonfinite)
            loss = float(np.mean(finite)) if finite else math.nan
            norms = float(figures[-1].gradient_norm), float(figures[-1].parameter_norm)
            yield Report(state, step, loss, *norms, len(figures) - len(finite), pace)
            since, timed, unseen = time.perf_counter(), 0, []


def _finite_losses(figures, last, skip):
    """The losses of the updates up to step `last` that were finite."""
    for step, each in enumerate(figures, last - len(figures) + 1):
        if each.finite or skip:
            continue
        if not math.isfinite(each.loss):
            what = f"the loss became {each.loss}"
        elif not math.isfinite(each.gradient_norm):
            what = f"the norm of the gradient became {each.gradient_norm}"
        else:
            what = "the update made a number that is not finite"
        norms = f"gradient norm {each.gradient_norm:.4g}, parameter norm {each.parameter_norm:.4g}"
        raise DivergedError(f"{what} at step {step} ({norms})")
    return [float(each.loss) for each in figures if each.finite]

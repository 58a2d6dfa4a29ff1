"""The loop of training: update after update, with a look at the figures now and then."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
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
      updates_per_second: since the last report; without the first update, which compiles. NaN
        where that was the only one.
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
    windows: Iterable[tuple[Any, Any, bool]],
    steps: int,
    *,
    every: int | Iterable[int] = 25,
    skip_nonfinite: bool = False,
    stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[Report]:
    """The loop: update after update, with a word now and then.

    Args:
      state: to begin with, or to go on from; it is consumed.
      update: from `make_checked_update`.
      windows: (inputs, targets, first) each time, as `windows` yields; the loop ends with them.
      steps: up to which step, counted from the very first update.
      every: report at each step that this divides, or one of these; and after the last one.
      skip_nonfinite: leave an update that is not finite out, instead of ending.
      stop: asked with the step after each update; after a yes comes the last report.

    Yields:
      A `Report`, whose state is good until the next one: copy what you keep. Between reports the
      devices are a few updates behind.

    Raises:
      TypeError, ValueError: steps or every that are no whole numbers, no `TrainState`, an update
        that makes no `Figures`.
      DivergedError: an update was not finite; the step and the norms are in its message.
    """
    intervals = tuple(every) if isinstance(every, Iterable) else (every,)
    for n in intervals:
        _checks.positive("every", n)
    _checks.whole("steps", steps)
    _checks.instance("state", state, TrainState)
    windows, step = iter(windows), int(state.step)
    since, timed, unseen = 0.0, 0, []

    def report():
        figures = jax.device_get(unseen)
        pace = timed / (time.perf_counter() - since) if timed else math.nan
        finite = _finite_losses(figures, step, skip_nonfinite)
        loss = float(np.mean(finite)) if finite else math.nan
        norms = float(figures[-1].gradient_norm), float(figures[-1].parameter_norm)
        return Report(state, step, loss, *norms, len(figures) - len(finite), pace)

    done = step >= steps
    while not done and (window := next(windows, None)) is not None:
        inputs, targets, first = window
        state, figures = update(start_over(state) if first else state, inputs, targets)
        if not isinstance(figures, Figures):
            _checks.bad_type("update", "that of make_checked_update", "another function")
        unseen.append(figures)
        if len(unseen) > AHEAD:
            unseen[-1 - AHEAD].loss.block_until_ready()
        step += 1
        if not since:
            figures.loss.block_until_ready()
            since = time.perf_counter()
        else:
            timed += 1
        done = stop(step) or step == steps
        if done or any(step % n == 0 for n in intervals):
            yield report()
            since, timed, unseen = time.perf_counter(), 0, []
    if unseen:  # the windows came to an end
        yield report()


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

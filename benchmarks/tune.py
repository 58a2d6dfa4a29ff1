"""The choices by shape in `jaxrnn/_core/schedule.py`, measured beside the other answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from benchmarks.worker import calibrate, sample
from benchmarks.workloads import Workload, draw
from jaxrnn._core import schedule

Shape = tuple[int, int, int, int]  # (T, B, D, H)
SHAPES: dict[str, list[Shape]] = {
    choice: [line.shape for line in lines] for choice, lines in schedule.TABLE.items()
}
ANSWERS: dict[str, tuple] = {
    "hoists_inputs": (True, False),
    "puts_weights_left": (True, False),
    "segment_rows": (128, 256, 512, 1024, 2048, 4096, None),
}
FORWARD_ONLY = ("hoists_inputs", "puts_weights_left")
# A line of the table is wrong where another answer takes less than this of its time.
BETTER = 0.9


@contextmanager
def choosing(choice: str, answer: Any) -> Iterator[None]:
    """The schedule with one choice that always answers the same."""
    before = schedule.TABLE[choice]
    schedule.TABLE[choice] = (schedule.Line(lambda *shape: True, answer, (1, 1, 1, 1), ""),)
    try:
        yield
    finally:
        schedule.TABLE[choice] = before


def table_answer(choice: str, shape: Shape) -> Any:
    """What is chosen for a shape."""
    return next(line.answer for line in schedule.TABLE[choice] if line.where(*shape))


def measure(choice: str, shape: Shape, rounds: int) -> tuple[str, bool]:
    """Milliseconds under each answer, the table's in brackets, and whether it would change."""
    chosen = table_answer(choice, shape)
    answers = list(dict.fromkeys((chosen, *ANSWERS[choice])))
    calls = [_compiled(choice, answer, shape) for answer in answers]
    repeats = [calibrate(call) for call in calls]
    seconds = np.empty((len(calls), rounds))
    for n in range(rounds):
        for k in np.roll(np.arange(len(calls)), -n):  # another one first in each round
            seconds[k, n] = sample(calls[k], repeats[k])
    ratios = np.median(seconds / seconds[0], axis=1)
    times = [f"{a} {1e3 * t:.3g} ms" for a, t in zip(answers, np.median(seconds, 1), strict=True)]
    others = [f"{text} ({ratio:.2f})" for text, ratio in zip(times, ratios, strict=True)][1:]
    change = bool(np.min(ratios) < BETTER)
    line = f"{shape!s:26s} {', '.join([f'[{times[0]}]', *others])}"
    return f"{line}{'  <- would change' if change else ''}", change


def _compiled(choice: str, answer: Any, shape: Shape) -> Callable[[], Any]:
    data = draw(Workload("", *shape))
    args = jaxrnn.Cell(*map(jnp.asarray, data.cells[0])), jnp.asarray(data.xs), jnp.asarray(data.g)

    def states(cell, xs, g):
        return jaxrnn.unroll(cell, xs)[1]

    def gradient(cell, xs, g):
        return jax.grad(lambda cell, xs: jnp.sum(states(cell, xs, g) * g), (0, 1))(cell, xs)

    jax.clear_caches()  # what was traced under another choice
    lowered = jax.jit(states if choice in FORWARD_ONLY else gradient)
    with choosing(choice, answer):
        compiled = lowered.lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def tune(choices: Sequence[str], rounds: int) -> int:
    """Print, for each choice of the schedule, the time of its answer and of the others.

    The answer of the table stands in brackets; behind each other one the median of its time over
    that of the answer, pair by pair: below 1 it is faster. A line whose answer loses more than 10 %
    is marked, and counted at the end.
    """
    changes = []
    for choice in choices:
        print(f"{choice} ({'forward' if choice in FORWARD_ONLY else 'forward and gradient'})")
        for shape in SHAPES[choice]:
            line, change = measure(choice, shape, rounds)
            print(line, flush=True)
            changes += [f"{choice} at {shape}"] if change else []
    print(f"would change: {'; '.join(changes) or 'nothing'}")
    return 0

"""What is chosen by shape in `jaxrnn/_core/schedule.py`, or by the user, beside other answers."""

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
IMPLEMENTATION = "implementation"
CHOICES = (*schedule.TABLE, IMPLEMENTATION)
# More shapes than those of the table's own lines, around the edges of each choice.
MORE: dict[str, tuple[Shape, ...]] = {
    "hoists_inputs": (
        *((25, 32, 65, 128), (256, 32, 128, 128), (256, 2, 64, 64), (1000, 1, 64, 64)),
        *((20_000, 1, 8, 32), (20_000, 1, 64, 64), (100, 16, 256, 1024), (100, 128, 512, 512)),
    ),
    "puts_weights_left": (
        *((200, 2, 8, 256), (200, 8, 8, 256), (200, 32, 8, 256), (60, 4, 8, 512)),
        *((60, 8, 8, 512), (60, 16, 8, 512), (60, 32, 8, 512), (40, 128, 8, 512)),
        *((40, 2, 8, 1024), (20, 64, 8, 1024)),
    ),
    "segment_rows": (
        *((60, 16, 3, 256), (60, 64, 3, 256), (60, 256, 3, 32), (60, 64, 16, 128)),
        *((784, 128, 1, 128), (200, 32, 64, 128), (20_000, 1, 8, 32), (100, 128, 512, 512)),
    ),
    # The linear loop, as a scan or an associative scan.
    IMPLEMENTATION: (
        *((1000, 1, 4, 1), (10_000, 1, 4, 1), (100_000, 1, 4, 1), (10_000, 1, 4, 2)),
        *((100_000, 1, 4, 2), (10_000, 1, 4, 4), (10_000, 1, 4, 8), (1000, 16, 4, 1)),
        *((1000, 16, 4, 4), (1000, 1, 8, 32)),
    ),
}
ANSWERS: dict[str, tuple] = {
    "hoists_inputs": (True, False),
    "puts_weights_left": (True, False),
    "segment_rows": (128, 256, 512, 1024, 2048, 4096, None),
    IMPLEMENTATION: ("scan", "associative"),
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


def measure(choice: str, shape: Shape, rounds: int) -> tuple[str, bool]:
    """Milliseconds under each answer, the table's in brackets, and whether it would change."""
    data = draw(Workload("", *shape))
    cell = jaxrnn.Cell(*map(jnp.asarray, data.cells[0]))
    args = cell, *map(jnp.asarray, (data.xs, data.g))
    chosen = table_answer(choice, shape)
    calls = {
        answer: _compiled(choice, answer, args)
        for answer in dict.fromkeys((chosen, *ANSWERS[choice]))
    }
    seconds = paired(calls, rounds)
    cells, best = [], 1.0
    for answer, values in seconds.items():
        text = f"{answer} {1e3 * np.median(values):.3g} ms"
        if answer == chosen:
            cells.append(f"[{text}]")
            continue
        ratio = float(np.median(values / seconds[chosen]))
        best = min(best, ratio)
        cells.append(f"{text} ({ratio:.2f})")
    change = best < BETTER
    return f"{shape!s:26s} {', '.join(cells)}{'  <- would change' if change else ''}", change


def table_answer(choice: str, shape: Shape) -> Any:
    """What the table answers for a shape."""
    if choice == IMPLEMENTATION:
        return "scan"
    return next(line.answer for line in schedule.TABLE[choice] if line.where(*shape))


def paired(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """Seconds of each, in turn, another one first in each round."""
    repeats = {name: calibrate(call) for name, call in calls.items()}
    found: dict[Any, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for n in range(rounds):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sample(calls[name], repeats[name]))
    return {name: np.array(seconds) for name, seconds in found.items()}


def _compiled(choice: str, answer: Any, args: tuple) -> Callable[[], Any]:
    how = {"implementation": answer} if choice == IMPLEMENTATION else {}

    def states(cell, xs, g):
        return jaxrnn.unroll(cell, xs, **how)[1]

    def gradient(cell, xs, g):
        return jax.grad(lambda cell, xs: jnp.sum(states(cell, xs, g) * g), (0, 1))(cell, xs)

    f = states if choice in FORWARD_ONLY else gradient
    jax.clear_caches()  # what was traced under another choice
    if how:
        compiled = jax.jit(f).lower(*args).compile()
    else:
        with choosing(choice, answer):
            compiled = jax.jit(f).lower(*args).compile()
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
        lines = schedule.TABLE.get(choice, ())
        for shape in (*(line.shape for line in lines), *MORE[choice]):
            line, change = measure(choice, shape, rounds)
            print(line, flush=True)
            changes += [f"{choice} at {shape}"] if change else []
    print(f"would change: {'; '.join(changes) or 'nothing'}")
    return 0

"""Measure what is chosen by shape in `jaxrnn/schedule.py`, or by the user: the alternatives."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from benchmarks.timing import calibrate, sample
from benchmarks.workloads import Workload, draw
from jaxrnn._core import schedule

# More shapes (T, B, D, H) than those of the table's own lines, around the edges of each choice.
MORE = {
    "hoists_inputs": (
        (25, 32, 65, 128), (256, 32, 128, 128), (256, 2, 64, 64), (1000, 1, 64, 64),
        (20_000, 1, 8, 32), (20_000, 1, 64, 64), (100, 16, 256, 1024), (100, 128, 512, 512),
    ),
    "puts_weights_left": (
        (200, 2, 8, 256), (200, 8, 8, 256), (200, 32, 8, 256), (60, 4, 8, 512), (60, 8, 8, 512),
        (60, 16, 8, 512), (60, 32, 8, 512), (40, 128, 8, 512), (40, 2, 8, 1024), (20, 64, 8, 1024),
    ),
    "segment_rows": (
        (60, 16, 3, 256), (60, 64, 3, 256), (60, 256, 3, 32), (60, 64, 16, 128), (784, 128, 1, 128),
        (200, 32, 64, 128), (20_000, 1, 8, 32), (100, 128, 512, 512),
    ),
}  # fmt: skip
ANSWERS = {
    "hoists_inputs": (True, False), "puts_weights_left": (True, False),
    "segment_rows": (128, 256, 512, 1024, 2048, 4096, None),
}  # fmt: skip
ASSOCIATIVE = (
    (1000, 1, 4, 1), (10_000, 1, 4, 1), (100_000, 1, 4, 1), (10_000, 1, 4, 2), (100_000, 1, 4, 2),
    (10_000, 1, 4, 4), (10_000, 1, 4, 8), (1000, 16, 4, 1), (1000, 16, 4, 4), (1000, 1, 8, 32),
)  # fmt: skip
# A line of the table is wrong where another answer takes less than this of its time.
BETTER = 0.9


@contextmanager
def choosing(choice: str, answer: Any) -> Iterator[None]:
    """The schedule with one choice that always answers the same."""
    kept = schedule.TABLE[choice]
    schedule.TABLE[choice] = (schedule.Line(lambda *shape: True, answer, (1, 1, 1, 1), ""),)
    try:
        yield
    finally:
        schedule.TABLE[choice] = kept


def _forward(cell, xs, g, **how):
    return jaxrnn.unroll(cell, xs, **how)[1]


def _gradient(cell, xs, g, **how):
    return jax.grad(lambda cell, xs: jnp.sum(_forward(cell, xs, g, **how) * g), (0, 1))(cell, xs)


def _compile(f: Callable, args: tuple) -> Callable[[], Any]:
    jax.clear_caches()  # what was traced under another choice
    compiled = jax.jit(f).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def paired(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each, in turn, another one first in each round."""
    repeats = {name: calibrate(call)[0] for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for n in range(rounds):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sample(calls[name], repeats[name]))
    return {name: np.array(seconds) for name, seconds in found.items()}


def measure(
    choice: str, f: Callable, shape: tuple, chosen: Any, answers: Sequence, rounds: int
) -> tuple[str, bool]:
    """Milliseconds under each answer, the table's in brackets, and whether it would change."""
    data = draw(Workload("", *shape))
    args = (
        jaxrnn.Cell(*map(jnp.asarray, (data.U, data.W, data.b))),
        *map(jnp.asarray, (data.xs, data.g)),
    )
    calls = {}
    for answer in dict.fromkeys((chosen, *answers)):
        if choice == "implementation":
            calls[answer] = _compile(partial(f, implementation=answer), args)
            continue
        with choosing(choice, answer):
            calls[answer] = _compile(f, args)
    seconds = paired(calls, rounds)
    cells, best = [], 1.0
    for answer, values in seconds.items():
        text = f"{answer} {1e3 * np.median(values):.3g} ms"
        if answer != chosen:
            ratio = float(np.median(values / seconds[chosen]))
            best = min(best, ratio)
            text += f" ({ratio:.2f})"
        cells.append(f"[{text}]" if answer == chosen else text)
    change = best < BETTER
    return f"{shape!s:26s} {', '.join(cells)}{'  <- would change' if change else ''}", change


def _told(choice: str, shape: tuple) -> Any:
    """What the table answers for a shape."""
    return next(line.answer for line in schedule.TABLE[choice] if line.where(*shape))


def main(argv: Sequence[str]) -> int:
    """Print, for each choice of the schedule, the time of its answer and of the others.

    The answer of the table stands in brackets; behind each other one the median of its time over
    that of the answer, pair by pair: below 1 it is faster. A line whose answer loses more than 10 %
    is marked, and counted at the end.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=main.__doc__)
    names = (*schedule.TABLE, "implementation")
    parser.add_argument("choice", nargs="*", choices=(*names, []), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    changes = []
    for choice in options.choice or names:
        if choice == "implementation":
            print("the linear loop as a scan? (forward and gradient)")
            every = [(shape, "scan", ("associative",)) for shape in ASSOCIATIVE]
        else:
            measured = "forward and gradient" if choice == "segment_rows" else "forward"
            print(f"{choice} ({measured})")
            shapes = [line.shape for line in schedule.TABLE[choice]] + list(MORE[choice])
            every = [(shape, _told(choice, shape), ANSWERS[choice]) for shape in shapes]
        f = _forward if choice in ("hoists_inputs", "puts_weights_left") else _gradient
        for shape, chosen, answers in every:
            line, change = measure(choice, f, shape, chosen, answers, options.rounds)
            print(line, flush=True)
            changes += [f"{choice} at {shape}"] if change else []
    print(f"would change: {'; '.join(changes) or 'nothing'}")
    return 0

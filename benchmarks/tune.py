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

# Shapes (T, B, D, H) around the edges of each rule.
HOIST = (
    (25, 32, 65, 128), (256, 32, 128, 128), (256, 8, 128, 128), (256, 2, 64, 64),
    (1000, 1, 64, 64), (20_000, 1, 8, 32), (20_000, 1, 64, 64), (100, 16, 1024, 1024),
    (100, 16, 256, 1024), (100, 128, 512, 512), (100, 32, 512, 512), (784, 128, 1, 128),
)  # fmt: skip
LEFT = (
    (200, 2, 8, 256), (200, 8, 8, 256), (200, 16, 8, 256), (100, 64, 8, 256), (60, 4, 8, 512),
    (60, 32, 8, 512), (40, 128, 8, 512), (40, 2, 8, 1024), (40, 16, 8, 1024), (20, 64, 8, 1024),
)  # fmt: skip
SEGMENT = (
    (25, 32, 65, 128), (64, 64, 103, 256), (256, 32, 128, 128), (784, 128, 1, 128),
    (20_000, 1, 8, 32), (1000, 16, 64, 64), (100, 16, 1024, 1024), (100, 128, 512, 512),
)  # fmt: skip
ASSOCIATIVE = (
    (1000, 1, 4, 1), (10_000, 1, 4, 1), (100_000, 1, 4, 1), (10_000, 1, 4, 2), (100_000, 1, 4, 2),
    (10_000, 1, 4, 4), (10_000, 1, 4, 8), (1000, 16, 4, 1), (1000, 16, 4, 4), (1000, 1, 8, 32),
)  # fmt: skip


@contextmanager
def choosing(rule: str, answer: Any) -> Iterator[None]:
    """The schedule with one rule that always answers the same."""
    kept = getattr(schedule, rule)
    setattr(schedule, rule, lambda *shape: answer)
    try:
        yield
    finally:
        setattr(schedule, rule, kept)


def _forward(cell, xs, g, **how):
    return jaxrnn.unroll(cell, xs, **how)[1]


def _gradient(cell, xs, g, **how):
    return jax.grad(lambda cell, xs: jnp.sum(_forward(cell, xs, g, **how) * g), (0, 1))(cell, xs)


def _compile(f: Callable, args: tuple) -> Callable[[], Any]:
    jax.clear_caches()  # what was traced under another choice
    compiled = jax.jit(f).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def paired(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each, in turn."""
    repeats = {name: calibrate(call)[0] for name, call in calls.items()}
    found = [{name: sample(call, repeats[name]) for name, call in calls.items()}
             for _ in range(rounds)]  # fmt: skip
    return {name: np.array([one[name] for one in found]) for name in calls}


def measure(
    rule: str, f: Callable, shape: tuple, chosen: Any, answers: Sequence, rounds: int
) -> str:
    """One line: milliseconds under each answer, the rule's own in brackets, and what it loses."""
    data = draw(Workload("", *shape))
    args = (
        jaxrnn.Cell(*map(jnp.asarray, (data.U, data.W, data.b))),
        *map(jnp.asarray, (data.xs, data.g)),
    )
    calls = {}
    for answer in dict.fromkeys((chosen, *answers)):
        if rule == "implementation":
            calls[answer] = _compile(partial(f, implementation=answer), args)
            continue
        with choosing(rule, answer):
            calls[answer] = _compile(f, args)
    seconds = paired(calls, rounds)
    cells = []
    for answer, values in seconds.items():
        text = f"{answer} {1e3 * np.median(values):.3g} ms"
        if answer != chosen:
            text += f" ({np.median(values / seconds[chosen]):.2f})"
        cells.append(f"[{text}]" if answer == chosen else text)
    return f"{shape!s:26s} {', '.join(cells)}"


def main(argv: Sequence[str]) -> int:
    """Print, for each rule and shape, the time of its choice and of the others.

    The rule's choice stands in brackets; behind each other one the median of its time over the
    time of the choice, pair by pair: below 1 the rule was wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=main.__doc__)
    rules = ("hoists_inputs", "puts_weights_left", "segment_length", "implementation")
    parser.add_argument("rule", nargs="*", choices=(*rules, []), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    wanted = options.rule or rules
    line = partial(measure, rounds=options.rounds)
    if "hoists_inputs" in wanted:
        print("U x before the loop? (forward)")
        for T, B, D, H in HOIST:
            chosen = schedule.hoists_inputs(T, (B,), D, H)
            print(line("hoists_inputs", _forward, (T, B, D, H), chosen, (True, False)), flush=True)
    if "puts_weights_left" in wanted:
        print("W on the left of a step's product? (forward)")
        for T, B, D, H in LEFT:
            chosen = schedule.puts_weights_left((B,), H, H)
            shape = (T, B, D, H)
            print(line("puts_weights_left", _forward, shape, chosen, (True, False)), flush=True)
    if "segment_length" in wanted:
        print("steps of a segment of the backward (forward and backward)")
        for T, B, D, H in SEGMENT:
            chosen = schedule.segment_length(T, (B,), H)
            others = [n for n in (T // 64, T // 32, T // 16, T // 8, T // 4, T // 2, T) if n]
            print(line("segment_length", _gradient, (T, B, D, H), chosen, others), flush=True)
    if "implementation" in wanted:
        print("the linear loop as a scan? (forward and backward)")
        for shape in ASSOCIATIVE:
            print(line("implementation", _gradient, shape, "scan", ("associative",)), flush=True)
    return 0

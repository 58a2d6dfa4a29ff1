"""What can be counted of the house: `python tests/counts.py` prints it.

Lines of the core, frames between a user's call and the loop over time, functions that run in an
eager call, and how long tracing and compiling a gradient take beside a naive scan's. Times are
printed only; the rest is tested.
"""

import contextlib
import inspect
import math
import pathlib
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import naive_unroll

import jaxrnn

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxrnn"
# Not part of the library proper: programs for accelerators, the command line, pictures.
APART = (
    "_backends/kernels", "_app", "__main__.py",
)  # fmt: skip
SMALL, LONG = (5, 2, 3, 4), (2048, 16, 64, 64)  # (T, B, D, H); LONG goes back in segments


def lines_of_core() -> int:
    """Lines of `_base` and `_core`: what one reads to know how the gradient is made."""
    return _lines(path for room in ("_base", "_core") for path in (PACKAGE / room).glob("*.py"))


def lines_of_library() -> int:
    """Lines of everything but the kernels, the command line and the pictures."""
    return _lines(
        path
        for path in PACKAGE.rglob("*.py")
        if not any(path.is_relative_to(PACKAGE / name) for name in APART)
    )


def _lines(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@contextlib.contextmanager
def _scans_seen():
    """Yields a list of (library frames on the stack, whether within a body), one per scan."""
    home = str(pathlib.Path(jaxrnn.__file__).parent) + "/"
    scan, seen, depth = jax.lax.scan, [], 0

    def recorded(*args, **kwargs):
        nonlocal depth
        frame, count = inspect.currentframe(), 0
        while frame := frame.f_back:
            count += frame.f_code.co_filename.startswith(home)
        seen.append((count, depth > 0))
        depth += 1
        try:
            return scan(*args, **kwargs)
        finally:
            depth -= 1

    jax.lax.scan = recorded
    try:
        yield seen
    finally:
        jax.lax.scan = scan


def frames(gradient: bool, sizes: tuple[int, int, int, int]) -> tuple[int, int]:
    """The most frames of the library on the stack where it calls `lax.scan`.

    Args:
      gradient: of the gradient of a sum of all states, else of the states.
      sizes: (T, B, D, H).

    Returns:
      (at scans that are in no other scan, at scans in the body of another one), 0 for none.
    """
    cell, xs, _ = _shapes(*sizes)
    program = jaxrnn.unroll
    if gradient:
        program = jax.grad(lambda cell, xs: jnp.sum(jaxrnn.unroll(cell, xs)[1]))
    jax.clear_caches()
    with _scans_seen() as seen:
        jax.jit(program).lower(cell, xs)
    jax.clear_caches()
    outer = [count for count, inside in seen if not inside]
    inner = [count for count, inside in seen if inside]
    return max(outer, default=0), max(inner, default=0)


def eager_calls() -> dict[str, Callable[[], Any]]:
    """Eager calls of one small cell of each kind, compiled and checked already."""
    cell = jaxrnn.Cell(jnp.ones((16, 3)), jnp.ones((16, 16)), jnp.ones(16))
    form = jaxrnn.Form(lambda a, h, gain: jnp.tanh(gain * a))
    cells = {
        "tanh": cell,
        "callable": replace(cell, activation=lambda a: jnp.tanh(a)),
        "leak": replace(cell, leak=jnp.asarray(0.5)),
        "custom": replace(cell, form=form, parameters=jnp.ones(16)),
        "number and NumPy": replace(cell, b=np.ones(16), leak=0.5),
    }
    xs, h = jnp.ones((5, 3)), jnp.zeros(16)
    jitted = jax.jit(lambda cell, xs: jaxrnn.unroll(cell, xs))
    calls = {f"step, {n}": partial(jaxrnn.step, c, xs[0], h) for n, c in cells.items()}
    calls |= {f"unroll, {n}": partial(jaxrnn.unroll, c, xs) for n, c in cells.items()}
    calls["jitted unroll"] = partial(jitted, cell, xs)
    for call in calls.values():
        jax.block_until_ready(call())
    return calls


def functions_run(call: Callable[[], Any]) -> int:
    """How many Python functions are called, by the library, by JAX and by Python itself."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def microseconds(call: Callable[[], Any], rounds: int = 5, number: int = 2000) -> float:
    """The shortest mean time of one call."""
    return min(timeit.repeat(call, number=number, repeat=rounds)) / number * 1e6


def _shapes(T, B, D, H, members=()):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    cell = jaxrnn.Cell(shape(*members, H, D), shape(*members, H, H), shape(*members, H))
    return cell, shape(T, B, D), shape(T, B, H)


def _gradient(unroll, members=0):
    """A new function each time: no cache of JAX knows it."""

    def loss(cell, xs, g):
        def of_one(cell):
            return unroll(cell, xs, jnp.zeros(g.shape[1:], g.dtype))[1]

        hs = jax.vmap(of_one)(cell) if members else of_one(cell)
        return jnp.sum(hs * jnp.broadcast_to(g, hs.shape))

    return jax.jit(jax.grad(loss, (0, 1), allow_int=True))


def _seconds(run) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tracing_against_naive(rounds: int = 15) -> float:
    """How long tracing a gradient takes, over the same of a naive scan: medians in turn."""
    args = _shapes(25, 32, 65, 128)
    unrolls = jaxrnn.unroll, naive_unroll
    taken = [[_seconds(lambda u=u: _gradient(u).trace(*args)) for u in unrolls]
             for _ in range(rounds + 1)][1:]  # fmt: skip
    ours, naive = (statistics.median(times) for times in zip(*taken, strict=True))
    return ours / naive


def compiling_against_naive() -> dict[str, float]:
    """How long trace, lowering and compilation of a gradient take together, over a naive scan's.

    For each shape of the benchmarks, once each; the naive scan reads ids as one-hot rows.
    """
    from benchmarks.workloads import WORKLOADS

    ratios = {}
    for n, work in enumerate(WORKLOADS):
        members = (work.members,) if work.members else ()
        cell, xs, g = _shapes(work.T, work.B, work.D, work.H, members)
        ids = jaxrnn.Ids(jax.ShapeDtypeStruct((work.T, work.B), jnp.int32))
        sides = [(jaxrnn.unroll, ids if work.ids else xs), (naive_unroll, xs)]
        taken = {}
        for unroll, inputs in sides if n % 2 else sides[::-1]:
            args = cell, inputs, g
            taken[unroll] = _seconds(
                lambda u=unroll, a=args, m=work.members: _gradient(u, m).lower(*a).compile()
            )
        ratios[work.name] = taken[jaxrnn.unroll] / taken[naive_unroll]
    return ratios


def main() -> None:
    """Print all counts."""
    print(f"lines of _base and _core: {lines_of_core():,}")
    print(f"lines of the library without kernels and command line: {lines_of_library():,}")
    for gradient in (False, True):
        what = "gradient" if gradient else "unroll"
        for name, sizes in (("small", SMALL), ("long", LONG)):
            outer, inner = frames(gradient, sizes)
            within = f", {inner} at one inside another" if inner else ""
            print(f"frames of the library at a scan, {what}, {name}: {outer}{within}")
    for name, call in eager_calls().items():
        print(f"{name}: {microseconds(call):.0f} µs, {functions_run(call)} functions")
    print(f"tracing a gradient, over a naive scan's: {tracing_against_naive():.2f}")
    ratios = compiling_against_naive()
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    print(f"tracing and compiling a gradient, likewise, geometric mean: {mean:.2f}")
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.2f}")


if __name__ == "__main__":
    sys.path.append(str(ROOT))  # for the shapes of the benchmarks
    main()

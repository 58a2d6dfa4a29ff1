"""Whether a kernel is exact and repeatable: beside the scan in float64, on the same device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxrnn
from benchmarks.kernels import NAMED, allowed
from benchmarks.measures import FORWARD

STEPS, BATCH, INPUTS, REPEATS = 2048, 128, 64, 100
NAMES = tuple(name for names in NAMED.values() for name in names)


def examine(
    dtype: str,
    hidden: int,
    direction: str,
    *,
    batch: int = BATCH,
    steps: int = STEPS,
    repeats: int = REPEATS,
    implementation: str = "mosaic_gpu",
) -> dict[str, Any]:
    """What a kernel computes from random numbers, beside what two scans do.

    Args:
      dtype: of the kernel; float64 starts from the same rounded numbers.
      hidden: H.
      direction: FORWARD, the states; or BACKWARD, the gradient in weights, inputs and h_0.
      batch: B.
      steps: T.
      repeats: calls whose results are compared bit by bit.
      implementation: the kernel.

    Returns:
      T, B, repeats; error: of the array where it is largest beside what is allowed, relative to
      that array's largest entry; array: which; scan_error: the scan's there, in the kernel's
      dtype; eps: of the dtype; identical: whether all repeats were; named: the kernels in the
      program.
    """
    arrays = _draw(dtype, hidden, batch, steps)
    function = _states if direction == FORWARD else _gradient
    with ThreadPoolExecutor(3) as pool:  # compiling is what takes the time
        kernel = pool.submit(build, partial(function, implementation), arrays)
        scan = pool.submit(build, partial(function, "scan"), arrays)
        right = pool.submit(_exact, function, arrays)
        call, text = kernel.result()
        eps = float(jnp.finfo(dtype).eps)
        found = call(*arrays)
        worst = _worst(found, scan.result()[0](*arrays), right.result(), eps)
    return {
        **worst,
        "T": steps,
        "B": batch,
        "eps": eps,
        "repeats": repeats,
        "identical": _identical(call, arrays, found, repeats),
        "named": kernels_in(text),
    }


def build(function: Callable[..., Any], args: tuple) -> tuple[Callable[..., Any], str]:
    """Compile.

    Args:
      function: for `jax.jit`.
      args: its arguments.

    Returns:
      The compiled function, and its program as text.
    """
    lowered = jax.jit(function).lower(*args)
    compiled = lowered.compile()
    return compiled, program_text(lowered, compiled)


def program_text(lowered: Any, compiled: Any) -> str:
    """A program before and after XLA has compiled it."""
    return f"{lowered.as_text()}\n{compiled.as_text()}"


def kernels_in(text: str) -> list[str]:
    """The kernels that a program's text names."""
    return sorted({name for name in NAMES if name in text})


def _draw(dtype, H, B, T):
    rng = np.random.default_rng(0)
    W = 0.9 * np.linalg.qr(rng.standard_normal((H, H)))[0]
    U, b = rng.standard_normal((H, INPUTS)) / INPUTS**0.5, 0.1 * rng.standard_normal(H)
    cell = jaxrnn.Cell(*(jnp.asarray(x, "float32").astype(dtype) for x in (U, W, b)))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (T, B, INPUTS), (B, H), (T, B, H)
    drawn = (jax.random.normal(k, s, "float32") for k, s in zip(keys, shapes, strict=True))
    xs, h0, g = (x.astype(dtype) for x in drawn)
    return cell, xs, jnp.tanh(h0), g


def _states(implementation, cell, xs, h0, g):
    return {"hs": jaxrnn.unroll(cell, xs, h0, implementation=implementation)[1]}


def _gradient(implementation, cell, xs, h0, g):
    def loss(cell, xs, h0):
        return jnp.sum(_states(implementation, cell, xs, h0, g)["hs"] * g)

    cell, xs, h0 = jax.grad(loss, (0, 1, 2))(cell, xs, h0)
    return {"U": cell.U, "W": cell.W, "b": cell.b, "xs": xs, "h0": h0}


def _exact(function, arrays):
    """By the scan in float64; a thread of its own has that mode to itself."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64"), arrays)
        return build(partial(function, "scan"), wide)[0](*wide)


def _worst(found, scanned, right, eps):
    with jax.enable_x64(True):
        rows = []
        for name, correct in right.items():
            scale = jnp.max(jnp.abs(correct))
            errors = [jnp.max(jnp.abs(x[name].astype("float64") - correct)) / scale
                      for x in (found, scanned)]  # fmt: skip
            error, scan_error = map(float, errors)
            rows.append({"array": name, "error": error, "scan_error": scan_error})

    def beyond(row):
        excess = row["error"] / allowed({**row, "eps": eps})
        return excess if excess == excess else np.inf  # NaN is worst

    return max(rows, key=beyond)


def _identical(call, arrays, first, repeats):
    @jax.jit
    def same(found, first):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(first), strict=True)
        return jnp.all(jnp.stack([jnp.array_equal(x, y) for x, y in pairs]))

    # Waited for one by one: results that are still to come would fill the memory.
    return all(bool(same(call(*arrays), first)) for _ in range(repeats - 1))

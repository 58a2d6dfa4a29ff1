"""What is measured of a layer in JAX, compiled: `prepare` is JAX's side of a worker."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.reference import parameter_names
from benchmarks.results import cores
from benchmarks.subjects import Layer, NotOfferedError, Prepared
from benchmarks.subjects.registry import Subject
from benchmarks.workloads import (
    BACKWARD,
    BACKWARD_ALONE,
    FORWARD,
    HVP,
    JVP,
    PARAMETERS,
    Data,
    Workload,
)

# XLA takes any program for a product.
NOT_TUNED = {"xla_gpu_autotune_level": 0}
# How jaxrnn's kernels are called in a program's text.
KERNEL_NAMES = ("jaxrnn_states", "jaxrnn_adjoint")
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def device() -> Any:
    """What JAX computes on."""
    return jax.devices()[0]


def machine() -> dict[str, Any]:
    """The accelerator's name or None as "gpu", and how many threads XLA has."""
    gpu = device().device_kind if device().platform == "gpu" else None
    return {"gpu": gpu, "threads": int(os.environ.get("NPROC") or cores())}


def healthy() -> bool:
    """Whether the device still computes: after an illegal address it never does again."""
    try:
        return float(jax.block_until_ready(jnp.ones(4)).sum()) == 4
    except Exception:
        return False


def forget() -> None:
    """Give compiled programs back."""
    jax.clear_caches()


def prepare(
    subject: Subject, workload: Workload, measure: str, data: Data, tangent: Data
) -> Prepared:
    """A subject's program, compiled and called once.

    Args:
      subject: whose.
      workload: the shapes, with the subject's network.
      measure: one of the measures.
      data: the numbers.
      tangent: the direction of derivatives.

    Returns:
      The `Prepared`.

    Raises:
      NotOfferedError: the subject lacks the network or the measure.
      ImportError: its library is not installed.
    """
    dtype = workload.dtype or subject.dtype
    if subject.make is None:
        return _compiled(products(workload, measure, dtype), workload, lambda result: {})
    layer = subject.make(workload.network)
    program = make(layer, workload, measure, data, tangent, dtype)
    return _compiled(program, workload, partial(arrays, layer, workload, measure))


def _compiled(
    program: Program, workload: Workload, unload: Callable[[Any], dict[str, Any]]
) -> Prepared:
    function, args = program
    times = [time.perf_counter()]
    jitted = jax.jit(function)
    lowered = jitted.lower(*args)
    times.append(time.perf_counter())
    compiled = lowered.compile(compiler_options=None if workload.tuned else NOT_TUNED)
    times.append(time.perf_counter())
    wanted = compiled.input_shardings[0]
    # Where a program wants its arguments on several devices, they lie there beforehand. On one
    # they stay as they are: for arguments that are put somewhere, JAX compiles anew.
    if any(len(where.device_set) > 1 for where in jax.tree.leaves(wanted)):
        args = jax.device_put(args, wanted)
    jax.block_until_ready(args)
    # As a user calls it: `compiled` itself is called by slower Python. But `jitted` would be
    # compiled anew where this one was compiled without tuning.
    call = partial(jitted if workload.tuned else compiled, *args)
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    trace, compiling = (float(seconds) for seconds in np.diff(times))
    text = f"{lowered.as_text()}\n{compiled.as_text()}"
    record: dict[str, Any] = {
        "trace": trace,
        "compile": compiling,
        "first_call": trace + compiling + time.perf_counter() - start,
        "kernels": [name for name in KERNEL_NAMES if name in text],
    }
    if (analysis := compiled.memory_analysis()) is not None:
        record["temporaries"] = analysis.temp_size_in_bytes
    queued = device().platform == "gpu"  # a call returns before its result is there
    wait = jax.block_until_ready if queued else None
    return Prepared(
        call if queued else lambda: jax.block_until_ready(call()),
        wait,
        lambda: unload(result),
        record,
    )


def make(
    layer: Layer, workload: Workload, measure: str, data: Data, tangent: Data, dtype: str
) -> Program:
    """The program of one measure and its arguments: nothing that is computed is closed over.

    Gradients and tangents have the layer's own layout: see `arrays`.
    """

    def array(values):
        # Rounded on the device: NumPy takes seconds for large arrays.
        return jnp.asarray(_batch_first(layer, values)).astype(dtype)

    def inputs(numbers):
        if numbers.ids is None:
            return array(numbers.xs)
        return jnp.asarray(numbers.ids.T if layer.batch_first else numbers.ids)

    unroll = _on_inputs(layer, workload)
    weights, moved = (_weights(layer, numbers, dtype) for numbers in (data, tangent))
    xs, g = inputs(data), array(data.g)
    lengths = () if data.lengths is None else (jnp.asarray(data.lengths),)

    def loss(weights, xs, g, *lengths):
        return jnp.sum(unroll(weights, xs, *lengths) * g)

    def curvature(weights, moved, *others):
        def gradient(weights):
            return jax.grad(loss)(weights, *others)

        return jax.jvp(gradient, (weights,), (moved,))[1]

    if measure == FORWARD:
        return unroll, (weights, xs, *lengths)
    if measure == PARAMETERS or (measure == BACKWARD and workload.ids):
        return jax.grad(loss), (weights, xs, g, *lengths)
    if measure == BACKWARD:
        return jax.grad(loss, (0, 1)), (weights, xs, g, *lengths)
    if measure == BACKWARD_ALONE:
        forward = jax.jit(lambda *args: jax.vjp(unroll, *args)[1], compiler_options=NOT_TUNED)
        return (lambda pull, g: pull(g)), (forward(weights, xs), g)
    if workload.network.activation == "relu":
        raise NotOfferedError(f"there is no reference for relu's {measure}")
    if measure == HVP:
        return curvature, (weights, moved, xs, g, *lengths)
    assert measure == JVP
    moving, still = ((), (xs,)) if workload.ids else ((xs, array(tangent.xs)), ())

    def tangent_of_states(weights, moved, moving, still):
        def states(weights, *xs):
            return unroll(weights, *xs, *still)

        return jax.jvp(states, (weights, *moving[:1]), (moved, *moving[1:]))

    return tangent_of_states, (weights, moved, moving, (*still, *lengths))


def arrays(layer: Layer, workload: Workload, measure: str, result: Any) -> dict[str, Any]:
    """A program's result as float64 arrays in Data's layout, by the reference's names.

    Where sequences repeat others, "copies" is how far those differ that are equal.
    """

    def sequences(array):
        if workload.distinct:
            few = workload.compared
            array = array[few] if layer.batch_first else array[:, few]
        return _batch_first(layer, np.asarray(array, np.float64))

    copies = {}
    if workload.distinct and measure in (FORWARD, BACKWARD):
        copies["copies"] = difference_of_copies(workload, measure, result)
    if measure == FORWARD:
        return {"hs": sequences(result), **copies}
    if measure == JVP:
        hs, moved = map(sequences, result)
        return {"hs": hs, "tangent of hs": moved}
    with_inputs = measure in (BACKWARD, BACKWARD_ALONE) and not workload.ids
    gradient, *dxs = result if with_inputs else (result,)
    # NumPy's arrays in the layer's containers: nothing here is compiled.
    gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
    prefix = "tangent of " if measure == HVP else ""
    names = [f"{prefix}{name}" for name in parameter_names(workload.network.cells)]
    found = dict(zip(names, _unload(layer, workload, gradient), strict=True))
    return found | copies | ({"dxs": sequences(dxs[0])} if dxs else {})


def difference_of_copies(workload: Workload, measure: str, result: Any) -> float:
    """How far sequences that are equal differ, in terms of the largest entry.

    The reference is compared with each of the distinct sequences once, and this finds a mistake in
    any of the others. Infinite where a NaN is.
    """
    return float(_difference(result if measure == FORWARD else result[1], workload.distinct))


@partial(jax.jit, static_argnums=1)
def _difference(array, distinct):
    array = array.astype(jnp.float32)
    copies = array.reshape(array.shape[0], -1, distinct, array.shape[-1])
    difference = jnp.abs(copies - copies[:, :1]) / jnp.max(jnp.abs(copies[:, :1]))
    # A maximum by XLA may lose NaN.
    return jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference))


def alike(call: Callable[[], Any], calls: int) -> bool:
    """Whether the results of so many calls are the same bit by bit."""

    @jax.jit
    def same(result, first):
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(first), strict=True)
        return jnp.all(jnp.stack([jnp.array_equal(x, y) for x, y in pairs]))

    first = call()
    # Waited for one by one: results that are still to come would fill the memory.
    return all(bool(same(call(), first)) for _ in range(calls - 1))


def products(workload: Workload, measure: str, dtype: str) -> Program:
    """The limit: the matrix products that a layer cannot do without, and nothing else.

    One product [B, H] × [H, H] a step, each waiting for the one before; what does not wait, as one
    product over all steps: U x, and backward dW, dU and dxs. No nonlinearity, no bias, no states
    kept.
    """
    if measure not in (FORWARD, BACKWARD, PARAMETERS) or not workload.network.plain:
        raise NotOfferedError("its products are not counted")
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    members, many = ((workload.members,) if workload.members else ()), max(workload.members, 1)
    rng = np.random.default_rng(0)
    # Orthogonal, so that the state neither dies nor overflows; the members' states side by side.
    W = jnp.asarray(np.linalg.qr(rng.standard_normal((*members, H, H)))[0], dtype)
    # Members share the inputs: their matrices U are rows of one. Where backward needs states and
    # deltas of all steps, any numbers will do.
    both = (*members, T * B, H)
    shapes = (*members, B, H), (many * H, D), (T * B, D), both, both, (T * B, many * H)
    others = [jax.random.normal(jax.random.key(n), s, dtype) for n, s in enumerate(shapes)]

    def loop(W, h):
        return lax.scan(lambda h, _: (h @ W, None), h, length=T)[0]

    def forward(W, h0, U, xs):
        return loop(W, h0), None if workload.ids else xs @ U.T

    def backward(W, h0, U, xs, hs, deltas, beside):
        h, inputs = forward(W, h0, U, xs)
        # From where the first loop ends, so that the two do not run side by side.
        found = {"adjoint": loop(W, h), "inputs": inputs, "dW": jnp.swapaxes(deltas, -1, -2) @ hs}
        if not workload.ids:
            found["dU"] = beside.T @ xs
            if measure == BACKWARD:
                found["dxs"] = beside @ U
        return found

    if measure == FORWARD:
        return forward, (W, *others[:3])
    return backward, (W, *others)


def _on_inputs(layer: Layer, workload: Workload) -> Callable[..., jax.Array]:
    """The layer's unroll, with one-hot rows for ids where it needs them, mapped over members."""
    unroll = layer.unroll
    if workload.ids and not layer.takes_ids:

        def unroll(weights, ids):
            dtype = jax.tree.leaves(weights)[0].dtype
            return layer.unroll(weights, jax.nn.one_hot(ids, workload.D, dtype=dtype))

    return jax.vmap(unroll, (0, None)) if workload.members else unroll


def _weights(layer: Layer, data: Data, dtype: str) -> Any:
    """The layer's pytree; for an ensemble its leaves are stacked, for several cells a tuple."""
    if len(data.cells) > 1:
        loaded = tuple(layer.load(*cell) for cell in data.cells)
    elif data.cells[0][1].ndim == 2:
        loaded = layer.load(*data.cells[0])
    else:
        members = [layer.load(*member) for member in zip(*data.cells[0], strict=True)]
        loaded = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loaded)


def _unload(layer: Layer, workload: Workload, gradient: Any) -> list[np.ndarray]:
    if workload.network.cells > 1:
        parts = [part for cell in gradient for part in layer.unload(cell)]
    elif not workload.members:
        parts = layer.unload(gradient)
    else:
        each = [
            layer.unload(jax.tree.map(lambda leaf, n=n: leaf[n], gradient))
            for n in range(workload.members)
        ]
        parts = [np.stack(part) for part in zip(*each, strict=True)]
    return [np.asarray(part) for part in parts]


def _batch_first(layer: Layer, array: np.ndarray) -> np.ndarray:
    """Time and batch swapped for a layer that has the batch first; its own inverse."""
    return np.swapaxes(array, -3, -2) if layer.batch_first else array

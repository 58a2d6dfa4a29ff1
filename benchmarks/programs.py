"""What is measured of a layer in JAX, compiled: `prepare` is JAX's side of a worker."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import cores
from benchmarks.subjects import Layer, Prepared, parameter_names
from benchmarks.subjects.registry import Subject
from benchmarks.workloads import BACKWARD, BACKWARD_ALONE, FORWARD, HVP, Data, Workload

# How jaxrnn's kernels are called in a program's text.
KERNEL_NAMES = ("jaxrnn_states", "jaxrnn_adjoint")
Program = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments


def device() -> Any:
    """What JAX computes on."""
    return jax.devices()[0]


def machine() -> dict[str, Any]:
    """The accelerator's name or None as "gpu", and how many threads XLA has."""
    gpu = device().device_kind if device().platform == "gpu" else None
    return {"gpu": gpu, "threads": cores()}


def check_device() -> None:
    """Compute: an error where the device does not any more, as after an illegal address."""
    jax.block_until_ready(jnp.ones(4) + 1)


def prepare(
    subject: Subject, workload: Workload, measure: str, data: Data, tangent: Data
) -> Prepared:
    """A subject's program, compiled and called once: NotOfferedError where it lacks it."""
    dtype = workload.dtype or subject.dtype
    layer = subject.make(workload.network)
    function, args = make(layer, workload, measure, data, tangent, dtype)
    jitted, start = jax.jit(function), time.perf_counter()
    lowered = jitted.lower(*args)
    trace = time.perf_counter() - start
    compiled = lowered.compile()
    record: dict[str, Any] = {"trace": trace, "compile": time.perf_counter() - start - trace}
    wanted = compiled.input_shardings[0]
    # Where a program wants its arguments on several devices, they lie there beforehand. On one
    # they stay as they are: for arguments that are put somewhere, JAX compiles anew.
    if any(len(where.device_set) > 1 for where in jax.tree.leaves(wanted)):
        args = jax.device_put(args, wanted)
    jax.block_until_ready(args)
    # As a user calls it: `compiled` itself is called by slower Python.
    call = partial(jitted, *args)
    result = jax.block_until_ready(call())
    text = f"{lowered.as_text()}\n{compiled.as_text()}"
    record["kernels"] = [name for name in KERNEL_NAMES if name in text]
    if (analysis := compiled.memory_analysis()) is not None:
        record["temporaries"] = analysis.temp_size_in_bytes
    found = partial(arrays, layer, workload, measure, result)
    if device().platform == "gpu":  # a call returns before its result is there
        return Prepared(call, jax.block_until_ready, found, record)
    return Prepared(lambda: jax.block_until_ready(call()), None, found, record)


def make(
    layer: Layer, workload: Workload, measure: str, data: Data, tangent: Data, dtype: str
) -> Program:
    """The program of one measure: nothing that is computed is closed over."""

    def array(values):
        # Rounded on the device: NumPy takes seconds for large arrays.
        return jnp.asarray(_batch_first(layer, values)).astype(dtype)

    unroll = _on_inputs(layer, workload)
    weights, g = _weights(layer, data, dtype), array(data.g)
    if data.ids is not None:
        xs = jnp.asarray(data.ids.T if layer.batch_first else data.ids)
    else:
        xs = array(data.xs)
    lengths = () if data.lengths is None else (jnp.asarray(data.lengths),)

    def loss(weights, xs, g, *lengths):
        return jnp.sum(unroll(weights, xs, *lengths) * g)

    def curvature(weights, moved, *others):
        def gradient(weights):
            return jax.grad(loss)(weights, *others)

        return jax.jvp(gradient, (weights,), (moved,))[1]

    if measure == FORWARD:
        return unroll, (weights, xs, *lengths)
    if measure == BACKWARD:
        return jax.grad(loss, 0 if workload.ids else (0, 1)), (weights, xs, g, *lengths)
    if measure == BACKWARD_ALONE:
        pull = jax.jit(lambda *args: jax.vjp(unroll, *args)[1])(weights, xs)
        return lambda pull, g: pull(g), (pull, g)
    assert measure == HVP
    return curvature, (weights, _weights(layer, tangent, dtype), xs, g, *lengths)


def arrays(layer: Layer, workload: Workload, measure: str, result: Any) -> dict[str, Any]:
    """A program's result as float64 arrays in Data's layout, by the reference's names.

    Where sequences repeat others, "copies" is how far those differ that are equal.
    """

    def sequences(array):
        if workload.distinct:
            few = workload.compared
            array = array[few] if layer.batch_first else array[:, few]
        return _batch_first(layer, np.asarray(array, np.float64))

    whole, gradient, found = {"hs": result} if measure == FORWARD else {}, result, {}
    if measure in (BACKWARD, BACKWARD_ALONE) and not workload.ids:
        gradient, whole["dxs"] = result
    if measure != FORWARD:
        # NumPy's arrays in the layer's containers: nothing here is compiled.
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
        names = parameter_names(workload.network.cells, "tangent of " if measure == HVP else "")
        found = dict(zip(names, _unload(layer, workload, gradient), strict=True))
    for name, array in whole.items():
        found[name] = sequences(array)
        if workload.distinct:
            found["copies"] = float(_difference_of_copies(array, workload.distinct))
    return found


@partial(jax.jit, static_argnums=1)
def _difference_of_copies(array, distinct):
    """In terms of the largest entry; infinite where a NaN is: a maximum by XLA may lose it.

    The reference is compared with each of the distinct sequences once, and this finds a mistake in
    any of the others.
    """
    array = array.astype(jnp.float32)
    copies = array.reshape(array.shape[0], -1, distinct, array.shape[-1])
    difference = jnp.abs(copies - copies[:, :1]) / jnp.max(jnp.abs(copies[:, :1]))
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
    cells = [[jnp.asarray(array, dtype) for array in cell] for cell in data.cells]
    if len(cells) > 1:
        return tuple(layer.load(*cell) for cell in cells)
    if cells[0][1].ndim == 2:
        return layer.load(*cells[0])
    members = [layer.load(*member) for member in zip(*cells[0], strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _unload(layer: Layer, workload: Workload, gradient: Any) -> list[np.ndarray]:
    if workload.members:
        one = [jax.tree.map(lambda leaf, n=n: leaf[n], gradient) for n in range(workload.members)]
        return [np.stack(parts) for parts in zip(*map(layer.unload, one), strict=True)]
    cells = gradient if workload.network.cells > 1 else (gradient,)
    return [np.asarray(part) for cell in cells for part in layer.unload(cell)]


def _batch_first(layer: Layer, array: np.ndarray) -> np.ndarray:
    """Time and batch swapped for a layer that has the batch first; its own inverse."""
    return np.swapaxes(array, -3, -2) if layer.batch_first else array

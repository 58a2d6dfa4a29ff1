"""What is measured, derived from a subject's `unroll`: the functions and their arguments.

With L(weights, xs) = Σ hs · g: the states; the gradient in weights and inputs; in the weights
alone; the tangent of the states; the Hessian of L times a vector, in the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measures import BACKWARD, BACKWARD_ALONE, FORWARD, HVP, JVP, PARAMETERS
from benchmarks.side import NotOfferedError
from benchmarks.subjects import JaxSubject
from benchmarks.tangents import direction
from benchmarks.workloads import Data, Workload

# For what is not timed itself: XLA takes any program for a product.
NOT_TUNED = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class Program:
    """A function for `jax.jit` and its arguments: nothing that is computed is closed over."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Arguments:
    """A workload's numbers in one subject's layout and containers, on the device.

    Args:
      weights: the subject's pytree, its leaves stacked for an ensemble.
      xs: inputs or ids.
      g: the cotangent of hs.
      tangent: a direction for the weights.
      xs_tangent: and for the inputs; None for ids.
      lengths: how many steps of each sequence are valid; None for all.
    """

    weights: Any
    xs: jax.Array
    g: jax.Array
    tangent: Any
    xs_tangent: jax.Array | None
    lengths: jax.Array | None = None


def arguments(
    subject: JaxSubject, data: Data, dtype: str = "float32", moved: Data | None = None
) -> Arguments:
    """The arguments of all programs of a subject on a workload.

    Args:
      subject: whose layout.
      data: the numbers.
      dtype: of weights, inputs and cotangent.
      moved: the direction; by default drawn.

    Returns:
      The `Arguments`.
    """

    def array(values):
        # Rounded on the device: NumPy takes seconds for large arrays.
        return jnp.asarray(_batch_first(subject, values)).astype(dtype)

    xs_tangent = None
    moved = direction(data) if moved is None else moved
    if data.ids is not None:
        xs = jnp.asarray(data.ids.T if subject.batch_first else data.ids)
    else:
        xs, xs_tangent = array(data.xs), array(moved.xs)
    weights, tangent = (_weights(subject, numbers, dtype) for numbers in (data, moved))
    lengths = None if data.lengths is None else jnp.asarray(data.lengths)
    return Arguments(weights, xs, array(data.g), tangent, xs_tangent, lengths)


def make(subject: JaxSubject, workload: Workload, measure: str, given: Arguments) -> Program:
    """The program of one measure.

    Args:
      subject: whose `unroll` it is.
      workload: the shapes.
      measure: one of MEASURES.
      given: the subject's arguments.

    Returns:
      The `Program`. Gradients and tangents have the subject's layout: see `unloaded`.

    Raises:
      NotOfferedError: there is no such measure, or of this network none.
    """
    unroll, network = _unroll(subject, workload), workload.network
    lengths = () if given.lengths is None else (given.lengths,)
    if measure in (JVP, HVP) and not replace(network, last=False).plain:
        raise NotOfferedError(f"there is no reference for the {measure} of this network")

    def loss(weights, xs, g, *lengths):
        return jnp.sum(unroll(weights, xs, *lengths) * g)

    def tangent_of_states(weights, xs, tangent, xs_tangent):
        if xs_tangent is None:
            return jax.jvp(lambda weights: unroll(weights, xs), (weights,), (tangent,))
        return jax.jvp(unroll, (weights, xs), (tangent, xs_tangent))

    def curvature(weights, xs, g, tangent):
        def gradient(weights):
            return jax.grad(loss)(weights, xs, g)

        return jax.jvp(gradient, (weights,), (tangent,))[1]

    weights, xs, g = given.weights, given.xs, given.g
    if measure == FORWARD:
        return Program(unroll, (weights, xs, *lengths))
    if measure == PARAMETERS or (measure == BACKWARD and workload.ids):
        return Program(jax.grad(loss), (weights, xs, g, *lengths))
    if measure == BACKWARD:
        return Program(jax.grad(loss, (0, 1)), (weights, xs, g, *lengths))
    if measure == BACKWARD_ALONE:
        forward = jax.jit(lambda *args: jax.vjp(unroll, *args)[1], compiler_options=NOT_TUNED)
        pull = forward(weights, xs)
        return Program(lambda pull, g: pull(g), (pull, g))
    if measure == JVP:
        return Program(tangent_of_states, (weights, xs, given.tangent, given.xs_tangent))
    if measure == HVP:
        return Program(curvature, (weights, xs, g, given.tangent))
    raise NotOfferedError(f"no such measure: {measure}")


def unloaded(subject: JaxSubject, workload: Workload, measure: str, result: Any) -> tuple:
    """A program's result as float64 arrays in the layout of Data.

    Args:
      subject: whose program it is.
      workload: the shapes.
      measure: one of MEASURES.
      result: what the program returned.

    Returns:
      (hs,), (dU, dW, db, dxs) or (dU, dW, db), with those of each cell before dxs, (hs, tangent
      of hs), or the Hessian's product as (dU, dW, db).
    """

    def sequences(array):
        if workload.distinct:
            few = workload.compared
            array = array[few] if subject.batch_first else array[:, few]
        return _batch_first(subject, np.asarray(array, np.float64))

    if measure in (FORWARD, JVP):
        found = tuple(map(sequences, (result,) if measure == FORWARD else result))
    else:
        with_inputs = measure in (BACKWARD, BACKWARD_ALONE) and not workload.ids
        gradient, *dxs = result if with_inputs else (result,)
        # NumPy's arrays in the subject's containers: nothing here is compiled.
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
        found = (*_unload(subject, workload, gradient), *map(sequences, dxs))
    return tuple(np.asarray(part) for part in found)


def difference_of_copies(workload: Workload, measure: str, result: Any) -> float:
    """How far sequences that are equal differ, in terms of the largest entry.

    The reference is compared with each of the distinct sequences once, and this finds a mistake in
    any of the others.

    Args:
      workload: the shapes; not for subjects that have the batch first.
      measure: FORWARD or BACKWARD.
      result: what the program returned.

    Returns:
      The difference; 0 where all sequences differ, infinite where a NaN is.
    """
    if not workload.distinct:
        return 0.0
    return float(_difference(result if measure == FORWARD else result[1], workload.distinct))


@partial(jax.jit, static_argnums=1)
def _difference(array, distinct):
    array = array.astype(jnp.float32)
    copies = array.reshape(array.shape[0], -1, distinct, array.shape[-1])
    difference = jnp.abs(copies - copies[:, :1]) / jnp.max(jnp.abs(copies[:, :1]))
    # A maximum by XLA may lose NaN.
    return jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference))


def _unroll(subject: JaxSubject, workload: Workload) -> Callable[[Any, Any], jax.Array]:
    unroll = subject.unroll
    if workload.ids and not subject.takes_ids:

        def from_ids(weights, ids):
            dtype = jax.tree.leaves(weights)[0].dtype
            return subject.unroll(weights, jax.nn.one_hot(ids, workload.D, dtype=dtype))

        unroll = from_ids
    return jax.vmap(unroll, (0, None)) if workload.members else unroll


def _weights(subject: JaxSubject, data: Data, dtype: str) -> Any:
    """The subject's pytree; for an ensemble its leaves are stacked, for several cells a tuple."""
    if data.more:
        loaded = tuple(subject.load(*cell) for cell in data.cells)
    elif data.W.ndim == 2:
        loaded = subject.load(data.U, data.W, data.b)
    else:
        members = [subject.load(*member) for member in zip(data.U, data.W, data.b, strict=True)]
        loaded = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loaded)


def _unload(subject: JaxSubject, workload: Workload, gradient: Any) -> tuple:
    if workload.network.cells > 1:
        return tuple(part for cell in gradient for part in subject.unload(cell))
    if not workload.members:
        return subject.unload(gradient)
    each = [
        subject.unload(jax.tree.map(lambda leaf, n=n: leaf[n], gradient))
        for n in range(workload.members)
    ]
    return tuple(np.stack(parts) for parts in zip(*each, strict=True))


def _batch_first(subject: JaxSubject, array: np.ndarray) -> np.ndarray:
    """Time and batch swapped for a subject that has the batch first; its own inverse."""
    return np.swapaxes(array, -3, -2) if subject.batch_first else array

"""Calls of the kernels: conversion of arrays to their layout, and back.

A kernel, and Pallas with it, is imported on first use.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from jaxrnn._backends.kernels import loops as kernel_loops
from jaxrnn._backends.kernels.loops import Arrays, Flags, Loop
from jaxrnn._base.options import Options
from jaxrnn._jax import sharding
from jaxrnn._jax.primitive import make_primitive


def states(
    name: str,
    options: Options,
    W: jax.Array,
    leak: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array],
    a: jax.Array,
    mask: jax.Array | None,
    h0: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(the last h_t in scan order, hs), frozen where the mask is False.

    Args:
      name: of the kernel.
      options: how the loops are run.
      W: recurrent weights, `[H, H]`.
      leak: α, scalar or `[H]`, or None.
      activation: φ, elementwise.
      a: U x_t + b + drive_t, `[T, *batch, H]`, in the dtype of sums.
      mask: which steps are valid, `[T, *batch]`, or None.
      h0: h_0, `[*batch, H]`.
    """
    if activation is jax.nn.relu:
        # Pallas for GPUs does not support functions with custom derivatives in jax 0.11, and this
        # one is not differentiated.
        activation = lambda a: jnp.maximum(a, 0)  # noqa: E731
    loop = kernel_loops.states(activation, h0.dtype)
    hs, _ = _run(name, options, loop, W, leak, h0, h0, (a,), (mask, None), h0.dtype)
    return hs[options.last], hs


def tangent_states(J: Any, e: jax.Array, y0: jax.Array, *, name: str) -> tuple[Any, jax.Array]:
    """(None, y of every step), as in `jaxrnn._core.linear`, for the rate form."""
    loop, flags = kernel_loops.tangent(J.slope_of, J.W.dtype), (J.mask, J.cut)
    return None, _run(name, J.options, loop, J.W, J.leak, y0, y0, (J.p, e), flags, e.dtype)[0]


def adjoint_states(
    J: Any, g: jax.Array | None, from_later: jax.Array, *, name: str, as_delta: bool
) -> tuple[jax.Array, jax.Array]:
    """As in `jaxrnn._core.linear`."""
    loop = kernel_loops.adjoint(J.slope_of, J.W.dtype, as_delta)
    streams = (J.p,) if g is None else (J.p, g)
    nothing, flags = jnp.zeros_like(from_later), (J.mask, J.cut)
    out, end = _run(
        name, J.options.turned(), loop, J.W.T, J.leak, nothing, from_later, streams, flags,
        from_later.dtype,
    )  # fmt: skip
    return end, out


def _run(name, options, loop, matrix, leak, v0, c0, streams, flags, out_dtype) -> tuple[Any, Any]:
    *batch, hidden_size = c0.shape
    time, B = streams[0].shape[0], prod(batch)

    def flat(x, *front):
        return x.reshape(*front, 1, B, hidden_size)

    def flag(where):
        return None if where is None else where.reshape(time, 1, B).astype("float32")

    if leak is not None:
        leak = jnp.broadcast_to(leak.astype("float32"), (1, hidden_size))
    arrays = Arrays(
        matrix=matrix[None],
        v0=flat(v0.astype(matrix.dtype)),
        c0=flat(c0.astype("float32")),
        streams=tuple(flat(x, time) for x in streams),
        flags=Flags(*map(flag, flags)),
        leak=leak,
    )
    out, end = _bind(_kernel(name, options, matrix.dtype), loop, arrays, out_dtype)
    out = out.reshape(time, *batch, hidden_size)
    return out, None if end is None else end.reshape(c0.shape)


def _kernel(name: str, options: Options, dtype: jnp.dtype) -> Callable[..., Any]:
    interpret = options.device is not None and options.device.interpret
    how: dict[str, Any] = dict(reverse=options.reverse, interpret=interpret)
    if name == "pallas_tpu":
        how["precision"] = options.precision
    elif dtype == jnp.float32:
        name = "mosaic_gpu_tf32"
    return partial(import_module(f"jaxrnn._backends.kernels.{name}").run, **how)


# The axis of networks in each of the `Arrays`, and in (out, end).
_M_OF_ARRAYS, _M_OF_RESULTS = (0, 0, 0, 1, 1, 0), (1, 0)

_kernel_p = make_primitive("kernel")


def _bind(kernel: Callable[..., Any], loop: Loop, arrays: Arrays, out_dtype: Any) -> Any:
    """Run a kernel; under vmap over weights, members join its axis M.

    It is not differentiated: the loops have their own derivative rules.
    """
    leaves, tree = jax.tree.flatten(arrays)

    def run(*leaves):
        out, end = kernel(loop, jax.tree.unflatten(tree, leaves), out_dtype)
        return [out] if end is None else [out, end]

    # Traced as if outside shard_map, whose array types kernels do not support.
    call = jax.make_jaxpr(run)(*[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])

    def again(leaves):
        return _bind(kernel, loop, jax.tree.unflatten(tree, leaves), out_dtype)

    results = _kernel_p.bind(*leaves, call=call, again=again, tree=tree)
    out, end = (*results, None)[:2]
    return sharding.varying_like((out, end), arrays)


def _join(leaves, axes, *, call, again, tree):
    del call  # of the unbatched shapes
    (size,) = {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}
    parts = zip(jax.tree.unflatten(tree, leaves), _M_OF_ARRAYS, strict=True)
    places = [place for part, place in parts for _ in jax.tree.leaves(part)]

    def join(x, axis, place):
        if axis is None:
            x, axis = jnp.broadcast_to(x[None], (size, *x.shape)), 0
        x = jnp.moveaxis(x, axis, place)
        return x.reshape(*x.shape[:place], -1, *x.shape[place + 2 :])

    def part(x, place):
        shape = (*x.shape[:place], size, -1, *x.shape[place + 1 :])
        return jnp.moveaxis(x.reshape(shape), place, 0)

    results = again([join(*each) for each in zip(leaves, axes, places, strict=True)])
    results = [part(x, n) for x, n in zip(results, _M_OF_RESULTS, strict=True) if x is not None]
    return results, [0] * len(results)


batching.primitive_batchers[_kernel_p] = _join

"""Shared by the kernels for NVIDIA GPUs: a warpgroup's tile, and the loop over time on it.

A warpgroup keeps its tile of c in registers, computes its tile of p on the tensor cores, and passes
its tile of v to the other warpgroups, by the `Exchange` of the kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrnn._backends.kernels.loops import Arrays, Loop

LAYOUT = plgpu.Layout.WGMMA


class Tile(NamedTuple):
    """The part of the arrays that belongs to a warpgroup.

    Args:
      network: index among the M.
      rows, columns: the slices of the last two axes.
      hidden_axis: 0 for the layout `[..., H, B]`, 1 for `[..., B, H]`.
    """

    network: jax.Array
    rows: Any  # pl.Slice
    columns: Any
    hidden_axis: int

    @property
    def shape(self) -> tuple[Any, Any]:
        """The shape of the tile."""
        return self.rows.size, self.columns.size

    def of(self, ref, *step):
        """The tile of `[T, M, ., .]` at a step, or of `[M, ., .]`."""
        return ref.at[(*step, self.network, self.rows, self.columns)]

    def read(self, ref, *step) -> jax.Array:
        """Load the tile into registers, in the layout of a product."""
        return _load(self.of(ref, *step), LAYOUT)

    def read_along(self, axis: int, ref, *step) -> jax.Array:
        """Load one value per row (axis 0) or per column (axis 1) of the tile."""
        part = (self.rows, self.columns)[axis]
        layout = LAYOUT.reduce(1 - axis)
        return _load(ref.at[(*step, self.network, part)], layout)

    def spread(self, axis: int, vector: jax.Array) -> jax.Array:
        """Broadcast a vector of `read_along` over the tile; this takes no registers."""
        return lax.broadcast_in_dim(vector, self.shape, (axis,))


class Exchange(NamedTuple):
    """How v gets from warpgroup to warpgroup; j counts steps in scan order.

    Args:
      product: `product(j) -> p`, the warpgroup's tile of M v, with v published in step j−1.
      publish: `publish(j, v)` publishes the warpgroup's tile of v.
      collect: `collect(j)` returns when the v of step j can be multiplied.
    """

    product: Callable[[Any], jax.Array]
    publish: Callable[[Any, jax.Array], None]
    collect: Callable[[Any], None]


def multiply(a, b) -> jax.Array:
    """The product of two matrices in shared memory, as a value in registers."""

    def scoped(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    shape = (a.shape[0], b.shape[1])
    return pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def iterate(loop: Loop, arrays: Arrays, out, end, tile: Tile, exchange: Exchange, reverse: bool):
    """Run the loop over time on one tile."""
    steps = out.shape[0]
    across = 1 - tile.hidden_axis
    leak = None
    if arrays.leak is not None:
        leak = tile.spread(tile.hidden_axis, tile.read_along(tile.hidden_axis, arrays.leak))

    def time(j):
        return steps - 1 - j if reverse else j

    def read(j):
        t = time(j)
        streams = tuple(tile.read(stream, t) for stream in arrays.streams)
        flags = jax.tree.map(lambda flag: tile.read_along(across, flag, t), arrays.flags)
        return streams, flags

    def step(j, carry):
        # fori_loop makes j 64 bits wide under jax_enable_x64.
        j = j.astype(jnp.int32)
        c, (streams, flags) = carry
        # A step is shorter than a load from memory, so loads are issued one step ahead.
        ahead = read(jnp.minimum(j + 1, steps - 1))
        p = exchange.product(j)
        streams = tuple(stream.astype(jnp.float32) for stream in streams)
        flags = jax.tree.map(lambda flag: tile.spread(across, flag), flags)
        value, v, c = loop.step(p, c, streams, flags, leak)
        exchange.publish(j, v)
        # out is stored while v is in transit.
        store(tile.of(out, time(j)), value, optimized=False)
        exchange.collect(j)
        return c, ahead

    first = tile.read(arrays.c0), read(np.int32(0))
    c, _ = lax.fori_loop(0, steps, step, first)
    if loop.finish is not None:
        store(tile.of(end), loop.finish(exchange.product(np.int32(steps)), c), optimized=False)


# Written for jax 0.11; the linters run with an older one.
def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]


def _interpreter():
    return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]


def store(ref, value: jax.Array, *, optimized: bool = True) -> None:
    """Store a tile. Device memory needs `optimized=False`: tiles are not whole cache lines."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        # In jax 0.11 any store to device memory works.
        ref[...] = value


def call(
    kernel: Callable[..., None],
    loop: Loop,
    arrays: Arrays,
    out_dtype,
    scratch: dict[str, Any],
    *,
    interpret: bool,
    spare: tuple[jax.ShapeDtypeStruct, ...] = (),
    **mesh: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Launch `kernel(arrays, out, end, *spare, **scratch)`, all of them references.

    `spare` are work arrays in device memory.
    """
    inputs, tree = jax.tree.flatten(arrays)
    out_type = [jax.ShapeDtypeStruct(arrays.streams[0].shape, out_dtype), *spare]
    if loop.finish is not None:
        out_type.insert(1, jax.ShapeDtypeStruct(arrays.c0.shape, jnp.float32))

    def body(*refs, **scratch):
        out, *others = refs[len(inputs) :]
        end = None if loop.finish is None else others.pop(0)
        kernel(jax.tree.unflatten(tree, refs[: len(inputs)]), out, end, *others, **scratch)

    out, *others = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=False
        ),
        kernel_name=loop.name,
        interpret=_interpreter() if interpret else None,
        **mesh,
    )(*inputs)
    return out, None if loop.finish is None else others[0]


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def padded(arrays: Arrays, batch: int, hidden: int, *, swap: bool) -> Arrays:
    """Pad B and H with zeros, and transpose `[..., B, H]` to `[..., H, B]` if `swap`.

    Zero rows and columns of M keep the padding out of the results.
    """

    def matrix(x):
        return _pad(x, hidden, hidden)

    def states(x):
        x = _pad(x, batch, hidden)
        return jnp.swapaxes(x, -1, -2) if swap else x

    return Arrays(
        matrix(arrays.matrix),
        states(arrays.v0),
        states(arrays.c0),
        tuple(states(stream) for stream in arrays.streams),
        jax.tree.map(lambda flag: _pad(flag, batch), arrays.flags),
        jax.tree.map(lambda leak: _pad(leak, hidden), arrays.leak),
    )


def cut(
    out: jax.Array, end: jax.Array | None, arrays: Arrays, *, swap: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Undo `padded`."""
    batch, hidden = arrays.c0.shape[-2:]

    def states(x):
        x = jnp.swapaxes(x, -1, -2) if swap else x
        return x[..., :batch, :hidden]

    return states(out), None if end is None else states(end)


def _pad(x: jax.Array, *sizes: int) -> jax.Array:
    """Pad the last axes with zeros up to these sizes."""
    kept = x.ndim - len(sizes)
    widths = [size - old for size, old in zip(sizes, x.shape[kept:], strict=True)]
    if not any(widths):
        return x
    return jnp.pad(x, [(0, 0)] * kept + [(0, width) for width in widths])

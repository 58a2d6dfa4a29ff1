"""The loops over time as one Pallas kernel for TPU: M stays in VMEM, streams are read in chunks.

The grid is (networks, tiles of the batch, chunks of time), with chunks in order. A program runs the
steps of one chunk for one tile `[rows, H]`. Scratch memory carries v and c from chunk to chunk,
while Pallas fetches the next chunk of the streams and writes back the last one of the output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrnn._backends.kernels.loops import Arrays, Loop

# For blocks and scratch memory, of the 16 MiB of a kernel; the rest is for the compiler's spills.
VMEM_BYTES = 12 * 2**20
LANES = 128
# The most sequences of a tile, tried in this order. A matrix unit loads a 128 × 128 tile of M in
# about the time of 128 rows, so fewer rows do not shorten a step by much.
MOST_ROWS = (128, 64, 32, 16, 8)
# The steps of a chunk. It should be short, since the first fetch and the last write are not
# overlapped; rows are reduced to allow LEAST_STEPS.
MOST_STEPS, LEAST_STEPS = 64, 2


def fits(hidden: int, dtype: Any) -> bool:
    """Whether M and the smallest blocks of any loop fit: H ≤ 1664, in bfloat16 2304."""
    dtype, f32 = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    return _room(_sublanes(dtype), _up(hidden, LANES), dtype, [f32] * 3, flags=2) >= 1


def run(
    loop: Loop,
    arrays: Arrays,
    out_dtype: Any,
    *,
    reverse: bool,
    precision: Any = None,
    interpret: bool = False,
    _blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Run a loop, of one step or more, where `fits`.

    Args:
      loop: the computation of a step.
      arrays: its inputs; the matrix in float32 or bfloat16.
      out_dtype: of out.
      reverse: run from the last step to the first.
      precision: of products in float32, "default" or "highest".
      interpret: simulate a TPU on the CPU, with memory that is initially NaN.
      _blocks: the sequences and the steps of a block, for tests.

    Returns:
      (out `[T, M, B, H]`, end `[M, B, H]` in float32 or None).
    """
    T, M, B, H = arrays.streams[0].shape
    dtype, out_dtype = arrays.matrix.dtype, jnp.dtype(out_dtype)
    columns = _up(H, LANES)
    moved = [*(stream.dtype for stream in arrays.streams), out_dtype]
    rows, steps = _blocks or _choose(
        T, B, columns, dtype, moved, len(jax.tree.leaves(arrays.flags))
    )
    total = _up(B, rows)
    chunks = pl.cdiv(T, steps)

    def when(t):
        return chunks - 1 - t if reverse else t

    # A Python 0 is 64 bits wide under jax_enable_x64, which Mosaic does not support as an index.
    zero = np.int32(0)
    # A second buffer would only hide fetches at the next tile or network.
    once = pl.Buffered(1)
    matrix = pl.BlockSpec(
        (None, columns, columns), lambda m, b, t: (m, zero, zero), pipeline_mode=once
    )
    leak = pl.BlockSpec((None, 1, columns), lambda m, b, t: (m, zero, zero), pipeline_mode=once)
    state = pl.BlockSpec((None, rows, columns), lambda m, b, t: (m, b, zero), pipeline_mode=once)
    end = pl.BlockSpec((None, rows, columns), lambda m, b, t: (m, b, zero))
    stream = pl.BlockSpec((steps, None, rows, columns), lambda m, b, t: (when(t), m, b, zero))
    flag = pl.BlockSpec((steps, None, rows, 1), lambda m, b, t: (when(t), m, b, zero))

    # Rows of zeros in Mᵀ keep the padding of v out of every product.
    padded = Arrays(
        matrix=_pad(jnp.swapaxes(arrays.matrix, 1, 2), M, columns, columns),
        v0=_pad(arrays.v0, M, total, columns),
        c0=_pad(arrays.c0, M, total, columns),
        streams=tuple(_pad(s, T, M, total, columns) for s in arrays.streams),
        flags=jax.tree.map(lambda f: _pad(f[..., None], T, M, total, 1), arrays.flags),
        leak=None if arrays.leak is None else _pad(arrays.leak[:, None], M, 1, columns),
    )

    def each(spec, part):
        return jax.tree.map(lambda _: spec, part)

    streams, flags = each(stream, arrays.streams), each(flag, arrays.flags)
    specs = Arrays._make((matrix, state, state, streams, flags, each(leak, arrays.leak)))
    # Not ShapeDtypeStruct, which inside shard_map needs the axes that arrays vary over.
    out_shape = [ShapedArray((T, M, total, columns), out_dtype)]
    out_specs = [stream]
    if loop.finish is not None:
        out_shape.append(ShapedArray((M, total, columns), jnp.dtype(jnp.float32)))
        out_specs.append(end)

    out, *ends = pl.pallas_call(
        _kernel(loop, T, H, reverse, precision if dtype == jnp.float32 else "default"),
        grid=(M, total // rows, chunks),
        in_specs=[specs],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((rows, columns), dtype),
            pltpu.VMEM((rows, columns), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=loop.name,
    )(padded)
    return out[:, :, :B, :H], ends[0][:, :B, :H] if ends else None


def _kernel(loop: Loop, T: int, H: int, reverse: bool, precision: Any) -> Callable[..., None]:
    """The body of one program; `read` is `Arrays` of references."""

    def kernel(read, out, *refs):
        *ends, v, c = refs
        steps, shape = out.shape[0], c.shape
        t, chunks = pl.program_id(2), pl.num_programs(2)
        chunk = chunks - 1 - t if reverse else t
        # The last block may extend beyond T, where memory is uninitialised.
        count = jnp.minimum(steps, T - chunk * steps)

        @pl.when(t == 0)
        def _():
            v[...], c[...] = read.v0[...], read.c0[...]

        def product():
            return jnp.dot(
                v[...], read.matrix[...], preferred_element_type=jnp.float32, precision=precision
            )

        def step(j, _):
            i = count - 1 - j if reverse else j
            streams = tuple(stream[i].astype(jnp.float32) for stream in read.streams)
            flags = jax.tree.map(lambda flag: jnp.broadcast_to(flag[i], shape), read.flags)
            leak = None if read.leak is None else jnp.broadcast_to(read.leak[...], shape)
            value, v_next, c_next = loop.step(product(), c[...], streams, flags, leak)
            if shape[1] > H:
                # An activation may be infinite at the zeros of the padding, where ∞ · 0 is NaN.
                real = lax.broadcasted_iota(jnp.int32, shape, 1) < H
                v_next = jnp.where(real, v_next.astype(jnp.float32), 0.0)
            out[i] = value.astype(out.dtype)
            v[...], c[...] = v_next.astype(v.dtype), c_next

        lax.fori_loop(jnp.int32(0), count, step, None)

        finish = loop.finish
        if finish is not None:

            @pl.when(t == chunks - 1)
            def _():
                ends[0][...] = finish(product(), c[...])

    return kernel


def _choose(
    T: int, B: int, columns: int, dtype: Any, moved: Sequence[Any], flags: int
) -> tuple[int, int]:
    """(sequences, steps) of a block: the fewest tiles and chunks, then the smallest blocks."""
    rows = steps = 1
    for most in MOST_ROWS:
        rows = _up(pl.cdiv(B, pl.cdiv(B, most)), _sublanes(dtype))
        steps = min(_room(rows, columns, dtype, moved, flags), MOST_STEPS, T)
        if steps >= min(T, LEAST_STEPS):
            break
    return rows, pl.cdiv(T, pl.cdiv(T, max(steps, 1)))


def _room(rows: int, columns: int, dtype: Any, moved: Sequence[Any], flags: int) -> int:
    """How many steps of a tile fit into VMEM beside the arrays that stay there."""
    tile = rows * columns
    # M; v and c, initial and current; two buffers of the end; 8 rows of the leak.
    stays = columns**2 * dtype.itemsize + 2 * tile * (dtype.itemsize + 4) + 2 * tile * 4
    stays += 8 * columns * 4
    # Two buffers. The flag of a sequence takes a row of lanes.
    step = 2 * (tile * sum(d.itemsize for d in moved) + flags * rows * LANES * 4)
    return (VMEM_BYTES - stays) // step


def _sublanes(dtype: Any) -> int:
    """The rows of a tile of memory: 8 for 32 bits, 16 for 16 bits."""
    return 32 // dtype.itemsize


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _pad(array: jax.Array, *shape: int) -> jax.Array:
    widths = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, widths)

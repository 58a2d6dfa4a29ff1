"""The loops on an NVIDIA Hopper GPU, in float32 by way of TF32.

As in `mosaic_gpu`, with the sides of the product exchanged: 64 sequences are the M side, and the
hidden units, split over the warpgroups, the N side. The tensor cores cannot transpose TF32, so v
and the matrix both have the summed axis last, as `[B, H]` and `[out, in]`. They ignore the last 13
bits of a float32, which makes every product too small: with an orthogonal W a state would lose half
its norm in 1,024 steps. So both factors are rounded before, and it loses 0.7 % at most (H = 64 to
160, simulated), for 5 to 10 % more static cycles per step. U x is XLA's product, in the precision
of the options.
"""

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrnn._backends.kernels._tiles import (
    Exchange,
    Tile,
    call,
    cut,
    iterate,
    multiply,
    padded,
    round_up,
    store,
)
from jaxrnn._backends.kernels.loops import Arrays, Loop

# Sequences in a tile: the rows of a warpgroup's product.
BATCH_TILE = 64
# Hidden units of a warpgroup: a row of v in its swizzled layout in shared memory.
COLUMNS = 32
# The largest hidden size for which M and two buffers of v fit into shared memory.
MAX_HIDDEN = 160


def run(
    loop: Loop,
    arrays: Arrays,
    out_dtype,
    *,
    reverse: bool,
    interpret: bool = False,
    slots: int = 2,
) -> tuple[jax.Array, jax.Array | None]:
    """Run a loop, as `mosaic_gpu.run` does; the matrix in float32, H at most MAX_HIDDEN."""
    arrays = arrays._replace(matrix=rounded(arrays.matrix), v0=rounded(arrays.v0))
    hidden = round_up(arrays.matrix.shape[-1], COLUMNS)
    networks, batch, _ = arrays.c0.shape
    batch = round_up(batch, BATCH_TILE)
    warpgroups = hidden // COLUMNS

    def kernel(arrays, out, end, m_s, v_s, loaded, published):
        network, warpgroup = lax.axis_index("network"), lax.axis_index("warpgroup")
        rows = pl.ds(lax.axis_index("tile") * BATCH_TILE, BATCH_TILE)
        columns = pl.ds(warpgroup * COLUMNS, COLUMNS)

        @pl.when(warpgroup == 0)
        def _load():
            plgpu.copy_gmem_to_smem(arrays.matrix.at[network], m_s, loaded)
            plgpu.copy_gmem_to_smem(arrays.v0.at[network, rows], v_s.at[0], loaded)

        plgpu.barrier_wait(loaded)

        def slot(j):
            return lax.rem(j, np.int32(slots))

        def product(j):
            return multiply(v_s.at[slot(j)], m_s.at[columns].T)

        def publish(j, v):
            # `mosaic_gpu` says why two slots and one barrier are enough.
            store(v_s.at[slot(j + 1), :, columns], rounded_in_kernel(v))
            plgpu.commit_smem()
            plgpu.barrier_arrive(published)

        def collect(j):
            plgpu.barrier_wait(published)

        iterate(
            loop, arrays, out, end, Tile(network, rows, columns, 1),
            Exchange(product, publish, collect), reverse,
        )  # fmt: skip

    dtype = arrays.matrix.dtype
    out, end = call(
        kernel,
        loop,
        padded(arrays, batch, hidden, swap=False),
        out_dtype,
        {
            "m_s": plgpu.SMEM((hidden, hidden), dtype),
            "v_s": plgpu.SMEM((slots, BATCH_TILE, hidden), dtype),
            "loaded": plgpu.Barrier(num_arrivals=2),
            "published": plgpu.Barrier(num_arrivals=warpgroups),
        },
        interpret=interpret,
        grid=(networks, batch // BATCH_TILE),
        grid_names=("network", "tile"),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )
    return cut(out, end, arrays, swap=False)


def rounded(x: jax.Array) -> jax.Array:
    """Round to TF32, which has 10 bits of mantissa."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def rounded_in_kernel(v: jax.Array) -> jax.Array:
    """`rounded` without `reduce_precision`, which kernels lack; NaN beyond 2^114.

    By Veltkamp's splitting: v + 2^13 v rounds the last 13 bits of v away.
    """
    above = v * (2.0**13 + 1)
    return above - (above - v)

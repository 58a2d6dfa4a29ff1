"""The loops on an NVIDIA Hopper GPU, in bfloat16 and float16.

One launch runs all steps. Each block has a tile of sequences and holds M in shared memory. Each of
its warpgroups multiplies 64 rows of M (the M side of the tensor cores' product) with v of the whole
tile (the N side); one barrier per step synchronises them. If M does not fit, a cluster of blocks
shares it: `mosaic_gpu_cluster`.
"""

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrnn._backends.kernels import mosaic_gpu_cluster
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

# Rows of a warpgroup's product.
ROWS = 64
# Sequences in a tile: all that fit into shared memory beside the largest M.
BATCH_TILE = 16
# The largest hidden sizes, of one block and of a cluster.
MAX_HIDDEN_BLOCK = 320
MAX_HIDDEN = mosaic_gpu_cluster.MAX_HIDDEN


def run(
    loop: Loop,
    arrays: Arrays,
    out_dtype,
    *,
    reverse: bool,
    interpret: bool = False,
    tile: int = BATCH_TILE,
    slots: int = 2,
) -> tuple[jax.Array, jax.Array | None]:
    """Run a loop.

    Args:
      loop: the computation of a step.
      arrays: its inputs; the matrix in bfloat16 or float16, H at most MAX_HIDDEN.
      out_dtype: of the first result of `loop.step`.
      reverse: run from the last step to the first.
      interpret: run in Pallas' interpreter, on the CPU.
      tile: sequences in a tile, a multiple of 16.
      slots: buffers for v; tests show that one is too few.

    Returns:
      out `[T, M, B, H]`, and end `[M, B, H]` in float32, or None without `loop.finish`.
    """
    hidden = round_up(arrays.matrix.shape[-1], ROWS)
    if hidden > MAX_HIDDEN:
        raise ValueError(f"H must be at most {MAX_HIDDEN}, not {arrays.matrix.shape[-1]}")
    batch = round_up(arrays.c0.shape[-2], tile)
    launch = one_block if hidden <= MAX_HIDDEN_BLOCK else mosaic_gpu_cluster.cluster
    out, end = launch(
        loop,
        padded(arrays, batch, hidden, swap=True),
        out_dtype,
        tile,
        reverse=reverse,
        interpret=interpret,
        slots=slots,
    )
    return cut(out, end, arrays, swap=True)


def one_block(
    loop: Loop, arrays: Arrays, out_dtype, sequences: int, *, reverse, interpret, slots
) -> tuple[jax.Array, jax.Array | None]:
    """Launch a block per network and tile, on padded arrays of layout `[..., H, B]`."""
    networks, hidden, batch = arrays.c0.shape
    dtype = arrays.matrix.dtype
    warpgroups = hidden // ROWS

    def kernel(arrays, out, end, m_s, v_s, loaded, published):
        network, warpgroup = lax.axis_index("network"), lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * ROWS, ROWS)
        columns = pl.ds(lax.axis_index("tile") * sequences, sequences)

        @pl.when(warpgroup == 0)
        def _load():
            plgpu.copy_gmem_to_smem(arrays.matrix.at[network], m_s, loaded)
            plgpu.copy_gmem_to_smem(arrays.v0.at[network, :, columns], v_s.at[0], loaded)

        plgpu.barrier_wait(loaded)

        def slot(j):
            return lax.rem(j, np.int32(slots))

        def product(j):
            return multiply(m_s.at[rows], v_s.at[slot(j)])

        def publish(j, v):
            # With two slots nothing reads this one: its readers were the products of step j−1,
            # which ended before their warpgroups arrived at the barrier of that step.
            store(v_s.at[slot(j + 1), rows], v)
            plgpu.commit_smem()
            plgpu.barrier_arrive(published)

        def collect(j):
            plgpu.barrier_wait(published)

        iterate(
            loop, arrays, out, end, Tile(network, rows, columns, 0),
            Exchange(product, publish, collect), reverse,
        )  # fmt: skip

    return call(
        kernel,
        loop,
        arrays,
        out_dtype,
        {
            "m_s": plgpu.SMEM((hidden, hidden), dtype),
            "v_s": plgpu.SMEM((slots, hidden, sequences), dtype),
            "loaded": plgpu.Barrier(num_arrivals=2),
            "published": plgpu.Barrier(num_arrivals=warpgroups),
        },
        interpret=interpret,
        grid=(networks, batch // sequences),
        grid_names=("network", "tile"),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )

"""The loops of `mosaic_gpu` for an M that is too large for one block, on a cluster of blocks.

Each block holds 64 rows of M. In every step it writes its rows of v to device memory, where they
stay in the L2 cache, waits for the cluster, and copies all of v into its shared memory.
"""

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrnn._backends.kernels._tiles import Exchange, Tile, call, iterate, multiply, store
from jaxrnn._backends.kernels.loops import Arrays, Loop

# Rows of M in a block.
ROWS = 64
# A cluster has at most 16 blocks; more than 8 are not portable to every GPU.
MAX_HIDDEN = 16 * ROWS


def cluster(
    loop: Loop, arrays: Arrays, out_dtype, sequences: int, *, reverse, interpret, slots
) -> tuple[jax.Array, jax.Array | None]:
    """Launch a cluster per network and tile, on padded arrays of layout `[..., H, B]`."""
    networks, hidden, batch = arrays.c0.shape
    dtype = arrays.matrix.dtype

    def kernel(arrays, out, end, shared, m_s, v_s, own_s, loaded, reloaded, published):
        network = lax.axis_index("network")
        rows = pl.ds(lax.axis_index("block") * ROWS, ROWS)
        columns = pl.ds(lax.axis_index("tile") * sequences, sequences)
        tile = Tile(network, rows, columns, 0)

        plgpu.copy_gmem_to_smem(arrays.matrix.at[network, rows], m_s, loaded)
        plgpu.copy_gmem_to_smem(arrays.v0.at[network, :, columns], v_s, loaded)
        plgpu.barrier_wait(loaded)

        def slot(j):
            return lax.rem(j, np.int32(slots))

        def product(j):
            return multiply(m_s, v_s)

        def publish(j, v):
            # With two slots, the last copies out of this one were in step j−2, and ended before
            # their blocks arrived at the barrier of step j−1. The wait below frees own_s.
            store(own_s, v)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_s, tile.of(shared, slot(j)))
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(published)

        def collect(j):
            plgpu.barrier_wait(published)
            # The product that read v_s has ended: this block has one warpgroup.
            plgpu.copy_gmem_to_smem(shared.at[slot(j), network, :, columns], v_s, reloaded)
            plgpu.barrier_wait(reloaded)

        iterate(loop, arrays, out, end, tile, Exchange(product, publish, collect), reverse)

    return call(
        kernel,
        loop,
        arrays,
        out_dtype,
        {
            "m_s": plgpu.SMEM((ROWS, hidden), dtype),
            "v_s": plgpu.SMEM((hidden, sequences), dtype),
            "own_s": plgpu.SMEM((ROWS, sequences), dtype),
            "loaded": plgpu.Barrier(num_arrivals=2),
            "reloaded": plgpu.Barrier(),
            "published": plgpu.ClusterBarrier(collective_axes=("block",)),
        },
        spare=(jax.ShapeDtypeStruct((slots, networks, hidden, batch), dtype),),
        interpret=interpret,
        grid=(networks, batch // sequences),
        grid_names=("network", "tile"),
        cluster=(hidden // ROWS,),
        cluster_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
    )

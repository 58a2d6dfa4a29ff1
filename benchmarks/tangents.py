"""The direction in which derivatives are taken, the same for every subject."""

import numpy as np

from benchmarks.workloads import Data


def direction(data: Data, seed: int = 1) -> Data:
    """A random tangent of the weights and the inputs.

    Each array is as long as what it is the tangent of.

    Args:
      data: the numbers of a workload.
      seed: of the draws.

    Returns:
      The tangents in the places of U, W, b, xs and more.
    """
    rng = np.random.default_rng(seed)

    def like(array):
        drawn = rng.standard_normal(array.shape)
        scale = np.linalg.norm(array) / np.linalg.norm(drawn)
        return (scale * drawn).astype(np.float32)

    moved = like(data.U), like(data.W), like(data.b), like(data.xs)
    more = tuple((like(U), like(W), like(b)) for U, W, b in data.more)
    return Data(*moved, data.g, data.ids, data.lengths, more)

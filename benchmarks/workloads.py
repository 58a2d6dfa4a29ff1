"""The shapes that are measured, and the numbers that every subject gets."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """One recurrent layer over a batch of sequences; the loss is Σ hs · g for a given g.

    Args:
      name: how the tables call it.
      T: time steps.
      B: sequences in the batch.
      D: features of an input.
      H: hidden units.
      ids: the inputs are ids of D characters; who has no use for them gets one-hot rows.
      members: parameter sets that are mapped over, on the same inputs; 0 for a single one.
      distinct: sequences that differ; the others repeat them, and only as many are compared with
        the reference. Its square divides B. 0: all differ, and are compared.
    """

    name: str
    T: int
    B: int
    D: int
    H: int
    ids: bool = False
    members: int = 0
    distinct: int = 0

    @property
    def compared(self) -> slice:
        """Of the batch: each of the distinct sequences once, from all over it."""
        return slice(None, None, self.B // self.distinct + 1 if self.distinct else None)

    @property
    def shape(self) -> str:
        """(T, B, D, H) as the tables print it."""
        many = f", {self.members} members" if self.members else ""
        return f"({self.T}, {self.B}, {self.D}, {self.H}){many}"


WORKLOADS = (
    Workload("document", 4, 1, 4, 1),
    Workload("char-rnn, ids", 25, 32, 65, 128, ids=True),
    Workload("char-rnn, one-hot", 25, 32, 65, 128),
    Workload("medium", 256, 32, 128, 128),
    Workload("sequential MNIST", 784, 128, 1, 128),
    Workload("one long stream", 1000, 1, 64, 64),
    Workload("very long", 100_000, 1, 8, 32),
    Workload("wide", 100, 16, 1024, 1024),
    Workload("large", 100, 128, 512, 512),
    Workload("ensemble", 100, 8, 16, 64, members=64),
)


def _grid(batches: tuple[int, ...], hidden: tuple[int, ...]) -> list[Workload]:
    return [Workload(f"H {H}, B {B}", 1024, B, 64, H, distinct=4) for H in hidden for B in batches]


# What kernels are measured on, the most telling first: a run has only so many minutes.
MAIN_BATCH = 64
GRID = tuple(
    workload
    for hidden in ((128, 256, 320, 64), (512, 1024, 768))
    for batches in ((MAIN_BATCH,), (16, 128))
    for workload in _grid(batches, hidden)
)


@dataclass(frozen=True, eq=False)
class Data:
    """The numbers of one workload, float32 NumPy arrays, time first.

    Args:
      U: `[*members, H, D]`.
      W: `[*members, H, H]`, 0.9 times an orthogonal matrix.
      b: `[*members, H]`.
      xs: `[T, B, D]`; for ids the one-hot rows.
      g: the cotangent of hs, `[T, B, H]`; members share it.
      ids: `[T, B]` int32, or None.
    """

    U: np.ndarray
    W: np.ndarray
    b: np.ndarray
    xs: np.ndarray
    g: np.ndarray
    ids: np.ndarray | None = None


def draw(workload: Workload, seed: int = 0) -> Data:
    """The same numbers for every subject, and at every run."""
    rng = np.random.default_rng(seed)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    members = (workload.members,) if workload.members else ()

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    U = normal(*members, H, D, scale=D**-0.5)
    W = 0.9 * np.linalg.qr(rng.standard_normal((*members, H, H)))[0]
    b = normal(*members, H, scale=0.1)
    ids = None
    if workload.ids or "one-hot" in workload.name:
        ids = rng.integers(0, D, (T, B)).astype(np.int32)
        xs = np.eye(D, dtype=np.float32)[ids]
    else:
        xs = _repeated(normal(T, workload.distinct or B, D), B)
    g = _repeated(normal(T, workload.distinct or B, H), B)
    return Data(U, W.astype(np.float32), b, xs, g, ids if workload.ids else None)


def _repeated(array: np.ndarray, batch: int) -> np.ndarray:
    return np.tile(array, (1, batch // array.shape[1], 1)) if array.shape[1] < batch else array

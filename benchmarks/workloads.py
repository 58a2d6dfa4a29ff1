"""The shapes that are measured, and the numbers that every subject gets."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from benchmarks.networks import ONE_LAYER, Network


@dataclass(frozen=True)
class Workload:
    """A recurrent network over a batch of sequences; the loss is Σ hs · g for a given g.

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
      tuned: whether XLA tries, on a GPU, which program for each product is the fastest.
      network: what is unrolled: one tanh layer by default.
      dtype: of weights, inputs and results; None for the subject's own.
    """

    name: str
    T: int
    B: int
    D: int
    H: int
    ids: bool = False
    members: int = 0
    distinct: int = 0
    tuned: bool = True
    network: Network = ONE_LAYER
    dtype: str | None = None

    def __post_init__(self):
        """Take a network as JSON has it."""
        if isinstance(self.network, dict):
            object.__setattr__(self, "network", Network(**self.network))

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

LEAK = 0.2
LEAKY = (
    *(
        Workload(f"{form} {phi}, B {B}, H {H}", 60, B, 3, H, network=Network(phi, LEAK, form))
        for form in ("rate", "voltage")
        for phi in ("tanh", "relu")
        for B in (16, 64)
        for H in (64, 128, 256)
    ),
    Workload("rate tanh, T 200", 200, 32, 64, 128, network=Network("tanh", LEAK)),
    Workload("rate relu, T 200", 200, 32, 64, 128, network=Network("relu", LEAK)),
)
RELU = (
    Workload("relu, T 60", 60, 64, 3, 128, network=Network("relu")),
    Workload("relu, T 200", 200, 32, 64, 128, network=Network("relu")),
)
SMALL = (Workload("small, B 96", 60, 96, 3, 32), Workload("small, B 256", 60, 256, 3, 32))
LAST = Workload("last state", 60, 256, 3, 32, network=Network(last=True))
OTHERS = (
    Workload("lengths", 60, 64, 3, 128, network=Network(lengths=True)),
    Workload("lengths, leak", 60, 64, 3, 128, network=Network(leak=LEAK, lengths=True)),
    Workload("two layers", 60, 64, 16, 128, network=Network(layers=2)),
    Workload("bidirectional", 60, 64, 16, 128, network=Network(bidirectional=True)),
    Workload("checkpointed", 1024, 16, 32, 128, network=Network(remat=True)),
    Workload("bfloat16, T 60", 60, 64, 16, 128, dtype="bfloat16"),
    Workload("bfloat16, T 256", 256, 32, 128, 128, dtype="bfloat16"),
)
# What WORKLOADS lack: another network, another dtype, or a batch of another size.
NEW_WORKLOADS = (*LEAKY, *RELU, *SMALL, LAST, *OTHERS)


def is_new(workload: Workload) -> bool:
    """Whether it is of NEW_WORKLOADS, by its name."""
    return workload.name in {new.name for new in NEW_WORKLOADS}


def on_gpu(H: int, B: int) -> Workload:
    """What kernels are measured on."""
    return Workload(f"H {H}, B {B}", 1024, B, 64, H, distinct=4)


def untuned(workload: Workload) -> Workload:
    """The same, without tuning."""
    name = f"{workload.name}, not tuned" if workload.tuned else workload.name
    return replace(workload, name=name, tuned=False)


def one_sequence(H: int, T: int) -> Workload:
    """What the associative scan is measured on."""
    return Workload(f"H {H}, T {T}", T, 1, 4, H)


# The most telling first: a run has only so many minutes.
MAIN_BATCH = 64
GRID = tuple(
    on_gpu(H, B)
    for hidden in ((128, 256, 320, 64), (512, 1024, 768))
    for batches in ((MAIN_BATCH,), (16, 128))
    for H in hidden
    for B in batches
)


@dataclass(frozen=True, eq=False)
class Data:
    """The numbers of one workload, float32 NumPy arrays, time first.

    Args:
      U: `[*members, H, D]`.
      W: `[*members, H, H]`, 0.9 times an orthogonal matrix.
      b: `[*members, H]`.
      xs: `[T, B, D]`; for ids the one-hot rows.
      g: the cotangent of the result, `[T, B, H]`, of both directions `[T, B, 2 H]`, of the last
        state `[B, H]`; members share it.
      ids: `[T, B]` int32, or None.
      lengths: how many steps of each sequence are valid, `[B]` int32, or None for all.
      more: U, W and b of the other layers, or of the other direction.
    """

    U: np.ndarray
    W: np.ndarray
    b: np.ndarray
    xs: np.ndarray
    g: np.ndarray
    ids: np.ndarray | None = None
    lengths: np.ndarray | None = None
    more: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...] = ()

    @property
    def cells(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
        """(U, W, b) of each cell."""
        return (self.U, self.W, self.b), *self.more


def draw(workload: Workload, seed: int = 0, dtype: str = "float32") -> Data:
    """The same numbers for every subject, and at every run.

    Args:
      workload: the shapes.
      seed: of the draws.
      dtype: numbers are rounded to it, so that what differs from the reference comes from
        computing; of "float32", "float64" and those of 16 bits.

    Returns:
      The `Data`.
    """
    rng = np.random.default_rng(seed)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    members = (workload.members,) if workload.members else ()

    def rounded(array):
        array = array.astype(np.float32)
        if dtype == "bfloat16":
            return array.astype(ml_dtypes.bfloat16).astype(np.float32)
        return array.astype(np.float16).astype(np.float32) if dtype == "float16" else array

    def normal(*shape, scale=1.0):
        return rounded(scale * rng.standard_normal(shape))

    def cell(inputs):
        U = normal(*members, H, inputs, scale=inputs**-0.5)
        W = 0.9 * np.linalg.qr(rng.standard_normal((*members, H, H)))[0]
        return U, rounded(W), normal(*members, H, scale=0.1)

    network, (U, W, b), ids = workload.network, cell(D), None
    if workload.ids or "one-hot" in workload.name:
        ids = rng.integers(0, D, (T, B)).astype(np.int32)
        xs = np.eye(D, dtype=np.float32)[ids]
    else:
        xs = _repeated(normal(T, workload.distinct or B, D), B)
    if network.last:
        g = normal(B, H)
    else:
        wide = 2 * H if network.bidirectional else H
        g = _repeated(normal(T, workload.distinct or B, wide), B)
    lengths = None
    if network.lengths:
        lengths = rng.integers(T // 4, T + 1, B).astype(np.int32)
    more = tuple(cell(D if network.bidirectional else H) for _ in range(1, network.cells))
    return Data(U, W, b, xs, g, ids if workload.ids else None, lengths, more)


def _repeated(array: np.ndarray, batch: int) -> np.ndarray:
    return np.tile(array, (1, batch // array.shape[1], 1)) if array.shape[1] < batch else array

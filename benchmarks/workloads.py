"""The rows: a network, its shape, and the numbers that every subject gets; and what is measured."""

from dataclasses import dataclass, fields, replace
from typing import Any

import ml_dtypes  # noqa: F401  # with it NumPy knows "bfloat16"
import numpy as np

# With the loss L = Σ hs · g:
FORWARD = "forward"  # hs
BACKWARD = "forward+backward"  # the gradient in weights and inputs; for ids in the weights
BACKWARD_ALONE = "backward alone"  # the same gradient, from what a forward pass has kept
HVP = "Hessian-vector product"  # the Hessian in the weights times one direction


@dataclass(frozen=True)
class Network:
    """What is unrolled: one tanh layer by default.

    a_t = W s_{t−1} + U x_t + b;  rate: h_t = (1 − α) h_{t−1} + α φ(a_t), s = h;
    voltage: h_t = (1 − α) h_{t−1} + α a_t, s = φ(h).
    """

    activation: str = "tanh"  # φ, or "relu"
    leak: float | None = None  # α; None is 1
    form: str = "rate"
    lengths: bool = False  # each sequence ends at its own step; the states after it are 0
    layers: int = 1  # of a stack, each of H units
    bidirectional: bool = False  # two layers that read from either end, side by side
    remat: bool = False  # only some √T states are kept for the gradient
    last: bool = False  # the result is the last state, not all states

    @property
    def cells(self) -> int:
        """How many sets of U, W and b there are."""
        return self.layers * (2 if self.bidirectional else 1)

    @property
    def plain(self) -> bool:
        """Whether it is one layer without options, of any φ."""
        return self == Network(self.activation)


@dataclass(frozen=True)
class Workload:
    """A recurrent network over a batch of sequences."""

    name: str
    T: int  # time steps
    B: int  # sequences
    D: int  # features of an input
    H: int  # hidden units
    ids: bool = False  # the inputs are ids of D characters, or one-hot rows of them
    members: int = 0  # parameter sets that are mapped over, on the same inputs; 0 for one
    # Sequences that differ; the others repeat them, and only these are compared with the
    # reference. Its square divides B. 0: all differ, and are compared.
    distinct: int = 0
    network: Network = Network()
    dtype: str | None = None  # None for the subject's own

    @property
    def compared(self) -> slice:
        """Of the batch: each of the distinct sequences once, from all over it."""
        return slice(None, None, self.B // self.distinct + 1 if self.distinct else None)

    @property
    def title(self) -> str:
        """The name and (T, B, D, H), as the tables print it."""
        many = f", {self.members} members" if self.members else ""
        return f"{self.name} ({self.T}, {self.B}, {self.D}, {self.H}){many}"


def from_json(values: dict[str, Any]) -> Workload:
    """The workload of a row of results."""
    known = {f.name: values[f.name] for f in fields(Workload) if f.name in values}
    return Workload(**known | {"network": Network(**known.get("network", {}))})


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

Cell = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Data:
    """The numbers of one workload, float32 NumPy arrays, time first."""

    # (U, W, b) of each: [*members, H, D], [*members, H, H], 0.9 times an orthogonal matrix, and
    # [*members, H].
    cells: tuple[Cell, ...]
    xs: np.ndarray  # [T, B, D]; for ids the one-hot rows
    g: np.ndarray  # the cotangent: [T, B, H], of both directions [T, B, 2 H], of the last [B, H]
    ids: np.ndarray | None = None  # [T, B] int32
    lengths: np.ndarray | None = None  # [B] int32


def draw(workload: Workload, dtype: str = "float32") -> Data:
    """The same numbers for every subject and in every run.

    They are rounded to the dtype, so that only computing differs from the reference.
    """
    rng, network = np.random.default_rng(0), workload.network
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    members = (workload.members,) if workload.members else ()
    distinct = workload.distinct or B

    def rounded(array):
        return array.astype(np.float32).astype(dtype).astype(np.float32)

    def normal(*shape, scale=1.0):
        return rounded(scale * rng.standard_normal(shape))

    def repeated(array):
        return np.tile(array, (1, B // distinct, 1))

    def cell(inputs):
        U = normal(*members, H, inputs, scale=inputs**-0.5)
        W = 0.9 * np.linalg.qr(rng.standard_normal((*members, H, H)))[0]
        return U, rounded(W), normal(*members, H, scale=0.1)

    first, ids = cell(D), None
    if workload.ids or "one-hot" in workload.name:
        ids = rng.integers(0, D, (T, B)).astype(np.int32)
        xs = np.eye(D, dtype=np.float32)[ids]
    else:
        xs = repeated(normal(T, distinct, D))
    width = 2 * H if network.bidirectional else H
    g = normal(B, H) if network.last else repeated(normal(T, distinct, width))
    lengths = rng.integers(T // 4, T + 1, B).astype(np.int32) if network.lengths else None
    others = (cell(D if network.bidirectional else H) for _ in range(1, network.cells))
    return Data((first, *others), xs, g, ids if workload.ids else None, lengths)


def direction(data: Data) -> Data:
    """A random tangent of the weights, each array as long as what it is the tangent of."""
    rng = np.random.default_rng(1)

    def like(array):
        drawn = rng.standard_normal(array.shape)
        return (drawn * np.linalg.norm(array) / np.linalg.norm(drawn)).astype(np.float32)

    return replace(data, cells=tuple(tuple(map(like, cell)) for cell in data.cells))

"""What a run measures, in which order, and in what time."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import product

from benchmarks import workloads
from benchmarks.subjects.registry import ASSOCIATIVE, KERNEL, LARGEST, NAIVE, OURS, SCAN, SUBJECTS
from benchmarks.workloads import BACKWARD, BACKWARD_ALONE, FORWARD, HVP, LAST, WORKLOADS, Workload

Names = Collection[str] | None  # None for all


@dataclass(frozen=True)
class Limits:
    """How much is measured."""

    most: int  # rounds at most
    least: int  # rounds at least, whatever they take
    budget: float  # seconds for the rounds of one measure of a workload
    alike: int = 0  # calls of a kernel whose results are compared bit by bit


@dataclass(frozen=True)
class Step:
    """One workload, what is measured on it, and of whom, by name."""

    workload: Workload
    measures: tuple[str, ...]
    subjects: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True)
class Plan:
    """The steps in order; the run is over after so many minutes."""

    steps: tuple[Step, ...]
    minutes: float = float("inf")

    def only(self, workloads: Names, measures: Names, subjects: Names) -> "Plan":
        """The same with these names only."""

        def among(values, names):
            return tuple(value for value in values if names is None or value in names)

        steps = [
            replace(
                step,
                measures=among(step.measures, measures),
                subjects=among(step.subjects, subjects),
            )
            for step in self.steps
            if workloads is None or step.workload.name in workloads
        ]
        return replace(self, steps=tuple(s for s in steps if s.measures and s.subjects))

    def limited(self, change: Callable[[Limits], Limits]) -> "Plan":
        """The same with other limits."""
        steps = (replace(step, limits=change(step.limits)) for step in self.steps)
        return replace(self, steps=tuple(steps))


BOTH = FORWARD, BACKWARD

# On a CPU. Every network is measured beside its naive twin, and beside the libraries that have it.
EVERYONE = tuple(subject.name for subject in SUBJECTS["cpu"])
TWINS = OURS, NAIVE
NOT_RELU = ("vmap", "vmap axis 1", "two host devices", "jaxrnn, relu", "naive scan, relu")
OF_RELU = tuple(name for name in EVERYONE if not name.endswith(NOT_RELU))
LONG, BRIEF = Limits(15, 5, 25.0), Limits(15, 5, 2.0)
FULL = Plan(
    (
        *(Step(workload, BOTH, EVERYONE, LONG) for workload in WORKLOADS),
        *(Step(workload, (HVP,), TWINS, LONG) for workload in (*WORKLOADS, LAST)),
        *(Step(workload, BOTH, TWINS, BRIEF) for workload in workloads.LEAKY),
        *(Step(workload, BOTH, OF_RELU, BRIEF) for workload in workloads.RELU),
        *(Step(workload, BOTH, EVERYONE, BRIEF) for workload in workloads.SMALL),
        *(Step(workload, BOTH, TWINS, BRIEF) for workload in (LAST, *workloads.OTHERS)),
    )
)
# The most telling part.
QUICK = FULL.only(
    ("document", "char-rnn, ids", "medium", "one long stream"),
    BOTH,
    (*TWINS, "jaxrnn, vmap", "flax.nnx", "keras", "jaxrnn, relu", "haiku, relu", "torch"),
).limited(lambda _: Limits(7, 5, 3.0))

# On a GPU: the most telling first, as a run has only so many minutes.
MAIN_BATCH = 64
# The largest H of a kernel that is one block; above it a cluster of blocks is.
MOST_OF_A_BLOCK = 320


def on_gpu(H: int, B: int) -> Workload:
    """What kernels are measured on."""
    return Workload(f"H {H}, B {B}", 1024, B, 64, H, distinct=4)


def _of(dtype: str, *bases: str) -> tuple[str, ...]:
    return tuple(f"{base}, {dtype}" for base in bases)


def _beside_cudnn(dtype: str) -> tuple[str, ...]:
    """The kernel of a dtype, the scan and cuDNN."""
    tf32 = ("cuDNN TF32",) if dtype == "float32" else ()
    return *_of(dtype, KERNEL, SCAN), f"cuDNN {dtype}", *tf32


def _first() -> Plan:
    """What a few minutes on a GPU are to say."""
    limits = Limits(5, 2, 1.0, alike=20)
    sizes = ((128, 64), (256, 64), (320, 64), (64, 64), (128, 16), (128, 128))
    bfloat16, linear = _beside_cudnn("bfloat16"), _of("float32", SCAN, ASSOCIATIVE)
    # float16 is the dtype in which cuDNN keeps a large W on the chip.
    large = *bfloat16, "cuDNN float16"
    streams = [(f"H {H}, T {T}", T, 1, 4, H) for T in (10_000, 100_000) for H in (1, 4, 16)]
    steps = (
        *(Step(on_gpu(*size), BOTH, bfloat16, limits) for size in sizes),
        Step(on_gpu(128, 64), BOTH, _beside_cudnn("float32"), limits),
        *(Step(on_gpu(H, MAIN_BATCH), BOTH, large, limits) for H in (512, 1024)),
        *(Step(Workload(*each), (BACKWARD_ALONE,), linear, limits) for each in streams),
    )
    return Plan(steps, minutes=5.7)


def _whole() -> Plan:
    """Every kernel at every H and B that it takes; at the main batch beside all rivals."""
    limits, steps = Limits(9, 5, 1.0, alike=100), []
    for dtype, hidden in product(LARGEST, ((128, 256, 320, 64), (512, 1024, 768))):
        rivals = (s.name for s in SUBJECTS["gpu"] if s.dtype == dtype and ASSOCIATIVE not in s.name)
        who = {MAIN_BATCH: tuple(rivals), 16: _beside_cudnn(dtype), 128: _beside_cudnn(dtype)}
        points = [*product((MAIN_BATCH,), hidden), *((B, H) for H in hidden for B in (16, 128))]
        for B, H in points:
            if H <= LARGEST[dtype]:
                steps.append(Step(on_gpu(H, B), BOTH, who[B], limits))
    return Plan(tuple(steps), minutes=8.0)


FIRST, GPU = _first(), _whole()

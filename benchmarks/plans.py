"""What a run measures, in which order, and in what time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks import sweeps
from benchmarks.kernels import ASSOCIATIVE, KERNEL, LARGEST, SCAN
from benchmarks.measures import BACKWARD, BACKWARD_ALONE, FORWARD, HVP, MEASURES
from benchmarks.rounds import DEFAULT, Limits
from benchmarks.workloads import (
    GRID,
    LAST,
    LEAKY,
    MAIN_BATCH,
    OTHERS,
    RELU,
    SMALL,
    WORKLOADS,
    Workload,
    on_gpu,
    one_sequence,
    untuned,
)


@dataclass(frozen=True)
class Step:
    """One workload, and who is measured on it.

    Args:
      workload: the shapes.
      dtype: only subjects of this dtype; None for all.
      bases: only these, by their names in the registry; None for all.
      measures: in order; None for those of the plan.
      limits: how much; None for those of the plan.
    """

    workload: Workload
    dtype: str | None = None
    bases: tuple[str, ...] | None = None
    measures: tuple[str, ...] | None = None
    limits: Limits | None = None


# Every network is measured beside its naive twin, and where others have it beside them.
TWINS = ("jaxrnn", "naive scan")
OF_RELU = (
    *TWINS, "flax.nnx", "flax.linen", "equinox", "keras", "haiku, relu", "torch", "torch.compile",
)  # fmt: skip
# A pair takes some three seconds.
BRIEF = Limits(most=15, least=5, budget=2.0, compiles=1)


def _new_steps() -> tuple[Step, ...]:
    both = FORWARD, BACKWARD
    return (
        *(Step(workload, None, TWINS, both, BRIEF) for workload in LEAKY),
        *(Step(workload, None, OF_RELU, both, BRIEF) for workload in RELU),
        *(Step(workload, None, None, both, BRIEF) for workload in SMALL),
        Step(LAST, None, TWINS, (*both, HVP), BRIEF),
        *(Step(workload, None, TWINS, both, BRIEF) for workload in OTHERS),
    )


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
      steps: in order.
      measures: of each step.
      limits: how much.
      sweeps: whether T, B and H are varied too.
      minutes: the run is over by then; None for no limit.
      ahead: whether the workers get a step's programs ready side by side, before it is timed.
    """

    steps: tuple[Step, ...] = (*map(Step, WORKLOADS), *_new_steps())
    measures: tuple[str, ...] = MEASURES
    limits: Limits = DEFAULT
    sweeps: bool = True
    minutes: float | None = None
    ahead: bool = False

    def measures_of(self, step: Step) -> tuple[str, ...]:
        """In order."""
        return step.measures or self.measures

    def limits_of(self, step: Step) -> Limits:
        """How much of it is measured."""
        return step.limits or self.limits

    def limited(self, change: Callable[[Limits], Limits]) -> "Plan":
        """The same with other limits, of its steps too."""
        steps = (replace(s, limits=change(s.limits)) if s.limits else s for s in self.steps)
        return replace(self, steps=tuple(steps), limits=change(self.limits))

    def only(self, measures: Sequence[str]) -> "Plan":
        """The same with these measures; a step that has others only is left out."""
        steps = []
        for step in self.steps:
            few = tuple(measure for measure in step.measures or () if measure in measures)
            if few or step.measures is None:
                steps.append(replace(step, measures=few or None))
        return replace(self, steps=tuple(steps), measures=tuple(measures))

    def units(self) -> int:
        """How many measures of a workload there are."""
        count = sum(len(self.measures_of(step)) for step in self.steps)
        return count + (sweeps.units() if self.sweeps else 0)


def _named(*names: str) -> tuple[Step, ...]:
    by_name = {workload.name: workload for workload in WORKLOADS}
    return tuple(Step(by_name[name]) for name in names)


FULL = Plan()
QUICK = Plan(
    _named("char-rnn, ids", "one long stream", "medium", "document"), (FORWARD, BACKWARD),
    Limits(most=7, least=5, budget=3.0, compiles=1), sweeps=False, minutes=1.7,
)  # fmt: skip


def _beside_cudnn(workload: Workload, dtype: str) -> Step:
    """The kernel of a dtype, the scan and cuDNN."""
    tf32 = ("cuDNN TF32",) if dtype == "float32" else ()
    return Step(workload, dtype, (KERNEL, SCAN, f"cuDNN {dtype}", *tf32))


def _on_grid() -> tuple[Step, ...]:
    """Every kernel on every workload that it takes; at one batch with all its rivals."""
    return tuple(
        Step(workload, dtype) if workload.B == MAIN_BATCH else _beside_cudnn(workload, dtype)
        for dtype, largest in LARGEST.items()
        for workload in GRID
        if workload.H <= largest
    )


GPU = Plan(
    _on_grid(), (FORWARD, BACKWARD),
    Limits(most=9, least=5, budget=1.0, compiles=1, alike=100), sweeps=False, minutes=8.0,
    ahead=True,
)  # fmt: skip


def _first() -> tuple[Step, ...]:
    """What a few minutes on a GPU are to say, the most telling first."""
    B = MAIN_BATCH
    exact = Step(untuned(on_gpu(128, B)), "bfloat16", (KERNEL, SCAN))
    sizes = ((128, B), (256, B), (320, B), (64, B), (128, 16), (128, 128))
    one_block = [_beside_cudnn(on_gpu(*size), "bfloat16") for size in sizes]
    clusters = []
    for H in (512, 1024):
        # The dtype in which cuDNN keeps a large W on the chip.
        persistent = Step(on_gpu(H, B), "float16", ("cuDNN float16",))
        clusters += [_beside_cudnn(on_gpu(H, B), "bfloat16"), persistent]
    linear = [
        Step(one_sequence(H, T), "float32", (SCAN, ASSOCIATIVE), (BACKWARD_ALONE,))
        for T in (10_000, 100_000)
        for H in (1, 4, 16)
    ]
    return exact, *one_block, _beside_cudnn(on_gpu(128, B), "float32"), *clusters, *linear


FIRST = Plan(
    _first(), (FORWARD, BACKWARD), Limits(most=5, least=2, budget=1.0, compiles=1, alike=20),
    sweeps=False, minutes=5.7, ahead=True,
)  # fmt: skip

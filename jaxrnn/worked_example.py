"""The source's example worked by hand, sections 4 to 6, beside every number that it prints.

A network of one unit reads "hell" and is to say "ello": h_0 = 0 at every epoch, plain gradient
descent of the summed loss, η = 0.1, all in float64 whatever JAX's global setting is.

* The printed start is rounded to 4 digits; `recovered_params` is the unrounded one, and from it
  every printed number agrees that can: all but the total loss of epoch 1000.
* By epoch 1000 the training is chaotic: additions in another order give another loss.
  `ensemble` shows the spread among starts that all round to the printed one.
* The source prints the total of epoch 0 as a sum of four rounded losses, 6.0338; unrounded it
  is 6.0337.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np

from jaxrnn import _checks, _printed
from jaxrnn._cell import Params
from jaxrnn._example_training import OPTIMIZER, TARGETS, XS, check_example, run, update
from jaxrnn._example_training import QUANTILES as QUANTILES
from jaxrnn._example_training import descend as descend
from jaxrnn._example_training import end_quantiles as end_quantiles
from jaxrnn._example_training import ensemble as ensemble
from jaxrnn._example_training import fraction_below as fraction_below
from jaxrnn._example_training import parting_epoch as parting_epoch
from jaxrnn._example_training import printed_params as printed_params
from jaxrnn._example_training import recovered_params as recovered_params
from jaxrnn._example_training import starts as starts
from jaxrnn._loss import cross_entropy, output_error
from jaxrnn._step import apply_readout
from jaxrnn._unroll import unroll

# The first group is the 68: the four steps, the gradients and the updated parameters. The
# others repeat or follow from them.
GROUPS = FIRST_UPDATE, OUTPUT_DELTAS, EPOCH_1, TOTALS = (
    "first update",
    "output deltas",
    "epoch 1",
    "totals",
)


@dataclass(frozen=True)
class Comparison:
    """One printed number beside the computed one.

    Args:
      section: of the source, such as "6.2".
      quantity: in the source's letters, such as "∂L/∂V".
      index: which element of a vector, counted from 1 as the source counts; None for a scalar.
      printed: by the source.
      computed: in float64.
      group: one of `GROUPS`.
    """

    section: str
    quantity: str
    index: int | None
    printed: float
    computed: float
    group: str

    @property
    def name(self) -> str:
        """The quantity and the index, such as "∂L/∂V[2]"."""
        return self.quantity if self.index is None else f"{self.quantity}[{self.index}]"

    @property
    def agrees(self) -> bool:
        """Whether both numbers read the same at 4 digits."""
        return four_digits(self.printed) == four_digits(self.computed)


def four_digits(value: float) -> str:
    """The number as the source prints it.

    Args:
      value: any number.

    Returns:
      It with four digits behind the point; a zero has no sign.

    Raises:
      TypeError: no number.
    """
    return f"{value:z.4f}"


def compare(params: Params) -> list[Comparison]:
    """Every number of sections 5 and 6 but the total of epoch 1000, printed and computed.

    Gradients are those of `jaxrnn.loss_and_grads`, the derivation by hand; the update is that
    of `optax.sgd`; the total of epoch 100 follows 100 such updates.

    Args:
      params: the start, of one unit and four characters.

    Returns:
      `Comparison` records in the source's order.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`; params of another shape than the
        printed ones.

    Source: sections 5 and 6.

    >>> from jaxrnn import worked_example
    >>> comparisons = worked_example.compare(worked_example.recovered_params())
    >>> worked_example.agreeing(comparisons, worked_example.FIRST_UPDATE)
    (68, 68)
    """
    with jax.enable_x64(True):
        found = jax.device_get(_follow(check_example(params)))
    return [
        Comparison(section, quantity, i if np.size(computed) > 1 else None, p, float(q), group)
        for group, section, quantity, printed, computed in _side_by_side(*found)
        for i, (p, q) in enumerate(zip(printed, np.ravel(computed), strict=True), start=1)
    ]


def agreeing(comparisons: Iterable[Comparison], group: str) -> tuple[int, int]:
    """How many numbers of a group agree at 4 digits, and how many it has.

    Args:
      comparisons: what `compare` returned.
      group: one of `GROUPS`.

    Returns:
      (agreeing, all).

    Raises:
      ValueError: an unknown group.
    """
    _checks.one_of("group", group, GROUPS)
    agree = [comparison.agrees for comparison in comparisons if comparison.group == group]
    return sum(agree), len(agree)


@jax.jit
def _follow(params):
    """What `_side_by_side` takes: a pass, its gradients, the update, a second pass, training."""
    (updated, _), _, gradients = update(params, OPTIMIZER.init(params))
    return _steps(params), gradients, updated, _steps(updated), run(params, 100)


def _steps(params):
    _, hs = unroll(params.cell, XS)
    omega = apply_readout(params.readout, hs)
    return {
        "h": hs,
        "omega": omega,
        "yhat": jax.nn.softmax(omega),
        "L": cross_entropy(omega, TARGETS),
        "delta": output_error(omega, TARGETS),
    }


def _side_by_side(first, gradients, updated, second, losses):
    """(group, section, quantity, printed, computed), vector by vector in the source's order."""
    symbols = {"h": "h", "omega": "Ω", "yhat": "ŷ", "L": "L"}
    for t, step in enumerate(_printed.STEPS):
        for letter, printed in step.items():
            name = f"{symbols[letter]}_{t + 1}"
            yield FIRST_UPDATE, f"5.{t + 1}", name, printed, first[letter][t]
    name = "Σ L_t of epoch 0, each L_t rounded"
    total = sum(float(four_digits(loss)) for loss in first["L"])
    yield TOTALS, "5.4", name, (_printed.TOTALS[0],), total
    for t, printed in enumerate(_printed.OUTPUT_DELTAS):
        yield OUTPUT_DELTAS, "6.1", f"ŷ_{t + 1}−y_{t + 1}", printed, first["delta"][t]
    for number, (letter, (gradient, new)) in enumerate(_printed.UPDATES.items(), start=2):
        layer = "readout" if letter in "Vc" else "cell"
        for name, printed, params in (
            (f"∂L/∂{letter}", gradient, gradients),
            (f"{letter}_new", new, updated),
        ):
            computed = getattr(getattr(params, layer), letter)
            yield FIRST_UPDATE, f"6.{number}", name, printed, computed
    for t, step in enumerate(_printed.EPOCH_1):
        for letter, printed in step.items():
            yield EPOCH_1, "6.7", f"{symbols[letter]}_{t + 1}", printed, second[letter][t]
    for epoch in (1, 100):
        name = f"Σ L_t of epoch {epoch}"
        yield TOTALS, "6.7", name, (_printed.TOTALS[epoch],), losses[epoch]

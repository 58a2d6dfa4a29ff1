"""The source's example worked by hand, sections 4 to 6, beside every number that it prints.

A network of one unit reads "hell" and learns to predict "ello", with h_0 = 0 in every epoch, by
gradient descent on the summed loss with η = 0.1. All arithmetic is float64; JAX's own setting is
left alone.

The source prints its initial parameters to 4 digits; `recovered_params` has them before rounding.
How many of the printed numbers each reproduces:

                                                            printed start   recovered start
    h, Ω, ŷ, L_t of four steps, gradients, new parameters        57 of 68          68 of 68
    output deltas (6.1)                                          16 of 16          16 of 16
    ŷ and L_t of epoch 1 (6.7)                                   20 of 20          20 of 20
    total losses of epochs 0, 1 and 100                            3 of 3            3 of 3

The total of epoch 0 is printed as 6.0338, the sum of four rounded losses; unrounded it is 6.0337.
The total of epoch 1000, 1.3455, cannot be reproduced, because training is chaotic by then. The
losses of 512 runs whose starts all round to the printed one (`ensemble`) stay within 0.01 of each
other until epoch 654, and at epoch 1000 they are

    min 0.74,  5 % 0.88,  25 % 1.32,  50 % 1.89,  75 % 1.91,  95 % 1.95,  max 3.68

so a quarter of them lie below 1.3455. The extremes depend on the number of runs.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_params
from jaxrnn._api.gradients import loss_and_grads
from jaxrnn._api.readout import apply_readout, cross_entropy
from jaxrnn._api.unroll import unroll
from jaxrnn._core.loss import output_error
from jaxrnn._types import Cell, Ids, Params, Readout
from jaxrnn.text import Vocabulary

# The printed numbers in the source's order and notation: the start (section 4), one step per t (5.1
# to 5.4), output deltas ŷ_t − y_t (6.1), updates (6.2 to 6.6), epoch 1 after one update (6.7), and
# the totals Σ L_t by epoch (5.4 and 6.7).
PRINTED = json.loads(Path(__file__).with_suffix(".json").read_bytes())
PRINTED["totals"] = {int(epoch): total for epoch, total in PRINTED["totals"].items()}

# NumPy arrays, because they do not depend on JAX's settings.
_encode: Any = Vocabulary(PRINTED["vocabulary"]).encode
XS, TARGETS = Ids(_encode(PRINTED["inputs"])), _encode(PRINTED["targets"])
OPTIMIZER = optax.sgd(PRINTED["eta"])
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# The first group has the 68 numbers of four steps, gradients and updated parameters.
GROUPS = ("first update", "output deltas", "epoch 1", "totals")
FIRST_UPDATE, OUTPUT_DELTAS, EPOCH_1, TOTALS = GROUPS


def printed_params() -> Params:
    """The initial parameters as section 4 prints them, rounded to 4 digits.

    Returns:
      `Params` of float64 NumPy arrays, whose precision does not depend on JAX's settings.
    """
    return _params(**PRINTED["start"])


def recovered_params() -> Params:
    """The initial parameters of section 4 before rounding.

    The source does not say how they were drawn. A search recovered them: NumPy's legacy generator
    with seed 124, whose stream is frozen, gives all nine, in this order: U = 0.5 randn(1, 4),
    W = 0.4 randn(1, 1), V = 0.3 randn(4, 1).

    Returns:
      `Params` as `printed_params`; b = c = 0.
    """
    draw = np.random.RandomState(124).randn
    U, W, V = 0.5 * draw(1, 4), 0.4 * draw(1, 1), 0.3 * draw(4, 1)
    return _params(U, W, np.zeros(1), V, np.zeros(4))


def starts(members: int, seed: int = 0) -> Params:
    """Initial parameters that all round to the printed ones: U, W and V uniform within ±0.5e-4.

    Args:
      members: how many.
      seed: of NumPy's generator.

    Returns:
      `Params` as `printed_params` with a leading axis `[members]`; b = c = 0 exactly.

    Raises:
      TypeError, ValueError: fewer than one member, or a negative seed.
    """
    checks.positive("members", members)
    checks.whole("seed", seed)
    generator = np.random.default_rng(seed)
    printed = [np.array(PRINTED["start"][letter]) for letter in "UWV"]
    U, W, V = (p + generator.uniform(-0.5e-4, 0.5e-4, (members, *p.shape)) for p in printed)
    return _params(U, W, np.zeros((members, 1)), V, np.zeros((members, 4)))


def _params(U, W, b, V, c):
    leaves: Any = [np.array(leaf, np.float64) for leaf in (U, W, b, V, c)]
    U, W, b, V, c = leaves
    return Params(Cell(U, W, b), Readout(V, c))


def descend(params: Params, epochs: int) -> np.ndarray:
    """The total loss in each epoch of gradient descent, as in section 6.7: `optax.sgd`, η = 0.1.

    Args:
      params: the initial parameters, for one unit and four characters.
      epochs: how many updates.

    Returns:
      Float64 `[epochs + 1]`, in nats: entry e is the loss after e updates.

    Raises:
      TypeError, ValueError: params that do not have the shapes of the source; epochs below 1.
    """
    checks.positive("epochs", epochs)
    with jax.enable_x64(True):
        return np.asarray(_run(_check_example(params), epochs))


def ensemble(members: int = 512, epochs: int = 1000, seed: int = 0) -> np.ndarray:
    """The total losses of many runs whose initial parameters all round to the printed ones.

    After `parting_epoch` a single run means nothing: a compiler that orders additions differently
    gets another loss. The middle quantiles of many runs hardly change.

    Args:
      members: how many runs; they run together under `jax.vmap`.
      epochs: as in `descend`.
      seed: as in `starts`.

    Returns:
      Float64 `[epochs + 1, members]`, each column as `descend` returns it.

    Raises:
      TypeError, ValueError: as `starts`; epochs below 1.
    """
    checks.positive("epochs", epochs)
    params = starts(members, seed)
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(partial(_run, epochs=epochs), out_axes=1)(params))


def end_quantiles(losses: np.ndarray) -> dict[float, float]:
    """The quantiles of the last epoch's losses.

    Args:
      losses: `[epochs + 1, members]`, from `ensemble`.

    Returns:
      The loss at each of `QUANTILES`: 0 is the smallest, 0.5 the median, 1 the largest.

    Raises:
      ValueError: another shape.
    """
    values = np.quantile(_by_member(losses)[-1], QUANTILES)
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def fraction_below(losses: np.ndarray, total: float = PRINTED["totals"][1000]) -> float:
    """The fraction of runs whose last loss is below `total`, the printed 1.3455 by default.

    Args:
      losses: as in `end_quantiles`.
      total: in nats.

    Returns:
      A fraction from 0 to 1.

    Raises:
      ValueError: another shape.
    """
    return float(np.mean(_by_member(losses)[-1] < total))


def parting_epoch(losses: np.ndarray, spread: float = 0.01) -> int | None:
    """The first epoch at which the largest loss exceeds the smallest by more than `spread`.

    Args:
      losses: as in `end_quantiles`.
      spread: in nats.

    Returns:
      The epoch, or None if the runs stay together.

    Raises:
      ValueError: another shape.
    """
    parted = np.flatnonzero(np.ptp(_by_member(losses), axis=1) > spread)
    return int(parted[0]) if parted.size else None


def _check_example(params: Params) -> Params:
    params = check_params(params)
    checks.shaped("params.cell.U", params.cell.U, (1, 4))
    checks.shaped("params.readout.V", params.readout.V, (4, 1))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def _update(params: Any, state: Any) -> tuple:
    """One update: (new params, new optimizer state), the loss before it, its gradients."""
    loss, result = loss_and_grads(params, XS, TARGETS)
    gradients: Any = result.params
    updates, state = OPTIMIZER.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), loss, gradients


@partial(jax.jit, static_argnames="epochs")
def _run(params, epochs):
    def body(carry, _):
        carry, loss, _ = _update(*carry)
        return carry, loss

    # Each loss is computed before an update, so the last one costs one more update.
    return jax.lax.scan(body, (params, OPTIMIZER.init(params)), length=epochs + 1)[1]


def _by_member(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses)
    if losses.ndim != 2 or losses.size == 0:
        checks.bad_value("losses", "shape [epochs + 1, members]", list(losses.shape))
    return losses


@dataclass(frozen=True)
class Comparison:
    """One printed number beside the computed one.

    `section` of the source, such as "6.2"; `quantity` in its letters, such as "∂L/∂V"; `index` into
    a vector, from 1 as in the source, None for a scalar; the number `printed`, and `computed` in
    float64; `group`, one of `GROUPS`.
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
        """Whether both numbers are the same to 4 digits."""
        return four_digits(self.printed) == four_digits(self.computed)


def four_digits(value: float) -> str:
    """The number as the source prints it.

    Args:
      value: any number.

    Returns:
      The number with four digits after the point; zero has no sign.

    Raises:
      TypeError: not a number.
    """
    return f"{value:z.4f}"


def compare(params: Params) -> list[Comparison]:
    """Every number of sections 5 and 6 except the total of epoch 1000, printed and computed.

    Gradients are those of `jaxrnn.loss_and_grads`, updates those of `optax.sgd`.

    Args:
      params: as in `descend`.

    Returns:
      `Comparison` records in the source's order.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`; params of other shapes than the source's.

    >>> from jaxrnn import worked_example
    >>> comparisons = worked_example.compare(worked_example.recovered_params())
    >>> worked_example.agreeing(comparisons, worked_example.FIRST_UPDATE)
    (68, 68)
    """
    with jax.enable_x64(True):
        values = jax.device_get(_follow(_check_example(params)))
    return [
        Comparison(section, quantity, i if np.size(computed) > 1 else None, p, float(q), group)
        for group, section, quantity, printed, computed in _compared(*values)
        for i, (p, q) in enumerate(zip(printed, np.ravel(computed), strict=True), start=1)
    ]


def agreeing(comparisons: Iterable[Comparison], group: str) -> tuple[int, int]:
    """How many numbers of a group agree to 4 digits, and how many there are.

    Args:
      comparisons: from `compare`.
      group: one of `GROUPS`.

    Returns:
      (agreeing, all).

    Raises:
      ValueError: an unknown group.
    """
    checks.one_of("group", group, GROUPS)
    agree = [comparison.agrees for comparison in comparisons if comparison.group == group]
    return sum(agree), len(agree)


@jax.jit
def _follow(params):
    """The arguments of `_compared`: a pass, its gradients, the update, another pass, losses."""

    def steps(params):
        _, hs = unroll(params.cell, XS)
        omega = apply_readout(params.readout, hs)
        L, delta = cross_entropy(omega, TARGETS), output_error(omega, TARGETS)
        return {"h": hs, "omega": omega, "yhat": jax.nn.softmax(omega), "L": L, "delta": delta}

    (updated, _), _, gradients = _update(params, OPTIMIZER.init(params))
    return steps(params), gradients, updated, steps(updated), _run(params, 100)


def _compared(first, gradients, updated, second, losses):
    """(group, section, quantity, printed, computed), vector by vector in the source's order."""
    symbols = {"h": "h", "omega": "Ω", "yhat": "ŷ", "L": "L"}
    for t, step in enumerate(PRINTED["steps"]):
        for letter, printed in step.items():
            name, computed = f"{symbols[letter]}_{t + 1}", first[letter][t]
            yield FIRST_UPDATE, f"5.{t + 1}", name, printed, computed
    total = sum(float(four_digits(loss)) for loss in first["L"])
    yield TOTALS, "5.4", "Σ L_t of epoch 0, each L_t rounded", (PRINTED["totals"][0],), total
    for t, printed in enumerate(PRINTED["output_deltas"]):
        yield OUTPUT_DELTAS, "6.1", f"ŷ_{t + 1}−y_{t + 1}", printed, first["delta"][t]
    for number, (letter, printed) in enumerate(PRINTED["updates"].items(), start=2):
        layer, section = "readout" if letter in "Vc" else "cell", f"6.{number}"
        gradient, new = (getattr(getattr(tree, layer), letter) for tree in (gradients, updated))
        yield FIRST_UPDATE, section, f"∂L/∂{letter}", printed["gradient"], gradient
        yield FIRST_UPDATE, section, f"{letter}_new", printed["new"], new
    for t, step in enumerate(PRINTED["epoch_1"]):
        for letter, printed in step.items():
            yield EPOCH_1, "6.7", f"{symbols[letter]}_{t + 1}", printed, second[letter][t]
    for epoch in (1, 100):
        printed = (PRINTED["totals"][epoch],)
        yield TOTALS, "6.7", f"Σ L_t of epoch {epoch}", printed, losses[epoch]

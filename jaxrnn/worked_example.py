"""The source's example worked by hand, sections 4 to 6, beside every number that it prints.

A network of one unit reads "hell" and is to say "ello": h_0 = 0 at every epoch, plain gradient
descent of the summed loss, η = 0.1. All is float64 whatever JAX's global setting is, and leaves
that setting alone.

* The printed start is rounded to 4 digits; `recovered_params` is the unrounded one, and from it
  every printed number agrees that can: all but the total loss of epoch 1000.
* By epoch 1000 the training is chaotic; `ensemble` shows how far starts spread that all round to
  the printed one.
* The source prints the total of epoch 0 as a sum of four rounded losses, 6.0338, not 6.0337.
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

# What the source prints, in its own order and notation; typed from it, not computed. Section 4 has
# the start, 5.1 to 5.4 the steps, one for each t, 6.1 the output deltas ŷ_t − y_t, 6.2 to 6.6 the
# updates, 6.7 epoch 1, after one update; the totals Σ L_t by epoch are of 5.4 and 6.7.
PRINTED = json.loads(Path(__file__).with_suffix(".json").read_bytes())
PRINTED["totals"] = {int(epoch): total for epoch, total in PRINTED["totals"].items()}

# NumPy, which every setting of JAX takes alike.
_encode: Any = Vocabulary(PRINTED["vocabulary"]).encode
XS, TARGETS = Ids(_encode(PRINTED["inputs"])), _encode(PRINTED["targets"])
OPTIMIZER = optax.sgd(PRINTED["eta"])
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# The first is the 68: four steps, gradients, updated parameters. The others follow from them.
GROUPS = ("first update", "output deltas", "epoch 1", "totals")
FIRST_UPDATE, OUTPUT_DELTAS, EPOCH_1, TOTALS = GROUPS


def printed_params() -> Params:
    """The start as section 4 prints it, rounded to 4 digits.

    Returns:
      `Params` of float64 NumPy arrays, which keep their precision under any JAX setting.
    """
    return _params(**PRINTED["start"])


def recovered_params() -> Params:
    """The start of section 4 before rounding, which rounds to the printed one.

    The source does not say how it drew its numbers; they were recovered by search. NumPy's legacy
    generator with seed 124 gives all nine: U = 0.5 randn(1, 4), W = 0.4 randn(1, 1) and V = 0.3
    randn(4, 1), in this order. Its stream is frozen for good, unlike that of newer generators.

    Returns:
      `Params` as `printed_params`; b = c = 0.
    """
    draw = np.random.RandomState(124).randn
    U, W, V = 0.5 * draw(1, 4), 0.4 * draw(1, 1), 0.3 * draw(4, 1)
    return _params(U, W, np.zeros(1), V, np.zeros(4))


def starts(members: int, seed: int = 0) -> Params:
    """Starts drawn uniformly inside the rounding of the printed U, W and V, ±0.5e-4 each.

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
    """The total loss by epoch, of plain gradient descent as in section 6.7: `optax.sgd`, η = 0.1.

    Args:
      params: the start, of one unit and four characters.
      epochs: how many updates.

    Returns:
      Float64 `[epochs + 1]`, in nats: the loss of epoch e is the loss after e updates.

    Raises:
      TypeError, ValueError: params of another shape than the printed ones; fewer than one epoch.
    """
    checks.positive("epochs", epochs)
    with jax.enable_x64(True):
        return np.asarray(_run(_check_example(params), epochs))


def ensemble(members: int = 512, epochs: int = 1000, seed: int = 0) -> np.ndarray:
    """The total losses of many runs whose starts all round to the printed one.

    Past `parting_epoch` a single run says nothing: another compiler may order additions otherwise
    and gets another loss. The middle quantiles of many runs hardly move.

    Args:
      members: how many runs, descended together under `jax.vmap`.
      epochs: as in `descend`.
      seed: as in `starts`.

    Returns:
      Float64 `[epochs + 1, members]`, each run as `descend` returns it.

    Raises:
      TypeError, ValueError: as `starts`; fewer than one epoch.
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
    """The fraction of members whose last loss is below a total, the printed 1.3455 by default.

    Args:
      losses: as in `end_quantiles`.
      total: in nats.

    Returns:
      From 0 to 1.

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
      The epoch, or None where the runs stay together.

    Raises:
      ValueError: another shape.
    """
    parted = np.flatnonzero(np.ptp(_by_member(losses), axis=1) > spread)
    return int(parted[0]) if parted.size else None


def _check_example(params: Params) -> Params:
    """Require params of the example's shape; return them in float64."""
    params = check_params(params)
    checks.shaped("params.cell.U", params.cell.U, (1, 4))
    checks.shaped("params.readout.V", params.readout.V, (4, 1))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def _update(params: Any, state: Any) -> tuple:
    """One update: (new params, new state of the optimizer), the loss before it, its gradients."""
    loss, found = loss_and_grads(params, XS, TARGETS)
    gradients: Any = found.params
    updates, state = OPTIMIZER.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), loss, gradients


@partial(jax.jit, static_argnames="epochs")
def _run(params, epochs):
    def body(carry, _):
        carry, loss, _ = _update(*carry)
        return carry, loss

    # Each loss is that before an update, so the last one costs one update more.
    return jax.lax.scan(body, (params, OPTIMIZER.init(params)), length=epochs + 1)[1]


def _by_member(losses: np.ndarray) -> np.ndarray:
    """Require losses as `ensemble` returns them."""
    losses = np.asarray(losses)
    if losses.ndim != 2 or losses.size == 0:
        checks.bad_value("losses", "shape [epochs + 1, members]", list(losses.shape))
    return losses


@dataclass(frozen=True)
class Comparison:
    """One printed number beside the computed one.

    The source's section, such as "6.2", and the quantity in its letters, such as "∂L/∂V"; which
    element of a vector, counted from 1 as the source counts, None for a scalar; the number printed
    by the source and the one computed in float64; one of `GROUPS`.
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

    Gradients are those of `jaxrnn.loss_and_grads`, the derivation by hand; the update is that of
    `optax.sgd`; the total of epoch 100 follows 100 such updates.

    Args:
      params: as in `descend`.

    Returns:
      `Comparison` records in the source's order.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`; params of another shape than the printed.

    >>> from jaxrnn import worked_example
    >>> comparisons = worked_example.compare(worked_example.recovered_params())
    >>> worked_example.agreeing(comparisons, worked_example.FIRST_UPDATE)
    (68, 68)
    """
    with jax.enable_x64(True):
        found = jax.device_get(_follow(_check_example(params)))
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
    checks.one_of("group", group, GROUPS)
    agree = [comparison.agrees for comparison in comparisons if comparison.group == group]
    return sum(agree), len(agree)


@jax.jit
def _follow(params):
    """What `_side_by_side` takes: a pass, its gradients, the update, a second pass, training."""

    def steps(params):
        _, hs = unroll(params.cell, XS)
        omega = apply_readout(params.readout, hs)
        L, delta = cross_entropy(omega, TARGETS), output_error(omega, TARGETS)
        return {"h": hs, "omega": omega, "yhat": jax.nn.softmax(omega), "L": L, "delta": delta}

    (updated, _), _, gradients = _update(params, OPTIMIZER.init(params))
    return steps(params), gradients, updated, steps(updated), _run(params, 100)


def _side_by_side(first, gradients, updated, second, losses):
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

"""Training of the worked example: its start, plain gradient descent, and many runs at once.

Everything is float64 whatever JAX's global setting is, and leaves that setting alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxrnn import _checks, _printed
from jaxrnn._cell import Cell, Ids, Params, Readout, check_params
from jaxrnn._loss_and_grads import loss_and_grads


def _ids(text: str) -> Any:
    # NumPy, which every setting of JAX takes alike.
    return np.array([_printed.VOCABULARY.index(character) for character in text], np.int32)


XS, TARGETS = Ids(_ids(_printed.INPUTS)), _ids(_printed.TARGETS)
OPTIMIZER = optax.sgd(_printed.ETA)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def printed_params() -> Params:
    """The start as section 4 prints it, rounded to 4 digits.

    Returns:
      `Params` of float64 NumPy arrays, which keep their precision under any JAX setting.

    Source: section 4.
    """
    return _params(_printed.U, _printed.W, _printed.b, _printed.V, _printed.c)


def recovered_params() -> Params:
    """The unrounded start, which rounds to the printed one.

    The source does not say how it drew its numbers; they were recovered by search. NumPy's
    legacy generator with seed 124, drawing U = 0.5 randn(1, 4), W = 0.4 randn(1, 1) and
    V = 0.3 randn(4, 1) in this order, gives all nine. Its stream is frozen for good, unlike
    that of NumPy's newer generators.

    Returns:
      `Params` of float64 NumPy arrays, as `printed_params`; b = c = 0.

    Source: section 4, before rounding.
    """
    generator = np.random.RandomState(124)
    U = 0.5 * generator.randn(1, 4)
    W = 0.4 * generator.randn(1, 1)
    V = 0.3 * generator.randn(4, 1)
    return _params(U, W, np.zeros(1), V, np.zeros(4))


def starts(members: int, seed: int = 0) -> Params:
    """Starts drawn uniformly inside the rounding of the printed U, W and V, ±0.5e-4 each.

    Args:
      members: how many.
      seed: of NumPy's generator.

    Returns:
      `Params` of float64 NumPy arrays with a leading axis `[members]`; b = c = 0 exactly.

    Raises:
      TypeError, ValueError: fewer than one member, or a negative seed.
    """
    _checks.positive("members", members)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        _checks.bad_type("seed", "a whole number", type(seed).__name__)
    if seed < 0:
        _checks.bad_value("seed", "at least 0", seed)
    generator = np.random.default_rng(seed)

    def near(printed):
        return printed + generator.uniform(-0.5e-4, 0.5e-4, (members, *np.shape(printed)))

    U, W, V = near(_printed.U), near(_printed.W), near(_printed.V)
    return _params(U, W, np.zeros((members, 1)), V, np.zeros((members, 4)))


def descend(params: Params, epochs: int) -> np.ndarray:
    """The total loss by epoch, of plain gradient descent as the source does it.

    Args:
      params: the start, of one unit and four characters.
      epochs: how many updates.

    Returns:
      Float64 `[epochs + 1]`, in nats: the loss of epoch e is the loss after e updates.

    Raises:
      TypeError, ValueError: params of another shape than the printed ones; fewer than one
        epoch.

    Source: section 6.7; the update by `optax.sgd`, η = 0.1.
    """
    _checks.positive("epochs", epochs)
    with jax.enable_x64(True):
        return np.asarray(run(check_example(params), epochs))


def ensemble(members: int = 512, epochs: int = 1000, seed: int = 0) -> np.ndarray:
    """The total losses of many runs whose starts all round to the printed one.

    Args:
      members: how many runs, descended together under `jax.vmap`.
      epochs: how many updates.
      seed: as in `starts`.

    Returns:
      Float64 `[epochs + 1, members]`, in nats: the loss of epoch e is the loss after e updates.

    Raises:
      TypeError, ValueError: as `starts`; fewer than one epoch.

    Numerics: past `parting_epoch` a single run says nothing: another compiler may order
    additions otherwise and gets another loss. The middle quantiles of many runs hardly move.
    """
    _checks.positive("epochs", epochs)
    params = starts(members, seed)
    with jax.enable_x64(True):
        return np.asarray(_run_together(params, epochs))


def end_quantiles(losses: np.ndarray) -> dict[float, float]:
    """The quantiles of the last epoch's losses.

    Args:
      losses: `[epochs + 1, members]`, from `ensemble`.

    Returns:
      The loss at each of `QUANTILES`: 0 is the smallest, 0.5 the median, 1 the largest.

    Raises:
      ValueError: another shape.
    """
    values = np.quantile(by_member(losses)[-1], QUANTILES)
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def fraction_below(losses: np.ndarray, total: float = _printed.TOTALS[1000]) -> float:
    """The fraction of members whose last loss is below a total, the printed 1.3455 by default.

    Args:
      losses: `[epochs + 1, members]`, from `ensemble`.
      total: in nats.

    Returns:
      From 0 to 1.

    Raises:
      ValueError: another shape.
    """
    return float(np.mean(by_member(losses)[-1] < total))


def parting_epoch(losses: np.ndarray, spread: float = 0.01) -> int | None:
    """The first epoch at which the largest loss exceeds the smallest by more than `spread`.

    Args:
      losses: `[epochs + 1, members]`, from `ensemble`.
      spread: in nats.

    Returns:
      The epoch, or None where the runs stay together.

    Raises:
      ValueError: another shape.
    """
    parted = np.flatnonzero(np.ptp(by_member(losses), axis=1) > spread)
    return int(parted[0]) if parted.size else None


def check_example(params: Params) -> Params:
    """Require params of the example's shape; return them in float64."""
    params = check_params(params)
    _checks.shaped("params.cell.U", params.cell.U, (1, 4))
    _checks.shaped("params.readout.V", params.readout.V, (4, 1))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def _params(U, W, b, V, c):
    leaves: Any = [np.array(leaf, np.float64) for leaf in (U, W, b, V, c)]
    U, W, b, V, c = leaves
    return Params(Cell(U, W, b), Readout(V, c))


def update(params: Any, state: Any) -> tuple:
    """One update: (new params, new state of the optimizer), the loss before it, its gradients."""
    loss, gradients = loss_and_grads(params, XS, TARGETS)
    gradients: Any = gradients.params
    updates, state = OPTIMIZER.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), loss, gradients


@partial(jax.jit, static_argnames="epochs")
def run(params, epochs):
    """What `descend` returns."""

    def body(carry, _):
        carry, loss, _ = update(*carry)
        return carry, loss

    # Each loss is that before an update, so the last one costs one update more.
    return lax.scan(body, (params, OPTIMIZER.init(params)), length=epochs + 1)[1]


@partial(jax.jit, static_argnames="epochs")
def _run_together(params, epochs):
    return jax.vmap(partial(run, epochs=epochs), out_axes=1)(params)


def by_member(losses: np.ndarray) -> np.ndarray:
    """Require losses as `ensemble` returns them."""
    losses = np.asarray(losses)
    if losses.ndim != 2 or losses.size == 0:
        _checks.bad_value("losses", "shape [epochs + 1, members]", list(losses.shape))
    return losses

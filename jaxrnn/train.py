"""Training on a text: parallel contiguous streams, truncated backpropagation, any optimiser.

A text is cut into B streams that are read side by side, T characters at a time. The state
after one window is the first state of the next (truncated BPTT: values go on, gradients
stop at the edge of a window).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrnn import _checks
from jaxrnn._cell import Ids, Params, check_forward, check_params
from jaxrnn._layers import first_states, unroll_layers
from jaxrnn._loss import cross_entropy
from jaxrnn._loss_and_grads import loss_and_grads
from jaxrnn._step import apply_readout
from jaxrnn._text import streams as streams

# Held-out text is read in windows of this many steps, so that memory does not grow with it.
EVALUATION_WINDOW = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """All that changes in training.

    Args:
      params: the `Params`.
      optimizer_state: what optax keeps.
      h: the state carried from window to window, `[B, H]`; of a stack one for each layer.
      step: how many updates have been made, int32.
    """

    params: Params
    optimizer_state: Any
    h: Any
    step: jax.Array


def init_state(
    params: Params, optimizer: optax.GradientTransformation, batch_size: int
) -> TrainState:
    """The state before the first update.

    Args:
      params: initial `Params`.
      optimizer: from optax.
      batch_size: B, how many streams are read side by side.

    Returns:
      A `TrainState` with h = 0 and step = 0.

    Raises:
      TypeError, ValueError: params that do not fit, a batch size below 1.
    """
    # Copied: an update consumes its state, and the caller's params must outlive it.
    checked: Any = jax.tree.map(jnp.copy, check_params(params))
    check_forward("params.cell", checked.cell)  # a state from the end is not carried on
    _checks.positive("batch_size", batch_size)
    h = first_states(checked.cell, (batch_size,))
    return TrainState(checked, optimizer.init(checked), h, jnp.zeros((), jnp.int32))


def make_update(
    optimizer: optax.GradientTransformation,
) -> Callable[
    [TrainState, jax.typing.ArrayLike, jax.typing.ArrayLike], tuple[TrainState, jax.Array]
]:
    """One update of truncated BPTT as one jitted call.

    θ ← θ + optimizer(∂/∂θ of the mean loss of the window), h_0 ← h_T

    Args:
      optimizer: from optax; `optax.sgd(η)` is the source's θ ← θ − η ∂L/∂θ, of the mean.

    Returns:
      A function (state, inputs, targets) -> (state, loss): ids `[T, B]` each, loss in mean
      nats per character before the update. It consumes the state that it is given.

    Raises:
      TypeError, ValueError: the function returned, as `jaxrnn.loss_and_grads`.

    Source: "Parameter updates".
    """

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        params: Any = state.params
        total, gradients = loss_and_grads(params, Ids(inputs), targets, h0=state.h)
        mean = jax.tree.map(lambda g: g / jnp.asarray(targets.size, g.dtype), gradients.params)
        updates, optimizer_state = optimizer.update(mean, state.optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return TrainState(params, optimizer_state, gradients.h_last, state.step + 1), (
            total / targets.size
        )

    return update


def windows(
    inputs: np.ndarray, targets: np.ndarray, seq_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Read parallel streams window by window, from the start again after the last whole window.

    Args:
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: T ≤ L.

    Yields:
      (inputs, targets, first): `[T, B]` each, and whether the streams start over, so that the
      carried state must be 0.

    Raises:
      ValueError: streams shorter than one window.
    """
    _checks.positive("seq_length", seq_length)
    inputs, targets = _streams(inputs, targets)
    if len(inputs) < seq_length:
        _checks.bad_value("inputs", f"at least {seq_length} steps", len(inputs))
    while True:
        for start in range(0, len(inputs) - seq_length + 1, seq_length):
            window = slice(start, start + seq_length)
            yield inputs[window], targets[window], start == 0


def start_over(state: TrainState) -> TrainState:
    """The same state before the first window of the streams.

    Args:
      state: a `TrainState`.

    Returns:
      It with h = 0.

    Raises:
      TypeError: no `TrainState`.
    """
    _checks.instance("state", state, TrainState)
    return replace(state, h=jax.tree.map(jnp.zeros_like, state.h))


def evaluate(params: Params, inputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean cross-entropy of whole streams, read from h = 0.

    Args:
      params: the `Params`.
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.

    Returns:
      Nats per character; divided by ln 2, bits.

    Raises:
      TypeError, ValueError: as `jaxrnn.unroll` and `jaxrnn.cross_entropy`; empty streams.
    """
    params, (inputs, targets) = check_params(params), _streams(inputs, targets)
    if np.size(targets) == 0:
        _checks.bad_value("targets", "at least one character", list(np.shape(targets)))
    h = first_states(params.cell, (inputs.shape[1],))
    totals = []
    for start in range(0, len(inputs), EVALUATION_WINDOW):
        window = slice(start, start + EVALUATION_WINDOW)
        total, h = _total(params, inputs[window], targets[window], h)
        totals.append(total)
    return float(sum(map(float, totals)) / targets.size)


def _streams(inputs, targets):
    """Ids `[L, B]` on the host, of one shape."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    if inputs.ndim != 2:
        _checks.bad_value("inputs", "shape [L, B]", list(inputs.shape))
    if targets.shape != inputs.shape:
        _checks.bad_value("targets", f"shape {list(inputs.shape)}", list(targets.shape))
    return inputs, targets


@jax.jit
def _total(params, inputs, targets, h):
    h, hs = unroll_layers(params.cell, Ids(inputs), h)
    return jnp.sum(cross_entropy(apply_readout(params.readout, hs), targets)), h

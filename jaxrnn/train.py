"""Training on a text: parallel contiguous streams, truncated backpropagation, any optimiser.

A text is cut into B streams that are read side by side, T characters at a time. The state
after one window is the first state of the next (truncated BPTT: values go on, gradients
stop at the edge of a window).

Where arrays are is the caller's choice: a state and windows that are placed on a mesh of devices
stay there, and XLA splits the work as they lie.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import _checks
from jaxrnn._cell import Ids, check_params
from jaxrnn._fit import DivergedError as DivergedError
from jaxrnn._fit import Report as Report
from jaxrnn._fit import fit as fit
from jaxrnn._layers import first_states, unroll_layers
from jaxrnn._loss import cross_entropy
from jaxrnn._step import apply_readout
from jaxrnn._update import Figures as Figures
from jaxrnn._update import Loss as Loss
from jaxrnn._update import TrainState as TrainState
from jaxrnn._update import init_state as init_state
from jaxrnn._update import make_checked_update as make_checked_update
from jaxrnn._update import make_update as make_update
from jaxrnn._update import start_over as start_over
from jaxrnn.text import streams as streams

# Steps of held-out text that are read at once, so that memory does not grow with it.
EVALUATION_WINDOW = 1024


def windows(
    inputs: np.ndarray, targets: np.ndarray, seq_length: int, start: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Read parallel streams window by window, from the start again after the last whole window.

    Args:
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: T ≤ L.
      start: how many windows have been read before, as a run that goes on.

    Yields:
      (inputs, targets, first): `[T, B]` each, and whether the streams start over, so that the
      carried state must be 0.

    Raises:
      TypeError, ValueError: streams shorter than one window; a start below 0.
    """
    _checks.positive("seq_length", seq_length)
    _checks.whole("start", start)
    inputs, targets = _streams(inputs, targets)
    if len(inputs) < seq_length:
        _checks.bad_value("inputs", f"at least {seq_length} steps", len(inputs))
    for n in count(start):
        first = n % (len(inputs) // seq_length) * seq_length
        window = slice(first, first + seq_length)
        yield inputs[window], targets[window], first == 0


def evaluate(
    params: Any,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    seq_length: int = EVALUATION_WINDOW,
    loss: Loss | None = None,
    h: Any = None,
    put: Callable[[Any, int], Any] = lambda x, axis: x,
) -> float:
    """The mean cross-entropy of whole streams, read from h = 0 or from the h given.

    Args:
      params: the `Params`; of a model of one's own what its loss takes.
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: steps read at once: memory grows with it, and the result does not depend on it
        beyond rounding.
      loss: of a model of one's own, as in `make_update`; its key is None.
      h: with that loss, what it starts from, where it shall be computed with.
      put: (an array of the host, which of its axes is B) -> the same where it shall be computed
        with; as it is by default.

    Returns:
      Nats per character; divided by ln 2, bits.

    Raises:
      TypeError, ValueError: as `jaxrnn.unroll` and `jaxrnn.cross_entropy`; empty streams, a window
        of no step, an h without a loss or a loss without an h.
    """
    if (loss is None) != (h is None):
        _checks.bad_value("h", "one with a loss of your own only", _checks.came(h))
    inputs, targets = _streams(inputs, targets)
    _checks.positive("seq_length", seq_length)
    if np.size(targets) == 0:
        _checks.bad_value("targets", "at least one character", list(np.shape(targets)))
    if loss is None:
        params = check_params(params)
        shapes = jax.eval_shape(lambda: first_states(params.cell, (inputs.shape[1],)))
        h = jax.tree.map(lambda x: put(np.zeros(x.shape, x.dtype), 0), shapes)
    nats = 0.0
    for start in range(0, len(inputs), seq_length):
        window = slice(start, start + seq_length)
        x, y = put(inputs[window], 1), put(targets[window], 1)
        total, h = _total(params, x, y, h, loss=loss or _loss)
        # Waited for: of some dozens under way that several devices share, XLA's CPU runs into a
        # deadlock.
        nats += float(total)
    return nats / targets.size


def _streams(inputs, targets):
    """Ids `[L, B]` on the host, of one shape."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    if inputs.ndim != 2:
        _checks.bad_value("inputs", "shape [L, B]", list(inputs.shape))
    if targets.shape != inputs.shape:
        _checks.bad_value("targets", f"shape {list(inputs.shape)}", list(targets.shape))
    return inputs, targets


@partial(jax.jit, static_argnames="loss")
def _total(params, inputs, targets, h, *, loss):
    return loss(params, h, inputs, targets, None)


def _loss(params, h, inputs, targets, key):
    h, hs = unroll_layers(params.cell, Ids(inputs), h)
    return jnp.sum(cross_entropy(apply_readout(params.readout, hs), targets)), h

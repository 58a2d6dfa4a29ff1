"""Training on a text: parallel contiguous streams, truncated backpropagation, any optimiser.

A text is cut into B streams that are read side by side, T characters at a time. The state after one
window is the first state of the next (truncated BPTT: values go on, gradients stop at the edge of a
window). A state and windows that the caller places on a mesh of devices stay there, and XLA splits
the work as they lie.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxrnn._api import checks
from jaxrnn._api.cell import check_forward, check_params
from jaxrnn._api.gradients import loss_and_grads
from jaxrnn._api.layers import unroll_layers
from jaxrnn._api.readout import apply_readout, cross_entropy
from jaxrnn._jax.sharding import varying_like
from jaxrnn._record import Record, pytree
from jaxrnn._types import Ids
from jaxrnn.text import streams as streams

# The axis of a mesh over which the batch is split.
DATA = "data"
# Updates under way at most: some dozens that devices share run XLA's CPU into a deadlock.
AHEAD = 8
# Steps of held-out text that are read at once, so that memory does not grow with it.
EVALUATION_WINDOW = 1024


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class TrainState(Record):
    """All that changes in training.

    The `params`; what optax keeps; `h`, carried from window to window, `[B, H]`, of a stack one for
    each layer; `step`, how many updates have been made, int32; a random `key` for a loss of one's
    own, None if nothing is random, which does not change: each update folds its step into it.
    For a model of one's own `params` is any pytree of arrays, and `h` too.
    """

    params: Any
    optimizer_state: Any
    h: Any
    step: jax.Array
    key: Any = None


# (params, h, inputs, targets, key) -> (the loss summed over all targets, in nats; the last h)
Loss = Callable[[Any, Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def init_state(
    params: Any, optimizer: optax.GradientTransformation, batch_size: int | None = None,
    key: Any = None, *, h: Any = None,
) -> TrainState:  # fmt: skip
    """The state before the first update.

    Args:
      params: as in `TrainState`.
      optimizer: from optax.
      batch_size: B, how many streams are read side by side.
      key: as in `TrainState`, where that loss draws.
      h: of a model of one's own, instead of B: what it carries, any pytree of zeros.

    Returns:
      A `TrainState` with h = 0 and step = 0, of copies: an update consumes it.

    Raises:
      TypeError, ValueError: bad params, a batch size below 1, both or neither of that and h.
    """
    if (batch_size is None) == (h is None):
        checks.bad_value("batch_size", "either that or h", "both" if h is not None else "neither")
    if batch_size is not None:
        params = check_params(params)
        check_forward("params.cell", params.cell)  # a state from the end is not carried on
        checks.positive("batch_size", batch_size)
        h = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _state_types(params, batch_size))
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(params, optimizer.init(params), h, jnp.zeros((), jnp.int32), key)
    return jax.tree.map(jnp.array, state)


def _state_types(params, batch_size):
    """Shapes and dtypes of the states, as ids in lead to them: h keeps those of its zeros."""
    none = Ids(jnp.zeros((0, batch_size), jnp.int32))
    return jax.eval_shape(lambda: unroll_layers(params.cell, none)[0])


def start_over(state: TrainState) -> TrainState:
    """The same state before the first window of the streams.

    For a new pass over a text, where what was carried belongs to its end.

    Args:
      state: a `TrainState`.

    Returns:
      It with h = 0.

    Raises:
      TypeError: another state.
    """
    checks.instance("state", state, TrainState)
    return replace(state, h=jax.tree.map(jnp.zeros_like, state.h))


def make_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[[TrainState, ArrayLike, ArrayLike], tuple[TrainState, jax.Array]]:
    """One update of truncated BPTT as one jitted call; the source's "Parameter updates".

    θ ← θ + optimizer(∂/∂θ of the mean loss of the window), h_0 ← h_T

    Args:
      optimizer: from optax; `optax.sgd(η)` is the source's θ ← θ − η ∂L/∂θ, of the mean.
      loss: a `Loss` of a model of one's own; by default `jaxrnn.loss_and_grads`, by hand.
      mesh: has an axis "data" over which the batch is split, axis 0 of each array of h. Each device
        there forms the gradients of its own sequences, and after all loops one all-reduce adds them
        up; left to itself, XLA may do that in every segment of a long sequence. B is a multiple of
        that axis. Where it has several devices, a loss of one's own gets another key on each, and
        can ask for its `jax.lax.axis_index`.

    Returns:
      A function (state, inputs, targets) -> (state, loss): ids `[T, B]` each, loss in mean nats per
      character before the update. It consumes the state that it is given.

    Raises:
      ValueError: a mesh without that axis.
      TypeError, ValueError: the function returned, as `jaxrnn.loss_and_grads`.
    """
    whole = partial(_update, optimizer, _split(loss, mesh))

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        return whole(state, inputs, targets)[:2]

    return update


def _update(optimizer, summed, state, inputs, targets):
    """The new state, the mean loss, and its gradient."""
    params, size = state.params, targets.size
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    (total, gradient), h = summed(params, state.h, inputs, targets, key)
    mean: Any = jax.tree.map(lambda g: g / jnp.asarray(size, g.dtype), gradient)
    updates, optimizer_state = optimizer.update(mean, state.optimizer_state, params)
    params = optax.apply_updates(params, updates)
    return TrainState(params, optimizer_state, h, state.step + 1, state.key), total / size, mean


def _split(loss, mesh):
    """(params, h, inputs, targets, key) -> ((the summed loss, its gradient), the last h)."""
    if mesh is not None and DATA not in mesh.shape:
        checks.bad_value("mesh", f"an axis {DATA!r}", list(mesh.shape))

    def summed(params, h, inputs, targets, key):
        if loss is None:
            total, found = loss_and_grads(params, Ids(inputs), targets, h0=h)
            return (total, found.params), found.h_last
        run = jax.value_and_grad(loss, has_aux=True)
        (total, h), gradient = run(params, h, inputs, targets, key)
        return (total, gradient), h

    if mesh is None or mesh.shape[DATA] == 1:
        return summed

    def share(params, h, inputs, targets, key):
        if loss is not None:
            # Else JAX itself would add gradients up over the devices, wherever they are formed.
            params = varying_like(params, inputs)
            key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(DATA))
        sums, h = summed(params, h, inputs, targets, key)
        return jax.lax.psum(sums, DATA), h

    whole, rows, batch = jax.P(), jax.P(DATA), jax.P(None, DATA)
    specs = {"in_specs": (whole, rows, batch, batch, whole), "out_specs": (whole, rows)}
    return jax.shard_map(share, mesh=mesh, axis_names={DATA}, **specs)


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Figures(Record):
    """What a checked update says of itself; it stays on the device until someone looks.

    The loss in mean nats per character and the norms of its gradient, before the optimiser, and of
    the parameters, each of all together and before the update; and whether loss, gradient, and the
    new parameters and optimiser state are all finite.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    finite: jax.Array


def make_checked_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[[TrainState, ArrayLike, ArrayLike], tuple[TrainState, Figures]]:
    """An update that changes nothing where a number of it is not finite.

    Parameters and optimiser state are then as before (typed keys in it go on: none is used twice),
    h = 0 as at the start of a stream, and the step counts. `optax.apply_if_finite` sees neither the
    carried state nor what overflows although the gradient did not.

    Args:
      optimizer: as in `make_update`.
      loss: as in `make_update`.
      mesh: as in `make_update`.

    Returns:
      A function as that of `make_update`, but with `Figures` for the loss; `fit` takes it.

    Raises:
      TypeError, ValueError: as `make_update`, and what that returns.
    """
    whole = partial(_update, optimizer, _split(loss, mesh))

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        new, mean, gradient = whole(state, inputs, targets)
        # Not h: it is split as the batch is, and a loss is finite only where its states are.
        leaves = jax.tree.leaves((mean, gradient, new.params, new.optimizer_state))
        numbers = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves if not _is_key(leaf)]
        finite = jnp.all(jnp.stack(numbers))
        squares = [jax.tree.map(jnp.square, tree) for tree in (gradient, state.params)]
        norms = [jnp.sqrt(sum(map(jnp.sum, jax.tree.leaves(tree)))) for tree in squares]
        kept = replace(start_over(state), step=new.step)
        keep = lambda a, b: a if _is_key(a) else jnp.where(finite, a, b)  # noqa: E731
        new = jax.tree.map(keep, new, kept)
        return new, Figures(mean, norms[0], norms[1], finite)

    return update


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class DivergedError(Exception):
    """The loss, the gradient or what an update makes of it is no number any more.

    Args:
      message: what became of which number.
      state: the `TrainState` at hand, finite as a checked update left it: to save, or to go on from
        with a smaller learning rate. None where nobody has one.
      step: that of the first update that was not finite, or None.
    """

    def __init__(self, message: str = "", *, state: TrainState | None = None, step: Any = None):
        super().__init__(message)
        self.state, self.step = state, step


@dataclass(frozen=True)
class Report:
    """What `fit` has to say since it last said something.

    Args:
      state: the `TrainState`; the next update consumes it.
      step: how many updates it has seen.
      loss: the mean over these updates, in nats per character; NaN where all were skipped.
      gradient_norm: of the last update.
      parameter_norm: of the last update, before it.
      skipped: how many of these updates were not finite.
      updates_per_second: without the very first, which compiles; NaN where that was the only one.
    """

    state: TrainState
    step: int
    loss: float
    gradient_norm: float
    parameter_norm: float
    skipped: int
    updates_per_second: float


def fit(
    state: TrainState, update: Callable[[TrainState, Any, Any], tuple[TrainState, Figures]],
    windows: Iterable[tuple[Any, Any, bool]], steps: int, *, every: int | Iterable[int] = 25,
    skip_nonfinite: bool = False, stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[Report]:  # fmt: skip
    """The loop: update after update, with a word now and then.

    Args:
      state: to begin with, or to go on from; it is consumed.
      update: from `make_checked_update`.
      windows: (inputs, targets, first) each time, as `windows` yields; the loop ends with them.
      steps: up to which step, counted from the very first update.
      every: report at each step that this divides, or one of these; and after the last one.
      skip_nonfinite: leave an update that is not finite out, instead of ending.
      stop: asked with the step after each update; after a yes comes the last report.

    Yields:
      A `Report`, whose state is good until the next one: copy what you keep. Between reports the
      devices are a few updates behind.

    Raises:
      TypeError, ValueError: steps or every that are no whole numbers, another state or update.
      DivergedError: an update was not finite; the norms are in its message, and it has the step
        and a state to go on from.
    """
    intervals = tuple(every) if isinstance(every, Iterable) else (every,)
    for n in intervals:
        checks.positive("every", n)
    checks.whole("steps", steps)
    checks.instance("state", state, TrainState)
    begun, since, timed, unseen = int(state.step), 0.0, 0, []

    def report():
        figures = jax.device_get(unseen)
        pace = timed / (time.perf_counter() - since) if timed else math.nan
        finite = [float(each.loss) for each in figures if each.finite]
        if not skip_nonfinite and len(finite) < len(figures):
            raise _diverged(figures, step, state)
        loss = float(np.mean(finite)) if finite else math.nan
        norms = float(figures[-1].gradient_norm), float(figures[-1].parameter_norm)
        return Report(state, step, loss, *norms, len(figures) - len(finite), pace)

    wanted = islice(windows, max(steps - begun, 0))
    for step, (inputs, targets, first) in enumerate(wanted, begun + 1):
        state, figures = update(start_over(state) if first else state, inputs, targets)
        if not isinstance(figures, Figures):
            checks.bad_type("update", "that of make_checked_update", "another function")
        unseen.append(figures)
        if len(unseen) > AHEAD:
            unseen[-1 - AHEAD].loss.block_until_ready()
        timed += since > 0
        if not since:
            figures.loss.block_until_ready()
            since = time.perf_counter()
        stopped = stop(step)
        if any(step % n == 0 for n in intervals):
            yield report()
            since, timed, unseen = time.perf_counter(), 0, []
        if stopped:
            break
    if unseen:
        yield report()


def _diverged(figures, last, state):
    """The error of the first update up to step `last` that was not finite."""
    n, first = next((n, each) for n, each in enumerate(figures) if not each.finite)
    step, what = last - len(figures) + 1 + n, "the update made a number that is not finite"
    if not math.isfinite(first.loss):
        what = f"the loss became {first.loss}"
    elif not math.isfinite(first.gradient_norm):
        what = f"the norm of the gradient became {first.gradient_norm}"
    norms = f"gradient norm {first.gradient_norm:.4g}, parameter norm {first.parameter_norm:.4g}"
    return DivergedError(f"{what} at step {step} ({norms})", state=state, step=step)


def windows(
    inputs: np.ndarray, targets: np.ndarray, seq_length: int, start: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Read parallel streams window by window, from the start again after the last whole window.

    For an update, one after the other, of a text that is in memory or mapped into it.

    Args:
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: T ≤ L.
      start: how many windows have been read before, as a run that goes on.

    Yields:
      (inputs, targets, first): `[T, B]` each; whether the streams, and so h from 0, start over.

    Raises:
      TypeError, ValueError: streams shorter than one window; a start below 0.
    """
    checks.positive("seq_length", seq_length)
    checks.whole("start", start)
    inputs, targets = _streams(inputs, targets)
    if len(inputs) < seq_length:
        checks.bad_value("inputs", f"at least {seq_length} steps", len(inputs))
    for n in count(start):
        first = n % (len(inputs) // seq_length) * seq_length
        window = slice(first, first + seq_length)
        yield inputs[window], targets[window], first == 0


def evaluate(
    params: Any, inputs: np.ndarray, targets: np.ndarray, *, seq_length: int = EVALUATION_WINDOW,
    loss: Loss | None = None, h: Any = None,
    put: Callable[[Any, int], Any] = lambda x, axis: x,
) -> float:  # fmt: skip
    """The mean cross-entropy of whole streams, read from h = 0 or from the h given.

    For text that was held out, of any length in the same memory.

    Args:
      params: the `Params`; of a model of one's own what its loss takes.
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: steps read at once: memory grows with it, and the result changes by rounding only.
      loss: of a model of one's own, as in `make_update`; its key is None.
      h: with that loss, what it starts from, where it shall be computed with.
      put: (an array of the host, which of its axes is B) -> the same where it is computed with.

    Returns:
      Nats per character; divided by ln 2, bits.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`; empty streams, a window of no step, one of
        h and loss alone.
    """
    if (loss is None) != (h is None):
        checks.bad_value("h", "one with a loss of your own only", checks.came(h))
    inputs, targets = _streams(inputs, targets)
    checks.positive("seq_length", seq_length)
    if targets.size == 0:
        checks.bad_value("targets", "at least one character", list(targets.shape))
    if loss is None:
        params = check_params(params)
        types = _state_types(params, inputs.shape[1])
        h = jax.tree.map(lambda x: put(np.zeros(x.shape, x.dtype), 0), types)
    nats = 0.0
    for start in range(0, len(inputs), seq_length):
        x, y = (put(ids[start : start + seq_length], 1) for ids in (inputs, targets))
        total, h = _total(params, x, y, h, loss=loss)
        nats += float(total)  # waited for, see AHEAD
    return nats / targets.size


def _streams(inputs, targets):
    """Ids `[L, B]` on the host, of one shape."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    if inputs.ndim != 2:
        checks.bad_value("inputs", "shape [L, B]", list(inputs.shape))
    if targets.shape != inputs.shape:
        checks.bad_value("targets", f"shape {list(inputs.shape)}", list(targets.shape))
    return inputs, targets


@partial(jax.jit, static_argnames="loss")
def _total(params, inputs, targets, h, *, loss):
    if loss is not None:
        return loss(params, h, inputs, targets, None)
    h, hs = unroll_layers(params.cell, Ids(inputs), h)
    return jnp.sum(cross_entropy(apply_readout(params.readout, hs), targets)), h

"""Training on text with truncated backpropagation and any optax optimiser.

A text is cut into B parallel streams, which are read T characters at a time. The state after one
window is the first state of the next; gradients stop between windows (truncated BPTT). States and
windows may be sharded over a mesh of devices.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import count, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxrnn._api import checks
from jaxrnn._api.cell import check_forward, check_params
from jaxrnn._api.gradients import loss_and_grads
from jaxrnn._api.layers import unroll_layers
from jaxrnn._api.readout import apply_readout, cross_entropy
from jaxrnn._jax.sharding import varying_like
from jaxrnn._record import Record, by_name, pytree
from jaxrnn._types import Ids, Params, first_cell
from jaxrnn.text import streams as streams

# The axis of a mesh over which the batch is split.
DATA = "data"
# The most updates in flight. Some dozens of them deadlock XLA's CPU devices.
AHEAD = 8
# Steps of held-out text that are evaluated at once, which bounds memory.
EVALUATION_WINDOW = 1024


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class TrainState(Record):
    """The state of training.

    `params`; `optimizer_state`; `h`, carried from window to window, `[B, H]`, for a stack one per
    layer; `step`, the number of updates, int32; and `key`, a random key for a custom loss or None,
    which is constant: each update folds its step into it. For a custom model `params` and `h` are
    any pytrees of arrays.

    An update donates the buffers of its state, including arrays that the caller has put into it
    with `dataclasses.replace`.
    """

    params: Any
    optimizer_state: Any
    h: Any
    step: jax.Array
    key: Any = None


# (params, h, inputs, targets, key) -> (loss in nats, summed over all targets; last h)
Loss = Callable[[Any, Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def init_state(
    params: Any, optimizer: optax.GradientTransformation, batch_size: int | None = None,
    key: Any = None, *, h: Any = None,
) -> TrainState:  # fmt: skip
    """The state before the first update.

    Args:
      params: as in `TrainState`.
      optimizer: as in `make_update`.
      batch_size: B, the number of streams.
      key: a random key, typed or raw, for a custom loss that needs one.
      h: for a custom model, in place of `batch_size`: its first h, any pytree of zeros.

    Returns:
      A `TrainState` with h = 0 and step = 0. All its arrays are copies, because an update donates
      them.

    Raises:
      TypeError, ValueError: invalid params, optimiser or key; a batch size below 1; both or neither
        of `batch_size` and h.
    """
    if (batch_size is None) == (h is None):
        checks.bad_value("batch_size", "either that or h", "both" if h is not None else "neither")
    if batch_size is not None:
        params = check_params(params)
        check_forward("params.cell", params.cell)  # a backward state cannot be carried on
        checks.positive("batch_size", batch_size)
        h = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _state_types(params, batch_size))
    if key is not None:
        checks.random_key("key", key)
    params = jax.tree.map(jnp.asarray, params)
    copy, optimizer = partial(jax.tree.map, jnp.array), _check_optimizer(optimizer)
    optimizer_state = _call(lambda: copy(optimizer.init(params)))
    return TrainState(copy(params), optimizer_state, copy(h), jnp.zeros((), jnp.int32), copy(key))


def _check_optimizer(optimizer):
    """Require an optax optimiser; return it with an `update` that accepts extra arguments."""
    both: Any = [getattr(optimizer, name, None) for name in ("init", "update")]
    if isinstance(optimizer, type) or not all(map(callable, both)):
        hint = f"; call it: {by_name(optimizer)}(...)" if callable(optimizer) else ""
        got = checks.describe(optimizer) + hint
        checks.bad_type("optimizer", "an optax.GradientTransformation", got)
    if isinstance(optimizer, optax.MultiSteps):  # accepts them, but is not declared so
        return optax.GradientTransformationExtraArgs(*both)
    return optax.with_extra_args_support(optimizer)


def _call(function, *args, extras=({},)):
    """Call a function of an optimiser with the first `extras` it accepts, or raise a TypeError."""
    failed = None
    for extra in extras:
        try:
            return function(*args, **extra)
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            failed = failed or error
    reason = str(failed).strip().split("\n")[0]
    got = f"one that fails: {type(failed).__name__}: {reason}"
    raise TypeError(f"optimizer: expected one for these parameters, got {got}") from failed


def _state_types(params, batch_size):
    """Shapes and dtypes of the states for ids as inputs; h keeps those of its zeros."""
    none = Ids(jnp.zeros((0, batch_size), jnp.int32))
    return jax.eval_shape(lambda: unroll_layers(params.cell, none)[0])


def start_over(state: TrainState) -> TrainState:
    """The state with h = 0, for a new pass over a text.

    Args:
      state: a `TrainState`.

    Returns:
      A `TrainState` with h = 0, except for random keys in h. It shares its other arrays with
      `state`, so an update donates those too.

    Raises:
      TypeError: not a `TrainState`.
    """
    checks.instance("state", state, TrainState)
    return replace(state, h=jax.tree.map(lambda x: x if _is_key(x) else jnp.zeros_like(x), state.h))


def make_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[[TrainState, ArrayLike, ArrayLike], tuple[TrainState, jax.Array]]:
    """A jitted function for one update of truncated BPTT; the source's "Parameter updates".

    θ ← θ + optimizer(∂/∂θ of the mean loss of the window), h_0 ← h_T

    Args:
      optimizer: any optimiser of optax; `optax.sgd(η)` is the source's θ ← θ − η ∂L/∂θ, of the mean
        loss. If it accepts them it gets `value`, the mean loss, `grad`, its gradient, and the same
        as functions of the parameters, `value_fn` (also as `obj_fn`) and `grad_fn`.
      loss: a custom `Loss`; by default `jaxrnn.loss_and_grads`, which needs no key.
      mesh: a mesh with an axis "data", over which the batch is split (axis 0 of each array of h); B
        is a multiple of it. Each device computes the gradients of its own sequences, and one
        all-reduce sums them after all loops; XLA alone may do that in every segment of a long
        sequence. A custom loss gets a different key on each device, and may use
        `jax.lax.axis_index("data")`.

    Returns:
      A function (state, inputs, targets) -> (state, loss), for ids `[T, B]`; loss is the mean in
      nats per character, before the update. It donates the state, waits if the devices are some
      updates behind, and has the `lower` of a jitted function.

    Raises:
      TypeError, ValueError: not an optimiser; a mesh without that axis. The returned function:
        shapes that do not fit, inputs that are not integers, ids outside the alphabet, an optimiser
        that cannot update these parameters. Ids are checked if they are on the host (NumPy, lists);
        reading a JAX array would wait for it, and an invalid id in it gives NaN. For a custom loss
        inputs and targets are not checked.
    """
    whole = _update(optimizer, loss, mesh)

    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        return whole(state, inputs, targets)[:2]

    return _guarded(update, loss)


def _guarded(update, loss) -> Any:
    """The public function of an update: it is jitted, checks ids, and limits updates in flight."""
    jitted: Any = jax.jit(update, donate_argnums=0)
    under_way = deque()

    @wraps(jitted)
    def call(state, inputs, targets):
        checks.instance("state", state, TrainState)
        if loss is None and isinstance(state.params, Params):
            inputs = _known_ids("inputs", inputs, first_cell(state.params.cell).U.shape[1])
            targets = _known_ids("targets", targets, state.params.readout.V.shape[0])
        state, result = jitted(state, inputs, targets)
        value = result.loss if isinstance(result, Figures) else result
        if not isinstance(value, Tracer):
            under_way.append(value)
            if len(under_way) > AHEAD and not (oldest := under_way.popleft()).is_deleted():
                oldest.block_until_ready()
        return state, result

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
        setattr(call, name, getattr(jitted, name))
    return call


def _known_ids(name, ids: Any, size):
    """Require 0 <= id < size of ids that are on the host."""
    if isinstance(ids, jax.Array):
        return ids
    ids = _on_host(name, ids)
    if ids.dtype.kind not in "iu" or not ids.dtype.isnative:
        checks.integers(name, ids)
    # As unsigned integers, negative ids are large.
    if ids.size and ids.view(f"u{ids.itemsize}").max() >= size:
        checks.in_range(name, ids, size)
    return ids


def _on_host(name, value):
    """A NumPy array, which may be memory-mapped, as it is; anything else converted to one."""
    if type(value) in (np.ndarray, np.memmap):
        return value
    return np.asarray(checks.array(name, value))


def _update(optimizer, loss, mesh):
    """(state, inputs, targets) -> (new state, mean loss, its gradient, whether h is finite)."""
    optimizer = _check_optimizer(optimizer)
    with_gradient, alone = _split(loss, mesh)

    def update(state, inputs, targets):
        params, h, size = state.params, state.h, targets.size
        if loss is None:
            _check_window(h, inputs, targets, mesh)
        key = None if loss is None else state.key
        if key is not None:
            checks.random_key("state.key", key)
            key = jax.random.fold_in(key, state.step)
        (total, gradient, wrong), h = with_gradient(params, h, inputs, targets, key)
        mean: Any = jax.tree.map(lambda g: g / jnp.asarray(size, g.dtype), gradient)
        value = total / size

        def value_fn(params):
            again = None if key is None else jax.random.clone(key)
            return alone(params, state.h, inputs, targets, again)[0] / size

        # Some optimisers reject arguments that others need.
        common = {"value": value, "grad": mean, "value_fn": value_fn}
        grad_fn = {"grad_fn": lambda params, *_: jax.grad(value_fn)(params)}
        extras = {**common, **grad_fn, "obj_fn": value_fn}, common, grad_fn, {}
        before = state.optimizer_state
        updates, after = _call(optimizer.update, mean, before, params, extras=extras)
        for what, (a, b) in {"updates": (updates, params), "a state": (after, before)}.items():
            if jax.tree.map(jnp.shape, a) != jax.tree.map(jnp.shape, b):
                checks.bad_value("optimizer", f"{what} of the same shapes", "different shapes")
        new = TrainState(optax.apply_updates(params, updates), after, h, state.step + 1, state.key)
        return new, value, mean, wrong == 0

    return update


def _check_window(h, inputs, targets, mesh):
    """Require ids `[T, B]` with the batch of h, divisible by the devices of the mesh."""
    batch = jax.tree.leaves(h)[0].shape[:-1]
    hint = (*batch, None), "time comes first here"
    inputs = checks.integers("inputs", inputs, (None, *batch), hint)
    checks.integers("targets", targets, inputs.shape)
    if inputs.shape[0] == 0:
        checks.bad_value("inputs", "at least one step", "none")
    if mesh is not None and inputs.shape[1] % mesh.shape[DATA]:
        expected = f"a batch that the {mesh.shape[DATA]} devices of the mesh divide"
        checks.bad_value("inputs", expected, inputs.shape[1])


def _network(params, h, inputs, targets, key):
    h, hs = unroll_layers(params.cell, Ids(inputs), h)
    return jnp.sum(cross_entropy(apply_readout(params.readout, hs), targets)), h


def _split(loss, mesh):
    """Two functions of (params, h, inputs, targets, key), split over the mesh.

    The first returns ((summed loss, its gradient, the count of non-finite numbers in the last h),
    that h); the second is a `Loss`.
    """
    if mesh is not None and DATA not in mesh.shape:
        checks.bad_value("mesh", f"an axis {DATA!r}", list(mesh.shape))

    def with_gradient(params, h, inputs, targets, key):
        if loss is None:
            total, gradients = loss_and_grads(params, Ids(inputs), targets, h0=h)
            gradient, h = gradients.params, gradients.h_last
        else:
            run = jax.value_and_grad(loss, has_aux=True)
            (total, h), gradient = run(params, h, inputs, targets, key)
        wrong = [jnp.sum(~jnp.isfinite(x), dtype=total.dtype) for x in _numbers(h)]
        return (total, gradient, sum(wrong, jnp.zeros_like(total))), h

    functions = with_gradient, loss or _network
    if mesh is None or mesh.shape[DATA] == 1:
        return functions

    def share(function, params, h, inputs, targets, key):
        # Otherwise JAX would sum gradients over the devices wherever they are computed.
        params = varying_like(params, inputs)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(DATA))
        sums, h = function(params, h, inputs, targets, key)
        return jax.lax.psum(sums, DATA), h

    mesh = Mesh(mesh.devices, mesh.axis_names)  # XLA splits what is not over "data"
    whole, rows, batch = jax.P(), jax.P(DATA), jax.P(None, DATA)
    specs = {"in_specs": (whole, rows, batch, batch, whole), "out_specs": (whole, rows)}
    split = partial(jax.shard_map, mesh=mesh, axis_names={DATA}, **specs)
    return [split(partial(share, function)) for function in functions]


def _numbers(tree):
    return [x for x in jax.tree.leaves(tree) if not _is_key(x)]


@pytree
@dataclass(frozen=True, eq=False, repr=False)
class Figures(Record):
    """Figures of a checked update, as arrays on the device.

    `loss`, the mean in nats per character; the global norms of its gradient and of the parameters,
    before the update; and `finite`, whether loss, gradient and the new parameters, optimiser state
    and h are all finite.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    finite: jax.Array


def make_checked_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[[TrainState, ArrayLike, ArrayLike], tuple[TrainState, Figures]]:
    """An update, for `fit`, that changes nothing if any number in it is not finite.

    Parameters and optimiser state are then kept, except for typed keys, of which none is used
    twice; h is 0, and the step counts. `optax.apply_if_finite` checks neither h nor the new
    parameters. An infinity that was there before, such as an optimiser's best value so far, passes.

    Args:
      optimizer, loss, mesh: as in `make_update`.

    Returns:
      A function as from `make_update`, with `Figures` in place of the loss.

    Raises:
      TypeError, ValueError: as `make_update`, and so does the returned function.
    """
    whole = _update(optimizer, loss, mesh)

    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        new, mean, gradient, finite = whole(state, inputs, targets)
        pairs = [_numbers((x.params, x.optimizer_state)) for x in (new, state)]
        good = [jnp.isfinite(x) for x in _numbers((mean, gradient))]
        good += [jnp.isfinite(x) | (x == old) for x, old in zip(*pairs, strict=True)]
        finite = jnp.all(jnp.stack([finite, *map(jnp.all, good)]))
        squares = [jax.tree.map(_square, tree) for tree in (gradient, state.params)]
        norms = [jnp.sqrt(sum(map(jnp.sum, jax.tree.leaves(tree)))) for tree in squares]
        unchanged = replace(start_over(state), step=new.step)
        keep = lambda a, b: a if _is_key(a) else jnp.where(finite, a, b)  # noqa: E731
        return jax.tree.map(keep, new, unchanged), Figures(mean, norms[0], norms[1], finite)

    return _guarded(update, loss)


def _square(x):
    return jnp.square(jnp.abs(x))


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class DivergedError(Exception):
    """The loss, the gradient or the update is not finite.

    Args:
      message: which number is not finite.
      state: the last `TrainState`, which a checked update keeps finite: to save, or to continue
        with a smaller learning rate. May be None.
      step: of the first update that was not finite, or None.
    """

    def __init__(self, message: str = "", *, state: TrainState | None = None, step: Any = None):
        super().__init__(message)
        self.state, self.step = state, step


@dataclass(frozen=True)
class Report:
    """A report of `fit` on the updates since its last report.

    Args:
      state: the `TrainState`; the next update donates it.
      step: the number of updates in the state.
      loss: the mean over these updates, in nats per character; NaN if all were skipped.
      gradient_norm: of the last update.
      parameter_norm: before the last update.
      skipped: how many of these updates were not finite.
      updates_per_second: without the first update, which compiles; NaN if it is the only one.
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
    """The training loop, which yields reports.

    Args:
      state: the first state, new or from a checkpoint; it is donated.
      update: from `make_checked_update`.
      windows: an iterable of (inputs, targets, first), as from `windows`; the loop ends with it.
      steps: the last step, counted from the first update of all.
      every: one or more numbers; a report follows each step that one of them divides, and the last.
      skip_nonfinite: skip an update that is not finite, instead of raising.
      stop: called with the step after each update; True ends the loop after one more report.

    Yields:
      A `Report`. Its state is valid until the next one; copy what you keep. Between reports the
      devices may be a few updates behind.

    Raises:
      TypeError, ValueError: steps or every that are not whole numbers, an invalid state or update.
      DivergedError: an update was not finite. It has the step and a state to continue from, and the
        norms in its message.
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

    remaining = islice(windows, max(steps - begun, 0))
    for step, (inputs, targets, first) in enumerate(remaining, begun + 1):
        state, figures = update(start_over(state) if first else state, inputs, targets)
        if not isinstance(figures, Figures):
            checks.bad_type("update", "a function from make_checked_update", "another one")
        unseen.append(figures)
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
    """The error for the first update that was not finite; `last` is the last step in figures."""
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
    """Read parallel streams in windows, endlessly, restarting after the last full window.

    Args:
      inputs: ids, `[L, B]`, in memory or memory-mapped.
      targets: ids, `[L, B]`.
      seq_length: T ≤ L.
      start: the number of windows to skip, for a resumed run.

    Yields:
      (inputs, targets, first): `[T, B]` each, and whether the streams start over, so that h is 0.

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
    """The mean cross-entropy of whole streams, such as held-out text, in bounded memory.

    Args:
      params: the `Params`, or those of a custom model.
      inputs: ids, `[L, B]`.
      targets: ids, `[L, B]`.
      seq_length: steps computed at once: memory grows with it, the result changes by rounding only.
      loss: of a custom model, as in `make_update`; its key is None.
      h: for a custom loss, its first h, on the devices; otherwise h is 0.
      put: (host array, its axis B) -> device array.

    Returns:
      Nats per character; divide by ln 2 for bits.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`; empty streams, `seq_length` below 1, only
        one of h and loss. All ids are checked.
    """
    if (loss is None) != (h is None):
        checks.bad_value("h", "one with a custom loss only", checks.describe(h))
    inputs, targets = _streams(inputs, targets)
    checks.positive("seq_length", seq_length)
    if targets.size == 0:
        checks.bad_value("targets", "at least one character", list(targets.shape))
    sizes = 0, 0
    if loss is None:
        params = check_params(params)
        sizes = first_cell(params.cell).U.shape[1], params.readout.V.shape[0]
        types = _state_types(params, inputs.shape[1])
        h = jax.tree.map(lambda x: put(np.zeros(x.shape, x.dtype), 0), types)
    nats = 0.0
    for start in range(0, len(inputs), seq_length):
        x, y = (ids[start : start + seq_length] for ids in (inputs, targets))
        if loss is None:
            x, y = map(_known_ids, ("inputs", "targets"), (x, y), sizes)
        total, h = _total(params, put(x, 1), put(y, 1), h, loss=loss)
        nats += float(total)  # waits for the device, see AHEAD
    return nats / targets.size


def _streams(inputs, targets):
    """Require ids `[L, B]` of one shape, on the host."""
    inputs, targets = map(_on_host, ("inputs", "targets"), (inputs, targets))
    if inputs.ndim != 2:
        checks.bad_value("inputs", "shape [L, B]", list(inputs.shape))
    if targets.shape != inputs.shape:
        checks.bad_value("targets", f"shape {list(inputs.shape)}", list(targets.shape))
    return inputs, targets


@partial(jax.jit, static_argnames="loss")
def _total(params, inputs, targets, h, *, loss):
    return (loss or _network)(params, h, inputs, targets, None)

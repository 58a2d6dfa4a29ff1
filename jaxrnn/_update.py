"""One update of truncated backpropagation, and the state that goes from each to the next."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrnn import _checks
from jaxrnn._cell import Ids, check_forward, check_params
from jaxrnn._layers import first_states
from jaxrnn._loss_and_grads import loss_and_grads
from jaxrnn._sharding import varying_like

# The axis of a mesh over which the batch is split.
DATA = "data"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """All that changes in training.

    Args:
      params: the `Params`.
      optimizer_state: what optax keeps.
      h: the state carried from window to window, `[B, H]`; of a stack one for each layer.
      step: how many updates have been made, int32.
      key: a random key for a loss of one's own; None if nothing is random. It does not change:
        each update folds its step into it.

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
    params: Any,
    optimizer: optax.GradientTransformation,
    batch_size: int | None = None,
    key: Any = None,
    *,
    h: Any = None,
) -> TrainState:
    """The state before the first update.

    Args:
      params: initial `Params`; of a model of one's own any pytree of arrays.
      optimizer: from optax.
      batch_size: B, how many streams are read side by side.
      key: a random key, for a loss of one's own that draws.
      h: of a model of one's own, instead of B: what it carries, any pytree of zeros.

    Returns:
      A `TrainState` with h = 0 and step = 0, of copies: an update consumes it.

    Raises:
      TypeError, ValueError: params that do not fit, a batch size below 1, both or neither of
        batch size and h.
    """
    if (batch_size is None) == (h is None):
        _checks.bad_value("batch_size", "either that or h", "both" if h is not None else "neither")
    if batch_size is not None:
        params = check_params(params)
        check_forward("params.cell", params.cell)  # a state from the end is not carried on
        _checks.positive("batch_size", batch_size)
        h = first_states(params.cell, (batch_size,))
    params, h = jax.tree.map(jnp.array, (params, h))
    return TrainState(params, optimizer.init(params), h, jnp.zeros((), jnp.int32), key)


def make_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[
    [TrainState, jax.typing.ArrayLike, jax.typing.ArrayLike], tuple[TrainState, jax.Array]
]:
    """One update of truncated BPTT as one jitted call.

    θ ← θ + optimizer(∂/∂θ of the mean loss of the window), h_0 ← h_T

    Args:
      optimizer: from optax; `optax.sgd(η)` is the source's θ ← θ − η ∂L/∂θ, of the mean.
      loss: of a model of one's own, (params, h, inputs, targets, key) -> (the loss summed over all
        targets, the last h); by default that of `jaxrnn.loss_and_grads`, by hand.
      mesh: has an axis "data" over which the batch is split, axis 0 of each array of h. Each device
        there forms the gradients of its own sequences, and after all loops one all-reduce adds
        them up; left to itself, XLA may do that in every segment of a long sequence. B is a
        multiple of that axis. Where it has several devices, a loss of one's own gets another key
        on each, and can ask for its `jax.lax.axis_index`.

    Returns:
      A function (state, inputs, targets) -> (state, loss): ids `[T, B]` each, loss in mean
      nats per character before the update. It consumes the state that it is given.

    Raises:
      ValueError: a mesh without that axis.
      TypeError, ValueError: the function returned, as `jaxrnn.loss_and_grads`.

    Source: "Parameter updates".
    """
    summed = _split(loss, mesh)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        new, mean, _ = _update(optimizer, summed, state, inputs, targets)
        return new, mean

    return update


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Figures:
    """What a checked update says of itself; it stays on the device until someone looks.

    Args:
      loss: in mean nats per character, before the update.
      gradient_norm: of the mean's gradient, all parameters together, before the optimiser.
      parameter_norm: likewise, before the update.
      finite: whether loss, gradient, and the new parameters and optimiser state all are.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    parameter_norm: jax.Array
    finite: jax.Array


def make_checked_update(
    optimizer: optax.GradientTransformation, loss: Loss | None = None, *, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.typing.ArrayLike, jax.typing.ArrayLike], tuple[TrainState, Figures]]:
    """An update that changes nothing where a number of it is not finite.

    Parameters and optimiser state are then as before, h = 0 as at the start of a stream, and the
    step counts. `optax.apply_if_finite` looks at gradients only: neither at the carried state nor
    at what overflows although the gradient did not.

    Args:
      optimizer: as in `make_update`.
      loss: as in `make_update`.
      mesh: as in `make_update`.

    Returns:
      A function (state, inputs, targets) -> (state, `Figures`), which `fit` takes. It consumes the
      state that it is given.

    Raises:
      TypeError, ValueError: as `make_update`, and what that returns.
    """
    summed = _split(loss, mesh)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, inputs: jax.Array, targets: jax.Array):
        new, mean, gradient = _update(optimizer, summed, state, inputs, targets)
        # Not h: it is split as the batch is, and a loss is finite only where its states are.
        leaves = jax.tree.leaves((mean, gradient, new.params, new.optimizer_state))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        norms = _norm(gradient), _norm(state.params)
        kept = replace(start_over(state), step=new.step)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        return new, Figures(mean, *norms, finite)

    return update


def _norm(tree):
    # optax renames its own.
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


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
        _checks.bad_value("mesh", f"an axis {DATA!r}", list(mesh.shape))
    if mesh is None or mesh.shape[DATA] == 1:
        return partial(_summed, loss)

    def share(params, h, inputs, targets, key):
        if loss is not None:
            # Else JAX itself would add gradients up over the devices, wherever they are formed.
            params = varying_like(params, inputs)
            key = None if key is None else jax.random.fold_in(key, lax.axis_index(DATA))
        sums, h = _summed(loss, params, h, inputs, targets, key)
        return lax.psum(sums, DATA), h

    batch = P(None, DATA)
    return jax.shard_map(
        share, mesh=mesh, axis_names={DATA},
        in_specs=(P(), P(DATA), batch, batch, P()), out_specs=(P(), P(DATA)),
    )  # fmt: skip


def _summed(loss, params, h, inputs, targets, key):
    if loss is None:
        total, gradients = loss_and_grads(params, Ids(inputs), targets, h0=h)
        return (total, gradients.params), gradients.h_last
    differentiated = jax.value_and_grad(loss, has_aux=True)
    (total, h), gradient = differentiated(params, h, inputs, targets, key)
    return (total, gradient), h


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

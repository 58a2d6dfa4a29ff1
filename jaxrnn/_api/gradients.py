"""Hand-derived gradients: of any loss of the states, and of the source's loss."""

from typing import Any

import jax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_params
from jaxrnn._api.sequences import check_options, check_sequences, check_targets
from jaxrnn._base.masking import valid_steps
from jaxrnn._core import derivative, loss
from jaxrnn._types import Cell, CellGradients, Gradients, Ids, Params, leading_shape


def bptt(
    cell: Cell,
    xs: jax.Array | Ids,
    h0: jax.Array | None,
    hs: jax.Array,
    dhs: jax.Array,
    *,
    dh_last: jax.Array | None = None,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: jax.Array | None = None,
    reverse: bool = False,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> CellGradients:
    """The gradients of a loss that depends on the states, by backpropagation through time.

    λ_t = g_t + J_{t+1}ᵀ λ_{t+1},  λ_{T+1} = 0        (λ_t = dL/dh_t, g_t = dhs_t)
    δ_t = p_t λ_t,                                   (δ_t = dL/da_t, p_t = ∂h_t/∂a_t)
    dL/dU = Σ δ_t x_tᵀ,  dL/dW = Σ δ_t s_{t−1}ᵀ,  dL/db = Σ δ_t
    dL/dx_t = Uᵀ δ_t,    dL/dh_0 = J_1ᵀ λ_1,      dL/dα = Σ λ_t ∂h_t/∂α

    J_t = diag(p_t) W diag(q_{t−1}) + diag(k_t):  p = α φ'(a), q = 1, s = h in the rate form;
    p = α, q = φ'(h), s = φ(h) in the voltage form, and k = 1 − α in both; p = ∂f/∂a, q = g'(h),
    s = g(h), k = ∂f/∂h in a custom form.

    For δ and λ themselves: learning rules, penalties on adjoints, plots of how they decay. For
    gradients alone, `jax.grad` of `unroll` runs the same loops.

    Args:
      cell, xs, h0: the arguments of `unroll`; h0 is None for zeros.
      hs: the states from `unroll`, `[T, *batch, H]`.
      dhs: ∂L/∂h_t at fixed later states, `[T, *batch, H]`; ignored on invalid steps.
      dh_last: ∂L/∂h_last, `[*batch, H]`; None for zeros.
      lengths, mask, drive, reverse, truncate, window, implementation, precision: as in `unroll`.

    Returns:
      `CellGradients`; each gradient has the dtype of its argument.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll`.

    Numerics: the adjoint and all sums are float32 or better.
    Inside shard_map each device returns its own share of every gradient, for the caller to add up;
    `jax.grad` of `unroll` adds them up.
    Cost: one product a step; then one product over many steps for each of U, W and xs.
    Source: section 3.3, with the errata in `jaxrnn.textbook`.
    """
    checks.not_swapped("cell", cell, "xs", xs, Cell)
    shape = getattr(h0, "shape", ())
    for name, states in (("hs", hs), ("dhs", dhs)):
        checks.shapes_not_swapped("h0", h0, name, states, shape[1:], shape)
    args = check_sequences(check_cell("cell", cell), xs, h0, lengths, mask, drive)
    cell, xs, h0, lengths, mask, drive = args
    shape = (*leading_shape(xs), cell.W.shape[0])
    hs = checks.floating("hs", hs, shape, checks.swapped(shape))
    dhs = checks.floating("dhs", dhs, shape, checks.swapped(shape))
    dh_last = None if dh_last is None else checks.floating("dh_last", dh_last, shape[1:])
    options = check_options(args, reverse, None, truncate, window, implementation, precision)
    return derivative.bptt(cell, xs, h0, hs, dhs, dh_last, lengths, mask, drive, options=options)


def loss_and_grads(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    h0: Any = None,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: Any = None,
    reverse: bool = False,
    checkpoint_every: int | str | None = None,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> tuple[jax.Array, Gradients]:
    """The summed cross-entropy of a network and its gradients: all of section 3 by hand.

    L = Σ_t L_t,  ∂L/∂Ω_t = ŷ_t − y_t,  dL/dV = Σ (ŷ_t − y_t) s_tᵀ,  dL/dc = Σ (ŷ_t − y_t),
    g_t = q_t Vᵀ (ŷ_t − y_t), and the rest as in `bptt`, with q and s of the cell's form.

    For classification at every step, as of text: logits are never stored for all steps.

    Args:
      params: the `Params`, of one cell or of a stack as in `unroll_layers`.
      targets: integer ids `[T, *batch]`, or one-hot floats `[T, *batch, K]`.
      h0: first state, `[*batch, H]`; for a stack, in the structure of its cells; zeros by default.
      xs, lengths, mask, drive, reverse, truncate, window, implementation: as in `unroll`, or
        `unroll_layers` for a stack; invalid steps have no loss.
      precision: as in `unroll`; also of products with V.
      checkpoint_every: as in `unroll`; readout and loss too are computed for k steps at a time.

    Returns:
      (loss, `Gradients`): the loss in nats, a scalar summed over steps and batch; the gradients of
      params and h0, and the final state.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll` and `cross_entropy`.

    Numerics: the loss is float32 or better.
    Inside shard_map each device returns its own share of the loss and of every gradient.
    Cost: hs is stored for all steps; logits, errors and cotangents for one segment at a time. With
    `checkpoint_every` = k everything is stored for k steps at a time, also for a stack without
    pairs. Without it a stack stores all steps, and so does `window`. JAX can differentiate this.
    Source: sections 3.1 to 3.3.

    >>> import jax, jaxrnn
    >>> params = jaxrnn.init_params(jax.random.key(0), 4, 8, 4)
    >>> xs, targets = jaxrnn.Ids(jax.numpy.array([0, 1, 2, 2])), jax.numpy.array([1, 2, 2, 3])
    >>> loss, gradients = jaxrnn.loss_and_grads(params, xs, targets)
    >>> loss.shape, gradients.params.cell.W.shape, gradients.h_last.shape
    ((), (8, 8), (8,))
    """
    checks.not_swapped("params", params, "xs", xs, Params)
    params = check_params(params)
    args = check_sequences(params.cell, xs, h0, lengths, mask, drive)
    xs, h0, lengths, mask, drive = args[1:]
    how = reverse, checkpoint_every, truncate, window, implementation, precision
    options, steps = check_options(args, *how), leading_shape(xs)
    valid = valid_steps(lengths, mask, steps[0])
    targets = check_targets(targets, (*steps, params.readout.V.shape[0]), valid)
    return loss.loss_and_grads(params, targets, xs, h0, lengths, mask, drive, options=options)

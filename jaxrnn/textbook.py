"""Section 3 of the source, literally: the double sum over t and k ≤ t.

It costs T² terms where the adjoint recursion of `jaxrnn.bptt` costs T: to read, to teach and
to check with. Errata of the printed formulas, mended here:

* 3.3 prints (y_t − ŷ_t); it is (ŷ_t − y_t), as in 3.1 and 3.2 and in the worked numbers.
* 3.3 prints the Jacobian of a one-unit network, Wᵀ (1 − h²_{j+1}); for H units it is
  ∂h_{j+1}/∂h_j = diag(1 − h²_{j+1}) W, and its transpose carries the adjoint back.
* ∂h_k/∂W, ∂h_k/∂U and ∂h_k/∂b are the immediate derivatives, with h_{k−1} held fixed; the
  sum over k does the rest.
* The upper limits S and T are both the length of the sequence.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _checks
from jaxrnn._activation import resolve, slope
from jaxrnn._cell import (
    Cell,
    Ids,
    Params,
    Readout,
    check_cell,
    check_inputs,
    check_params,
    leading_shape,
)
from jaxrnn._dtypes import cast, cast_like, result_dtype, wide
from jaxrnn._jacobians import previous
from jaxrnn._loss import check_targets, cross_entropy, output_error
from jaxrnn._step import apply_readout, preactivation, row_weights
from jaxrnn._unroll import check_how, unroll


def loss_and_grads(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    truncate: int | None = None,
    window: int | None = None,
) -> tuple[jax.Array, Params]:
    """The summed cross-entropy and its gradients, by the double sum of section 3.3.

    dL/dW = Σ_{t=1}^T Σ_{k=1}^t (ŷ_t − y_t)ᵀ V (Π_{j=k}^{t−1} ∂h_{j+1}/∂h_j) ∂h_k/∂W

    with h_0 = 0; U and b likewise, V and c as in section 3.2.

    Args:
      params: the `Params`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      targets: integer ids `[T, *batch]`, or one-hot floats `[T, *batch, K]`.
      truncate: as in `jaxrnn.unroll`: no term has a factor ∂a_{mk+1}/∂h_{mk}.
      window: as in `jaxrnn.unroll`: only the terms with k > t − window.

    Returns:
      (loss, gradients): nats, summed over steps and batch; a `Params`.

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`.

    Cost: T² / 2 products of Jacobians with vectors; memory T · T · B · H.

    Source: sections 3.1 to 3.3.
    """
    args = _checked(params, xs, targets)
    return _loss_and_grads(*args, how=check_how(args, False, None, truncate, window))


def contributions(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    truncate: int | None = None,
    window: int | None = None,
) -> Cell:
    """The (t, k) terms of the double sum: what the loss at t owes to the step k.

    Args:
      params: the `Params`.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      targets: integer ids `[T, *batch]`, or one-hot floats `[T, *batch, K]`.
      truncate: as in `jaxrnn.unroll`: no term has a factor ∂a_{mk+1}/∂h_{mk}.
      window: as in `jaxrnn.unroll`: only the terms with k > t − window.

    Returns:
      A `Cell` whose leaves are `[T, T, *leaf]`, first t, then k; 0 for k > t; summed over the
      batch. Their sum over t and k is the gradient. How fast they fade (or grow) with t − k
      is how fast gradients vanish (or explode).

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`.

    Source: section 3.3.
    """
    args = _checked(params, xs, targets)
    return _contributions(*args, how=check_how(args, False, None, truncate, window))


@partial(jax.jit, static_argnames="how")
def _loss_and_grads(params, xs, targets, *, how):
    loss, hs, error = _forward(params, xs, targets)
    readout = Readout(V=jnp.einsum("tbk,tbi->ki", error, hs), c=jnp.sum(error, (0, 1)))
    cell = _double_sum(params, xs, hs, error, how, kept="")
    return loss, cast_like(Params(cell, readout), params)


@partial(jax.jit, static_argnames="how")
def _contributions(params, xs, targets, *, how):
    _, hs, error = _forward(params, xs, targets)
    return cast_like(_double_sum(params, xs, hs, error, how, kept="tk"), params.cell)


def _checked(params, xs, targets):
    params = check_params(params)
    size = check_cell("params.cell", params.cell).U.shape[1]
    xs = check_inputs("xs", xs, size, time=True)
    steps = leading_shape(xs)
    if isinstance(xs, Ids):
        _checks.in_range("xs.ids", xs.ids, size)
        rows = jax.nn.one_hot(wide(xs.ids), size, dtype=result_dtype(params.cell))
        # An invalid id has no row; traced, it is not seen above and gives NaN.
        xs = jnp.where(jnp.sum(rows, axis=-1, keepdims=True) == 1, rows, jnp.nan)
    return params, xs, check_targets(targets, (*steps, params.readout.V.shape[0]), None)


def _forward(params, xs, targets):
    """The loss, the states `[T, B, H]` and ŷ_t − y_t `[T, B, K]` in the dtype of sums."""
    _, hs = unroll(params.cell, xs)
    logits = apply_readout(params.readout, hs)
    loss = jnp.sum(cross_entropy(logits, targets))
    error = output_error(logits, targets)
    return loss, _one_batch_axis(hs).astype(error.dtype), _one_batch_axis(error)


def _one_batch_axis(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _double_sum(params, xs, hs, error, how, kept):
    """The sum of 3.3 over batch, t and k, or (`kept` = "tk") its terms `[T, T, *leaf]`."""
    dtype = error.dtype
    cell, V = cast(params.cell, dtype), params.readout.V.astype(dtype)
    xs = _one_batch_axis(xs).astype(dtype)
    time, batch, size = hs.shape
    h_prev = previous(hs, jnp.zeros((batch, size), dtype), reverse=False)[:time]
    a = preactivation(row_weights(cell, xs), xs, h_prev)
    activation = resolve(cell.activation)
    phi = activation.function(a)
    alpha = jnp.ones((), dtype) if cell.leak is None else cell.leak
    alpha = jnp.broadcast_to(alpha, (size,))
    # ∂h_k/∂a_k and ∂h_{k+1}/∂h_k = (1 − α) I + diag(∂h/∂a) W; tanh: 1 − h².
    dh_da = jnp.einsum("i,tbi->tbi", alpha, slope(activation, phi, a))
    through_a = jnp.einsum("tbi,ij->tbij", dh_da, cell.W)
    steps = jnp.arange(time)
    if how.truncate is not None:
        cut = (steps > 0) & (steps % how.truncate == 0)
        through_a = jnp.where(cut[:, None, None, None], 0, through_a)
    jacobians = jnp.diag(1 - alpha)[None, None] + through_a

    def multiply(products, now):
        # Row t holds (ŷ_t − y_t)ᵀ V Π_{j=k}^{t−1} ∂h_{j+1}/∂h_j; row k starts here.
        k, jacobian, error = now
        products = jnp.einsum("tbi,bij->tbj", products, jacobian)
        own = jnp.einsum("bo,oi->bi", error, V)[None]
        products = jnp.where((steps == k)[:, None, None], own, products)
        if how.window is not None:
            products = jnp.where((steps - k < how.window)[:, None, None], products, 0)
        return products, products

    later = jnp.concatenate([jacobians[1:], jnp.zeros_like(jacobians[:1])])
    start = jnp.zeros_like(dh_da)
    products = lax.scan(multiply, start, (steps, later, error), reverse=True)[1].swapaxes(0, 1)

    # Times the immediate derivatives ∂h_k/∂θ, with h_{k−1} held fixed.
    delta = jnp.einsum("tkbi,kbi->tkbi", products, dh_da)
    leak = None
    if cell.leak is not None:
        per_unit = "i" if cell.leak.ndim else ""
        leak = jnp.einsum(f"tkbi,kbi->{kept}{per_unit}", products, phi - h_prev)
    return Cell(
        U=jnp.einsum(f"tkbi,kbj->{kept}ij", delta, xs),
        W=jnp.einsum(f"tkbi,kbj->{kept}ij", delta, h_prev),
        b=jnp.einsum(f"tkbi->{kept}i", delta),
        leak=leak,
        activation=cell.activation,
    )

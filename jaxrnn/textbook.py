"""Section 3 of the source, literally: the double sum over t and k ≤ t.

For reading, teaching and checking: it has T² terms where the recursion of `jaxrnn.bptt` has T.

The source is "RNN by hand", sections 1 to 6. Its equations, and the functions that compute them:
inputs x_t, states h_t, logits Ω_t, probabilities ŷ_t and targets y_t, t = 1 … T, as columns.

    2.1  h_t = tanh(U x_t + W h_{t−1} + b)                      `step`, `unroll`
    2.2  Ω_t = V h_t + c                                        `apply_readout`
    2.3  ŷ_t = softmax(Ω_t)                                     `jax.nn.softmax`
    2.4  L_t = −y_t · ln ŷ_t,  L = Σ L_t                        `cross_entropy`
    3.1  ∂L_t/∂Ω_t = ŷ_t − y_t                                  `loss_and_grads`
    3.2  dL/dV = Σ (ŷ_t − y_t) h_tᵀ,  dL/dc = Σ (ŷ_t − y_t)     `loss_and_grads`
    3.3  dL/dW = Σ_t Σ_{k≤t} (ŷ_t − y_t)ᵀ V (Π_{j=k}^{t−1} ∂h_{j+1}/∂h_j) ∂h_k/∂W
         term by term                                           `textbook.loss_and_grads`
         in time linear in T, for any cell                      `bptt`
         θ ← θ − η ∂L/∂θ                                        `optax.sgd`

Errata, corrected here:

1. 2.3 lets t run to |A|. It runs to T; the sum inside the softmax is over the |A| characters.
2. 3.3 prints (y_t − ŷ_t) in the gradients of W, U and b. It is (ŷ_t − y_t), as in 3.1, 3.2 and the
   source's own numbers.
3. The upper limits S and T are the same length.
4. 3.3 prints the Jacobian of a one-unit network, Wᵀ (1 − h²_{j+1}). For H units it is
   ∂h_{j+1}/∂h_j = diag(1 − h²_{j+1}) W, and its transpose carries the adjoint back.
5. ∂h_k/∂W, ∂h_k/∂U and ∂h_k/∂b in 3.3 are immediate derivatives, with h_{k−1} held fixed.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_inputs, check_params
from jaxrnn._api.sequences import check_options, check_targets
from jaxrnn._base.arithmetic import cast, cast_like, preactivation, result_dtype, row_weights, wide
from jaxrnn._base.forms import (
    function_of,
    is_custom,
    output,
    output_derivatives,
    resolve,
    slope,
    update_derivatives,
)
from jaxrnn._base.masking import previous
from jaxrnn._core import derivative
from jaxrnn._core.loss import cross_entropy, logits, output_error
from jaxrnn._types import Cell, Ids, Params, Readout, leading_shape


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

    with h_0 = 0, and V diag(g'(h_t)) for V where the output g(h) is not h. The same for U and b; V
    and c as in section 3.2.

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

    Cost: T² / 2 products of Jacobians with vectors; memory T · T · B · H. It does not run under
    explicit sharding (`AxisType.Explicit`).
    Source: sections 3.1 to 3.3.
    """
    how = _checked(params, xs, targets, truncate, window)
    loss, readout, cell = _by_section_3(*how, kept="")
    return loss, Params(cell, readout)


def contributions(
    params: Params,
    xs: jax.Array | Ids,
    targets: jax.Array,
    *,
    truncate: int | None = None,
    window: int | None = None,
) -> Cell:
    """The (t, k) terms of the double sum: how step k contributes to the gradient of the loss at t.

    For plots of how far back a network remembers.

    Args:
      params, xs, targets, truncate, window: as in `loss_and_grads`.

    Returns:
      A `Cell` with leaves `[T, T, *leaf]`, t before k, summed over the batch; 0 for k > t. Their
      sum over t and k is the gradient. They decay (or grow) with t − k as fast as gradients vanish
      (or explode).

    Raises:
      TypeError, ValueError: as `jaxrnn.loss_and_grads`.

    Source: section 3.3.
    """
    how = _checked(params, xs, targets, truncate, window)
    return _by_section_3(*how, kept="tk")[2]


def _checked(params, xs, targets, truncate, window):
    params = check_params(params)
    size = check_cell("params.cell", params.cell).U.shape[1]
    xs = check_inputs("xs", xs, size, time=True)
    steps = leading_shape(xs)
    if isinstance(xs, Ids):
        checks.in_range("xs.ids", xs.ids, size)
        rows = jax.nn.one_hot(wide(xs.ids), size, dtype=result_dtype(params.cell))
        # An invalid id that is traced passes the check above; it becomes a row of NaN.
        xs = jnp.where(jnp.sum(rows, axis=-1, keepdims=True) == 1, rows, jnp.nan)
    targets = check_targets(targets, (*steps, params.readout.V.shape[0]), None)
    options = check_options((params.cell, xs), False, None, truncate, window, "scan", None)
    return params, xs, targets, options


@partial(jax.jit, static_argnames=("options", "kept"))
def _by_section_3(params, xs, targets, options, *, kept):
    """The loss, the gradients of the readout, and `_double_sum` for the cell."""
    _, hs = derivative.unroll(params.cell, xs, None, None, None, None, options=options)
    Omega = logits(params.readout, output(params.cell, hs))
    loss = jnp.sum(cross_entropy(Omega, targets))
    error = output_error(Omega, targets)  # ŷ_t − y_t, in the dtype of sums
    hs, error = _one_batch_axis(hs).astype(error.dtype), _one_batch_axis(error)
    V = jnp.einsum("tbk,tbi->ki", error, output(params.cell, hs))
    cell = _double_sum(params, xs, hs, error, options, kept)
    readout = cast_like(Readout(V, jnp.sum(error, (0, 1))), params.readout)
    return loss, readout, cast_like(cell, params.cell)


def _one_batch_axis(x):
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _double_sum(params, xs, hs, error, options, kept):
    """The sum of 3.3 over batch, t and k, or (`kept` = "tk") its terms `[T, T, *leaf]`."""
    dtype = error.dtype
    cell, V = cast(params.cell, dtype), params.readout.V.astype(dtype)
    xs = _one_batch_axis(xs).astype(dtype)
    time, batch, size = hs.shape
    h_prev = previous(hs, jnp.zeros((batch, size), dtype), reverse=False)[:time]
    s_prev = output(cell, h_prev)
    a = preactivation(row_weights(cell, xs), xs, s_prev)
    if is_custom(cell):
        p, k, by_f = update_derivatives(cell, a, h_prev)
    else:
        alpha = jnp.ones((), dtype) if cell.leak is None else cell.leak
        alpha = jnp.broadcast_to(alpha.astype(dtype), hs.shape)
        p, k, by_f = alpha, 1 - alpha, a - h_prev  # voltage: h_k = (1 − α) h_{k−1} + α a_k
        if cell.form == "rate":  # h_k = (1 − α) h_{k−1} + α φ(a_k); tanh' = 1 − φ²
            phi = function_of(cell)(a).astype(dtype)
            p, by_f = alpha * slope(resolve(cell.activation), phi, a), phi - h_prev
    (q, by_g), (q_last, by_last) = (output_derivatives(cell, h) for h in (h_prev, hs))
    q, q_last = (jnp.ones_like(hs) if slopes is None else slopes for slopes in (q, q_last))
    # ∂h_k/∂h_{k−1} = diag(p_k) W diag(q_{k−1}) + diag(k_k), where k = 1 − α with a leak.
    through_a = jnp.einsum("tbi,ij,tbj->tbij", p, cell.W, q)
    steps = jnp.arange(time)
    if options.truncate is not None:
        cut = (steps > 0) & (steps % options.truncate == 0)
        through_a = jnp.where(cut[:, None, None, None], 0, through_a)
    jacobians = jnp.einsum("tbi,ij->tbij", k, jnp.eye(size, dtype=dtype)) + through_a

    def multiply(products, inputs):
        # Row t is (ŷ_t − y_t)ᵀ V Π_{j=k}^{t−1} ∂h_{j+1}/∂h_j; row k begins with this step.
        k, jacobian, error, q = inputs
        products = jnp.einsum("tbi,bij->tbj", products, jacobian)
        own = (jnp.einsum("bo,oi->bi", error, V) * q)[None]
        products = jnp.where((steps == k)[:, None, None], own, products)
        if options.window is not None:
            products = jnp.where((steps - k < options.window)[:, None, None], products, 0)
        return products, products

    later = jnp.concatenate([jacobians[1:], jnp.zeros_like(jacobians[:1])])
    every = (steps, later, error, q_last)
    products = lax.scan(multiply, jnp.zeros_like(hs), every, reverse=True)[1].swapaxes(0, 1)

    # Times the immediate derivatives ∂h_k/∂θ, with h_{k−1} held fixed.
    delta = jnp.einsum("tkbi,kbi->tkbi", products, p)

    def of_theta(theta, by_f, by_g=None, by_last=None):
        # Through f at step k, through g of h_{k−1}, and through the readout at t.
        to = kept + ("i" if theta.ndim else "")
        total = jnp.einsum(f"tkbi,kbi->{to}", products, by_f)
        if by_g is not None:
            total += jnp.einsum(f"tkbj,ji,kbi->{to}", delta, cell.W, by_g)
            same = jnp.eye(time, dtype=dtype)
            total += jnp.einsum(f"tk,tbo,oi,tbi->{to}", same, error, V, by_last)
        return total

    leak = None if cell.leak is None else of_theta(cell.leak, by_f)
    slopes = () if cell.parameters is None else (by_f,) if by_g is None else (by_f, by_g, by_last)
    parameters = jax.tree.map(of_theta, cell.parameters, *slopes)
    return replace(
        cell,
        U=jnp.einsum(f"tkbi,kbj->{kept}ij", delta, xs),
        W=jnp.einsum(f"tkbi,kbj->{kept}ij", delta, s_prev),
        b=None if cell.b is None else jnp.einsum(f"tkbi->{kept}i", delta),
        leak=leak,
        parameters=parameters,
    )

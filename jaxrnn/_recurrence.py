"""The linear recurrence: the derivative of the other one, and its transpose.

    y_t = e_t + J_t y_{t−1},      J_t = ∂h_t/∂h_{t−1},

solved forward (the tangent) or transposed, backward in time (the adjoint, which is BPTT).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _associative
from jaxrnn._fold import foldable
from jaxrnn._implementation import choose, perform
from jaxrnn._jacobians import Jacobians, previous, times
from jaxrnn._kernels import run as kernels
from jaxrnn._padding import select
from jaxrnn._step import repeated_product


def tangent_states(J: Jacobians, e: jax.Array, y0: jax.Array | None = None) -> jax.Array:
    """Solve y_t = e_t + J_t y_{t−1} forward in time, y_0 = 0 unless given."""
    slope_of, loops = J.slope_of, J.loops

    def loop(weights, sequences, y0):
        (W, leak), (basis, mask, cut, e) = weights, sequences
        J = Jacobians(W, leak, basis, mask, cut, slope_of, loops)
        name = choose(loops, W, y0.shape[:-1], slope_of)
        return None, perform(
            name,
            loops,
            (J, e, y0),
            scan=_scan_forward,
            kernel=partial(kernels.tangent_states, name),
            associative=_associative.tangent_states,
        )

    y0 = jnp.zeros_like(e[0]) if y0 is None else y0
    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, J.cut, e), y0)[1]


def _scan_forward(J, e, y0):
    W_times = repeated_product(J.W.T, y0.shape[:-1], J.loops.precision)

    def body(y, now):
        basis, mask, cut, e = now
        y = e + times(Jacobians(J.W, J.leak, basis, mask, cut, J.slope_of, J.loops), y, W_times)
        return y, y

    return lax.scan(body, y0, (J.basis, J.mask, J.cut, e), reverse=J.loops.reverse)[1]


def adjoint_states(
    J: Jacobians,
    g: jax.Array | None,
    from_later: jax.Array,
    *,
    as_delta: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Solve λ_t = g_t + J_{t+1}ᵀ λ_{t+1} backward in time: this is BPTT.

    With g_t = ∂L/∂h_t at fixed later states, λ_t = dL/dh_t through all of them. It is the
    source's double sum (section 3.3) with the sum over t > k taken once for all k.

    Args:
      J: of the steps.
      g: `[T, *batch, H]`; None for 0.
      from_later: J_{T+1}ᵀ λ_{T+1}, `[*batch, H]`.
      as_delta: return δ_t = α D_t λ_t, 0 on frozen steps, in place of λ_t.

    Returns:
      (J_1ᵀ λ_1, which is dL/dh_0; λ or δ).
    """
    slope_of, loops = J.slope_of, J.loops

    def loop(weights, sequences, from_later):
        (W, leak), (basis, mask, cut, g) = weights, sequences
        J = Jacobians(W, leak, basis, mask, cut, slope_of, loops)
        name = choose(loops, W, from_later.shape[:-1], slope_of)
        return perform(
            name,
            loops,
            (J, g, from_later),
            scan=partial(_scan_backward, as_delta=as_delta),
            kernel=partial(kernels.adjoint_states, name, as_delta=as_delta),
            associative=partial(_associative.adjoint_states, as_delta=as_delta),
        )

    return foldable(loop)((J.W, J.leak), (J.basis, J.mask, J.cut, g), from_later)


def _scan_backward(J, g, from_later, *, as_delta):
    W_T_times = repeated_product(J.W, from_later.shape[:-1], J.loops.precision)

    def body(from_later, now):
        basis, mask, cut, g = now
        J_t = Jacobians(J.W, J.leak, basis, mask, cut, J.slope_of, J.loops)
        adjoint = from_later if g is None else g + from_later
        delta = J_t.scale(adjoint)
        passed = J_t.through_W(W_T_times(delta)) + J_t.keep(adjoint)
        from_here = select(mask, passed, adjoint)
        return from_here, select(mask, delta, 0) if as_delta else adjoint

    steps = (J.basis, J.mask, J.cut, g)
    return lax.scan(body, from_later, steps, reverse=not J.loops.reverse)


def solve_linear(J: Jacobians, e: jax.Array) -> jax.Array:
    """The y of y_t = e_t + J_t y_{t−1}, differentiable to every order.

    Over all steps it is the system (I − J S) y = e, S the shift by one step. JAX transposes
    the forward solve into the adjoint one, and differentiates the system itself by `matvec`: two
    solves more, and products of all steps.
    """

    def matvec(y):
        return y - times(J, previous(y, jnp.zeros_like(y[0]), J.loops.reverse))

    return lax.custom_linear_solve(
        matvec,
        e,
        solve=lambda _, e: tangent_states(J, e),
        transpose_solve=lambda _, g: adjoint_states(J, g, jnp.zeros_like(g[0]))[1],
    )

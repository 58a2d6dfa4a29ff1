"""Loop 2, the linear recurrence: the derivative of loop 1.

    y_t = e_t + J_t y_{t−1},    J_t = ∂h_t/∂h_{t−1} = diag(p_t) W diag(q_{t−1}) + diag(k_t),

solved forward in time (the tangent), or transposed and backward (the adjoint, which is BPTT).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._backends import associative
from jaxrnn._backends import select as backends
from jaxrnn._backends.kernels import run as kernels
from jaxrnn._base.arithmetic import like, product, repeated_product
from jaxrnn._base.masking import previous, select
from jaxrnn._base.options import Options
from jaxrnn._core import schedule
from jaxrnn._jax.batch_axes import run_loop

Steps: TypeAlias = tuple[Any, Any, Any, Any, Any]  # p, q, k, mask, cut


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Jacobians:
    """J_t of every step, or of one, as an operator; the matrices are never formed.

    Args:
      W: recurrent weights.
      leak: α, or None.
      p: rate form: the argument of `slope_of` for φ'(a_t). Without a leak that is h_t itself, so
        that only h is saved beyond inputs and parameters; for relu with a leak, whether a_t > 0.
      q: voltage form: the argument of `slope_of` for φ'(h_{t−1}).
      k: custom form: ∂f/∂h; p and q are then ∂f/∂a and g' (None for 1).
      mask: which steps are valid; J_t = I on the others.
      cut: where q_{t−1} = 0, so that only the leak passes.
      slope_of: φ' from p or q.
      options: how the loops are run.
    """

    W: jax.Array
    leak: jax.Array | None
    p: jax.Array | None
    q: jax.Array | None
    k: jax.Array | None
    mask: jax.Array | None
    cut: jax.Array | None
    slope_of: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})
    options: Options = field(metadata={"static": True})

    def steps(self) -> Steps:
        """The fields that have a time axis."""
        return self.p, self.q, self.k, self.mask, self.cut

    def at(self, steps: Steps) -> "Jacobians":
        """The Jacobians with these fields."""
        return Jacobians(self.W, self.leak, *steps, self.slope_of, self.options)

    def before_W(self, v: jax.Array) -> jax.Array:
        """diag(q) v: takes a tangent from h to the input of W, or an adjoint back."""
        if self.q is not None:
            v = self.slope_of(self.q.astype(v.dtype)) * v
        return v if self.cut is None else jnp.where(self.cut[..., None], 0, v)

    def after_W(self, v: jax.Array) -> jax.Array:
        """diag(p) v: takes a tangent from a to h, or an adjoint from h to a."""
        if self.p is not None:
            v = self.slope_of(self.p.astype(v.dtype)) * v
        return v if self.leak is None else like(self.leak, v) * v

    def beside_W(self, v: jax.Array) -> jax.Array | float:
        """diag(k) v: the path beside W; 1 − α with a leak."""
        if self.k is not None:
            return self.k.astype(v.dtype) * v
        return 0.0 if self.leak is None else (1 - like(self.leak, v)) * v


def times(J: Jacobians, y: jax.Array, W_times: Callable | None = None) -> jax.Array:
    """J y, for one step or for all."""
    W_times = W_times or partial(product, matrix=J.W.T, precision=J.options.precision)
    return select(J.mask, J.after_W(W_times(J.before_W(y))) + J.beside_W(y), y)


def times_first(J: Jacobians, y0: jax.Array) -> jax.Array:
    """J_1 y_0: the tangent of the first state in scan order, from one of h_0."""
    return times(J.at(jax.tree.map(lambda s: s[J.options.first], J.steps())), y0)


def tangent_states(J: Jacobians, e: jax.Array, y0: jax.Array) -> jax.Array:
    """Solve y_t = e_t + J_t y_{t−1} forward in time."""
    by = dict(scan=_forward, kernel=kernels.tangent_states, associative=associative.tangent_states)
    return _run(by, J, e, y0)[1]


def _forward(J, e, y0):
    W_times = _repeated(J.W.T, y0, J.options)

    def step(y, inputs):
        steps, e = inputs
        y = e + times(J.at(steps), y, W_times)
        return y, y

    return lax.scan(step, y0, (J.steps(), e), reverse=J.options.reverse)


def adjoint_states(
    J: Jacobians, g: jax.Array | None, from_later: jax.Array, *, as_delta: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Solve λ_t = g_t + J_{t+1}ᵀ λ_{t+1} backward in time: this is BPTT.

    g_t is ∂L/∂h_t at fixed later states, and λ_t is dL/dh_t, through all of them. This is the
    source's double sum (section 3.3), with the sum over t > k taken once for all k.

    `g` is `[T, *batch, H]`, or None for 0, and `from_later` is J_{T+1}ᵀ λ_{T+1}. Returns J_1ᵀ λ_1,
    which is dL/dh_0, and λ, or if `as_delta` δ_t = diag(p_t) λ_t, which is 0 on invalid steps.
    """
    by = dict(scan=_backward, kernel=kernels.adjoint_states, associative=associative.adjoint_states)
    return _run({name: partial(f, as_delta=as_delta) for name, f in by.items()}, J, g, from_later)


def _backward(J, g, from_later, *, as_delta):
    W_T_times = _repeated(J.W, from_later, J.options)

    def step(from_later, inputs):
        steps, g = inputs
        J_t = J.at(steps)
        adjoint = from_later if g is None else g + from_later
        delta = J_t.after_W(adjoint)
        passed = J_t.before_W(W_T_times(delta)) + J_t.beside_W(adjoint)
        from_here = select(J_t.mask, passed, adjoint)
        return from_here, select(J_t.mask, delta, 0) if as_delta else adjoint

    return lax.scan(step, from_later, (J.steps(), g), reverse=not J.options.reverse)


def _repeated(matrix, y, options):
    left = schedule.puts_weights_left(y.shape[:-1], matrix.shape[0])
    return repeated_product(matrix, options.precision, left)


def _run(by: dict[str, Callable], J, sequence, carry) -> Any:
    """Run one loop by the chosen implementation, with mapped axes in the batch."""
    slope_of, options = J.slope_of, J.options  # not J: a closure must not keep arrays alive

    def loop(weights, sequences, carry):
        (W, leak), ((p, q, k, mask, cut), sequence) = weights, sequences
        J = Jacobians(W, leak, p, q, k, mask, cut, slope_of, options)
        form = "rate" if J.q is None else "voltage"
        name = backends.choose(options, W, carry.shape[:-1], slope_of, form)
        named = by | dict(kernel=partial(by["kernel"], name=name))
        return backends.perform(name, options, (J, sequence, carry), **named)

    return run_loop(loop, (J.W, J.leak), (J.steps(), sequence), carry)


def solve(J: Jacobians, e: jax.Array) -> jax.Array:
    """Solve y_t = e_t + J_t y_{t−1}, y_0 = 0, differentiably to every order.

    Over all steps this is the system (I − J S) y = e, with S the shift by one step. JAX transposes
    the forward solve into the adjoint one, and differentiates through `matvec`, at the cost of two
    more solves and products over all steps.
    """
    zero = jnp.zeros_like(e[0])
    return lax.custom_linear_solve(
        lambda y: y - times(J, previous(y, zero, J.options.reverse)),
        e,
        solve=lambda _, e: tangent_states(J, e, zero),
        transpose_solve=lambda _, g: adjoint_states(J, g, zero)[1],
    )

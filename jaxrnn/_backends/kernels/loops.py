"""The three loops over time as kernels run them: one product a step, and elementwise work after it.

    p = M v_{j−1},     (out_j, v_j, c_j) = step(p, c_{j−1}, what step j reads),     j = 1 … T

M is W (the states, the tangent) or Wᵀ (the adjoint). v is what is multiplied, in the dtype of M;
c is what else goes from step to step, in float32. A kernel chooses where M, v and c live and in
which orientation a tile lies: here every value is a tile of one shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Slope = Callable[[jax.Array], jax.Array]


class Loop(NamedTuple):
    """What a kernel does in a step.

    Args:
      name: how the kernel is called in a compiled program.
      step: `step(p, c, streams, flags, leak) -> (out, v, c)`.
      finish: `finish(p, c) -> end`, float32, from a last product after the loop; or None.
    """

    name: str
    step: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    finish: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Flags(NamedTuple):
    """Per step and sequence, 1 or 0 in float32; None where it is 1, 0 throughout.

    Args:
      valid: 0 where the step is frozen.
      cut: 1 where nothing passes through the product.
    """

    valid: Any
    cut: Any


class Arrays(NamedTuple):
    """What a kernel is given, M networks side by side.

    Args:
      matrix: `[M, H, H]`, multiplied with column vectors.
      v0: `[M, B, H]`, of the matrix's dtype.
      c0: `[M, B, H]`, float32.
      streams: arrays `[T, M, B, H]`, float32 or the matrix's dtype, read a step at a time.
      flags: `Flags` of arrays `[T, M, B]`, float32.
      leak: `[M, H]`, float32, or None.
    """

    matrix: jax.Array
    v0: jax.Array
    c0: jax.Array
    streams: tuple[jax.Array, ...]
    flags: Flags
    leak: jax.Array | None


def states(activation: Callable[[jax.Array], jax.Array], dtype: jnp.dtype) -> Loop:
    """h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + a_t), from streams (a,); v is h, and so is c."""

    def step(p, h_prev, streams, flags, leak):
        (a,) = streams
        h = activation(p + a)
        if leak is not None:
            h = (1 - leak) * h_prev + leak * h
        h = _where(flags.valid, h, h_prev).astype(dtype)
        return h, h, h.astype(jnp.float32)

    return Loop("jaxrnn_states", step)


def tangent(slope_of: Slope, dtype: jnp.dtype) -> Loop:
    """y_t = e_t + J_t y_{t−1}, from streams (basis, e); v and c are y."""

    def step(p, y, streams, flags, leak):
        basis, e = streams
        if flags.cut is not None:
            p = jnp.where(flags.cut > 0, 0.0, p)
        moved = _scale(slope_of, basis, leak, p) + _keep(leak, y)
        y = e + _where(flags.valid, moved, y)
        return y, y.astype(dtype), y

    return Loop("jaxrnn_tangent", step)


def adjoint(slope_of: Slope, dtype: jnp.dtype, as_delta: bool) -> Loop:
    """λ_t = g_t + J_{t+1}ᵀ λ_{t+1}, from streams (basis, g) or (basis,), g = 0.

    v is δ_t as it goes through Wᵀ; c is what λ_t passes on beside it. The end is J_1ᵀ λ_1.
    """

    def step(p, kept, streams, flags, leak):
        basis, *g = streams
        adjoint = p + kept
        if g:
            adjoint = g[0] + adjoint
        delta = _where(flags.valid, _scale(slope_of, basis, leak, adjoint), 0.0)
        v = delta if flags.cut is None else jnp.where(flags.cut > 0, 0.0, delta)
        kept = _where(flags.valid, _keep(leak, adjoint), adjoint)
        return delta if as_delta else adjoint, v.astype(dtype), kept

    return Loop("jaxrnn_adjoint", step, finish=lambda p, kept: p + kept)


def _where(valid, value, frozen):
    if valid is None:
        return value
    return jnp.where(valid > 0, value, frozen)


def _scale(slope_of, basis, leak, value):
    value = slope_of(basis.astype(jnp.float32)) * value
    return value if leak is None else leak * value


def _keep(leak, value):
    return jnp.zeros_like(value) if leak is None else (1 - leak) * value

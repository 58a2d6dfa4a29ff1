"""The three loops over time as kernels run them: in each step a product, then elementwise work.

    p = M v_{j−1},     (out_j, v_j, c_j) = step(p, c_{j−1}, inputs of step j),     j = 1 … T

M is W (for the states and the tangent) or Wᵀ (for the adjoint). The carry is v, the factor of M, in
its dtype, and c, in float32. A kernel chooses the memory of M, v and c and the orientation of
tiles; here all values are tiles of one shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Slope = Callable[[jax.Array], jax.Array]


class Loop(NamedTuple):
    """The computation of a kernel in each step.

    Args:
      name: of the kernel in a compiled program.
      step: `step(p, c, streams, flags, leak) -> (out, v, c)`.
      finish: `finish(p, c) -> end`, float32, from a last product after the loop; or None.
    """

    name: str
    step: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    finish: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Flags(NamedTuple):
    """1 or 0 for each step and sequence, in float32.

    Args:
      valid: 0 where the step is frozen; None for 1 everywhere.
      cut: 1 where nothing passes through the product; None for 0 everywhere.
    """

    valid: Any
    cut: Any


class Arrays(NamedTuple):
    """The inputs of a kernel, for M networks.

    Args:
      matrix: `[M, H, H]`, the left factor of column vectors.
      v0: `[M, B, H]`, in the matrix's dtype.
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

    v is δ_t, 0 where cut; c is what λ_t passes on beside W. The end is J_1ᵀ λ_1.
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

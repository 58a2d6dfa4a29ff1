"""Outputs of layers, stacks of layers, and pairs (forward, backward)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn._base.arithmetic import cast, from_inputs, product, result_dtype, row_weights
from jaxrnn._base.forms import has_output, output, update
from jaxrnn._base.masking import select, valid_steps, without_padding
from jaxrnn._base.options import Options
from jaxrnn._core import derivative
from jaxrnn._jax import sharding
from jaxrnn._types import Cell


def outputs(cell: Cell, hs: jax.Array) -> jax.Array:
    """g(h), in the dtype of h."""
    return output(cell, hs).astype(hs.dtype)


def first_states(cells: Any, batch: tuple[int, ...], h0: Any = None) -> Any:
    """First states `[*batch, H]`, in the structure of the cells; zeros in place of None."""
    if isinstance(cells, Cell):
        return jnp.zeros((*batch, cells.W.shape[0]), cells.W.dtype) if h0 is None else h0
    h0 = (None,) * len(cells) if h0 is None else h0
    return tuple(first_states(cell, batch, h) for cell, h in zip(cells, h0, strict=True))


@partial(jax.jit, static_argnames=("options", "dropout", "residual"))
def unroll(
    cells, xs, h0, lengths, mask, drive, cut=None, key=None, *,
    options: Options, dropout=0.0, residual=False,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """(h_last in the structure of the cells, the last layer's outputs, 0 on invalid steps)."""
    if isinstance(cells, Cell):
        h_last, hs = derivative.unroll(cells, xs, h0, lengths, mask, drive, cut, options=options)
        if not has_output(cells):
            return h_last, hs
        valid = valid_steps(lengths, mask, len(hs))
        # On invalid steps not at h = 0, where g may have an infinite slope, and 0 · ∞ is NaN.
        return h_last, without_padding(outputs(cells, select(valid, hs, 0.5)), valid)
    none = (None,) * len(cells)
    drops = _dropouts(dropout, key, len(cells))
    h_last, y = [], xs
    for layer, h, a, drop in zip(cells, h0 or none, drive or none, drops, strict=True):
        if isinstance(layer, Cell):
            last, out = unroll(layer, drop(y), h, lengths, mask, a, cut, options=options)
        else:
            last, out = unroll_both(layer, drop(y), h, lengths, mask, a, options=options)
        y = out + y if residual and h_last else out
        h_last.append(last)
    return tuple(h_last), y


@partial(jax.jit, static_argnames="options")
def unroll_both(pair, xs, h0, lengths, mask, drive, *, options: Options):
    """((h_last, h_last), concatenated outputs) of two networks, one for each direction."""
    none = None, None
    each = zip(pair, h0 or none, drive or none, (options, options.turned()), strict=True)
    results = [unroll(cells, xs, h, lengths, mask, a, options=how) for cells, h, a, how in each]
    h_last, ys = zip(*results, strict=True)
    dtype = result_dtype(ys)
    return h_last, jnp.concatenate([y.astype(dtype) for y in ys], axis=-1)


def step(cells: Any, x: Any, h: Any, precision: Any = None) -> tuple[Any, jax.Array]:
    """One step of all layers: (their states, the output of the last one)."""
    if isinstance(cells, Cell):
        cells, x, h = cast((cells, x, h), result_dtype(cells, x, h))
        weights = row_weights(cells, x, precision)
        a = product(output(cells, h), weights.W_T, precision) + from_inputs(weights, x)
        h = update(cells, a, h)
        return h, outputs(cells, h)
    states = []
    for cell, h_prev in zip(cells, h, strict=True):
        h_now, x = step(cell, x, h_prev, precision)
        states.append(h_now)
    return tuple(states), x


def _dropouts(rate: float, key: jax.Array | None, count: int) -> list[Callable]:
    """A dropout function for the inputs of each layer; the identity for the first."""
    if not rate or key is None:
        return [lambda y: y] * count

    def drop(y, key):
        kept = sharding.laid_out_like(jax.random.bernoulli(key, 1 - rate, y.shape), y)
        return jnp.where(kept, y / jnp.asarray(1 - rate, y.dtype), jnp.zeros_like(y))

    keys = jax.random.split(key, count)
    return [lambda y: y, *(partial(drop, key=keys[n]) for n in range(1, count))]

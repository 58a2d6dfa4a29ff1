"""More than one layer: stacks, and layers that read in both directions.

A stack is a tuple of layers; a layer is a Cell, or a pair of Cells (forward, backward), of which
the second reads from the end. Whatever belongs to the layers one by one, first states, final
states and drives, comes in the structure of the cells.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn import _checks
from jaxrnn._cell import Cell, Cells, Ids, check_cells, directions, first_cell, leading_shape
from jaxrnn._dropout import check_dropout, dropouts
from jaxrnn._dtypes import result_dtype
from jaxrnn._step import step
from jaxrnn._unroll import batch_first, check_how, check_sequences, unroll


def unroll_layers(
    cells: Cells,
    xs: jax.Array | Ids,
    h0: Any = None,
    *,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: Any = None,
    reverse: bool = False,
    checkpoint_every: int | str | None = None,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    residual: bool = False,
) -> tuple[Any, jax.Array]:
    """The hidden states of a stack: the states of each layer are the inputs of the next.

    y_0 = xs,  h^l = unroll(cell_l, drop(y_{l−1})),  y_l = h^l, or with `residual` from the
    second layer on y_l = h^l + y_{l−1}

    Args:
      cells: a tuple of layers, each a `Cell` or a pair of them (forward, backward), whose
        states stand side by side; or one `Cell`.
      xs: inputs of the first layer, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: first states, in the structure of `cells`; zeros by default, for any layer too.
      lengths: as in `unroll`, for all layers.
      mask: as in `unroll`, for all layers.
      drive: as in `unroll`, in the structure of `cells`; None for any layer without.
      reverse: every layer reads in the other direction.
      checkpoint_every: as in `unroll`, for all layers.
      truncate: as in `unroll`, for all layers.
      window: as in `unroll`, for all layers.
      implementation: as in `unroll`, for all layers.
      precision: as in `unroll`, for all layers.
      dropout: the probability with which each entry of what one layer hands to the next is
        set to 0; the others are divided by 1 − dropout. 0 ≤ dropout < 1.
      key: a JAX random key, where dropout is above 0.
      residual: each layer but the first adds its inputs to its states.

    Returns:
      (h_last, y_L): the final state of every layer, in the structure of `cells`, and the
      outputs of the last layer, `[T, *batch, H]`; of a pair `[T, *batch, H_forward + H_backward]`.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll`; layers that do not fit each other;
        a dropout outside [0, 1), or without a key.

    Cost: as `unroll`, for each layer; the states between layers are kept.

    >>> import jax, jaxrnn
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> cells = jaxrnn.init_cell(keys[0], 4, 3), jaxrnn.init_cell(keys[1], 3, 5)
    >>> h_last, hs = jaxrnn.unroll_layers(cells, jax.numpy.ones((7, 2, 4)))
    >>> [h.shape for h in h_last], hs.shape
    ([(2, 3), (2, 5)], (7, 2, 5))
    """
    args = check_layers(cells, xs, h0, lengths, mask, drive)
    cells, xs, h0, lengths, mask, drive = args
    residual = _checks.boolean("residual", residual)
    how = check_how(args, reverse, checkpoint_every, truncate, window, implementation, precision)
    options: dict[str, Any] = {**how.options(), "lengths": lengths, "mask": mask}
    if isinstance(cells, Cell):
        check_dropout(dropout, key)
        return unroll(cells, xs, h0, drive=drive, **options)
    _check_residual(residual, cells)
    drops = dropouts(check_dropout(dropout, key), key, len(cells))
    h_last: list[Any] = []
    y: Any = xs
    for layer, h, a, drop in zip(cells, h0, drive, drops, strict=True):
        x = drop(y)
        if isinstance(layer, Cell):
            last, hs = unroll(layer, x, h, drive=a, **options)
        else:
            last, hs = _both(unroll, layer, x, h, a, options)
        y = hs + y if residual and h_last else hs
        h_last.append(last)
    return tuple(h_last), y


def bidirectional(
    forward: Cells,
    backward: Cells,
    xs: jax.Array | Ids,
    h0: Any = None,
    *,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    drive: Any = None,
    checkpoint_every: int | str | None = None,
    truncate: int | None = None,
    window: int | None = None,
    implementation: str = "auto",
    precision: Any = None,
) -> tuple[Any, jax.Array]:
    """The hidden states of two networks that read the same inputs from either end.

    Args:
      forward: a `Cell`, or a stack as in `unroll_layers`, that reads from the first step.
      backward: one that reads from the last step, with `lengths` from the last valid one.
      xs: inputs, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: (first state of forward, of backward), each in the structure of its cells; zeros by
        default.
      lengths: as in `unroll`.
      mask: as in `unroll`.
      drive: (of forward, of backward), as in `unroll_layers`.
      checkpoint_every: as in `unroll`.
      truncate: as in `unroll`, counted in the order in which each reads.
      window: as in `unroll`, likewise.
      implementation: as in `unroll`.
      precision: as in `unroll`.

    Returns:
      ((h_last of forward, h_last of backward), hs): the state of each after the last step that
      it reads, and the states side by side, aligned with xs,
      `[T, *batch, H_forward + H_backward]`.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll_layers`.

    Source: Schuster and Paliwal 1997, "Bidirectional recurrent neural networks".

    >>> import jax, jaxrnn
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> cells = [jaxrnn.init_cell(key, 4, 3) for key in keys]
    >>> _, hs = jaxrnn.bidirectional(*cells, jax.numpy.ones((7, 2, 4)))
    >>> hs.shape
    (7, 2, 6)
    """
    cells = check_cells("forward", forward), check_cells("backward", backward)
    sizes = [first_cell(cell).U.shape[1] for cell in cells]
    if sizes[1] != sizes[0]:
        _checks.bad_value("backward", f"a first U of shape [any, {sizes[0]}]", f"[any, {sizes[1]}]")
    args = cells, *_check_inputs(cells, xs, h0, lengths, mask, drive)
    _, xs, h0, lengths, mask, drive = args
    how = check_how(args, False, checkpoint_every, truncate, window, implementation, precision)
    options: dict[str, Any] = {**how.options(), "lengths": lengths, "mask": mask}
    return _both(unroll_layers, cells, xs, h0, drive, options)


def check_layers(cells, xs, h0, lengths, mask, drive):
    """Require arguments of `unroll_layers` that fit each other; the same with jax arrays."""
    cells = check_cells("cells", cells)
    return cells, *_check_inputs(cells, xs, h0, lengths, mask, drive)


def _check_inputs(cells, xs, h0, lengths, mask, drive):
    _, xs, _, lengths, mask, _ = check_sequences(
        first_cell(cells), xs, None, lengths, mask, None
    )  # fmt: skip
    time, *batch = leading_shape(xs)
    h0 = _for_each(cells, "h0", h0, tuple(batch), partial(batch_first, xs))
    shape = (time, *batch)
    hint = lambda size: _checks.swapped((*shape, size))  # noqa: E731
    return xs, h0, lengths, mask, _for_each(cells, "drive", drive, shape, hint)


def _for_each(cells, name, value, axes, hint: Callable[[int], _checks.Hint]):
    """One array `[*axes, H]` or None for each cell, in their structure."""
    if isinstance(cells, Cell):
        size = cells.W.shape[0]
        return None if value is None else _checks.floating(name, value, (*axes, size), hint(size))
    if value is None:
        value = (None,) * len(cells)
    expected = f"a tuple of {len(cells)}, in the structure of the cells"
    if not isinstance(value, tuple | list):
        _checks.bad_type(name, expected, _checks.came(value))
    if len(value) != len(cells):
        _checks.bad_value(name, expected, f"{len(value)} entries")
    each = enumerate(zip(cells, value, strict=True))
    return tuple(_for_each(cell, f"{name}[{n}]", v, axes, hint) for n, (cell, v) in each)


def first_states(cells: Any, batch: tuple[int, ...], given: Any = None) -> Any:
    """First states `[*batch, H]`: the given ones, and zeros where there is None."""
    if isinstance(cells, Cell):
        return jnp.zeros((*batch, cells.W.shape[0]), cells.W.dtype) if given is None else given
    given = (None,) * len(cells) if given is None else given
    return tuple(first_states(cell, batch, h) for cell, h in zip(cells, given, strict=True))


def step_layers(cells: Any, x: jax.Array | Ids, h: Any) -> tuple[Any, jax.Array]:
    """One step of all layers that read forward: (their states, the last layer's)."""
    if isinstance(cells, Cell):
        h = step(cells, x, h)
        return h, h
    states = []
    for cell, h_prev in zip(cells, h, strict=True):
        x = step(cell, x, h_prev)
        states.append(x)
    return tuple(states), states[-1]


def _both(run: Callable, cells, xs, h0, drive, options):
    turned = options | dict(reverse=not options["reverse"])
    last, hs = zip(
        *[run(cell, xs, h, drive=a, **how)
          for cell, h, a, how in zip(cells, h0, drive, (options, turned), strict=True)],
        strict=True,
    )  # fmt: skip
    dtype = result_dtype(hs)
    return last, jnp.concatenate([h.astype(dtype) for h in hs], axis=-1)


def _check_residual(residual: bool, cells: tuple) -> None:
    sizes = [sum(cell.W.shape[0] for cell in directions(layer)) for layer in cells]
    if residual and len(set(sizes)) > 1:
        got = "sizes " + ", ".join(map(str, sizes))
        _checks.bad_value("residual", "layers of one size", got)

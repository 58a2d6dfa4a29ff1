"""Stacks of layers, and layers that read in both directions.

A stack is a tuple of layers; a layer is a Cell, or a pair of Cells (forward, backward), of which
the second reads from the end. First states, final states and drives have the structure of the
cells.
"""

from typing import Any

import jax

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cells
from jaxrnn._api.sequences import check_options, check_sequences
from jaxrnn._core import layers
from jaxrnn._types import Cell, Cells, Ids, first_cell, output_size


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
    """The outputs of a stack, in which the outputs of each layer are the inputs of the next.

    y_0 = xs,  h^l = unroll(cell_l, drop(y_{l−1})),  y_l = g(h^l), or with `residual` from the
    second layer on y_l = g(h^l) + y_{l−1}; g(h) is h in the rate form, φ(h) in the voltage form.

    Args:
      cells: a tuple of layers, each a `Cell` or a pair (forward, backward), whose outputs are
        concatenated; or one `Cell`.
      xs: inputs of the first layer, float `[T, *batch, D]`, or `Ids` of `[T, *batch]`.
      h0: first states, in the structure of `cells`; None, for all or for one layer, is zeros.
      drive: as in `unroll`, in the structure of `cells`; None, for all or for one layer, is none.
      reverse: every layer reads in the other direction.
      lengths, mask, checkpoint_every, truncate, window, implementation, precision: as in `unroll`,
        for each layer.
      dropout: the probability of setting an input of the second and later layers to 0; the others
        are divided by 1 − dropout. 0 ≤ dropout < 1.
      key: a JAX random key, required if dropout > 0.
      residual: each layer but the first adds its inputs to its outputs.

    Returns:
      (h_last, y_L): the final state of every layer, in the structure of `cells`, and the
      outputs of the last layer, `[T, *batch, H]`, 0 on invalid steps; of a pair
      `[T, *batch, H_forward + H_backward]`.

    Raises:
      TypeError, ValueError, NotImplementedError: as `unroll`; layers that do not fit each other;
        a dropout outside [0, 1), or without a key.

    Cost: as `unroll` for each layer; outputs between layers are saved, also with
    `checkpoint_every`.

    >>> import jax, jaxrnn
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> cells = jaxrnn.init_cell(keys[0], 4, 3), jaxrnn.init_cell(keys[1], 3, 5)
    >>> h_last, hs = jaxrnn.unroll_layers(cells, jax.numpy.ones((7, 2, 4)))
    >>> [h.shape for h in h_last], hs.shape
    ([(2, 3), (2, 5)], (7, 2, 5))
    """
    checks.not_swapped("cells", cells, "xs", xs[0] if isinstance(xs, tuple) and xs else xs, Cell)
    args = check_sequences(check_cells("cells", cells), xs, h0, lengths, mask, drive)
    if checks.boolean("residual", residual) and not isinstance(args[0], Cell):
        sizes = [output_size([layer]) for layer in args[0]]
        if len(set(sizes)) > 1:
            got = "sizes " + ", ".join(map(str, sizes))
            checks.bad_value("residual", "layers of one size", got)
    dropout = checks.number("dropout", dropout)
    if not 0 <= dropout < 1:
        checks.bad_value("dropout", "a number from 0 to below 1", dropout)
    if dropout and key is None:
        checks.bad_value("key", "a JAX random key, with dropout above 0", None)
    if dropout:
        checks.random_key("key", key)
    how = reverse, checkpoint_every, truncate, window, implementation, precision
    static = dict(options=check_options(args, *how), dropout=dropout, residual=bool(residual))
    return layers.unroll(*args, None, key, **static)


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
    """The outputs of two networks, one reading the inputs forward and one backward.

    For sequences that are known to their end: tagging, smoothing.

    Args:
      forward: a `Cell`, or a stack as in `unroll_layers`, which reads from the first step.
      backward: the same, reading from the last step, or with `lengths` from the last valid one.
      xs, lengths, mask, checkpoint_every, implementation, precision: as in `unroll`.
      h0: first states (forward, backward), each as in `unroll_layers`.
      drive: drives (forward, backward), each as in `unroll_layers`.
      truncate, window: as in `unroll`; each network counts in the order in which it reads.

    Returns:
      ((h_last of forward, h_last of backward), ys): each state is that after the last step in its
      direction; the outputs, concatenated and aligned with xs, are
      `[T, *batch, H_forward + H_backward]`, 0 on invalid steps.

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
        checks.bad_value("backward", f"a first U of shape [any, {sizes[0]}]", f"[any, {sizes[1]}]")
    args = check_sequences(cells, xs, h0, lengths, mask, drive)
    how = False, checkpoint_every, truncate, window, implementation, precision
    return layers.unroll_both(*args, options=check_options(args, *how))

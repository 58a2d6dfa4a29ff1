"""What the functions of whole sequences ask of their arguments, and of their options."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_cells, check_inputs
from jaxrnn._backends.select import KERNELS, choose, with_device
from jaxrnn._base.arithmetic import result_dtype
from jaxrnn._base.forms import resolve, slope_of
from jaxrnn._base.masking import valid_steps
from jaxrnn._base.options import IMPLEMENTATIONS, Options
from jaxrnn._types import Cell, Ids, first_cell, leading_shape


def check_options(
    args: tuple, reverse, checkpoint_every, truncate, window, implementation, precision
) -> Options:
    """Require options that go together and with args; "sqrt" becomes a number of steps."""
    cells, xs, *arrays = args
    time = leading_shape(xs)[0]
    if checkpoint_every is not None and not isinstance(time, int):
        checks.bad_value("checkpoint_every", "None where T is symbolic", repr(checkpoint_every))
    if isinstance(checkpoint_every, str):
        if checkpoint_every != "sqrt":
            expected = "None, a whole number or 'sqrt'"
            checks.bad_value("checkpoint_every", expected, repr(checkpoint_every))
        checkpoint_every = _about_the_square_root(time)
    given = {"checkpoint_every": checkpoint_every, "truncate": truncate, "window": window}
    given = {name: value for name, value in given.items() if value is not None}
    # From T on all numbers mean the same, but for a window, which then still reaches h_0.
    most = 1 + (time if isinstance(time, int) else 2**30)
    for name, value in given.items():
        checks.positive(name, value)
        given[name] = min(int(value), most)
    for other in ("truncate", "checkpoint_every"):
        if "window" in given and other in given:
            checks.bad_value(f"{other} and window", "at most one of them", "both")
    reverse = checks.boolean("reverse", reverse)
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    checks.precision(precision)
    options = with_device(Options(reverse, implementation, precision, None, **given), time)
    if implementation in KERNELS:
        _check_kernel(options, cells, xs, arrays)
    return options


def _about_the_square_root(time: int) -> int:
    """From √T to twice that: a divisor of T where there is one."""
    least = math.isqrt(max(time - 1, 0)) + 1
    return next((n for n in range(least, 2 * least) if time % n == 0), least)


def _check_kernel(options, cells, xs, arrays):
    """Require a kernel that runs each of the cells."""
    dtype, (_, *batch) = result_dtype(cells, xs, arrays), leading_shape(xs)
    for cell in jax.tree.leaves(cells, is_leaf=lambda leaf: isinstance(leaf, Cell)):
        W = jax.ShapeDtypeStruct(cell.W.shape, dtype)
        for function in (resolve(cell.activation).function, slope_of(cell)):
            choose(options, W, tuple(batch), function, cell.form)


def check_sequences(cell, xs, h0, lengths, mask, drive) -> tuple:
    """Require arguments of `unroll` that fit each other; return them with jax arrays."""
    cell = check_cell("cell", cell)
    return cell, *check_inputs_of(cell, xs, h0, lengths, mask, drive)


def check_layers(cells, xs, h0, lengths, mask, drive, name="cells") -> tuple:
    """Require arguments of `unroll_layers` that fit each other; the same with jax arrays."""
    cells = check_cells(name, cells)
    return cells, *check_inputs_of(cells, xs, h0, lengths, mask, drive)


def check_inputs_of(cells, xs, h0, lengths, mask, drive) -> tuple:
    """Require inputs that fit checked cells: (xs, h0, lengths, mask, drive)."""
    input_size = first_cell(cells).U.shape[1]
    xs = check_inputs("xs", xs, input_size, time=True)
    steps = time, *batch = leading_shape(xs)
    hint = lambda size: batch_first(xs, size)  # noqa: E731
    h0 = _for_each(cells, "h0", h0, tuple(batch), hint)
    swapped = lambda size: checks.swapped((*steps, size))  # noqa: E731
    drive = _for_each(cells, "drive", drive, steps, swapped)
    lengths, mask = check_valid(lengths, mask, steps, batch_first(xs))
    if isinstance(xs, Ids):
        checks.in_range("xs.ids", xs.ids, input_size, valid_steps(lengths, mask, time))
    return xs, h0, lengths, mask, drive


def _for_each(cells, name, value, axes, hint):
    """One array `[*axes, H]` or None for each cell, in their structure."""
    if isinstance(cells, Cell):
        size = cells.W.shape[0]
        return None if value is None else checks.floating(name, value, (*axes, size), hint(size))
    if value is None:
        value = (None,) * len(cells)
    expected = f"a tuple of {len(cells)}, in the structure of the cells"
    if not isinstance(value, tuple | list):
        checks.bad_type(name, expected, checks.came(value))
    if len(value) != len(cells):
        checks.bad_value(name, expected, f"{len(value)} entries")
    each = enumerate(zip(cells, value, strict=True))
    return tuple(_for_each(cell, f"{name}[{n}]", v, axes, hint) for n, (cell, v) in each)


def batch_first(xs: jax.Array | Ids, *features: int) -> checks.Hint:
    """For an array `[*batch, *features]`: it would fit if xs had its first two axes swapped."""
    name, array = ("xs.ids", xs.ids) if isinstance(xs, Ids) else ("xs", xs)
    time, *batch = leading_shape(xs)
    said = f"{name} {list(array.shape)} looks batch-first: time comes first here"
    return ((time, *batch[1:], *features), said) if batch else None


def check_valid(
    lengths, mask, steps: tuple[int, ...], hint: checks.Hint = None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Require at most one of lengths `[*batch]` (0 … T) and mask `[T, *batch]`."""
    if lengths is not None and mask is not None:
        checks.bad_value("lengths and mask", "at most one of them", "both")
    if mask is not None:
        mask = checks.booleans("mask", mask, steps, checks.swapped(steps))
    if lengths is not None:
        lengths = checks.integers("lengths", lengths, steps[1:], hint)
        if not isinstance(lengths, Tracer):
            wrong = (np.asarray(lengths) < 0) | (np.asarray(lengths) > steps[0])
            if wrong.any():
                checks.bad_value("lengths", f"0 to {steps[0]}", np.asarray(lengths)[wrong][0])
    return lengths, mask


def check_targets(targets: Any, shape: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """Require ids or rows that fit logits of this shape; ids where `where` is False may be any."""
    targets = checks.array("targets", targets)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        rows = shape, "rows must be floats"
        hint = rows if targets.ndim == len(shape) else checks.swapped(shape[:-1])
        checks.shaped("targets", targets, shape[:-1], hint)
        checks.in_range("targets", targets, shape[-1], where)
        return targets
    expected = f"integer ids, or floats of shape {list(shape)}"
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        checks.bad_type("targets", expected, targets.dtype)
    if targets.shape == shape[:-1]:
        checks.bad_value("targets", expected, f"floats of shape {list(targets.shape)}")
    return checks.shaped("targets", targets, shape, checks.swapped(shape))

"""Checks of the arguments and options of functions on whole sequences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._api import checks
from jaxrnn._api.cell import check_inputs
from jaxrnn._backends.select import KERNELS, choose, with_device
from jaxrnn._base.arithmetic import result_dtype
from jaxrnn._base.forms import resolve, slope_of
from jaxrnn._base.masking import valid_steps
from jaxrnn._base.options import IMPLEMENTATIONS, Options
from jaxrnn._types import Cell, Ids, first_cell, leading_shape


def check_options(
    args: tuple, reverse, checkpoint_every, truncate, window, implementation, precision
) -> Options:
    """Require options that are compatible with each other and with args; resolve "sqrt"."""
    cells, xs, *_ = args
    time, *batch = leading_shape(xs)
    if checkpoint_every is not None and not isinstance(time, int):
        checks.bad_value("checkpoint_every", "None where T is symbolic", repr(checkpoint_every))
    if isinstance(checkpoint_every, str):
        if checkpoint_every != "sqrt":
            expected = "None, a whole number or 'sqrt'"
            checks.bad_value("checkpoint_every", expected, repr(checkpoint_every))
        # A divisor of T between √T and 2 √T, if there is one.
        least = math.isqrt(max(time - 1, 0)) + 1
        checkpoint_every = next((n for n in range(least, 2 * least) if time % n == 0), least)
    reach = {"checkpoint_every": checkpoint_every, "truncate": truncate, "window": window}
    reach = {name: value for name, value in reach.items() if value is not None}
    # All k ≥ T mean the same, except that a window of T + 1 reaches h_0.
    most = 1 + (time if isinstance(time, int) else 2**30)
    for name, value in reach.items():
        checks.positive(name, value)
        reach[name] = min(int(value), most)
    for other in ("truncate", "checkpoint_every"):
        if "window" in reach and other in reach:
            checks.bad_value(f"{other} and window", "at most one of them", "both")
    reverse = checks.boolean("reverse", reverse)
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    checks.precision(precision)
    options = with_device(Options(reverse, implementation, precision, None, **reach), time)
    if implementation in KERNELS:
        for cell in jax.tree.leaves(cells, is_leaf=lambda leaf: isinstance(leaf, Cell)):
            W = jax.ShapeDtypeStruct(cell.W.shape, result_dtype(args))
            for function in (resolve(cell.activation).function, slope_of(cell)):
                choose(options, W, tuple(batch), function, cell.form)
    return options


def check_sequences(cells, xs, h0, lengths, mask, drive) -> tuple:
    """Require inputs that fit the checked cells; return all with JAX arrays."""
    input_size = first_cell(cells).U.shape[1]
    if isinstance(cells, Cell):
        batch, time = (getattr(x, "shape", ()) for x in (xs, h0))
        shapes = (*time[:1], *batch[:-1], input_size), (*batch[:-1], cells.W.shape[0])
        checks.shapes_not_swapped("xs", xs, "h0", h0, *shapes)
    xs = check_inputs("xs", xs, input_size, time=True)
    steps = time, *batch = leading_shape(xs)

    def batch_first(*features: int) -> checks.Hint:
        """The hint for an array `[*batch, *features]` that would fit a batch-first xs."""
        name, array = ("xs.ids", xs.ids) if isinstance(xs, Ids) else ("xs", xs)
        hint = f"{name} {list(array.shape)} looks batch-first: time comes first here"
        return ((time, *batch[1:], *features), hint) if batch else None

    h0 = _for_each(cells, "h0", h0, tuple(batch), batch_first)
    drive = _for_each(cells, "drive", drive, steps, lambda size: checks.swapped((*steps, size)))
    if lengths is not None and mask is not None:
        checks.bad_value("lengths and mask", "at most one of them", "both")
    if mask is not None:
        mask = checks.booleans("mask", mask, steps, checks.swapped(steps))
    if lengths is not None:
        lengths = checks.integers("lengths", lengths, steps[1:], batch_first())
        if not isinstance(lengths, Tracer):
            wrong = (np.asarray(lengths) < 0) | (np.asarray(lengths) > time)
            if wrong.any():
                checks.bad_value("lengths", f"0 to {time}", np.asarray(lengths)[wrong][0])
    if isinstance(xs, Ids):
        checks.in_range("xs.ids", xs.ids, input_size, valid_steps(lengths, mask, time))
    return cells, xs, h0, lengths, mask, drive


def _for_each(cells, name, value, axes, hint):
    """Require one array `[*axes, H]` or None for each cell, in their structure."""
    if isinstance(cells, Cell):
        size = cells.W.shape[0]
        return None if value is None else checks.floating(name, value, (*axes, size), hint(size))
    value = (None,) * len(cells) if value is None else value
    expected = f"a tuple of {len(cells)}, in the structure of the cells"
    if not isinstance(value, tuple | list):
        checks.bad_type(name, expected, checks.describe(value))
    if len(value) != len(cells):
        checks.bad_value(name, expected, f"{len(value)} entries")
    each = enumerate(zip(cells, value, strict=True))
    return tuple(_for_each(cell, f"{name}[{n}]", v, axes, hint) for n, (cell, v) in each)


def check_targets(targets: Any, shape: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """Require ids or rows that fit logits of this shape; ids may be invalid where masked."""
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

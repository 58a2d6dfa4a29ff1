"""The one derivative rule of the library: of the states of all steps."""

from functools import partial
from typing import NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero

from jaxrnn._cell import Cell, Ids
from jaxrnn._fold import foldable
from jaxrnn._implementation import Loops
from jaxrnn._linearised import Steps, Tangents
from jaxrnn._states import Sequences, states
from jaxrnn._tangent import tangent_of_states
from jaxrnn._window import tangent_in_window


class _How(NamedTuple):
    loops: Loops
    window: int | None
    time_axis: int = 0
    copies: int = 1


def recurrence(
    cell: Cell,
    sequences: Sequences,
    h0: jax.Array,
    *,
    loops: Loops,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(h_last, states of all steps, frozen where the mask is False): what JAX differentiates.

    Two results, so that what wants the first alone keeps nothing for the others.

    Args:
      cell: the `Cell`.
      sequences: of one dtype, clean on invalid steps, time in front.
      h0: the state before, `[*batch, H]`.
      loops: how the loops are run, which way time runs among it.
      window: through how many steps derivatives reach; None for all.
    """
    return _foldable(_How(loops, window))(cell, sequences, h0)


def _foldable(how):
    def loop(cell, sequences, h0, time_axis, copies):
        here = how._replace(time_axis=time_axis, copies=how.copies * copies)
        return _states(here, cell, sequences, h0)

    return foldable(loop, how.time_axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _states(how, cell, sequences, h0):
    axes = dict(loops=how.loops, time_axis=how.time_axis)
    return states(cell, sequences, h0, **axes, copies=how.copies)


@partial(_states.defjvp, symbolic_zeros=True)
def _states_jvp(how, primals, tangents):
    h_last, hs = _foldable(how)(*primals)
    cell, sequences, h0 = primals
    steps, moved = Steps(*sequences, hs=hs), moving(tangents)
    axes = dict(loops=how.loops, time_axis=how.time_axis)
    if how.window is None:
        return (h_last, hs), tangent_of_states(cell, steps, h0, moved, **axes)
    moved = tangent_in_window(cell, steps, h0, moved, **axes, window=how.window)
    return (h_last, hs), moved


def moving(tangents) -> Tangents:
    """The tangents of (cell, sequences, h0) that are not zero, those of ids and masks aside."""
    tangents = jax.tree.map(_none_if_zero, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    dcell, sequences, dh0 = tangents
    dxs = None if isinstance(sequences.xs, Ids) else sequences.xs
    return Tangents(dcell, dxs, sequences.drive, dh0)


def _none_if_zero(tangent):
    is_zero = isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0
    return None if is_zero else tangent

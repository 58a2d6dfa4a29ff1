"""Who is measured: jaxrnn, a naive scan, and the recurrent layers of other libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.workloads import Network


class NotOfferedError(Exception):
    """A subject lacks what is measured; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A network as a pure function that JAX can compile; what is measured is derived from it.

    Args:
      unroll: `unroll(weights, xs) -> hs`; xs is `[T, B, D]` and hs `[T, B, H]`, or both with the
        batch first; for a layer that takes ids, xs may be an integer array `[T, B]`. Of a network
        of several cells weights are a tuple, of one with lengths those come third.
      load: `load(U, W, b) -> weights`, a pytree of JAX arrays, from arrays of Data's shapes
        without members; for each cell.
      unload: the gradient of a cell's weights as (dU, dW, db).
      batch_first: whether xs and hs have the batch in front of time.
      takes_ids: whether integer xs are ids; others get one-hot rows, made inside what is timed.
    """

    unroll: Callable[..., Any]
    load: Callable[[Any, Any, Any], Any]
    unload: Callable[[Any], tuple[Any, Any, Any]]
    batch_first: bool = False
    takes_ids: bool = False


class Prepared(NamedTuple):
    """One subject's program, ready to be checked and timed.

    Args:
      call: computes once; without `wait`, returns when the result is there.
      wait: returns when the result of a call is there, where a call returns before.
      arrays: the result as float64 arrays in Data's layout, by the reference's names; "copies" is
        how far sequences differ that are equal.
      record: seconds of tracing, compiling and the first call; bytes of temporaries; kernels.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], object] | None
    arrays: Callable[[], dict[str, Any]]
    record: dict[str, Any]


def only_plain(network: Network) -> None:
    """Refuse all but one layer without options."""
    if not network.plain:
        raise NotOfferedError("it is measured with one layer without options only")

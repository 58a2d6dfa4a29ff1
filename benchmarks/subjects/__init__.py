"""Who is measured: jaxrnn, a naive scan, and the recurrent layers of other libraries."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.workloads import Network


class NotOfferedError(Exception):
    """A subject lacks what is measured; the message says why."""


class Layer(NamedTuple):
    """A network as a pure function that JAX can compile; what is measured is derived from it."""

    # unroll(weights, xs) -> hs, [T, B, D] -> [T, B, H]. Of a network of several cells weights are
    # a tuple, of one with lengths those come third.
    unroll: Callable[..., Any]
    load: Callable[[Any, Any, Any], Any]  # JAX arrays U, W, b of a cell as a pytree
    unload: Callable[[Any], tuple[Any, Any, Any]]  # the gradient of a cell as (dU, dW, db)
    batch_first: bool = False  # xs and hs have the batch in front of time
    takes_ids: bool = False  # integer xs [T, B] are ids; others get one-hot rows


class Prepared(NamedTuple):
    """One subject's program, ready to be checked and timed."""

    call: Callable[[], Any]
    wait: Callable[[Any], object] | None  # until a result is there, where a call returns before
    # The result as float64 arrays in Data's layout, by the reference's names; "copies" is how far
    # sequences differ that are equal.
    arrays: Callable[[], dict[str, Any]]
    record: dict[str, Any]  # seconds to trace and to compile; temporaries; kernels


def parameter_names(cells: int, prefix: str = "") -> list[str]:
    """Of the gradients of every cell: "dU of 2" is that of the second one."""
    numbers = ["", *(f" of {n}" for n in range(2, cells + 1))]
    return [f"{prefix}{d}{number}" for number in numbers for d in ("dU", "dW", "db")]


def only_plain(network: Network) -> None:
    """Refuse all but one layer without options."""
    if not network.plain:
        raise NotOfferedError("it is measured with one layer without options only")

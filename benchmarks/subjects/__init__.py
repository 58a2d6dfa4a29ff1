"""Who is measured: jaxrnn, a naive scan, and the recurrent layers of other libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JaxSubject:
    """A layer as a pure function that JAX can compile; the harness derives what is measured.

    Args:
      name: how the tables call it.
      package: the distribution whose version is recorded.
      unroll: `unroll(weights, xs) -> hs`; xs is `[T, B, D]` and hs `[T, B, H]`, or both with
        the batch first; for a subject that takes ids, xs may be an integer array `[T, B]`.
      load: `load(U, W, b) -> weights`, a pytree of jax arrays, from arrays of Data's shapes
        without members.
      unload: the gradient of weights as (dU, dW, db).
      batch_first: whether xs and hs have the batch in front of time.
      takes_ids: whether integer xs are ids; others get one-hot rows, made inside what is timed.
      activation: "tanh" or "relu".
      variant: the environment it must run in: "" for the plain one (see `workers`).
    """

    name: str
    package: str
    unroll: Callable[[Any, Any], Any]
    load: Callable[[Any, Any, Any], Any]
    unload: Callable[[Any], tuple[Any, Any, Any]]
    batch_first: bool = False
    takes_ids: bool = False
    activation: str = "tanh"
    variant: str = ""

"""Who is measured: jaxrnn, a naive scan, and the recurrent layers of other libraries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.networks import ONE_LAYER, Network
from benchmarks.side import NotOfferedError


@dataclass(frozen=True)
class JaxSubject:
    """A layer as a pure function that JAX can compile; the harness derives what is measured.

    Args:
      name: how the tables call it.
      package: the distribution whose version is recorded.
      unroll: `unroll(weights, xs) -> hs`; xs is `[T, B, D]` and hs `[T, B, H]`, or both with
        the batch first; for a subject that takes ids, xs may be an integer array `[T, B]`. Of a
        network of several cells weights are a tuple, of one with lengths those come third.
      load: `load(U, W, b) -> weights`, a pytree of jax arrays, from arrays of Data's shapes
        without members; for each cell.
      unload: the gradient of a cell's weights as (dU, dW, db).
      batch_first: whether xs and hs have the batch in front of time.
      takes_ids: whether integer xs are ids; others get one-hot rows, made inside what is timed.
      activation: "tanh" or "relu".
      variant: the environment it must run in: "" for the plain one (see `workers`).
      of: the same subject with another network, or NotOfferedError; None where there is none.
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
    of: Callable[[Network], "JaxSubject"] | None = None

    def on(self, network: Network) -> "JaxSubject":
        """The subject with the network of a row; as it is on one tanh layer.

        Raises:
          NotOfferedError: it has no such network.
        """
        if network == ONE_LAYER:
            return self
        if self.of is None:
            raise NotOfferedError("it is measured with one tanh layer only")
        return replace(self.of(network), name=self.name, variant=self.variant)


def of_activation(make: Callable[[str], JaxSubject]) -> Callable[[Network], JaxSubject]:
    """The `of` of a subject that has one layer, of any φ."""

    def of(network):
        if not network.plain:
            raise NotOfferedError("it is measured with one layer without more only")
        return make(network.activation)

    return of

"""What does not depend on values: how the loops are run, and how far derivatives reach."""

from typing import Any, NamedTuple


class Options(NamedTuple):
    """The options of `unroll` that are static under jit, checked.

    Args:
      reverse: whether time runs backward.
      implementation: one of `IMPLEMENTATIONS`.
      precision: of every product, as `jax.lax.dot_general` takes it.
      device: what a kernel is chosen for; None where no choice depends on it.
      checkpoint_every: how many steps stand between two states that are kept, or None.
      truncate: after how many steps derivatives are cut, or None.
      window: through how many steps derivatives reach, or None.
    """

    reverse: bool = False
    implementation: str = "auto"
    precision: Any = None
    device: Any = None
    checkpoint_every: int | None = None
    truncate: int | None = None
    window: int | None = None

    @property
    def first(self) -> int:
        """The index of the step that is read first."""
        return -1 if self.reverse else 0

    @property
    def last(self) -> int:
        """The index of the step that is read last."""
        return 0 if self.reverse else -1

    def turned(self) -> "Options":
        """The same in the other direction of time."""
        return self._replace(reverse=not self.reverse)


IMPLEMENTATIONS = ("auto", "scan", "mosaic_gpu", "pallas_tpu", "associative")

"""Static options: how the loops are run, and how far derivatives reach."""

from typing import Any, NamedTuple


class Options(NamedTuple):
    """The static options of `unroll`, checked.

    Args:
      reverse: whether time runs backward.
      implementation: one of `IMPLEMENTATIONS`.
      precision: of every product, as `jax.lax.dot_general` takes it.
      device: the device to choose a kernel for; None if no choice depends on it.
      checkpoint_every: save every k-th state only, or None.
      truncate: cut derivatives before every k-th step, or None.
      window: derivatives reach through the last k steps, or None.
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
        """The index of the first step in scan order."""
        return -1 if self.reverse else 0

    @property
    def last(self) -> int:
        """The index of the last step in scan order."""
        return 0 if self.reverse else -1

    def turned(self) -> "Options":
        return self._replace(reverse=not self.reverse)


IMPLEMENTATIONS = ("auto", "scan", "mosaic_gpu", "pallas_tpu", "associative")

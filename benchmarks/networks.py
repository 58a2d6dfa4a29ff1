"""What a row's network is, beside its shapes: one tanh layer where nothing else is said."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Network:
    """What is unrolled.

    a_t = W s_{t−1} + U x_t + b;  rate: h_t = (1 − α) h_{t−1} + α φ(a_t), s = h;
    voltage: h_t = (1 − α) h_{t−1} + α a_t, s = φ(h).

    Args:
      activation: φ, "tanh" or "relu".
      leak: α, a constant in which no gradient is asked; None is 1.
      form: "rate" or "voltage".
      lengths: sequences end early, each at its own step; the states after it are 0.
      layers: of a stack, each of H units; the result is what the last puts out.
      bidirectional: two layers that read from either end; the result is both side by side.
      remat: only some √T states are kept for the gradient, the others computed again.
      last: the result is the last state, and not all.
    """

    activation: str = "tanh"
    leak: float | None = None
    form: str = "rate"
    lengths: bool = False
    layers: int = 1
    bidirectional: bool = False
    remat: bool = False
    last: bool = False

    def __post_init__(self):
        """Refuse what no row has and nobody here computes."""
        several = self.cells > 1
        if several and (self.form != "rate" or self.lengths or self.remat or self.last):
            raise ValueError("several cells are of the rate form, and their states all asked for")
        if self.layers > 1 and self.bidirectional:
            raise ValueError("a stack reads in one direction")
        if self.last and self.lengths:
            raise ValueError("the last state is that of step T")

    @property
    def cells(self) -> int:
        """How many sets of U, W and b there are."""
        return self.layers * (2 if self.bidirectional else 1)

    @property
    def plain(self) -> bool:
        """Whether it is one layer without more, of any φ."""
        return self == Network(self.activation)

    def of(self, activation: str) -> "Network":
        """The same with another φ."""
        return replace(self, activation=activation)


ONE_LAYER = Network()

"""Pictures: how a figure is made and written, and that of a training run."""

import os
from pathlib import Path
from typing import Any

LN_2 = 0.6931471805599453


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Not pyplot's: that would choose a back end for the caller and keep the figure alive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all; an old file is replaced when the new one is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _nats(bits: Any) -> Any:
    return bits * LN_2


def _bits(nats: Any) -> Any:
    return nats / LN_2


def plot_run(rows: list[dict[str, Any]], references: dict[str, float], path: Path) -> None:
    """Draw bits per character by step, of training and held-out text, as a PNG file.

    Args:
      rows: the metrics of a run.
      references: bits per character of other predictors, drawn as lines.
      path: the file.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    held_out = [row for row in rows if "held_out_bits" in row]
    axes.plot([r["step"] for r in rows], [r["bits"] for r in rows], label="training")
    axes.plot(
        [r["step"] for r in held_out], [r["held_out_bits"] for r in held_out],
        "o-", label=f"held-out, {held_out[-1]['held_out_bits']:.3f} at the end",
    )  # fmt: skip
    for style, (name, bits) in zip(("--", ":"), references.items(), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, label=f"{name}, {bits:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per character")
    axes.set_ylim(bottom=0)
    nats = axes.secondary_yaxis("right", functions=(_nats, _bits))
    nats.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)

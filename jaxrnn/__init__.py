"""Recurrent networks of one equation as pure JAX functions, with hand-derived backpropagation.

rate:     h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + U x_t + b)        α = 1: the Elman network
voltage:  h_t = (1 − α) h_{t−1} + α (W φ(h_{t−1}) + U x_t + b)      its output is φ(h)
custom:   h_t = f(W g(h_{t−1}) + U x_t + b, h_{t−1})                any elementwise f and g

`init_cell` makes a `Cell`, and `unroll` returns its states over whole sequences. `jax.grad` of
`unroll` runs the hand-derived gradient; `bptt` and `loss_and_grads` return it directly.

Axes: T time, B batch, D input, H hidden, K output. Time is first and features are last, any batch
axes between: inputs `[T, *batch, D]`, states `[T, *batch, H]`. Final state first, as in `lax.scan`.

Four files lead from a call to its gradient: `_api/unroll.py` (what `unroll` promises),
`_core/derivative.py` (the derivation and the derivative rule; `linearised` forms the derivative of
a step), `_core/forward.py` (loop 1, the states) and `_core/linear.py` (loop 2, the linear
recurrence whose transpose is BPTT). Memory is bounded by `checkpoint_every`, see `help(unroll)` and
`_core/remat.py`. A custom equation is a `Form`; the built-in ones are in `_base/forms.py`.

"The source" is "RNN by hand", a character RNN on "hello" worked out by hand: 1 preprocessing,
2 forward pass, 3 backpropagation through time, 4 to 6 numbers. `textbook` lists its equations and
errata, `worked_example` reproduces its numbers.
"""

import importlib
from typing import TYPE_CHECKING

from jaxrnn._api.cell import init_cell, init_params
from jaxrnn._api.gradients import bptt, loss_and_grads
from jaxrnn._api.layers import bidirectional, unroll_layers
from jaxrnn._api.readout import apply_readout, cross_entropy
from jaxrnn._api.unroll import outputs, step, unroll
from jaxrnn._types import Activation, Cell, CellGradients, Form, Gradients, Ids, Params, Readout

if TYPE_CHECKING:
    from jaxrnn import convert, text, textbook, train, worked_example
    from jaxrnn.convert import from_flax, from_haiku, from_keras, from_torch, to_torch
    from jaxrnn.text import Vocabulary, generate, one_hot

__version__ = "0.1.0"

__all__ = [
    "Activation", "Cell", "CellGradients", "Form", "Gradients", "Ids", "Params", "Readout",
    "Vocabulary", "apply_readout", "bidirectional", "bptt", "convert", "cross_entropy",
    "from_flax", "from_haiku", "from_keras", "from_torch", "generate", "init_cell", "init_params",
    "loss_and_grads", "one_hot", "outputs", "step", "text", "textbook", "to_torch", "train",
    "unroll", "unroll_layers", "worked_example",
]  # fmt: skip

# Names loaded on first use -> the module that defines them, or the module itself.
_LATER = {
    **{name: name for name in ("convert", "text", "textbook", "train", "worked_example")},
    **{name: "convert" for name in __all__ if name.startswith(("from_", "to_"))},
    **dict.fromkeys(("Vocabulary", "generate", "one_hot"), "text"),
}

for _name in set(__all__) - set(_LATER):
    globals()[_name].__module__ = __name__  # for help() and pickle

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name):
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_LATER[name]}")
        globals()[name] = home if _LATER[name] == name else getattr(home, name)
        return globals()[name]

    def __dir__():
        return [*__all__, *(name for name in globals() if name.startswith("__"))]

"""Recurrent networks of one equation as pure JAX functions, with their backpropagation by hand.

rate:     h_t = (1 − α) h_{t−1} + α φ(W h_{t−1} + U x_t + b)        α = 1: the Elman network
voltage:  h_t = (1 − α) h_{t−1} + α (W φ(h_{t−1}) + U x_t + b)      puts out φ(h)

Axes: T time, B batch, D input, H hidden, K output. Time first, features last, any batch axes
between: inputs `[T, *batch, D]`, states `[T, *batch, H]`. Final state first, as in `lax.scan`.

"The source" in docstrings is "RNN by hand", a worked character RNN, sections 1 to 6.
"""

from jaxrnn import convert as convert
from jaxrnn import textbook as textbook
from jaxrnn._api.cell import init_cell as init_cell
from jaxrnn._api.cell import init_params as init_params
from jaxrnn._api.gradients import bptt as bptt
from jaxrnn._api.gradients import loss_and_grads as loss_and_grads
from jaxrnn._api.layers import bidirectional as bidirectional
from jaxrnn._api.layers import unroll_layers as unroll_layers
from jaxrnn._api.readout import apply_readout as apply_readout
from jaxrnn._api.readout import cross_entropy as cross_entropy
from jaxrnn._api.unroll import outputs as outputs
from jaxrnn._api.unroll import step as step
from jaxrnn._api.unroll import unroll as unroll
from jaxrnn._types import Activation as Activation
from jaxrnn._types import Cell as Cell
from jaxrnn._types import CellGradients as CellGradients
from jaxrnn._types import Gradients as Gradients
from jaxrnn._types import Ids as Ids
from jaxrnn._types import Params as Params
from jaxrnn._types import Readout as Readout
from jaxrnn.convert import from_flax as from_flax
from jaxrnn.convert import from_haiku as from_haiku
from jaxrnn.convert import from_keras as from_keras
from jaxrnn.convert import from_torch as from_torch
from jaxrnn.convert import to_torch as to_torch
from jaxrnn.text import Vocabulary as Vocabulary
from jaxrnn.text import generate as generate
from jaxrnn.text import one_hot as one_hot

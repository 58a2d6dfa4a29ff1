"""Elman networks of other libraries as cells of this one, and cells as PyTorch's.

All compute h_t = φ(U x_t + W h_{t−1} + b), with weights in layouts of their own. Only `to_torch`
imports another library. Dtypes stay, float64 where JAX has it enabled.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_cells
from jaxrnn._base.forms import NAMED, resolve
from jaxrnn._types import Activation, Cell, Cells, directions

Phi = str | Activation | Callable[[jax.Array], jax.Array]
KERAS_PHI = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "linear": "identity"}
TORCH_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def from_torch(module: Any, activation: Phi | None = None) -> Cells:
    """The cells of a `torch.nn.RNN` or `torch.nn.RNNCell`; b is the sum of its two biases.

    To go on in JAX with a network trained there; the other converters likewise.

    Args:
      module: the module, or its `state_dict()`. `batch_first` and `dropout` do not travel.
      activation: φ; by default the module's, and "tanh" for a state dict, which holds none.

    Returns:
      A `Cell` for one layer of one direction; else a tuple of layers as `unroll_layers` takes
      it, each a `Cell` or, if bidirectional, a pair (forward, backward): the order of h_n.

    Raises:
      TypeError, ValueError: another module, as an LSTM or a GRU; keys or weights unlike these.
    """
    state, own = module, "tanh"
    if _is(module, "torch.nn", "RNN", "RNNCell"):
        state, own = module.state_dict(), module.nonlinearity
    if not isinstance(state, Mapping):
        checks.bad_type("module", "a torch.nn.RNN, RNNCell or state_dict", type(module).__name__)
    left, phi = dict(state), own if activation is None else activation
    turns = ("", "_reverse") if "weight_ih_l0_reverse" in left else ("",)
    depth = sum(re.fullmatch("weight_ih_l[0-9]+", str(key)) is not None for key in left)
    ends = [[f"_l{n}{turn}" for turn in turns] for n in range(depth)] or [[""]]
    layers = [tuple(_torch_cell(left, end, phi) for end in layer) for layer in ends]
    if left:
        checks.bad_value("module", "no keys but those of a torch.nn.RNN", list(left))
    cells: Any = tuple(layer if len(layer) == 2 else layer[0] for layer in layers)
    return check_cells("module", cells if depth > 1 or len(turns) > 1 else cells[0])


def to_torch(cells: Cells) -> Any:
    """A new `torch.nn.RNN` of these cells, its second biases 0; `from_torch` gives them back.

    To hand a network on, to serve it or to compare.

    Args:
      cells: a `Cell`, or a tuple of layers as in `unroll_layers`: all of one hidden size, dtype
        and activation, "tanh" or "relu", all or none of them pairs, of the rate
        form without leak.

    Returns:
      The module, on the CPU, `batch_first` False. torch's random numbers are left as they were.

    Raises:
      ModuleNotFoundError: torch is not installed.
      TypeError, ValueError: no cells; what torch's module cannot hold.
    """
    cells = check_cells("cells", cells)
    layers = [directions(layer) for layer in ((cells,) if isinstance(cells, Cell) else cells)]
    flat = [cell for layer in layers for cell in layer]
    for cell in flat:
        if cell.form != "rate":
            form = "the voltage" if cell.form == "voltage" else "a custom"
            checks.bad_value("cells", "the rate form, which torch has", f"{form} form")
    if any(cell.leak is not None for cell in flat):
        checks.bad_value("cells", "no leak, which torch does not have", "a leak")
    pairs = _same("all or no layers in both directions", [len(layer) == 2 for layer in layers])
    hidden_size = _same("one hidden size", [cell.W.shape[0] for cell in flat])
    phi = _same("one activation", [_named(resolve(cell.activation).function) for cell in flat])
    dtype = _same("one dtype", [leaf.dtype.name for leaf in jax.tree.leaves(flat)])
    checks.one_of("activation of cells", phi, ("tanh", "relu"))
    checks.one_of("dtype of cells", dtype, ("float16", "bfloat16", "float32", "float64"))
    try:
        import torch
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"{e}; pip install 'jaxrnn[peers]'", name=e.name) from e
    how = dict(bidirectional=pairs, device="meta", dtype=getattr(torch, dtype))
    module = torch.nn.RNN(flat[0].U.shape[1], hidden_size, len(layers), phi, **how)
    module = module.to_empty(device="cpu")  # On "meta" no weights were drawn.
    values = []
    for cell in flat:
        nothing = jnp.zeros(hidden_size, dtype)
        values += [cell.U, cell.W, nothing if cell.b is None else cell.b, nothing]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            # torch does not know NumPy's bfloat16; float64 holds all four dtypes exactly.
            parameter.copy_(torch.from_numpy(np.array(value, np.float64)))
    return module


def from_flax(params: Any, activation: Phi | None = None) -> Cells:
    """The cells of flax's `SimpleCell`, of `flax.nnx` or `flax.linen`.

    Args:
      params: an `nnx.SimpleCell`, or an `nnx.RNN` or `nnx.Bidirectional` of such; or the state
        of one, or the parameters of a linen one; or a list of these, one for each layer.
        Parameters do not tell whether their cell has `residual`, which is not Elman's.
      activation: as in `from_torch`; parameters hold none.

    Returns:
      A `Cell` for one cell; for a list a tuple of layers as `unroll_layers` takes it; for a
      `Bidirectional` a stack of one layer, ((forward, backward),).

    Raises:
      TypeError, ValueError: another module, as an LSTM or a GRU; entries unlike a `SimpleCell`'s;
        a module with `residual`; a `Bidirectional` that does not concatenate.
    """
    return check_cells("params", _each("params", params, _flax, activation))


def from_haiku(params: Mapping[str, Any], activation: Phi = "relu") -> Cells:
    """The cells of Haiku's `VanillaRNN`; b is the sum of its biases, one or two.

    Args:
      params: the parameters of one `hk.VanillaRNN` or of several, and no others: each has the
        modules "<name>/linear", of the inputs, and "<name>/linear_1", of the states.
      activation: φ; Haiku's is "relu".

    Returns:
      A `Cell` for one; of several, as in an `hk.DeepRNN`, a tuple of them as `unroll_layers`
      takes it, in the order of their names: vanilla_rnn, vanilla_rnn_1, ..., vanilla_rnn_10.

    Raises:
      TypeError, ValueError: other modules, as an LSTM's; weights that do not fit.
    """
    if not isinstance(params, Mapping):
        checks.bad_type("params", "an hk.VanillaRNN's parameters", type(params).__name__)
    names = {str(key).rpartition("/")[0] for key in params}
    if not names or set(params) != {f"{name}/linear{n}" for name in names for n in ("", "_1")}:
        checks.bad_value("params", "an hk.VanillaRNN's linear and linear_1 only", list(params))
    names = sorted(names, key=lambda name: [s.zfill(9) for s in re.split("([0-9]+)", name)])
    parts = [(f"params of {n}", params[f"{n}/linear"], params[f"{n}/linear_1"]) for n in names]
    cells = tuple(_cell(*part, phi=activation, w="w", b="b") for part in parts)
    return check_cells("params", cells[0] if len(cells) == 1 else cells)


def from_keras(layer: Any) -> Cells:
    """The cells of Keras's `SimpleRNN`; φ comes by its name if we have one, else as a callable.

    Args:
      layer: a built `SimpleRNN` or `SimpleRNNCell`, an `RNN` of a `SimpleRNNCell` or of
        `StackedRNNCells`, a `Bidirectional` of two such; or a list of these, one for each
        layer. `go_backwards` does not change the weights and does not travel, nor `dropout`.

    Returns:
      As `from_flax`; for `StackedRNNCells` a tuple of layers, as for a list.

    Raises:
      TypeError, ValueError: another layer, as an LSTM or a GRU; one that is not built; a
        `Bidirectional` that does not concatenate, or whose first layer goes backwards.
    """
    return check_cells("layer", _each("layer", layer, _keras))


def _torch_cell(left: dict[str, Any], end: str, phi: Phi) -> Cell:
    def taken(kind):
        """A copy: the module's next training step must not reach into the cell."""
        value: Any = left.pop(f"{kind}{end}", None)
        if _is(value, "torch", "Tensor"):
            value, half = value.detach().cpu(), str(value.dtype) == "torch.bfloat16"
            value = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
        return None if value is None else np.array(value).T

    U, W, b, c = map(taken, TORCH_KINDS)
    # A sum would not keep every bit: −0.0 + 0.0 is 0.0, and XLA may flush denormals to 0.
    inputs, states = dict(weight=U, bias=b), dict(weight=W, bias=c if np.any(c) else None)
    return _cell(f"module, cell{end}", inputs, states, phi, "weight", "bias")


def _each(name: str, value: Any, convert: Callable, *how: Any) -> Any:
    if not isinstance(value, list | tuple):
        return convert(name, value, *how)
    layers = [_each(f"{name}[{n}]", part, convert, *how) for n, part in enumerate(value)]
    return sum((part if isinstance(part, tuple) else (part,) for part in layers), ())


def _flax(name: str, value: Any, phi: Phi | None) -> Any:
    found: Any = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    if found is not value and not _is(value, "flax.nnx", "SimpleCell", "RNN", "Bidirectional"):
        wanted = "an nnx.SimpleCell, an nnx.RNN or nnx.Bidirectional of such, or parameters"
        checks.bad_type(name, wanted, type(value).__name__)
    if found.get("residual"):
        checks.bad_value(f"{name}.residual", "False, as in an Elman network", True)
    if "merge_fn" in found and found["merge_fn"] is not getattr(type(value), "merge_fn", 0):
        checks.bad_value(f"{name}.merge_fn", "the default, which concatenates", "another")
    for inputs, states in (("i", "h"), ("dense_i", "dense_h")):
        if inputs in found and states in found:
            own = _named(found.get("activation_fn", jnp.tanh))
            return _cell(name, found[inputs], found[states], own if phi is None else phi)
    if "forward_rnn" in found and "backward_rnn" in found:
        return (tuple(_flax(name, found[end], phi) for end in ("forward_rnn", "backward_rnn")),)
    # A cell stands under "params", as its RNN's attribute, or alone under a name of its own.
    inner = [key for key in found if key in ("params", "cell") or len(found) == 1]
    if not inner:
        checks.bad_value(name, "the parameters of one SimpleCell", list(found))
    return _flax(f"{name}[{inner[0]!r}]", found[inner[0]], phi)


def _keras(name: str, layer: Any) -> Any:
    for kind, inner in (("RNN", "cell"), ("StackedRNNCells", "cells")):
        if _is(layer, "keras.", kind):
            return _each(f"{name}.{inner}", getattr(layer, inner), _keras)
    if _is(layer, "keras.", "Bidirectional"):
        if layer.merge_mode != "concat" or layer.forward_layer.go_backwards:
            wanted = "merge_mode 'concat', and a first layer that reads forward"
            checks.bad_value(name, wanted, f"merge_mode {layer.merge_mode!r}")
        return ((_keras(name, layer.forward_layer), _keras(name, layer.backward_layer)),)
    if not _is(layer, "keras.", "SimpleRNNCell"):
        checks.bad_type(name, "a keras SimpleRNN or one of its kin", type(layer).__name__)
    if not layer.built:
        checks.bad_value(name, "a layer that is built", "one that is not")
    phi = layer.activation
    if str(getattr(phi, "__module__", "")).startswith("keras."):
        phi = KERAS_PHI.get(getattr(phi, "__name__", ""), phi)
    weights = layer.kernel, layer.recurrent_kernel, layer.bias
    U, W, b = (None if value is None else np.asarray(value) for value in weights)
    return _cell(name, {"kernel": U, "bias": b}, {"kernel": W}, phi)


def _cell(name: str, inputs: Any, states: Any, phi: Any, w="kernel", b="bias") -> Cell:
    """The Cell of two linear layers, each with a kernel `[in, out]` and perhaps a bias."""
    layers = [v if isinstance(v, Mapping) else getattr(v, "__dict__", {}) for v in (inputs, states)]
    if any(layer.get(w) is None for layer in layers):
        checks.bad_value(name, f"{w!r} for inputs and states", [list(layer) for layer in layers])
    U, W = (checks.floating(f"{name}, {w!r}", layer[w], (None, None)).mT for layer in layers)
    found = [layer[b] for layer in layers if layer.get(b) is not None]
    biases = [checks.floating(f"{name}, {b!r}", value, U.shape[:1]) for value in found]
    total = sum(biases[1:], biases[0]) if biases else jnp.zeros(len(U), U.dtype)
    return check_cell(name, Cell(U, W, total, activation=phi))


def _is(value: Any, home: str, *names: str) -> bool:
    """Whether the value is of one of these classes of a library that need not be installed."""
    return any(k.__name__ in names and k.__module__.startswith(home) for k in type(value).__mro__)


def _named(function: Callable) -> Phi:
    return next((name for name, phi in NAMED.items() if phi.function is function), function)


def _same(wanted: str, values: list) -> Any:
    if any(value != values[0] for value in values):
        checks.bad_value("cells", wanted, " and ".join(map(str, values)))
    return values[0]

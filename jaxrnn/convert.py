"""Cells from the Elman networks of PyTorch, Flax, Haiku and Keras, and back to PyTorch.

All compute h_t = φ(U x_t + W h_{t−1} + b), in different layouts. Layers, directions and the
activation are converted, and two biases are summed. Only `to_torch` imports another library. Dtypes
are unchanged (float64 if JAX has it enabled). A module that computes anything else is refused by
name: a subclass, a dtype other than its weights', a nonzero initial state.
"""

import copy
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrnn._api import checks
from jaxrnn._api.cell import check_cell, check_cells
from jaxrnn._base.forms import NAMED, resolve
from jaxrnn._types import Activation, Cell, Cells, directions

Phi = str | Activation | Callable[[jax.Array], jax.Array]
KERAS_PHI = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "linear": "identity"}
TORCH_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Tensors from which torch computes a weight: weight_norm, spectral_norm, pruning, parametrizations.
TORCH_SOURCE = r"(.*\.)?(parametrizations\..*|\w+_[ih]h(_l\d+(_reverse)?)?_(g|v|u|orig|mask))"
NNX_PARTS = {
    "SimpleCell": ("dense_i", "dense_h"), "RNN": ("cell",), "Linear": ("kernel", "bias"),
    "Bidirectional": ("forward_rnn", "backward_rnn"),
}  # fmt: skip
# Arguments of these that change what is computed, not only its layout.
NNX_CHANGING = {"residual", "carry_init", "reverse", "merge_fn", "promote_dtype", "dot_general"}
# Methods that define what a module computes.
METHODS = {"forward", "call", "__call__", "inner_loop", "get_initial_state", "initialize_carry"}


def from_torch(module: Any, activation: Phi | None = None) -> Cells:
    """The cells of a `torch.nn.RNN` or `torch.nn.RNNCell`; b is the sum of its two biases.

    Args:
      module: the module, or its `state_dict()`. The weights of a module are those of eval mode,
        also under weight_norm, spectral_norm, other parametrizations and pruning. `batch_first` and
        `dropout` are not converted.
      activation: φ; by default the module's, or "tanh" for a state dict, which has none.

    Returns:
      A `Cell` for one layer in one direction; else a tuple of layers as in `unroll_layers`, each a
      `Cell` or, if bidirectional, a pair (forward, backward), in the order of h_n.

    Raises:
      TypeError, ValueError: another module, such as an LSTM or a GRU, or one with other hooks; keys
        that are missing or unknown; weights that do not fit.
    """
    if _kind(module, "torch.nn", "RNN", "RNNCell"):
        own, state = module.nonlinearity, _torch_state(module)
    elif isinstance(module, Mapping):
        own, state = "tanh", {str(key): value for key, value in module.items()}
    else:
        expected = "a torch.nn.RNN or RNNCell that keeps torch's forward, or a state_dict of one"
        checks.bad_type("module", expected, _describe(module))
    phi = own if activation is None else activation
    keys = [m for m in (re.fullmatch(r"[a-z]+_[ih]h_l(\d+)(_reverse)?", key) for key in state) if m]
    turns = ("", "_reverse") if any(m[2] for m in keys) else ("",)
    # With more layers than keys, some key is missing in any case.
    depth = min(max((int(m[1]) + 1 for m in keys), default=1), len(state) + 1)
    ends = [[f"_l{n}{turn}" for turn in turns] for n in range(depth)]
    ends = [[""]] if set(TORCH_KINDS) & set(state) else ends
    kinds = TORCH_KINDS[: 4 if any(key.startswith("bias_") for key in state) else 2]
    expected_keys = [kind + end for layer in ends for end in layer for kind in kinds]
    _require("module", state, expected_keys, hint=_torch_hint(state))
    stack = [tuple(_torch_cell(state, end, kinds, phi) for end in layer) for layer in ends]
    cells: Any = tuple(layer if len(layer) == 2 else layer[0] for layer in stack)
    return check_cells("module", cells if len(ends) > 1 or len(turns) > 1 else cells[0])


def to_torch(cells: Cells) -> Any:
    """A new `torch.nn.RNN` with these cells, its second biases 0; the inverse of `from_torch`.

    Args:
      cells: a `Cell`, or a tuple of layers as in `unroll_layers`, in the rate form without leaks,
        with one hidden size, dtype and activation ("tanh" or "relu"), all or none of them pairs.

    Returns:
      The module, on the CPU, with `batch_first` False. torch's random state does not change.

    Raises:
      ModuleNotFoundError: torch is not installed.
      TypeError, ValueError: not cells, or cells that torch's module cannot represent.
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
    for leaf in jax.tree.leaves(flat):
        if isinstance(leaf, Tracer) or leaf.size == 0:
            checks.bad_value("cells", "arrays of values that torch can hold", checks.describe(leaf))
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
    module = module.to_empty(device="cpu")  # on "meta" no weights are drawn
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
      params: an `nnx.SimpleCell`, or an `nnx.RNN` or `nnx.Bidirectional` of them, or the state of
        one, or the parameters of a linen one; or a list of these, one for each layer. Parameters do
        not show a `residual`, `reverse` or `carry_init`, or a cell shared with another module.
        `time_major`, `return_carry`, `keep_order`, `unroll`, `state_axes`, `broadcast_rngs` and
        `precision` of modules are not converted.
      activation: as in `from_torch`; parameters have none.

    Returns:
      A `Cell` for one cell; for a list, a tuple of layers as in `unroll_layers`; for a
      `Bidirectional`, a stack of one layer, ((forward, backward),), with a shared cell in both.

    Raises:
      TypeError, ValueError: another module, such as an LSTM or a GRU; entries that are not a
        `SimpleCell`'s; a module with `residual`, `reverse` or `carry_init`; a `Bidirectional` that
        does not concatenate, or the parameters or state of one with a shared cell.
    """
    return check_cells("params", _each("params", params, _flax, activation))


def from_haiku(params: Mapping[str, Any], activation: Phi = "relu") -> Cells:
    """The cells of Haiku's `VanillaRNN`; b is the sum of its one or two biases.

    Args:
      params: the parameters of one or more `hk.VanillaRNN`s, and no others: each has the modules
        "<name>/linear" for inputs and "<name>/linear_1" for states, the latter with a bias only if
        `double_bias`.
      activation: φ; Haiku's is "relu".

    Returns:
      A `Cell` for one; for several, as in an `hk.DeepRNN`, a tuple as in `unroll_layers`, in the
      order of their names: vanilla_rnn, vanilla_rnn_1, ..., vanilla_rnn_10.

    Raises:
      TypeError, ValueError: other modules, such as an LSTM; weights that are missing or do not fit.
    """
    if not isinstance(params, Mapping):
        checks.bad_type("params", "an hk.VanillaRNN's parameters", _describe(params))
    names = {str(key).rpartition("/")[0] for key in params} - {""} or {"vanilla_rnn"}
    names = sorted(names, key=lambda name: [s.zfill(9) for s in re.split("([0-9]+)", name)])
    pairs = [(f"{name}/linear", f"{name}/linear_1") for name in names]
    _require("params", params, [key for pair in pairs for key in pair])
    layers = [_linears("params", {key: params[key] for key in pair}, "w", "b") for pair in pairs]
    cells = [_cell(f"params of {n}", v, activation) for n, v in zip(names, layers, strict=True)]
    return check_cells("params", cells[0] if len(cells) == 1 else tuple(cells))


def from_keras(layer: Any) -> Cells:
    """The cells of Keras's `SimpleRNN`; φ becomes a name if this library has it, else a callable.

    Args:
      layer: a built `SimpleRNN` or `SimpleRNNCell`, an `RNN` of a `SimpleRNNCell` or of
        `StackedRNNCells`, or a `Bidirectional` of two of these; or a list, one for each layer.
        `go_backwards` of a single layer is not converted (`unroll` has `reverse=True`), nor are
        `return_sequences`, `return_state`, `unroll`, `zero_output_for_mask`, or anything that acts
        only in training: `dropout`, `recurrent_dropout`, regularizers, constraints.

    Returns:
      As `from_flax`; for `StackedRNNCells`, a tuple of layers.

    Raises:
      TypeError, ValueError: another layer, such as an LSTM or a GRU; one that is not built or is
        `stateful`; a `Bidirectional` that does not concatenate, or whose first layer goes
        backwards; a list with a layer that does.
    """
    for n, part in enumerate(layer if isinstance(layer, list | tuple) else ()):
        if getattr(part, "go_backwards", False):
            checks.bad_value(f"layer[{n}]", "a layer that reads forward", "one that goes backwards")
    return check_cells("layer", _each("layer", layer, _keras))


def _torch_state(module: Any) -> dict[str, Any]:
    """The state dict with the weights of eval mode; the module does not change."""
    state = dict(module.state_dict())
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        kind = _kind(hook, "torch.nn.utils.", "WeightNorm", "SpectralNorm", "BasePruningMethod")
        if kind is None:
            got = f"{_describe(hook)}; to leave it out pass the state_dict()"
            checks.bad_value("module", "no hooks except torch's own for weights", got)
        elif kind.__name__ == "BasePruningMethod":
            state[hook._tensor_name] = hook.apply_mask(module)
        else:  # False skips the power iteration, which would change the module
            how = (False,) if kind.__name__ == "SpectralNorm" else ()
            state[hook.name] = hook.compute_weight(module, *how)
    for key, computed in getattr(module, "parametrizations", {}).items():
        state[key] = copy.deepcopy(computed).eval()()
    return {key: value for key, value in state.items() if not re.fullmatch(TORCH_SOURCE, key)}


def _torch_hint(state: Mapping[str, Any]) -> str:
    if any(re.fullmatch(TORCH_SOURCE, key) for key in state):
        return "; pass the module, which computes its weights from these"
    starts = (re.fullmatch(r"(.+\.)weight_[ih]h(_l0)?", key) for key in state)
    prefixes = sorted({repr(m[1]) for m in starts if m})
    how = "; take off {}: {{k.removeprefix({}): v for k, v in state.items() if k.startswith({})}}"
    return how.format(" or ".join(prefixes), *prefixes[:1] * 2) if prefixes else ""


def _torch_cell(state: Mapping[str, Any], end: str, kinds: tuple, phi: Phi) -> Cell:
    values = []
    for key in (kind + end for kind in kinds):
        name, value = f"module[{key!r}]", state[key]
        half = str(getattr(value, "dtype", "")) == "torch.bfloat16"
        if _kind(value, "torch", "Tensor"):
            try:
                tensor = value.detach().cpu()
                value = (tensor.float() if half else tensor).numpy()
            except (TypeError, RuntimeError):
                got = f"{value.dtype}, {value.layout}, on {value.device}"
                checks.bad_type(name, "a tensor that NumPy can hold", got)
        if isinstance(value, np.ndarray):  # copied: the module may be trained on
            value = np.array(value, jnp.bfloat16 if half else None)
        values.append((name, value))
    # A second bias of zeros is dropped, because a sum changes bits: −0.0 + 0.0 is 0.0.
    for _, c in values[3:]:
        if isinstance(c, np.ndarray) and c.shape == np.shape(values[2][1]) and not c.any():
            del values[3]
    return _cell(f"module, cell{end}", values, phi, transposed=False)


def _each(name: str, value: Any, convert: Callable, *how: Any) -> Any:
    if not isinstance(value, list | tuple):
        return convert(name, value, *how)
    layers = [convert(f"{name}[{n}]", part, *how) for n, part in enumerate(value)]
    return sum((part if isinstance(part, tuple) else (part,) for part in layers), ())


def _flax(name: str, value: Any, phi: Phi | None, turned: bool = False) -> Any:
    if phi is None:
        phi = _named(value.activation_fn) if _kind(value, "flax.nnx", "SimpleCell") else None
    parameters = _nnx_parts(name, value, turned, "SimpleCell", "RNN", "Bidirectional")
    parameters = {key: part for key, part in parameters.items() if key != "rngs"}
    for keys in (("i", "h"), NNX_PARTS["SimpleCell"], NNX_PARTS["Bidirectional"]):
        if not set(keys) & set(parameters):
            continue
        _require(name, parameters, keys)
        where = {key: f"{name}[{key!r}]" for key in keys}
        if keys[0] == "forward_rnn":
            return (tuple(_flax(where[key], parameters[key], phi, True) for key in keys),)
        parts = {key: _nnx_parts(where[key], parameters[key], turned, "Linear") for key in keys}
        return _cell(name, _linears(name, parts), "tanh" if phi is None else phi)
    # A cell is under "params", under its RNN's attribute, or alone under a name.
    if len(parameters) != 1:
        checks.bad_value(name, "the parameters of one SimpleCell, with i and h", _keys(parameters))
    [(key, inner)] = parameters.items()
    return _flax(f"{name}[{key!r}]", inner, phi, turned)


def _nnx_parts(name: str, value: Any, turned: bool, *kinds: str) -> Mapping:
    """Parameters, or those of a module; `turned` inside a `Bidirectional`, which sets `reverse`."""
    kind = _kind(value, "flax.nnx", *kinds)
    if kind is None:
        if not isinstance(value, Mapping):
            checks.bad_type(name, f"an nnx.{' or '.join(kinds)}, or parameters", _describe(value))
        return value
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        got, changing = getattr(value, key, None), NNX_CHANGING - ({"reverse"} if turned else set())
        if key in changing and got not in (parameter.default, jax.nn.initializers.zeros):
            default, got = (getattr(v, "__name__", v) for v in (parameter.default, got))
            checks.bad_value(f"{name}.{key}", f"the default, {default}", got)
    if kind.__name__ == "Linear":
        _one_dtype(f"{name}.dtype", value.dtype, value.kernel.dtype)
    parts = {key: getattr(value, key) for key in NNX_PARTS[kind.__name__]}
    return {key: part for key, part in parts.items() if part is not None}


def _one_dtype(name: str, computing: Any, weights: Any) -> None:
    if computing is not None and jax.dtypes.canonicalize_dtype(computing) != weights:
        checks.bad_value(name, f"the weights' dtype, {weights}", jnp.dtype(computing))


def _keras(name: str, layer: Any) -> Any:
    if _kind(layer, "keras.", "StackedRNNCells"):
        return _each(f"{name}.cells", layer.cells, _keras)
    if _kind(layer, "keras.", "SimpleRNN", "RNN"):
        if layer.stateful:
            checks.bad_value(f"{name}.stateful", "False", "True; pass its cell to leave h out")
        return _keras(f"{name}.cell", layer.cell)
    if _kind(layer, "keras.", "Bidirectional"):
        mode, turned = layer.merge_mode, layer.forward_layer.go_backwards
        if mode != "concat" or turned:
            expected = "merge_mode 'concat', and a first layer that reads forward"
            checks.bad_value(name, expected, f"merge_mode {mode!r}, go_backwards={turned}")
        return ((_keras(name, layer.forward_layer), _keras(name, layer.backward_layer)),)
    if not _kind(layer, "keras.", "SimpleRNNCell"):
        checks.bad_type(name, "a keras SimpleRNN, or layers of its cells", _describe(layer))
    if not layer.built:
        checks.bad_value(name, "a layer that is built", "one that is not")
    _one_dtype(f"{name}.compute_dtype", layer.compute_dtype, layer.variable_dtype)
    phi = layer.activation
    if str(getattr(phi, "__module__", "")).startswith("keras."):
        phi = KERAS_PHI.get(getattr(phi, "__name__", ""), phi)
    weights = [(k, getattr(layer, k)) for k in ("kernel", "recurrent_kernel", "bias")]
    values = [(f"{name}.{k}", np.asarray(value)) for k, value in weights if value is not None]
    return _cell(name, values, phi)


def _linears(name: str, layers: Mapping[str, Any], w: str = "kernel", b: str = "bias") -> list:
    """U, W and one or two biases, with names, from a layer for inputs and one for states."""
    weights, biases = [], []
    for n, (key, layer) in enumerate(layers.items()):
        where = f"{name}[{key!r}]"
        if not isinstance(layer, Mapping):
            checks.bad_type(where, f"arrays by name, as {w!r}", _describe(layer))
        _require(where, layer, (w, b) if n == 0 or b in layer else (w,))
        weights.append((f"{where}[{w!r}]", layer[w]))
        biases += [(f"{where}[{b!r}]", layer[b])] if b in layer else []
    return weights + biases


def _cell(name: str, values: list[tuple[str, Any]], phi: Any, transposed: bool = True) -> Cell:
    """A Cell of U, W (`[in, out]` if transposed) and the sum of biases, as (name, value) pairs."""
    U, W = (checks.floating(*value, (None, None)) for value in values[:2])
    U, W = (U.mT, W.mT) if transposed else (U, W)
    biases = [checks.floating(*value, U.shape[:1]) for value in values[2:]]
    total = sum(biases[1:], biases[0]) if biases else jnp.zeros(len(U), U.dtype)
    return check_cell(name, Cell(U, W, total, activation=phi))


def _require(name: str, mapping: Mapping, keys: Collection[str], hint: str = "") -> None:
    for key in keys:
        if key not in mapping:
            checks.bad_value(name, f"the key {key!r}", _keys(mapping) + hint)
    if len(mapping) > len(keys):
        others = [key for key in mapping if key not in keys]
        checks.bad_value(name, f"no keys but {_keys(keys)}", _keys(others))


def _keys(keys: Collection) -> str:
    more = [f"and {len(keys) - 8} more"] if len(keys) > 8 else []
    return ", ".join([*map(str, keys)][:8] + more) or "no keys"


def _describe(value: Any) -> str:
    """The class of a value and its module, as more than one library has an RNN."""
    home = type(value).__module__
    return type(value).__name__ + ("" if home == "builtins" else f" of {home}")


def _kind(value: Any, home: str, *names: str) -> type | None:
    """The class of `names` in a library that value is an instance of and computes like, or None."""
    changed = METHODS & set(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        if kind.__name__ in names and kind.__module__.startswith(home):
            return None if changed else kind
        changed |= METHODS & set(vars(kind))
    return None


def _named(function: Callable) -> Phi:
    return next((name for name, phi in NAMED.items() if phi.function is function), function)


def _same(expected: str, values: list) -> Any:
    if any(value != values[0] for value in values):
        checks.bad_value("cells", expected, " and ".join(map(str, values)))
    return values[0]

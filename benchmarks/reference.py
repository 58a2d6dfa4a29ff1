"""What every subject is compared with before it is timed: NumPy, float64, plain loops over time."""

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.workloads import BACKWARD, BACKWARD_ALONE, FORWARD, HVP, Data, Network, Workload

PHI = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0)}
# Of the central differences that stand for second derivatives of the reference.
STEP = 1e-6
Arrays = dict[str, np.ndarray]


def parameter_names(cells: int, prefix: str = "") -> list[str]:
    """Of the gradients of every cell: "dU of 2" is that of the second one."""
    numbers = ["", *(f" of {n}" for n in range(2, cells + 1))]
    return [f"{prefix}{d}{number}" for number in numbers for d in ("dU", "dW", "db")]


class Reference:
    """What is right on one workload in a dtype, computed once for all subjects.

    With `tf32` their products round factors to TensorFloat-32.
    """

    def __init__(self, workload: Workload, data: Data, dtype: str = "float32", tf32: bool = False):
        few, self.workload, self.precision = workload.compared, workload, (dtype, tf32)
        if workload.distinct:
            data = replace(data, xs=data.xs[:, few], g=data.g[:, few])
        self.data = _float64(data)
        self.known: dict[tuple[str, str], tuple[Arrays, dict[str, float]]] = {}

    def compare(
        self, measure: str, activation: str, arrays: Arrays, tangent: Data
    ) -> tuple[dict[str, float], str | None]:
        """How far a subject's float64 arrays are off.

        Returns:
          (the largest error of each array in terms of the array's largest entry, a line that says
          which is off by more than rounding explains or None).
        """
        measure = BACKWARD if measure == BACKWARD_ALONE else measure
        if (measure, activation) not in self.known:
            network = replace(self.workload.network, activation=activation)
            self.known[measure, activation] = self._expected(measure, network, tangent)
        (expected, slack), errors, wrong = self.known[measure, activation], {}, None
        for name, right in expected.items():
            array = arrays.get(name)
            if array is None or array.shape != right.shape:
                shape = None if array is None else list(array.shape)
                return errors, f"{name} has shape {shape}, not {list(right.shape)}"
            errors[name] = _off(array, right)
            allowed = tolerance(name, self.workload, *self.precision) + slack.get(name, 0.0)
            if wrong is None and not errors[name] <= allowed:  # NaN too
                wrong = f"{name} is off by {errors[name]:.1e} of its largest entry"
                wrong += f", allowed {allowed:.1e}"
        return errors, wrong

    def _expected(self, measure, network, tangent):
        """The arrays of a measure, and how far each may be off beyond rounding."""
        if measure == FORWARD:
            return {"hs": states(self.data, network)}, {}
        if measure == HVP:
            moved = [_moved(self.data, tangent, by) for by in (STEP, -STEP)]
            ahead, back = (gradients(data, network) for data in moved)
            names = parameter_names(network.cells)
            return {f"tangent of {n}": (ahead[n] - back[n]) / (2 * STEP) for n in names}, {}
        right = self._gradients(network)
        if network.activation != "relu":
            return right, {}
        # Where relu's argument is 0 but for rounding it falls to either side of the kink, and
        # gradients jump: the gradients of one side, and of the other.
        near = tolerance("hs", self.workload, *self.precision) / 4
        near *= np.max(np.abs(states(self.data, network)))
        low, high = (self._gradients(network, kink) for kink in (near, -near))
        return right, {name: _off(high[name], low[name]) for name in low}

    def _gradients(self, network, kink=0.0):
        copies = self.workload.B // (self.workload.distinct or self.workload.B)
        found = gradients(self.data, network, kink)
        return {n: array if n == "dxs" else copies * array for n, array in found.items()}


def states(data: Data, network: Network) -> np.ndarray:
    """What a network of h_0 = 0 puts out, for each member: see `Network`."""
    every = [hs for _, hs, _ in _cells(data, network)]
    if network.bidirectional:
        return np.concatenate([every[0], np.flip(every[1], -3)], -1)
    if network.lengths:
        return every[-1] * (np.arange(len(data.xs))[:, None] < data.lengths)[..., None]
    return every[-1][..., -1, :, :] if network.last else every[-1]


def gradients(data: Data, network: Network, kink: float = 0.0) -> Arrays:
    """The gradients of Σ hs · g by name, in Data's shapes, by backpropagation through time.

    dxs is summed over members, and left out for ids. At `kink` relu's slope jumps.
    """
    g, cells = data.g, _cells(data, network)
    if network.last:
        g = np.concatenate([np.zeros((len(data.xs) - 1, *g.shape)), g[None]])
    if network.lengths:
        g = g * (np.arange(len(data.xs))[:, None] < data.lengths)[..., None]
    if network.bidirectional:
        ahead, back = np.split(g, 2, -1)
        (*first, dxs), (*second, dxs_back) = (
            _backward(cell, *ran, part, network, kink)
            for cell, ran, part in zip(data.cells, cells, (ahead, np.flip(back, -3)), strict=True)
        )
        found, g = [*first, *second], dxs + np.flip(dxs_back, -3)
    else:
        found = []
        for cell, ran in zip(reversed(data.cells), reversed(cells), strict=True):
            *parameters, g = _backward(cell, *ran, g, network, kink)
            found = [*parameters, *found]
    named = dict(zip(parameter_names(network.cells), found, strict=True))
    return named if data.ids is not None else {**named, "dxs": g.sum(0) if g.ndim == 4 else g}


def _cells(data, network):
    """(inputs, states, arguments of φ') of each cell, in the order in which it reads."""
    found, inputs = [], data.xs
    for n, cell in enumerate(data.cells):
        if network.bidirectional and n == 1:
            inputs = np.flip(inputs, -3)
        hs, arguments = _forward(cell, inputs, network)
        found.append((inputs, hs, arguments))
        inputs = inputs if network.bidirectional else hs
    return found


def _forward(cell, xs, network):
    U, W, b = cell
    phi, leak, voltage = PHI[network.activation], network.leak, network.form == "voltage"
    drive = xs @ U.mT[..., None, :, :] + b[..., None, None, :]
    hs, arguments = np.empty_like(drive), np.empty_like(drive)
    h, Wt = np.zeros_like(drive[..., 0, :, :]), W.mT
    for t in range(xs.shape[-3]):
        a = (phi(h) if voltage else h) @ Wt + drive[..., t, :, :]
        new = a if voltage else phi(a)
        h = new if leak is None else (1 - leak) * h + leak * new
        hs[..., t, :, :] = h
        arguments[..., t, :, :] = h if voltage else a
    return hs, arguments


def _backward(cell, xs, hs, arguments, g, network, kink):
    """(dU, dW, db, dxs) of one cell, g the cotangent of its states."""
    (U, W, _), voltage, phi = cell, network.form == "voltage", PHI[network.activation]
    kept, taken = (0.0, 1.0) if network.leak is None else (1 - network.leak, network.leak)
    if network.activation == "tanh":
        slopes = 1 - np.square(np.tanh(arguments))
    else:
        slopes = (arguments > kink).astype(np.float64)
    deltas = np.empty_like(hs)
    later = delta = np.zeros_like(hs[..., 0, :, :])
    for t in reversed(range(xs.shape[-3])):
        slope, back = slopes[..., t, :, :], delta @ W
        later = (slope * back if voltage else back) + kept * later + g[..., t, :, :]
        delta = taken * (later if voltage else slope * later)
        deltas[..., t, :, :] = delta
    before = np.concatenate([np.zeros_like(hs[..., :1, :, :]), hs[..., :-1, :, :]], axis=-3)
    rows = _rows(deltas).mT
    dW = rows @ _rows(phi(before) if voltage else before)
    return rows @ _rows(xs), dW, rows.sum(-1), deltas @ U[..., None, :, :]


def tolerance(name: str, workload: Workload, dtype: str, tf32: bool = False) -> float:
    """How far rounding may take an array from the reference, relative to its largest entry."""
    # u is one rounding of a state or a factor, v one addition in a product's accumulator, which
    # is float32 also where the dtype is narrower. Roundings add up as a random walk does:
    #   a pre-activation, a sum of D + H products, errs by u + v √(D + H),
    #   a state by √(1 + 0.9² + 0.9⁴ + …) that, as W shrinks an earlier error by 0.9 a step,
    #   a delta by that on the way forward and again on the way backward,
    #   a parameter's gradient by u √T more where a scan adds up T products over the batch, by
    #   v √(T B) where one product has them all.
    # With a leak α a step forgets less, 0.9 α + 1 − α for 0.9, and takes α of its product's error.
    # A layer adds its own errors to those of the layers below, a tangent those of what it is the
    # tangent of. Four is for the largest of many errors; the largest entry of a gradient is itself
    # some four times a usual one. Tensor cores cut a factor to TF32 where nothing rounds it before,
    # which is up to one step of its 10 bits of mantissa, twice what rounding is.
    v = 2.0**-24
    u = 2.0**-10 if tf32 else {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, v)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    leak = 1.0 if workload.network.leak is None else workload.network.leak
    of_states = 4 * (u + leak * v * np.sqrt(D + H)) / np.sqrt(1 - (1 - 0.1 * leak) ** 2)
    of_states *= workload.network.layers
    if name == "hs":
        return of_states
    of_gradients = 2 * of_states + u * np.sqrt(T) + v * np.sqrt(T * B)
    return 2 * of_gradients if name.startswith("tangent") else of_gradients


def _off(array, right):
    """The largest error. A gradient can be 0 throughout: a relu unit that is off gives none."""
    return float(np.max(np.abs(array - right)) / (np.max(np.abs(right)) or 1.0))


def _float64(data: Data) -> Data:
    cells: Any = tuple(tuple(array.astype(np.float64) for array in cell) for cell in data.cells)
    return replace(data, cells=cells, xs=data.xs.astype(np.float64), g=data.g.astype(np.float64))


def _moved(data: Data, tangent: Data, by: float) -> Data:
    pairs = zip(data.cells, tangent.cells, strict=True)
    cells: Any = tuple(tuple(x + by * dx for x, dx in zip(*pair, strict=True)) for pair in pairs)
    return replace(data, cells=cells)


def _rows(array):
    """`[..., T, B, N]` as `[..., T B, N]`."""
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])

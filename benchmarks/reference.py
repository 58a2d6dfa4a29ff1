"""What every subject is compared with before it is timed: NumPy, float64, plain loops."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.networks import Network
from benchmarks.workloads import Data, Workload

PHI = {"tanh": np.tanh, "relu": lambda a, out: np.maximum(a, 0, out=out)}
# φ', written with φ.
SLOPE = {"tanh": lambda hs: 1 - np.square(hs), "relu": lambda hs: (hs > 0).astype(np.float64)}
NAMES = ("hs", "dU", "dW", "db", "dxs")


def states(data: Data, network: Network) -> np.ndarray:
    """What a network of h_0 = 0 puts out.

    Args:
      data: the numbers of a workload.
      network: see `Network`.

    Returns:
      hs, float64 `[*members, T, B, H]`, 0 after a sequence's end; of both directions
      `[T, B, 2 H]`; or the last state, `[*members, B, H]`.
    """
    found = [hs for _, hs in _each(data, network)]
    hs = found[-1]
    if network.bidirectional:
        return np.concatenate([found[0], _reversed(hs)], -1)
    if network.lengths:
        return hs * _valid(data)
    return hs[..., -1, :, :] if network.last else hs


def slopes(data: Data, network: Network, hs: np.ndarray) -> np.ndarray:
    """φ' at every step of one layer whose states these are.

    Args:
      data: the numbers of a workload.
      network: of one cell.
      hs: `[*members, T, B, H]`.

    Returns:
      Float64, of the shape of hs.
    """
    hs = np.asarray(hs, np.float64)
    return _slopes(_float64(*data.cells[0]), np.asarray(data.xs, np.float64), network, hs)


def preactivations(data: Data, hs: np.ndarray) -> np.ndarray:
    """The a_t of one layer of the rate form whose states these are.

    Args:
      data: the numbers of a workload.
      hs: `[*members, T, B, H]`.

    Returns:
      Float64, of the shape of hs.
    """
    cell, xs = _float64(*data.cells[0]), np.asarray(data.xs, np.float64)
    return _preactivations(cell, xs, np.asarray(hs, np.float64))


def gradients(data: Data, network: Network, slopes: np.ndarray | None = None) -> tuple[Any, ...]:
    """The gradients of Σ hs · g, by backpropagation through time.

    Args:
      data: the numbers of a workload.
      network: see `Network`.
      slopes: φ' at every step of one layer, as in `slopes`, of the states of the subject that is
        compared. Where a pre-activation is 0 but for rounding, it may have fallen to either side
        of relu's kink, and its gradients, which jump there, are right on its own side. By
        default those of the reference.

    Returns:
      (dU, dW, db, dxs) of Data's shapes, float64, with the dU, dW and db of further cells before
      dxs, which is summed over members, which share xs, and None for ids.
    """
    g, both = np.asarray(data.g, np.float64), list(_each(data, network))
    if network.last:
        g = np.concatenate([np.zeros((len(data.xs) - 1, *g.shape)), g[None]])
    if network.lengths:
        g = g * _valid(data)
    asked = data.ids is None
    if network.bidirectional:
        parts = g[..., : g.shape[-1] // 2], _reversed(g[..., g.shape[-1] // 2 :])
        given = zip(data.cells, both, parts, strict=True)
        (*first, dxs), (*second, dxs_reversed) = (
            _gradients(_float64(*cell), network, *found, part, None, asked)
            for cell, found, part in given
        )
        return *first, *second, dxs + _reversed(dxs_reversed) if asked else None
    found: tuple[np.ndarray, ...] = ()
    for n, cell in reversed(list(enumerate(data.cells))):
        *parameters, g = _gradients(_float64(*cell), network, *both[n], g, slopes, asked or n > 0)
        found = *parameters, *found
    dxs = g.sum(0) if g is not None and g.ndim == 4 else g
    return *found, dxs


def _each(data, network):
    """(inputs, states) of each cell, in the order in which it reads."""
    inputs = np.asarray(data.xs, np.float64)
    for n, cell in enumerate(data.cells):
        if network.bidirectional and n == 1:
            inputs = _reversed(inputs)
        hs = _states(_float64(*cell), inputs, network)
        yield inputs, hs
        inputs = inputs if network.bidirectional else hs


def _states(cell, xs, network):
    _, W, _ = cell
    drive, leak = _drive(cell, xs), network.leak
    voltage, phi = network.form == "voltage", PHI[network.activation]
    hs, Wt = np.empty_like(drive), _transposed(W)
    h, a = np.zeros_like(drive[..., 0, :, :]), np.empty_like(drive[..., 0, :, :])
    for t in range(xs.shape[0]):
        np.matmul(phi(h, out=np.empty_like(h)) if voltage else h, Wt, out=a)
        a += drive[..., t, :, :]
        if not voltage:
            phi(a, out=a)
        if leak is not None:
            a *= leak
            a += (1 - leak) * h
        hs[..., t, :, :] = a
        h, a = a, h
    return hs


def _drive(cell, xs):
    U, _, b = cell
    return np.matmul(xs, _transposed(U)[..., None, :, :]) + b[..., None, None, :]


def _preactivations(cell, xs, hs):
    return _before(hs) @ _transposed(cell[1])[..., None, :, :] + _drive(cell, xs)


def _slopes(cell, xs, network, hs):
    phi, slope = PHI[network.activation], SLOPE[network.activation]
    if network.form == "voltage":
        return slope(phi(hs, out=np.empty_like(hs)))
    if network.leak is None:
        return slope(hs)
    a = _preactivations(cell, xs, hs)
    return slope(phi(a, out=a))


def _gradients(cell, network, xs, hs, g, slopes, inputs_asked):
    """(dU, dW, db, dxs) of one cell, g the cotangent of its states."""
    (U, W, _), voltage = cell, network.form == "voltage"
    kept, taken = (0.0, 1.0) if network.leak is None else (1 - network.leak, network.leak)
    slopes = _slopes(cell, xs, network, hs) if slopes is None else slopes
    deltas = np.empty_like(hs)
    later, delta = (np.zeros_like(hs[..., 0, :, :]) for _ in range(2))
    adjoint = np.empty_like(later)
    for t in reversed(range(xs.shape[0])):
        np.matmul(delta, W, out=adjoint)
        if voltage:
            adjoint *= slopes[..., t, :, :]
        if kept:
            adjoint += kept * later
        adjoint += g[t]
        np.multiply(adjoint, taken if voltage else taken * slopes[..., t, :, :], out=delta)
        deltas[..., t, :, :] = delta
        later, adjoint = adjoint, later
    before = _before(hs)
    if voltage:
        before = PHI[network.activation](before, out=before)
    over_steps = _transposed(_rows(deltas))
    dU, dW = over_steps @ _rows(xs), over_steps @ _rows(before)
    dxs = np.matmul(deltas, U[..., None, :, :]) if inputs_asked else None
    return dU, dW, over_steps.sum(-1), dxs


def _before(hs):
    return np.concatenate([np.zeros_like(hs[..., :1, :, :]), hs[..., :-1, :, :]], axis=-3)


def _valid(data):
    """`[T, B, 1]`: 1 up to a sequence's end."""
    steps = np.arange(len(data.xs))[:, None]
    return (steps < np.asarray(data.lengths))[..., None].astype(np.float64)


def _reversed(array):
    return np.flip(array, -3)


def directional_derivative(
    gradients: Sequence[np.ndarray | None], tangents: Sequence[np.ndarray | None]
) -> float:
    """Σ ⟨gradient, tangent⟩ in float64.

    Args:
      gradients: arrays, None where there is no gradient.
      tangents: as many, of the same shapes.

    Returns:
      The derivative of the loss in that direction.
    """
    pairs = zip(gradients, tangents, strict=True)
    return float(sum(np.vdot(*_float64(x, y)) for x, y in pairs if x is not None))


def mismatch(
    found: Sequence[Any],
    expected: Sequence[Any],
    workload: Workload,
    dtype: str,
    tf32: bool = False,
) -> str | None:
    """Where a subject's results differ from the reference's by more than rounding explains.

    Args:
      found: (hs, dU, dW, db, dxs), or the first of them, as `names` says; dxs is ignored for
        ids.
      expected: the same arrays, of the reference.
      workload: the shapes.
      dtype: the subject's, "float64", "float32", "bfloat16" or "float16".
      tf32: whether its products round their factors to TF32.

    Returns:
      None, or a line that says which array, its error relative to its largest entry, and the
      tolerance.
    """
    named = names(workload)
    count = len(named) - (1 if workload.ids else 0)
    found, expected = found[:count], expected[:count]
    for name, array, correct in zip(named, found, expected, strict=False):
        if array is None or array.shape != correct.shape:
            shape = None if array is None else list(array.shape)
            return f"{name} has shape {shape}, not {list(correct.shape)}"
    for name, error in errors(found, expected, named).items():
        allowed = tolerance(name, workload, dtype, tf32)
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.1e} of its largest entry, allowed is {allowed:.1e}"
    return None


def names(workload: Workload) -> tuple[str, ...]:
    """NAMES with those of every cell: "dU of 2" is the second one's."""
    more = range(2, workload.network.cells + 1)
    *first, dxs = NAMES
    return *first, *(f"{name} of {n}" for n in more for name in first[1:]), dxs


def errors(
    found: Sequence[np.ndarray | None],
    expected: Sequence[np.ndarray | None],
    names: Sequence[str] = NAMES,
) -> dict[str, float]:
    """The largest error of each array, relative to the largest entry.

    Args:
      found: arrays.
      expected: the same arrays, of the reference, in the same shapes.
      names: of at least as many.

    Returns:
      By name; NaN where a NaN is.
    """
    rows = {}
    for name, *pair in zip(names, found, expected, strict=False):
        array, correct = _float64(*pair)
        # A gradient can be 0 throughout: a relu unit that is off gives its W none.
        rows[name] = float(np.max(np.abs(array - correct)) / (np.max(np.abs(correct)) or 1.0))
    return rows


def tolerance(name: str, workload: Workload, dtype: str, tf32: bool = False) -> float:
    """How far rounding may take an array from the reference, relative to its largest entry.

    Args:
      name: of `names`.
      workload: the shapes.
      dtype: as for `mismatch`.
      tf32: as for `mismatch`.

    Returns:
      The tolerance.
    """
    # u is one rounding of a state or a factor, v one addition in a product's accumulator, which
    # is float32 also where the dtype is narrower. Roundings add up as a random walk does:
    #   a pre-activation, a sum of D + H products, errs by u + v √(D + H),
    #   a state by √(1 + 0.9² + 0.9⁴ + …) that, as W shrinks an earlier error by 0.9 a step,
    #   a delta by that on the way forward and again on the way backward,
    #   a parameter's gradient by u √T more where a scan adds up T products over the batch, by
    #   v √(T B) where one product has them all.
    # With a leak α a step forgets less, 0.9 α + 1 − α for 0.9, and takes α of its product's error.
    # A layer adds its own errors to those of the layers below.
    # Four is for the largest of many errors; the largest entry of a gradient is itself some
    # four times a usual one.
    v = 2.0**-53 if dtype == "float64" else 2.0**-24
    # Tensor cores cut a factor to TF32 where nothing rounds it before, which is up to one step of
    # its 10 bits of mantissa, twice what rounding is.
    u = 2.0**-10 if tf32 else {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, v)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    network = workload.network
    leak = 1.0 if network.leak is None else network.leak
    states = 4 * (u + leak * v * np.sqrt(D + H)) / np.sqrt(1 - (1 - 0.1 * leak) ** 2)
    states *= network.layers
    if name == "hs":
        return states
    return 2 * states + u * np.sqrt(T) + v * np.sqrt(T * B)


def _float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def _transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def _rows(array):
    """`[..., T, B, N]` as `[..., T B, N]`."""
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])

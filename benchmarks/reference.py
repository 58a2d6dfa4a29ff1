"""What every subject is compared with before it is timed: NumPy, float64, plain loops."""

from collections.abc import Sequence

import numpy as np

from benchmarks.workloads import Data, Workload

PHI = {"tanh": np.tanh, "relu": lambda a, out: np.maximum(a, 0, out=out)}
SLOPE = {"tanh": lambda hs: 1 - np.square(hs), "relu": lambda hs: (hs > 0).astype(np.float64)}
NAMES = ("hs", "dU", "dW", "db", "dxs")


def states(data: Data, activation: str) -> np.ndarray:
    """The states h_t = φ(U x_t + W h_{t−1} + b), h_0 = 0.

    Args:
      data: the numbers of a workload.
      activation: "tanh" or "relu".

    Returns:
      hs, float64 `[*members, T, B, H]`.
    """
    U, W, b, xs, _ = _in_float64(data)
    drive = np.matmul(xs, _transposed(U)[..., None, :, :]) + b[..., None, None, :]
    hs, phi, Wt = np.empty_like(drive), PHI[activation], _transposed(W)
    h, a = np.zeros_like(drive[..., 0, :, :]), np.empty_like(drive[..., 0, :, :])
    for t in range(xs.shape[0]):
        np.matmul(h, Wt, out=a)
        a += drive[..., t, :, :]
        phi(a, out=a)
        hs[..., t, :, :] = a
        h, a = a, h
    return hs


def gradients(
    data: Data, activation: str, hs: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The gradients of Σ hs · g, by backpropagation through time.

    Args:
      data: the numbers of a workload.
      activation: "tanh" or "relu".
      hs: for relu, the states `[*members, T, B, H]` of the subject that is compared. Where a
        pre-activation is 0 but for rounding, it may have fallen to either side of the kink,
        and its gradients, which jump there, are right on its own side. By default the states
        of the reference.

    Returns:
      (dU, dW, db, dxs) of Data's shapes, float64; dxs is summed over members, which share xs,
      and None for ids.
    """
    U, W, _, xs, g = _in_float64(data)
    own = states(data, activation)
    slopes = SLOPE[activation](own if hs is None or activation != "relu" else hs)
    deltas = np.empty_like(own)
    delta, adjoint = np.zeros_like(own[..., 0, :, :]), np.empty_like(own[..., 0, :, :])
    for t in reversed(range(xs.shape[0])):
        np.matmul(delta, W, out=adjoint)
        adjoint += g[t]
        np.multiply(adjoint, slopes[..., t, :, :], out=delta)
        deltas[..., t, :, :] = delta
    before = np.concatenate([np.zeros_like(own[..., :1, :, :]), own[..., :-1, :, :]], axis=-3)
    over_steps = _transposed(_rows(deltas))
    dU, dW = over_steps @ _rows(xs), over_steps @ _rows(before)
    dxs = None if data.ids is not None else np.matmul(deltas, U[..., None, :, :])
    if dxs is not None and dxs.ndim == 4:
        dxs = dxs.sum(0)
    return dU, dW, over_steps.sum(-1), dxs


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
    found: Sequence[np.ndarray | None],
    expected: Sequence[np.ndarray | None],
    workload: Workload,
    dtype: str,
    tf32: bool = False,
) -> str | None:
    """Where a subject's results differ from the reference's by more than rounding explains.

    Args:
      found: (hs, dU, dW, db, dxs), or the first of them; dxs is ignored for ids.
      expected: the same arrays, of the reference.
      workload: the shapes.
      dtype: the subject's, "float64", "float32", "bfloat16" or "float16".
      tf32: whether its products round their factors to TF32.

    Returns:
      None, or a line that says which array, its error relative to its largest entry, and the
      tolerance.
    """
    count = 4 if workload.ids else 5
    found, expected = found[:count], expected[:count]
    for name, array, correct in zip(NAMES, found, expected, strict=False):
        if array is None or array.shape != correct.shape:
            shape = None if array is None else list(array.shape)
            return f"{name} has shape {shape}, not {list(correct.shape)}"
    for name, error in errors(found, expected).items():
        allowed = tolerance(name, workload, dtype, tf32)
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.1e} of its largest entry, allowed is {allowed:.1e}"
    return None


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
      name: of NAMES.
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
    # Four is for the largest of many errors; the largest entry of a gradient is itself some
    # four times a usual one.
    v = 2.0**-53 if dtype == "float64" else 2.0**-24
    # Tensor cores cut a factor to TF32 where nothing rounds it before, which is up to one step of
    # its 10 bits of mantissa, twice what rounding is.
    u = 2.0**-10 if tf32 else {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, v)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    states = 4 * (u + v * np.sqrt(D + H)) / np.sqrt(1 - 0.9**2)
    if name == "hs":
        return states
    return 2 * states + u * np.sqrt(T) + v * np.sqrt(T * B)


def _in_float64(data):
    return _float64(data.U, data.W, data.b, data.xs, data.g)


def _float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def _transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def _rows(array):
    """`[..., T, B, N]` as `[..., T B, N]`."""
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])

"""The reference for forward mode and for second derivatives: NumPy, float64, plain loops.

ȧ_t = U̇ x_t + U ẋ_t + Ẇ h_{t−1} + W ḣ_{t−1} + ḃ,  ḣ_t = s_t ȧ_t with s = φ'(a);
backward λ_t = g_t + Wᵀ δ_{t+1},  δ_t = s_t λ_t,  and their tangents by the product rule.
"""

from typing import NamedTuple

import numpy as np

from benchmarks.workloads import Data


class Tangents(NamedTuple):
    """Derivatives in one direction.

    Args:
      states: of hs, in the direction of weights and inputs, `[*members, T, B, H]`.
      gradients: of (dU, dW, db), in the direction of the weights alone: the Hessian's product.
    """

    states: np.ndarray
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray]


def tangents(
    data: Data, tangent: Data, hs: np.ndarray, slopes: np.ndarray | None = None
) -> Tangents:
    """The tangent of the states, and that of the gradients of Σ hs · g, of one layer without leak.

    Args:
      data: the numbers of a workload; g `[B, H]` is the cotangent of the last state alone.
      tangent: the direction.
      hs: the states, float64 `[*members, T, B, H]`.
      slopes: φ' at every step, for a φ without curvature; by default tanh's, 1 − h².

    Returns:
      The `Tangents`.
    """
    U, W, g = (np.asarray(part, np.float64) for part in (data.U, data.W, data.g))
    if g.ndim == 2:
        g = np.concatenate([np.zeros((len(data.xs) - 1, *g.shape)), g[None]])
    xs, inputs_move = np.asarray(data.xs, np.float64), data.ids is None
    dU, dW, db, dxs = (
        np.asarray(part, np.float64) for part in (tangent.U, tangent.W, tangent.b, tangent.xs)
    )
    before = np.concatenate([np.zeros_like(hs[..., :1, :, :]), hs[..., :-1, :, :]], axis=-3)
    by_weights = xs @ _over_steps(dU) + before @ _over_steps(dW) + db[..., None, None, :]
    by_inputs = dxs @ _over_steps(U) if inputs_move else 0.0
    curved = slopes is None
    slopes = 1 - np.square(hs) if slopes is None else slopes
    moved = _forward(W, slopes, by_weights + by_inputs)
    by_weights = _forward(W, slopes, by_weights) if inputs_move else moved
    slopes_moved = -2 * hs * by_weights if curved else np.zeros_like(slopes)

    delta, ddelta = np.zeros_like(hs[..., 0, :, :]), np.zeros_like(hs[..., 0, :, :])
    deltas, ddeltas = np.empty_like(hs), np.empty_like(hs)
    for t in reversed(range(xs.shape[0])):
        at = (..., t, slice(None), slice(None))
        adjoint = g[t] + delta @ W
        dadjoint = delta @ dW + ddelta @ W
        ddelta = slopes_moved[at] * adjoint + slopes[at] * dadjoint
        delta = slopes[at] * adjoint
        deltas[at], ddeltas[at] = delta, ddelta
    before_moved = np.concatenate(
        [np.zeros_like(hs[..., :1, :, :]), by_weights[..., :-1, :, :]], axis=-3
    )
    rows = _rows(ddeltas).swapaxes(-1, -2)
    of_W = rows @ _rows(before) + _rows(deltas).swapaxes(-1, -2) @ _rows(before_moved)
    return Tangents(moved, (rows @ _rows(xs), of_W, rows.sum(-1)))


def _forward(W: np.ndarray, slopes: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """ḣ_t = s_t (drive_t + W ḣ_{t−1})."""
    moved, h = np.empty_like(drive), np.zeros_like(drive[..., 0, :, :])
    for t in range(drive.shape[-3]):
        h = slopes[..., t, :, :] * (drive[..., t, :, :] + h @ W.swapaxes(-1, -2))
        moved[..., t, :, :] = h
    return moved


def _over_steps(matrix: np.ndarray) -> np.ndarray:
    """A matrix, transposed, to multiply `[*members, T, B, N]` with."""
    return matrix.swapaxes(-1, -2)[..., None, :, :]


def _rows(array: np.ndarray) -> np.ndarray:
    """`[..., T, B, N]` as `[..., T B, N]`."""
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])

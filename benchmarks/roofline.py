"""The limit: the matrix products that a layer cannot do without, and nothing else.

One product [B, H] × [H, H] a step, each waiting for the one before; what does not wait, as one
product over all steps: U x, and backward dW, dU and dxs. No nonlinearity, no bias, no states
kept.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.measures import BACKWARD, COUNTED, FORWARD
from benchmarks.programs import Program
from benchmarks.side import NotOfferedError
from benchmarks.workloads import Workload

# Bytes a second, and operations a second (float32 as TF32): NVIDIA's data sheet, without sparsity.
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}
LIMITS = {"NVIDIA H200": (4.8e12, _HOPPER), "NVIDIA H100 80GB HBM3": (3.35e12, _HOPPER)}


def flops(workload: Workload, measure: str) -> int:
    """Floating-point operations of the products, two for each multiplication.

    Args:
      workload: the shapes; ids need no product with U, nor a gradient of the inputs.
      measure: one of COUNTED.

    Returns:
      Their number; for other measures 0.
    """
    if measure not in COUNTED:
        return 0
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    recurrent, of_inputs = 2 * T * B * H * H, 0 if workload.ids else 2 * T * B * D * H
    each = max(workload.members, 1)
    if measure == FORWARD:
        return each * (recurrent + of_inputs)
    with_inputs = 3 if measure == BACKWARD else 2
    return each * (3 * recurrent + with_inputs * of_inputs)


def least_seconds(device: str, workload: Workload, measure: str, dtype: str) -> float | None:
    """No program is faster: what the device takes to multiply, or to read and write arrays.

    Read are inputs and cotangent, written states and the gradient in the inputs; backward reads
    the states again. All else may stay on the chip.

    Args:
      device: as JAX calls it.
      workload: the shapes.
      measure: FORWARD or BACKWARD.
      dtype: of all arrays.

    Returns:
      The seconds; None for a device whose limits are not known here.
    """
    if device not in LIMITS:
        return None
    bytes_a_second, operations = LIMITS[device]
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    size = 4 if dtype == "float32" else 2
    moved = size * T * B * (D + H if measure == FORWARD else 2 * D + 3 * H)
    return max(moved / bytes_a_second, flops(workload, measure) / operations[dtype])


def make(workload: Workload, measure: str, dtype: str = "float32") -> Program:
    """The products of one measure.

    Args:
      workload: the shapes.
      measure: one of COUNTED.
      dtype: of all arrays.

    Returns:
      The `Program`; its result is what each of the products gives.

    Raises:
      NotOfferedError: for a measure that is not one of COUNTED.
    """
    if measure not in COUNTED:
        raise NotOfferedError("the products of this measure are not counted")
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    members = (workload.members,) if workload.members else ()
    rng = np.random.default_rng(0)

    def array(values):
        return jnp.asarray(values, dtype)

    # Orthogonal, so that the state neither dies nor overflows; the members' states side by side.
    W = array(np.linalg.qr(rng.standard_normal((*members, H, H)))[0])
    h0 = array(rng.standard_normal((*members, B, H)))
    # Members share the inputs: their matrices U are rows of one.
    U = array(rng.standard_normal((max(workload.members, 1) * H, D)))
    xs = array(rng.standard_normal((T * B, D)))

    def loop(W, h):
        return lax.scan(lambda h, _: (h @ W, None), h, length=T)[0]

    def forward(W, h0, U, xs):
        return loop(W, h0), None if workload.ids else xs @ U.T

    if measure == FORWARD:
        return Program(forward, (W, h0, U, xs))
    # Where backward needs states and deltas of all steps, any numbers will do. JAX draws them on
    # the device: NumPy takes seconds.
    shapes = *[(*members, T * B, H)] * 2, (T * B, max(workload.members, 1) * H)
    drawn = enumerate(shapes)
    hs, deltas, beside = (jax.random.normal(jax.random.key(n), s, dtype) for n, s in drawn)

    def both(W, h0, U, xs, hs, deltas, beside):
        h, inputs = forward(W, h0, U, xs)
        # From where the first loop ends, so that the two do not run side by side.
        found = {"adjoint": loop(W, h), "inputs": inputs, "dW": jnp.swapaxes(deltas, -1, -2) @ hs}
        if not workload.ids:
            found["dU"] = beside.T @ xs
            if measure == BACKWARD:
                found["dxs"] = beside @ U
        return found

    return Program(both, (W, h0, U, xs, hs, deltas, beside))

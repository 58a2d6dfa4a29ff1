"""What one update of `jaxrnn train` costs at least on many devices: arithmetic, nothing measured.

The program is that of `jaxrnn train`: one layer, windows `[T, B]` of ids, a mesh data × model.
Its collectives are those in the compiled program: after the loops one all-reduce of all gradients
over `data`; with model > 1 besides, in every step an all-gather of h_t and in every step back an
all-reduce of Wᵀδ_t, `[B / data, H]` each, and after the loops an all-gather of hs and an all-reduce
of the logits, over `model`; two more of a few numbers, for norms and whether all is finite, are
left out.

A step cannot begin before the one before has ended, on all devices of the model axis: so loops
are sums of steps, and a step is the longest of its product, its memory traffic and the device's
own latency, and after it the collective. Collectives hide behind nothing, as they stand in the
program; what else would cost (activations, softmax, input, the host) is left out.
Products are bfloat16; parameters, gradients and moments float32.
"""

from dataclasses import dataclass

from benchmarks.collectives import collective, log2
from benchmarks.hardware import Hardware

T, K = 256, 256  # steps of a window; characters: bytes
SIZES = (1024, 2048, 4096, 8192, 16384)
BYTES = 2  # of W, states, adjoints and logits: bfloat16
FLOAT32 = 4  # of parameters, gradients and moments
# Parameters and Adam's two moments, and what an update makes of them.
OF_PARAMETERS = 3 + 3
# `[T, B, H]`: states, inputs U x, adjoints; `[T, B, K]`: logits, their exponentials and errors, and
# one in another layout.
OF_ROWS, OF_LOGITS = 3, 4
PRODUCTS, MEMORY, STEPS, MODEL, GRADIENTS = "products", "memory", "steps", "model", "gradients"


@dataclass(frozen=True)
class Cost:
    """One update: seconds, each part as if it were alone, and bytes.

    Args:
      data: devices of that axis.
      model: devices of that axis.
      compute: all products at the device's peak.
      memory: all that is read and written.
      steps: 2 T latencies of the device.
      gradient_allreduce: of all gradients.
      step_collectives: in the loops, over the model axis.
      other_collectives: after the loops, over the model axis.
      total: no update is faster.
      bound_by: the largest part of `total`: one of PRODUCTS, MEMORY, STEPS, MODEL, GRADIENTS.
      sent: bytes that each device sends.
      flops: of the products of all devices.
      held: bytes that each device holds.
    """

    data: int
    model: int
    compute: float
    memory: float
    steps: float
    gradient_allreduce: float
    step_collectives: float
    other_collectives: float
    total: float
    bound_by: str
    sent: float
    flops: float
    held: float


def parameters(H: int, K: int = K) -> int:
    """Of U, W, b, V and c."""
    return H * H + H * (2 * K + 1) + K


def update_flops(H: int, B: int, T: int = T, K: int = K) -> int:
    """Of the products of an update; the inputs are ids, and no product.

    Forward W h_t and V h_t; backward for each its gradient and its adjoint.
    """
    return 6 * B * T * H * (H + K)


def update_cost(
    H: int,
    B: int,
    data: int,
    model: int,
    hardware: Hardware,
    *,
    T: int = T,
    K: int = K,
    bytes_per_number: int = BYTES,
) -> Cost:
    """The least that one update can cost.

    Args:
      H: units.
      B: sequences of the update, a multiple of `data`.
      data: devices of that axis, a power of 2.
      model: devices of that axis, a power of 2.
      hardware: the devices.
      T: steps of a window.
      K: characters.
      bytes_per_number: of W, states, adjoints and logits: 2 for bfloat16, 4 for float32.

    Returns:
      The `Cost`.

    Raises:
      ValueError: axes that are no powers of 2 or do not divide B and H.
    """
    if B % data or H % model:
        raise ValueError(f"expected B and H divisible by the mesh, got {B}/{data}, {H}/{model}")
    b, rows, s = B // data, H // model, bytes_per_number
    rate = hardware.float32_flops if s == FLOAT32 else hardware.flops
    near = min(model, hardware.joined)
    over_model = near, model // near
    near = min(data, max(1, hardware.joined // model))
    over_data = near, data // near

    # In the loops: a product for each step; drive read and state written, on the way back
    # cotangent and state read and adjoint written.
    product = 2 * b * rows * H / rate
    weights = 0 if s * rows * H <= hardware.on_chip else s * rows * H
    forward, back = weights + 2 * s * b * rows, weights + 3 * s * b * rows
    gather, gather_sent = collective(hardware, s * b * H, *over_model, passes=1)
    reduce, reduce_sent = collective(hardware, s * b * H, *over_model, passes=2)
    # After and before them: dW, and three products with V; the drive of all steps written, hs
    # read (its own rows, and all for dW), cotangents written, adjoints read, logits both.
    outside = 2 * T * b * rows * (H + 3 * K) / rate
    arrays = s * T * b * (4 * rows + H + 2 * K)
    states, states_sent = collective(hardware, s * T * b * H, *over_model, passes=1)
    logits, logits_sent = collective(hardware, s * T * b * K, *over_model, passes=2)
    # Adam: parameters, moments and gradients read, all but the last written.
    share = FLOAT32 * parameters(H, K) / model
    gradients, gradients_sent = collective(hardware, share, *over_data, passes=2)
    # On accelerators a window is one segment.
    kept = OF_ROWS * rows + H * (model > 1) + OF_LOGITS * K

    parts = dict.fromkeys((PRODUCTS, MEMORY, STEPS, MODEL, GRADIENTS), 0.0)
    bandwidth = hardware.memory_bandwidth
    for times, work, moved, least in (
        (T, product, forward, hardware.step),
        (T, product, back, hardware.step),
        (1, outside, arrays, 0.0),
        (1, 0.0, 7 * share, 0.0),
    ):
        seconds, cause = max((work, PRODUCTS), (moved / bandwidth, MEMORY), (least, STEPS))
        parts[cause] += times * seconds
    parts[MODEL] = T * (gather + reduce) + states + logits
    parts[GRADIENTS] = gradients
    return Cost(
        data,
        model,
        compute=2 * T * product + outside,
        memory=(T * (forward + back) + arrays + 7 * share) / bandwidth,
        steps=2 * T * hardware.step,
        gradient_allreduce=gradients,
        step_collectives=T * (gather + reduce),
        other_collectives=states + logits,
        total=sum(parts.values()),
        bound_by=max(parts, key=lambda part: parts[part]),
        sent=T * (gather_sent + reduce_sent) + states_sent + logits_sent + gradients_sent,
        flops=update_flops(H, B, T, K),
        held=OF_PARAMETERS * share + s * T * b * kept,
    )


def best(
    H: int, B: int, devices: int, hardware: Hardware, *, bytes_per_number: int = BYTES
) -> Cost | None:
    """The fastest split of some devices into data × model.

    Args:
      H: units.
      B: sequences of an update.
      devices: how many, a power of 2.
      hardware: which.
      bytes_per_number: as in `update_cost`.

    Returns:
      Its `Cost`, of equals that with the smaller model axis; None if no split divides B and H
      and fits in memory.
    """
    splits = [(devices >> n, 1 << n) for n in range(log2(devices) + 1)]
    costs = [
        update_cost(H, B, data, model, hardware, bytes_per_number=bytes_per_number)
        for data, model in splits
        if B % data == 0 and H % model == 0
    ]
    return min((c for c in costs if c.held <= hardware.memory), key=lambda c: c.total, default=None)


def model_axis_from(
    hardware: Hardware, B: int, devices: int, bytes_per_number: int = BYTES
) -> int | None:
    """The least H that is best split over `model`.

    Args:
      hardware: the devices.
      B: sequences of an update.
      devices: how many.
      bytes_per_number: as in `update_cost`.

    Returns:
      A multiple of 256, at most the largest of SIZES; None if it is none of those.
    """
    for H in range(256, SIZES[-1] + 1, 256):
        cost = best(H, B, devices, hardware, bytes_per_number=bytes_per_number)
        if cost is not None and cost.model > 1:
            return H
    return None

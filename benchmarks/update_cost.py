"""What one update of `jaxrnn train` costs at least on many devices: arithmetic, nothing measured.

The program is that of `jaxrnn train`: one layer, windows `[T, B]` of ids, a mesh data × model.
Its collectives are those in the compiled program: after the loops one all-reduce of all gradients
over `data`; with model > 1 besides, in every step an all-gather of h_t and in every step back an
all-reduce of Wᵀδ_t, `[B / data, H]` each, and after the loops an all-gather of hs and an all-reduce
of the logits, over `model`.

A step cannot begin before the one before has ended, on all devices of the model axis: so loops
are sums of steps, and a step is the longest of its product, its memory traffic and the device's
own latency, and after it the collective. Collectives hide behind nothing, as they stand in the
program; what else would cost (activations, softmax, input, the host) is left out.
Products are bfloat16; parameters, gradients and moments float32.
"""

from dataclasses import dataclass

from benchmarks.hardware import Hardware

T, K = 256, 256  # steps of a window; characters: bytes
SIZES = (1024, 2048, 4096, 8192, 16384)
BYTES = 2  # of W, states, adjoints and logits: bfloat16
FLOAT32 = 4  # of parameters, gradients and moments
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
      held: bytes that each device holds at least.
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


def within(hardware: Hardware, devices: int) -> tuple[int, float]:
    """Hops to the farthest of some devices that are joined, and bytes a second that each sends."""
    doublings = _log2(devices)
    if not hardware.torus:
        return doublings, hardware.link_bandwidth
    sides = [2 ** (doublings // 3 + (axis < doublings % 3)) for axis in range(3)]
    links = sum(min(2, side - 1) for side in sides)
    return sum(side // 2 for side in sides), links * hardware.link_bandwidth


def collective(
    hardware: Hardware, size: float, near: int, far: int, passes: int
) -> tuple[float, float]:
    """A collective of near × far devices, `near` of which are joined.

    A ring's bytes, and the hops of a tree. Within and beyond go on at the same time.

    Args:
      hardware: the devices.
      size: bytes of the whole array.
      near: devices that are joined.
      far: groups of those.
      passes: 1 for an all-gather, 2 for an all-reduce.

    Returns:
      (seconds, bytes that each device sends); (0, 0) for one device.
    """
    if near * far == 1:
        return 0.0, 0.0
    latency, sent, seconds = hardware.start, 0.0, [0.0]
    if near > 1:
        hops, bandwidth = within(hardware, near)
        inside = passes * (near - 1) / near * size
        latency, sent = latency + passes * hops * hardware.hop, sent + inside
        seconds.append(inside / bandwidth)
    if far > 1:
        beyond = passes * (far - 1) / far * size / near
        latency, sent = latency + passes * _log2(far) * hardware.network_hop, sent + beyond
        seconds.append(beyond / hardware.network_bandwidth)
    return latency + max(seconds), sent


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
        held=4 * share + s * T * b * (rows + (H if model > 1 else 0)),
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
    splits = [(devices >> n, 1 << n) for n in range(_log2(devices) + 1)]
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


def _log2(n: int) -> int:
    if n < 1 or n & (n - 1):
        raise ValueError(f"expected a power of 2, got {n}")
    return n.bit_length() - 1

"""What devices take to gather an array or to add arrays up."""

from benchmarks.hardware import Hardware


def within(hardware: Hardware, devices: int) -> tuple[int, float]:
    """Hops to the farthest of some devices that are joined, and bytes a second that each sends."""
    doublings = log2(devices)
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
        latency, sent = latency + passes * log2(far) * hardware.network_hop, sent + beyond
        seconds.append(beyond / hardware.network_bandwidth)
    return latency + max(seconds), sent


def log2(n: int) -> int:
    """Of a power of 2."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"expected a power of 2, got {n}")
    return n.bit_length() - 1

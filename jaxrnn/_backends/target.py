"""The device that programs are built for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax


def config_value(name: str) -> Any:
    """An option of JAX as it is now."""
    return getattr(jax.config, name)


class Device(NamedTuple):
    """What a program is built for."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as JAX calls the device, "NVIDIA H200"
    capability: str = ""  # of an NVIDIA GPU, "9.0"
    interpret: bool = False  # whether kernels are interpreted, on a CPU
    many: bool = False  # whether this process has more than one of them


# Of all threads: programs are compiled in several.
_assumed: list[Device] = []


@contextmanager
def built_for(device: Device) -> Iterator[None]:
    """Within, programs are traced for that device: to lower them elsewhere, or to interpret."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def target() -> Device:
    """The device that programs traced now are for."""
    return _assumed[-1] if _assumed else _present(config_value("jax_default_device"))


@cache
def _present(default: Any) -> Device:
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    capability = str(getattr(device, "compute_capability", ""))
    many = jax.local_device_count(device.platform) > 1
    return Device(device.platform, device.device_kind, capability, many=many)

"""The device that programs are built for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax


def config_value(name: str) -> Any:
    """The current value of a JAX option."""
    return getattr(jax.config, name)


class Device(NamedTuple):
    """The device that a program is built for."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # JAX's device_kind, such as "NVIDIA H200"
    capability: str = ""  # of an NVIDIA GPU, such as "9.0"
    interpret: bool = False  # interpret kernels, on a CPU
    many: bool = False  # this process has several such devices


# Shared by all threads, because programs are compiled in several.
_assumed: list[Device] = []


@contextmanager
def built_for(device: Device) -> Iterator[None]:
    """Trace programs for this device: to lower them for another platform, or to interpret."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def target() -> Device:
    """The device that programs are now traced for."""
    return _assumed[-1] if _assumed else _present(config_value("jax_default_device"))


@cache
def _present(default: Any) -> Device:
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    capability = str(getattr(device, "compute_capability", ""))
    many = jax.local_device_count(device.platform) > 1
    return Device(device.platform, device.device_kind, capability, many=many)

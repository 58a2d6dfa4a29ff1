"""The implementation of the two loops over time: a scan, a kernel, or an associative scan.

The choice changes only the rounding of sums; derivative rules do not depend on it. No kernel has
run on a device yet: they are interpreted and compared with the scan on a CPU, and lowered for their
devices, so "auto" is the scan until `python -m benchmarks first` has been run and its results are
committed. A kernel that is asked for by name runs or raises NotImplementedError; it never falls
back. XLA does not split a kernel over devices; inside shard_map each device runs its own. Where
kernels are interpreted, `checkpoint_every` has no derivative, as JAX cannot recompute callbacks.
"""

from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxrnn._backends.target import Device, config_value, target
from jaxrnn._base.forms import NAMED
from jaxrnn._base.options import Options
from jaxrnn._types import Elementwise


class Measured(NamedTuple):
    """Where a kernel was measured to be exact and faster than the scan."""

    kind: str  # the device, as JAX calls it
    dtype: str  # of the cell
    hidden: tuple[int, int]  # the sizes H, (least, most)
    batch: tuple[int, int]  # the sizes B, (least, most)
    implementation: str  # the kernel


# Where "auto" takes a kernel; each entry needs a file in benchmarks/results/. There is none yet.
MEASURED: tuple[Measured, ...] = ()

# The largest H for each dtype.
LARGEST = {
    "mosaic_gpu": {"bfloat16": 1024, "float16": 1024, "float32": 160},
    "pallas_tpu": {"bfloat16": 2304, "float32": 1664},
}
KERNELS = tuple(LARGEST)
# Mosaic does not compile bfloat16 products for these ("Unsupported matmul RHS type").
FLOAT32_ONLY = ("TPU v2", "TPU v3")
_PLATFORM = {"mosaic_gpu": "cuda", "pallas_tpu": "tpu"}
# (platform, compute capability or "", both in words).
_NEEDS = {
    "mosaic_gpu": ("gpu", "9.0", "an NVIDIA GPU of compute capability 9.0"),
    "pallas_tpu": ("tpu", "", "a TPU"),
}
_PRODUCTS = {
    "mosaic_gpu": "TensorFloat-32, summed in float32",
    "pallas_tpu": "those of precision 'default' or 'highest'",
}


def device_for(implementation: str) -> Device | None:
    """The device that programs are now traced for; None if no choice depends on it."""
    depends = implementation in KERNELS or (implementation == "auto" and MEASURED)
    return target() if depends else None


def with_device(options: Options, time: Any) -> Options:
    """Fix the current device and default precision, because derivatives are traced later.

    Raises NotImplementedError for a kernel or "associative" with a symbolic T.
    """
    name, known = options.implementation, isinstance(time, int)
    if name in (*KERNELS, "associative") and not known:
        reason = f"it needs a T that is a number, not {time}"
        raise NotImplementedError(f"implementation={name!r}: {reason}")
    default = config_value("jax_default_matmul_precision")
    precision = default if options.precision is None else options.precision
    return options._replace(precision=precision, device=device_for(name) if known else None)


def choose(
    options: Options, W, batch: tuple[int, ...], function: Elementwise, form: Any = "rate"
) -> str:
    """The implementation of a loop: "scan", "associative" or a kernel.

    W is `[H, H]`, shared by all axes of the batch; the function is φ, or φ' as the loop computes
    it. Raises NotImplementedError if a kernel named in the options cannot run this loop.
    """
    name, loop = options.implementation, (options, W, batch, function, form)
    if name == "auto":
        won = (m.implementation for m in MEASURED if _won(m, options, W, batch))
        return next((m for m in won if _unsupported(m, *loop) is None), "scan")
    reason = _unsupported(name, *loop) if name in KERNELS else None
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r}: {reason}")
    return name


def perform(name: str, options: Options, args: tuple, *, scan, kernel, associative=None) -> Any:
    """Run the implementation `name`; "associative" is the scan for a loop that is not linear.

    A kernel chosen by "auto" is replaced by the scan if the program is compiled for another
    platform, as for arrays on the CPU of a machine with a GPU. Where JAX differentiates a kernel
    without the library's rule, as in derivatives of `loss_and_grads`, it differentiates the scan.
    """
    if name not in KERNELS:
        return (associative if name == "associative" and associative else scan)(*args)

    @jax.custom_jvp
    def run(*args):
        if options.implementation == "auto":
            return jax.lax.platform_dependent(*args, default=scan, **{_PLATFORM[name]: kernel})
        return kernel(*args)

    run.defjvp(partial(jax.jvp, scan))
    return run(*args)


def _won(m, options, W, batch) -> bool:
    device = options.device
    if device is None or device.kind != m.kind or W.dtype != m.dtype:
        return False
    # XLA does not split a kernel over devices.
    if device.many and set(jax.sharding.get_abstract_mesh().axis_types) != {AxisType.Manual}:
        return False
    sizes = ((m.hidden, W.shape[0]), (m.batch, prod(batch)))
    return all(least <= size <= most for (least, most), size in sizes)


def _unsupported(name, options, W, batch, function, form) -> str | None:
    """Why a kernel cannot run a loop; None if it can."""
    hidden_size, device, dtype = W.shape[0], options.device, W.dtype.name
    if form != "rate":
        other = f"the {form}" if isinstance(form, str) else "a custom"
        return f"it runs the rate form, not {other} form"
    if name == "mosaic_gpu" and not (0, 11) <= jax.__version_info__ < (0, 13):
        return f"it is written for jax 0.11 and 0.12 (Python 3.12), not {jax.__version__}"
    platform, capability, required = _NEEDS[name]
    present = "none" if device is None else f"{device.kind} ({device.platform})"
    if device is None or device.platform != platform or capability not in ("", device.capability):
        return f"it needs {required}, not {present}"
    if dtype not in LARGEST[name]:
        return f"it runs {', '.join(LARGEST[name])}, not {dtype}"
    if device.kind in FLOAT32_ONLY and dtype != "float32":
        return f"it runs float32 on {device.kind}, not {dtype}"
    if not all(isinstance(size, int) for size in (hidden_size, *batch)):
        return f"it needs sizes that are numbers, not {[*batch, hidden_size]}"
    if hidden_size > LARGEST[name][dtype]:
        return f"it takes H up to {LARGEST[name][dtype]} in {dtype}, not {hidden_size}"
    if prod(batch) * hidden_size == 0:
        return f"it needs states, not those of shape {[*batch, hidden_size]}"
    if not any(function in (a.function, a.derivative_from_output) for a in NAMED.values()):
        return f"it has {', '.join(NAMED)}, not another activation"
    meshes = [jax.sharding.get_abstract_mesh()]
    if isinstance(W, jax.Array):
        meshes.append(jax.typeof(W).sharding.mesh)
    if any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
        return "it does not run under explicit sharding; use shard_map"
    if canonical_precision(options.precision) not in _multiplies(name, dtype):
        return f"its products of {dtype} are {_PRODUCTS[name]}, not of {options.precision!r}"
    return None


def _multiplies(name: str, dtype: str) -> tuple:
    """The precisions of a kernel's products of this dtype, as returned by `canonical_precision`."""
    default, high, highest = ((p, p) for p in jax.lax.Precision)
    if dtype != "float32":  # one pass is exact, so all precisions are the same
        return None, default, high, highest
    if name == "mosaic_gpu":
        return None, default, high, jax.lax.DotAlgorithmPreset.TF32_TF32_F32
    return None, default, highest


def canonical_precision(precision: Any) -> Any:
    """A precision as JAX resolves it now: None, a pair or an algorithm; raises if invalid."""
    return _canonical_precision(precision, config_value("jax_default_matmul_precision"))


@cache
def _canonical_precision(precision: Any, default: str | None) -> Any:
    del default  # a key of the cache: what None resolves to
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    product = jax.make_jaxpr(lambda x: jnp.matmul(x, x, precision=precision))(x)
    (resolved,) = (e.params["precision"] for e in product.eqns if "precision" in e.params)
    return resolved

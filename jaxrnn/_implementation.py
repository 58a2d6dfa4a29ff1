"""By which program the two loops over time are run: a scan, a kernel, an associative scan.

None changes what is computed, beyond the rounding of sums; derivatives never see which one ran.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple, NoReturn

import jax
from jax.sharding import AxisType

from jaxrnn import _checks
from jaxrnn._activation import NAMED
from jaxrnn._precision import check_precision, config_value, meaning
from jaxrnn._target import Device, target

IMPLEMENTATIONS = ("auto", "scan", "mosaic_gpu", "pallas_tpu", "associative")


class Loops(NamedTuple):
    """How the loops are run; static, and the same for all orders of derivatives.

    Args:
      reverse: whether time runs backward.
      implementation: one of IMPLEMENTATIONS.
      precision: of every product, as `jax.lax.dot_general` takes it.
      device: None where no choice depends on it.
    """

    reverse: bool
    implementation: str = "auto"
    precision: Any = None
    device: Device | None = None


class Measured(NamedTuple):
    """Where a kernel was measured: exact, and faster than the scan.

    Args:
      kind: the device, as JAX calls it.
      dtype: of the cell.
      hidden: the sizes H, (least, most).
      batch: the sizes B, (least, most).
      implementation: the kernel.
    """

    kind: str
    dtype: str
    hidden: tuple[int, int]
    batch: tuple[int, int]
    implementation: str


# What "auto" takes. An entry has a file in benchmarks/results/ that shows it; there is none yet.
MEASURED: tuple[Measured, ...] = ()

# The largest H of each dtype.
LARGEST = {
    "mosaic_gpu": {"bfloat16": 1024, "float16": 1024, "float32": 160},
    "pallas_tpu": {"bfloat16": 2304, "float32": 1664},
}
KERNELS = tuple(LARGEST)
# Mosaic compiles no product of bfloat16 for them ("Unsupported matmul RHS type").
FLOAT32_ONLY = ("TPU v2", "TPU v3")
_PLATFORM = {"mosaic_gpu": "cuda", "pallas_tpu": "tpu"}


def device_for(implementation: str) -> Device | None:
    """The device that programs traced now are for; None where nothing depends on it."""
    if implementation not in KERNELS and not (implementation == "auto" and MEASURED):
        return None
    return target()


def check_loops(time: Any, reverse: bool, implementation: str, precision: Any) -> Loops:
    """Require options that say how to run the loops over `time` steps."""
    reverse = _checks.boolean("reverse", reverse)
    _checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    check_precision(precision)
    if precision is None:
        # As it is now: derivatives are traced later, maybe under another default.
        precision = config_value("jax_default_matmul_precision")
    symbolic = not isinstance(time, int)
    if symbolic and implementation in (*KERNELS, "associative"):
        _refuse(implementation, f"it needs a T that is a number, not {time}")
    return Loops(
        reverse, implementation, precision, None if symbolic else device_for(implementation)
    )


def _refuse(name: str, reason: str) -> NoReturn:
    raise NotImplementedError(f"implementation={name!r}: {reason}")


def choose(
    loops: Loops,
    W: jax.Array | jax.ShapeDtypeStruct,
    batch: tuple[int, ...],
    function: Callable[[jax.Array], jax.Array],
) -> str:
    """What runs a loop: "scan", "associative" or a kernel.

    Args:
      loops: how it is asked for.
      W: recurrent weights, `[H, H]`.
      batch: all axes that share them.
      function: φ, or φ' from what the loop reads.

    Raises:
      NotImplementedError: a kernel that was asked for by name cannot run this.
    """
    name, given = loops.implementation, (loops, W, batch, function)
    if name == "auto":
        won = (m.implementation for m in MEASURED if _won(m, loops, W, batch))
        return next((m for m in won if _unsupported(m, *given) is None), "scan")
    reason = _unsupported(name, *given) if name in KERNELS else None
    if reason is not None:
        _refuse(name, reason)
    return name


def perform(
    name: str,
    loops: Loops,
    args: tuple,
    *,
    scan: Callable[..., Any],
    kernel: Callable[..., Any],
    associative: Callable[..., Any] | None = None,
) -> Any:
    """What `choose` has named; where a loop is not linear, "associative" is the scan.

    A kernel that "auto" chose gives way to the scan where the program is compiled for another
    platform: for arrays that lie on the CPU of a machine with a GPU. The derivative of a kernel,
    where no rule of the library stands around it (in that of `loss_and_grads`), is the scan's.
    """
    if name == "associative" and associative is not None:
        return associative(*args)
    if name not in KERNELS:
        return scan(*args)

    @jax.custom_jvp
    def run(*args):
        if loops.implementation == "auto":
            return jax.lax.platform_dependent(*args, default=scan, **{_PLATFORM[name]: kernel})
        return kernel(*args)

    run.defjvp(partial(jax.jvp, scan))
    return run(*args)


def _won(m, loops, W, batch) -> bool:
    device = loops.device
    if device is None or device.kind != m.kind or W.dtype != m.dtype:
        return False
    # XLA does not split a kernel over devices.
    if device.many and set(jax.sharding.get_abstract_mesh().axis_types) != {AxisType.Manual}:
        return False
    sizes = ((m.hidden, W.shape[0]), (m.batch, prod(batch)))
    return all(least <= size <= most for (least, most), size in sizes)


def _unsupported(name, loops, W, batch, function) -> str | None:
    """Why a kernel cannot run a loop; None where it can."""
    hidden_size, device, dtype = W.shape[0], loops.device, W.dtype.name
    if name == "mosaic_gpu" and not (0, 11) <= jax.__version_info__ < (0, 13):
        return f"it is written for jax 0.11 and 0.12 (Python 3.12), not {jax.__version__}"
    if device is None or not _runs_on(name, device):
        wanted = {"mosaic_gpu": "an NVIDIA GPU of compute capability 9.0", "pallas_tpu": "a TPU"}
        return f"it needs {wanted[name]}, not {_named(device)}"
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
    if _explicit(W):
        return "it does not run under explicit sharding (shard_map will do)"
    if meaning(loops.precision) not in _multiplies(name, dtype):
        return f"its products of {dtype} are {_PRODUCTS[name]}, not of {loops.precision!r}"
    return None


def _explicit(W) -> bool:
    meshes = [jax.sharding.get_abstract_mesh()]
    if isinstance(W, jax.Array):
        meshes.append(jax.typeof(W).sharding.mesh)
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def _runs_on(name: str, device: Device) -> bool:
    if name == "pallas_tpu":
        return device.platform == "tpu"
    return device.platform == "gpu" and device.capability == "9.0"


def _named(device: Device | None) -> str:
    return "none" if device is None else f"{device.kind} ({device.platform})"


_PRODUCTS = {
    "mosaic_gpu": "TensorFloat-32, summed in float32",
    "pallas_tpu": "those of precision 'default' or 'highest'",
}


def _multiplies(name: str, dtype: str) -> tuple:
    """The precisions that a kernel gives products of a dtype, as `meaning` has them."""
    default, high, highest = ((p, p) for p in jax.lax.Precision)
    if dtype != "float32":  # one pass is exact
        return None, default, high, highest
    if name == "mosaic_gpu":
        return None, default, high, jax.lax.DotAlgorithmPreset.TF32_TF32_F32
    return None, default, highest

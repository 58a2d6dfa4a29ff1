"""What every subject is compared with before it is timed: the naive scan in float64, on the CPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import programs
from benchmarks.subjects import naive
from benchmarks.workloads import BACKWARD, BACKWARD_ALONE, FORWARD, Data, Network, Workload

Arrays = dict[str, np.ndarray]


class Reference:
    """What is right on one workload in a dtype, computed once for all subjects.

    With `tf32` their products round factors to TensorFloat-32.
    """

    def __init__(self, workload: Workload, data: Data, tangent: Data, dtype: str, tf32: bool):
        self.workload, self.precision, self.copies = workload, (dtype, tf32), 1
        self.data, self.tangent = data, tangent
        if workload.distinct:
            few, self.copies = workload.compared, workload.B // workload.distinct
            self.data = replace(data, xs=data.xs[:, few], g=data.g[:, few])
        self.known: dict[tuple[str, str], tuple[Arrays, dict[str, float]]] = {}

    def compare(
        self, measure: str, activation: str, arrays: Arrays
    ) -> tuple[dict[str, float], str | None]:
        """How far a subject's float64 arrays are off.

        Returns:
          (the largest error of each array in terms of the array's largest entry, a line that says
          which is off by more than rounding explains or None).
        """
        measure = BACKWARD if measure == BACKWARD_ALONE else measure
        if (measure, activation) not in self.known:
            network = replace(self.workload.network, activation=activation)
            self.known[measure, activation] = self._expected(measure, network)
        (expected, slack), errors, wrong = self.known[measure, activation], {}, None
        for name, right in expected.items():
            array = arrays.get(name)
            if array is None or array.shape != right.shape:
                shape = None if array is None else list(array.shape)
                return errors, f"{name} has shape {shape}, not {list(right.shape)}"
            errors[name] = _off(array, right)
            allowed = tolerance(name, self.workload, *self.precision) + slack.get(name, 0.0)
            if wrong is None and not errors[name] <= allowed:  # NaN too
                wrong = f"{name} is off by {errors[name]:.1e} of its largest entry"
                wrong += f", allowed {allowed:.1e}"
        return errors, wrong

    def _expected(self, measure, network):
        """The arrays of a measure, and how far each may be off beyond rounding."""
        right = self.arrays(measure, network)
        if measure != BACKWARD or network.activation != "relu":
            return right, {}
        # Where relu's argument is 0 but for rounding it falls to either side of the kink, and
        # gradients jump: the gradients of one side, and of the other.
        near = tolerance("hs", self.workload, *self.precision) / 4
        near *= np.max(np.abs(self.arrays(FORWARD, network)["hs"]))
        low, high = (self.arrays(measure, network, kink) for kink in (near, -near))
        return right, {name: _off(high[name], low[name]) for name in low}

    def arrays(self, measure: str, network: Network, kink: float = 0.0) -> Arrays:
        """Those of a network whose relu is 0 up to `kink`, by name."""
        phi = {"tanh": jnp.tanh, "relu": lambda a: jnp.where(a > kink, a, 0)}[network.activation]
        of = replace(self.workload, network=network, B=self.data.xs.shape[1], distinct=0)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            layer = naive.batched(network, phi=phi)
            how = layer, of, measure, self.data, self.tangent, "float64"
            function, args = programs.make(*how)
            found = programs.arrays(layer, of, measure, jax.jit(function)(*args))
        whole = ("hs", "dxs")
        return {n: array if n in whole else self.copies * array for n, array in found.items()}


def tolerance(name: str, workload: Workload, dtype: str, tf32: bool = False) -> float:
    """How far rounding may take an array from the reference, relative to its largest entry."""
    # u is one rounding of a state or a factor, v one addition in a product's accumulator, which
    # is float32 also where the dtype is narrower. Roundings add up as a random walk does:
    #   a pre-activation, a sum of D + H products, errs by u + v √(D + H),
    #   a state by √(1 + 0.9² + 0.9⁴ + …) that, as W shrinks an earlier error by 0.9 a step,
    #   a delta by that on the way forward and again on the way backward,
    #   a parameter's gradient by u √T more where a scan adds up T products over the batch, by
    #   v √(T B) where one product has them all.
    # With a leak α a step forgets less, 0.9 α + 1 − α for 0.9, and takes α of its product's error.
    # A layer adds its own errors to those of the layers below, a tangent those of what it is the
    # tangent of. Four is for the largest of many errors; the largest entry of a gradient is itself
    # some four times a usual one. Tensor cores cut a factor to TF32 where nothing rounds it before,
    # which is up to one step of its 10 bits of mantissa, twice what rounding is.
    v = 2.0**-24
    u = 2.0**-10 if tf32 else {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, v)
    T, B, D, H = workload.T, workload.B, workload.D, workload.H
    leak = 1.0 if workload.network.leak is None else workload.network.leak
    of_states = 4 * (u + leak * v * np.sqrt(D + H)) / np.sqrt(1 - (1 - 0.1 * leak) ** 2)
    of_states *= workload.network.layers
    if name == "hs":
        return of_states
    of_gradients = 2 * of_states + u * np.sqrt(T) + v * np.sqrt(T * B)
    return 2 * of_gradients if name.startswith("tangent") else of_gradients


def _off(array, right):
    """The largest error. A gradient can be 0 throughout: a relu unit that is off gives none."""
    return float(np.max(np.abs(array - right)) / (np.max(np.abs(right)) or 1.0))

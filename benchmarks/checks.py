"""A subject's result beside the reference's, before it is timed."""

from dataclasses import replace
from functools import cached_property

import numpy as np

from benchmarks import curvature, reference
from benchmarks.measures import FORWARD, HVP, JVP
from benchmarks.networks import Network
from benchmarks.workloads import Data, Workload


class Checker:
    """What is right on one workload; computed once for all subjects, where they share it.

    Args:
      workload: the shapes.
      data: the numbers.
      tangent: the direction of derivatives.
    """

    def __init__(self, workload: Workload, data: Data, tangent: Data):
        self.workload, self.tangent = workload, tangent
        self.data, few = data, workload.compared
        if workload.distinct:
            self.data = replace(data, xs=data.xs[:, few], g=data.g[:, few])

    @cached_property
    def _tanh(self) -> Network:
        return self.workload.network.of("tanh")

    @cached_property
    def _tanh_states(self) -> np.ndarray:
        return reference.states(self.data, self._tanh)

    @cached_property
    def _tanh_gradients(self) -> tuple:
        return self._gradients(self._tanh)

    def _gradients(self, network: Network, slopes: np.ndarray | None = None) -> tuple:
        *parameters, dxs = reference.gradients(self.data, network, slopes)
        times = self.workload.B // self.workload.distinct if self.workload.distinct else 1
        return *(times * gradient for gradient in parameters), dxs

    @cached_property
    def _tanh_tangents(self) -> curvature.Tangents:
        hs = reference.states(self.data, replace(self._tanh, last=False))
        return curvature.tangents(self.data, self.tangent, hs)

    def wrong(
        self,
        measure: str,
        activation: str,
        found: tuple,
        hs: np.ndarray,
        dtype: str = "float32",
        tf32: bool = False,
    ) -> str | None:
        """Where a result differs by more than rounding explains.

        Args:
          measure: of `measures.MEASURES`.
          activation: "tanh" or "relu".
          found: hs; (dU, dW, db) of each cell, and dxs if it is there; (hs, tangent of hs); or
            the Hessian's product as (dU, dW, db): float64 arrays of Data's layout.
          hs: the subject's own result: states say on which side of relu's kink it is.
          dtype: the subject's.
          tf32: whether its products round to TF32.

        Returns:
          A line, or None where it is right.
        """
        network = self.workload.network.of(activation)
        if activation == "tanh":
            states = self._tanh_states
        else:
            states = reference.states(self.data, network)
        precision = self.workload, dtype, tf32
        wrong = reference.mismatch((hs,), (states,), *precision)
        if wrong is not None or measure == FORWARD:
            return wrong
        if measure in (JVP, HVP):
            if activation == "tanh":
                expected = self._tanh_tangents
            else:
                slopes = (hs > 0).astype(np.float64)
                expected = curvature.tangents(self.data, self.tangent, states, slopes)
            if measure == JVP and network.last:
                expected = expected._replace(states=expected.states[..., -1, :, :])
            return self._tangents_wrong(measure, found, expected, precision)
        if activation == "tanh":
            gradients = self._tanh_gradients
        elif network.cells > 1 or network.last:  # what the kinks of each cell were is not told
            gradients = self._gradients(network)
        else:
            slopes = reference.slopes(self.data, network, hs)
            gradients = self._gradients(network, slopes)
            wrong = reference.mismatch((hs, *found), (states, *gradients), *precision)
            if wrong is not None and network.leak is not None and network.form == "rate":
                slopes = self._own_side(network, slopes, found, hs, precision)
                gradients = self._gradients(network, slopes)
        return reference.mismatch((hs, *found), (states, *gradients), *precision)

    def _own_side(self, network, slopes, found, hs, precision) -> np.ndarray:
        """The slopes of relu, each that rounding may have changed as the gradients have it.

        Beside a state that is kept, φ(a) is lost in rounding where a is near 0: the states do not
        tell on which side of the kink it was.
        """

        def distance(slopes):
            gradients = self._gradients(network, slopes)
            pairs = zip(found, gradients, strict=False)
            return sum(
                np.sum(np.square(a - right)) / np.max(np.square(right)) for a, right in pairs
            )

        allowed = reference.tolerance("hs", *precision) * np.max(np.abs(hs))
        best = distance(slopes)
        near = np.abs(reference.preactivations(self.data, hs)) <= allowed
        for where in map(tuple, np.argwhere(near)):
            other = slopes.copy()
            other[where] = 1 - other[where]
            if (off := distance(other)) < best:
                slopes, best = other, off
        return slopes

    def errors(self, measure: str, found: tuple) -> dict[str, float]:
        """How far each array of a tanh network is off, in terms of its largest entry.

        Args:
          measure: one whose result is states or gradients.
          found: (hs,); or (dU, dW, db) of each cell, and dxs if it is there.

        Returns:
          By name.
        """
        if measure == FORWARD:
            return reference.errors(found, (self._tanh_states,))
        return reference.errors(found, self._tanh_gradients, reference.names(self.workload)[1:])

    def ahead(self) -> None:
        """Compute what tanh networks are compared with."""
        _ = self._tanh_states, self._tanh_gradients

    def _tangents_wrong(self, measure, found, expected, precision) -> str | None:
        names, right = ("hs",), (expected.states,)
        if measure == JVP:
            found = found[1:]
        else:
            names, right = ("dU", "dW", "db"), expected.gradients
        for name, array, correct in zip(names, found, right, strict=True):
            what = f"the tangent of {name}"
            if array.shape != correct.shape:
                return f"{what} has shape {list(array.shape)}, not {list(correct.shape)}"
            # A tangent adds the errors of what it is the tangent of to those of its own sums.
            allowed = 2 * reference.tolerance("dU", *precision)
            error = np.max(np.abs(array - correct)) / (np.max(np.abs(correct)) or 1)
            if not error <= allowed:  # NaN too
                return f"{what} is off by {error:.1e} of its largest entry, allowed {allowed:.1e}"
        return None

"""torch's side of a worker: the layer as its users call it, compiled by nobody or torch.compile."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks import timing, workers
from benchmarks.catalogue import listed
from benchmarks.checks import Checker
from benchmarks.measures import BACKWARD, FORWARD, HVP, JVP
from benchmarks.side import NotOfferedError, Prepared
from benchmarks.subjects.registry import TORCH_SUBJECTS
from benchmarks.tangents import direction
from benchmarks.text import one_line
from benchmarks.workloads import Workload, draw


class TorchSide:
    """The subjects of the torch worker.

    Args:
      device: "cpu" or "gpu".
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.listed = {s.name: s for s in listed(device) if s.kind == workers.TORCH}
        self.drawn: tuple[Workload, str] | None = None

    def machine(self) -> dict[str, Any]:
        """The accelerator's name, and how many threads torch has."""
        if find_spec("torch") is None:
            return {"gpu": None, "threads": None}
        import torch

        on_gpu = self.device == "gpu" and torch.cuda.is_available()
        gpu = torch.cuda.get_device_name() if on_gpu else None
        cudnn = torch.backends.cudnn.version() if on_gpu else None
        return {"gpu": gpu, "threads": torch.get_num_threads(), "cudnn": cudnn}

    def subjects(self, names: list[str] | None) -> list[dict[str, Any]]:
        """Name, package, activation and status of those subjects, or of all."""
        about: dict[str, Any] = {"package": "torch", "activation": "tanh", "status": "ready"}
        try:
            import torch

            if self.device == "gpu" and not torch.cuda.is_available():
                about |= {"status": "not installed", "reason": "this build of torch has no CUDA"}
        except ImportError as error:
            about |= {"status": "not installed", "reason": one_line(error)}
        return [{"name": name, **about} for name in self.listed if names is None or name in names]

    def compile(self, pairs: list[list[str]], workload: Workload) -> float:
        """Make the layers and what they are compared with, where all have one dtype."""
        names = {name for name, _ in pairs}
        for name in names:
            self._begin(workload, TORCH_SUBJECTS[name].dtype)
            self._built(name)
        if names:
            self.checker.ahead()
        return 0.0

    def prepare(
        self, name: str, workload: Workload, measure: str, compiles: int, alike: int = 0
    ) -> Prepared:
        """A subject's call; the first one is where torch.compile compiles."""
        self._begin(workload, TORCH_SUBJECTS[name].dtype)
        options, built = TORCH_SUBJECTS[name], self._built(name)
        if measure not in built.measures:
            raise NotOfferedError(built.reasons.get(measure, "torch has no such measure"))
        call = built.measures[measure]
        start = time.perf_counter()
        try:
            result = call()
            self._wait(result)
        except Exception as error:
            if options.compile and type(error).__module__.startswith("torch._dynamo"):
                raise NotOfferedError(one_line(error)) from error
            raise
        record: dict[str, Any] = {"first_call": time.perf_counter() - start}

        def check() -> str | None:
            if name not in self.results:
                self.results[name] = built.results()
            hs, *gradients = self.results[name]
            found: tuple
            if measure in (JVP, HVP):
                found = _derivatives(measure, result, workload)
            elif measure == FORWARD:
                found = (hs,)
            elif workload.ids:
                found = tuple(gradients[:3])
            else:
                found = tuple(gradients if measure == BACKWARD else gradients[:3])
            if self.device == "gpu":
                record["errors"] = self.checker.errors(measure, found)
            phi, how = workload.network.activation, (options.dtype, options.tf32)
            return self.checker.wrong(measure, phi, found, hs, *how)

        return Prepared(call, check, record, self._wait if self.device == "gpu" else None)

    def _wait(self, _: Any) -> None:
        """For all that was queued on a GPU; on the CPU it is done."""
        if self.device == "gpu":
            import torch

            torch.cuda.synchronize()

    def _begin(self, workload: Workload, dtype: str) -> None:
        """A workload's numbers and references, kept while it is the same."""
        if (workload, dtype) == self.drawn:
            return
        if self.device == "cpu":
            import torch

            # It counts how often a layer was compiled for new shapes, and gives up at the eighth.
            torch.compiler.reset()
        self.drawn, self.data = (workload, dtype), draw(workload, dtype=dtype)
        self.tangent = direction(self.data)
        self.checker = Checker(workload, self.data, self.tangent)
        self.built: dict[str, Any] = {}
        self.results: dict[str, Any] = {}

    def _built(self, name: str) -> Any:
        from benchmarks.subjects import torch_rnn

        if name not in self.built:
            options = TORCH_SUBJECTS[name]
            self.built[name] = torch_rnn.build(self.drawn[0], self.data, options, self.tangent)
        return self.built[name]

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """How far one call raises the memory in use."""
        if self.device == "cpu":
            return timing.peak_bytes(call)
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def healthy(self) -> bool:
        """Whether the device still computes: after an illegal address it never does again."""
        try:
            self._wait(None)
        except Exception:
            return False
        return True

    def forget(self) -> None:
        """Nothing is kept but the workload's numbers."""


def _derivatives(measure: str, result: Any, workload: Workload) -> tuple:
    """What torch_rnn's jvp or Hessian-vector product found, in the layout of Data."""

    def stacked(parts):
        arrays = [part.detach().double().cpu().numpy() for part in parts]
        return np.stack(arrays) if workload.members else arrays[0]

    if measure == JVP:
        return stacked([hs for hs, _ in result]), stacked([moved for _, moved in result])
    # Four parameters for each member; the second bias repeats the first one's gradient.
    return tuple(stacked(result[n::4]) for n in range(3))

"""A process that measures: `python -m benchmarks.worker KIND DEVICE`, driven by the parent.

Each line on standard input is a request, a JSON object whose `do` names it; each gets one line
on standard output. Whatever else the process or its libraries print goes to standard error. It
ends when its input does.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

from benchmarks import timing
from benchmarks.side import NotOfferedError, Side
from benchmarks.text import one_line
from benchmarks.workloads import Workload


class Bench:
    """Answers requests: what the subjects of one framework cost on one workload and measure.

    Args:
      side: the framework.
    """

    def __init__(self, side: Side):
        self.side = side
        self.ready: dict[str, tuple[Callable[[], Any], int, Callable[[Any], object] | None]] = {}
        self.called: set[str] = set()  # since another was prepared

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request: never an exception, but for the interpreter's own end."""
        request = dict(request)
        do = request.pop("do")
        try:
            return getattr(self, f"do_{do}")(**request)
        except NotOfferedError as error:
            return {"status": "not offered", "reason": str(error)}
        except Exception as error:
            reason = one_line(error)
            if do != "machine" and not self.side.healthy():
                # Only a new process can use the device again.
                print(reason, file=sys.stderr, flush=True)
                os._exit(1)
            return {"status": "failed", "reason": reason}

    def do_machine(self) -> dict[str, Any]:
        """The accelerator, threads and flags of this process."""
        flags = os.environ.get("XLA_FLAGS", "")
        return {"status": "ready", "flags": flags, **self.side.machine()}

    def do_subjects(self, names: list[str] | None) -> dict[str, Any]:
        """Who can be measured here, and who is not installed."""
        return {"status": "ready", "subjects": self.side.subjects(names)}

    def do_prepare(
        self, subject: str, workload: dict[str, Any], measure: str, compiles: int, alike: int = 0
    ) -> dict[str, Any]:
        """Compile, check against the reference, and find out how often to call for a sample."""
        self.ready.pop(subject, None)
        self.called.clear()
        prepared = self.side.prepare(subject, Workload(**workload), measure, compiles, alike)
        wrong = prepared.check()
        if wrong is not None:
            return {"status": "failed", "reason": wrong, **prepared.record}
        call, wait = prepared.call, prepared.wait
        repeats, seconds = timing.calibrate(call, wait)
        self.ready[subject] = call, repeats, wait
        peak = self.side.peak_bytes(lambda: timing.seconds(call, 1, wait))
        reply = {"status": "ready", "repeats": repeats, "seconds": seconds, "peak_bytes": peak}
        return {**reply, **prepared.record}

    def do_compile(self, pairs: list[list[str]], workload: dict[str, Any]) -> dict[str, Any]:
        """Get (subject, measure)s ready for `prepare`, side by side with other workers."""
        return {"status": "ready", "seconds": self.side.compile(pairs, Workload(**workload))}

    def do_sample(self, subject: str) -> dict[str, Any]:
        """One sample, in seconds per call.

        Preparing another dropped what JAX had compiled: the first call afterwards compiles again.
        """
        call, repeats, wait = self.ready[subject]
        if subject not in self.called:
            timing.seconds(call, 1, wait)
            self.called.add(subject)
        return {"status": "ready", "seconds": timing.sample(call, repeats, wait)}

    def do_forget(self) -> dict[str, Any]:
        """Give back all that was prepared."""
        self.ready.clear()
        self.side.forget()
        return {"status": "ready"}


def serve(make_side: Callable[[], Side]) -> None:
    """Answer requests until there are no more.

    Args:
      make_side: makes the framework's side; called when prints can do no harm any more.
    """
    requests, replies = _streams()
    bench = Bench(make_side())
    for line in requests:
        replies.write(json.dumps(bench.answer(json.loads(line))) + "\n")
        replies.flush()


def _streams() -> tuple[IO[str], IO[str]]:
    """The two ends of the pipe, out of reach of everything else in the process."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)  # a library's own prints, from C too
    return requests, replies


def main(arguments: list[str], make_side: Callable[[str, str], Side] | None = None) -> int:
    """Run the worker of a kind on a device.

    Args:
      arguments: KIND and DEVICE.
      make_side: makes the framework's side of them; by default the real one.

    Returns:
      0.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    kind, device = arguments
    serve(lambda: (make_side or side_of)(kind, device))
    return 0


def side_of(kind: str, device: str) -> Side:
    """The framework of a kind of worker."""
    if kind == "torch":
        from benchmarks.torch_side import TorchSide

        return TorchSide(device)
    from benchmarks.jax_side import JaxSide

    return JaxSide(kind, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

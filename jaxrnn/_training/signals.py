"""Ctrl-C, SIGTERM, a terminal that closes: in training one asks to stop, the next ends at once."""

import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_HANG_UP = getattr(signal, "SIGHUP", None)  # not everywhere
SIGNALS = tuple(each for each in (signal.SIGINT, signal.SIGTERM, _HANG_UP) if each is not None)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Which signal has asked to stop, 0 if none; a second one raises where the program is.

    What a run writes it writes whole or not at all, so that raising anywhere does no damage.
    """
    asked = 0

    def first(number, frame):
        nonlocal asked
        asked = number
        for each in ours:
            signal.signal(each, second)

    def second(number, frame):
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(exit_code(number))

    with _handled(dict.fromkeys(SIGNALS, first)) as ours:
        yield lambda: asked


@contextmanager
def undone() -> Iterator[None]:
    """All of them raise where the program is, as Ctrl-C does, so that what has begun is undone."""

    def end(number, frame):
        raise SystemExit(exit_code(number))

    with _handled({each: end for each in SIGNALS if each != signal.SIGINT}):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """All of them end the process, which waits where no exception of Python's can be raised."""
    with _handled(dict.fromkeys(SIGNALS, signal.SIG_DFL)):
        yield


@contextmanager
def _handled(handlers: Mapping[int, Any]) -> Iterator[Collection[int]]:
    """With these handlers, of the signals that it yields."""
    before = {
        each: signal.signal(each, handler)
        for each, handler in handlers.items()
        if each != _HANG_UP or signal.getsignal(each) != signal.SIG_IGN  # as nohup asks for
    }
    try:
        yield before.keys()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def exit_code(number: int) -> int:
    """What a shell reports of a process that this signal ended."""
    return 128 + number

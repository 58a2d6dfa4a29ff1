"""Ctrl-C and SIGTERM: in training the first one asks to stop, the second ends at once."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Which signal has asked to stop, 0 if none; a second one raises where the program is.

    What a run writes it writes whole or not at all, so that raising anywhere does no damage.
    """
    asked = 0

    def first(number, frame):
        nonlocal asked
        asked = number
        for each in SIGNALS:
            signal.signal(each, second)

    def second(number, frame):
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(exit_code(number))

    with _handled(dict.fromkeys(SIGNALS, first)):
        yield lambda: asked


@contextmanager
def undone() -> Iterator[None]:
    """SIGTERM raises where the program is, as Ctrl-C does, so that what has begun is undone."""

    def end(number, frame):
        raise SystemExit(exit_code(number))

    with _handled({signal.SIGTERM: end}):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Both end the process where it waits in code that is not Python's, which sees no exception."""
    with _handled(dict.fromkeys(SIGNALS, signal.SIG_DFL)):
        yield


@contextmanager
def _handled(handlers: Mapping[int, Any]) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def exit_code(number: int) -> int:
    """What a shell reports of a process that this signal ended."""
    return 128 + number

"""Ctrl-C and SIGTERM: the first one asks to stop at a good moment, the second ends at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    before = {each: signal.signal(each, first) for each in SIGNALS}
    try:
        yield lambda: asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def exit_code(number: int) -> int:
    """What a shell reports of a process that this signal ended."""
    return 128 + number

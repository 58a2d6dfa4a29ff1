"""Errors in one line that names nothing of the machine."""

import re

LONGEST = 200


def without_directories(text: str) -> str:
    """A text whose absolute paths are cut down to the files' names."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@~-]+/)+", "", text)


def one_line(error: BaseException) -> str:
    """The first line of what an error says, with its kind."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    text = without_directories(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

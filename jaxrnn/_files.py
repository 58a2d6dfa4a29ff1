"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from jaxrnn._api import checks


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses in the block becomes one line.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise checks.InputError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def whole_file(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A file under another name, which gets its own when all went well, and is gone otherwise.

    Args:
      path: where it is then; a file that is there is replaced.
      mark: of the other name, where two processes may write the file at once.

    Raises:
      InputError: it cannot be opened or completed. What is written in the block may raise OSError.
    """
    unfinished, file = partial(path, mark), None
    try:
        with writing(path):
            file = unfinished.open("w+b")
        yield file
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):  # a full disk refuses once more what is still in the buffer
            if file is not None:
                file.close()
        with suppress(OSError):
            unfinished.unlink()
        raise


def partial(path: Path, mark: str = "") -> Path:
    """The name of a file that is not complete."""
    return path.with_name(f".{path.name}{mark}.partial")

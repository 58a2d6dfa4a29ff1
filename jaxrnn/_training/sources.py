"""Where a text comes from: files, directories, standard input, or what ships inside CPython."""

import io
import os
import stat
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxrnn._api import checks
from jaxrnn._training.directory import is_run

STANDARD_INPUT = "-"
# A text of more sources than this is called by the first of them.
MOST_NAMES = 4


@dataclass(frozen=True)
class Source:
    """A stretch of bytes that can be read once, from its beginning.

    Args:
      name: what messages call it.
      size: in bytes; None where it is not known before it has been read.
      open: makes a context manager of a binary file.
      empty: what came where nothing can be read from it.
    """

    name: str
    size: int | None
    open: Callable[[], Any]
    empty: str = "an empty file"

    def chunks(self, size: int) -> Generator[bytes, None, None]:
        """All bytes, in pieces of at most that size.

        Raises:
          InputError: it cannot be read, or is empty.
        """
        came = False
        try:
            with self.open() as file:
                while chunk := file.read(size):
                    came = True
                    yield chunk
        except OSError as error:
            unreadable(self.name, error)
        if not came:
            raise checks.InputError(f"{self.name}: expected text, got {self.empty}")


def unreadable(name: object, error: OSError) -> NoReturn:
    """Raise the InputError of what cannot be read."""
    raise checks.InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def find(names: Sequence[str]) -> tuple[str, list[Source]]:
    """What to read, and what to call all of it.

    Args:
      names: files, directories, "-" for standard input, in their order; if there are none, the
        documentation that ships inside CPython.

    Raises:
      InputError: a name of nothing, a directory without text, standard input more than once.
    """
    if not names:
        source = _documentation()
        return source.name, [source]
    if names.count(STANDARD_INPUT) > 1:
        times = names.count(STANDARD_INPUT)
        raise checks.InputError(f"standard input: expected at most once, got {times} times")
    called = ["standard input" if name == STANDARD_INPUT else name for name in names]
    few = len(called) <= MOST_NAMES
    title = " ".join(called) if few else f"{called[0]} and {len(called) - 1} more"
    return title, [source for name in names for source in _sources(name)]


def _documentation() -> Source:
    from pydoc_data.topics import topics

    content = "".join(topics.values()).encode("utf-8")
    return Source("CPython's pydoc_data.topics", len(content), lambda: io.BytesIO(content))


def _sources(name: str) -> list[Source]:
    if name == STANDARD_INPUT:
        return [Source("standard input", None, _standard_input, "nothing")]
    try:
        about = os.stat(name)
    except OSError as error:
        unreadable(name, error)
    if stat.S_ISDIR(about.st_mode):
        return _below(name)
    # Of a pipe or a device nobody knows how much will come.
    return [_file(Path(name), about.st_size if stat.S_ISREG(about.st_mode) else None, name)]


def _file(path: Path, size: int | None, name: str) -> Source:
    return Source(name, size, lambda: path.open("rb"))


def _standard_input() -> Any:
    if sys.stdin is None:
        raise OSError("it is closed")
    return nullcontext(sys.stdin.buffer)  # not ours to close


def _below(folder: str) -> list[Source]:
    """The files of a directory that hold something, but those of training runs.

    Links to directories are not followed.
    """
    found: list[tuple[Path, int]] = []
    for where, folders, files in os.walk(folder, onerror=_unlisted):
        folders[:] = [
            name for name in folders if not (name.startswith(".") or is_run(Path(where, name)))
        ]
        paths = [Path(where, name) for name in files if not name.startswith(".")]
        found += [(path, size) for path in paths if (size := _size(path))]
    if not found:
        raise checks.InputError(f"{folder}: expected text, got a directory without text files")
    found.sort(key=lambda entry: entry[0].parts)
    return [_file(path, size, str(path)) for path, size in found]


def _unlisted(error: OSError) -> NoReturn:
    unreadable(error.filename, error)


def _size(path: Path) -> int:
    """The size of a regular file; 0 of a pipe or a device, and of a link to nothing."""
    try:
        about = path.stat()
    except OSError as error:
        if path.is_symlink():
            return 0
        unreadable(path, error)
    return about.st_size if stat.S_ISREG(about.st_mode) else 0

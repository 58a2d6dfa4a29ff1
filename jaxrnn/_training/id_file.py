"""A file of ids that is written piece by piece, and read as if it were an array in memory."""

import mmap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxrnn._api import checks
from jaxrnn._files import whole_file, writing

# Ids that are looked at at a time.
CHUNK = 2**20


def id_dtype(count: int) -> np.dtype:
    """The narrowest dtype for the ids of so many characters."""
    return np.min_scalar_type(max(0, count - 1))


class IdFile:
    """A `.npy` file of ids that grows; its header is right once it is finished.

    Args:
      file: empty, to be written and read.
      path: what messages call it.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.length = 0
        self._file, self._path, self._dtype = file, path, id_dtype(0)
        with writing(path):
            self._start = file.write(self._header())

    def append(self, ids: np.ndarray) -> None:
        """Add ids `[n]`; those of a wider dtype than before widen all that are in the file."""
        with writing(self._path):
            if ids.dtype != self._dtype:
                self._widen(ids.dtype)
            self._file.write(ids.data)
        self.length += len(ids)

    def _widen(self, dtype: np.dtype) -> None:
        old, self._dtype = self._dtype, dtype
        # From the end: what is written lies behind what is still to be read.
        for end in range(self.length, 0, -CHUNK):
            begin = max(0, end - CHUNK)
            self._file.seek(self._start + begin * old.itemsize)
            ids = np.frombuffer(self._file.read((end - begin) * old.itemsize), old)
            self._file.seek(self._start + begin * dtype.itemsize)
            self._file.write(ids.astype(dtype).data)
        self._file.seek(self._start + self.length * dtype.itemsize)

    def _header(self) -> bytes:
        """NumPy leaves room in it for the length to grow."""
        header = BytesIO()
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(header, about)
        return header.getvalue()

    def finish(self) -> None:
        """Write the length."""
        header = self._header()
        if len(header) != self._start:
            raise RuntimeError(f"{self._path}: NumPy's header grew to {len(header)} bytes")
        with writing(self._path):
            self._file.seek(0)
            self._file.write(header)


@contextmanager
def new_file(path: Path) -> Iterator[IdFile]:
    """A file of ids that is written whole or not at all.

    Args:
      path: where it is then; a file that is there is replaced.

    Raises:
      InputError: it cannot be written, at any time until it is complete.
    """
    with whole_file(path) as file:
        ids = IdFile(file, path)
        yield ids
        ids.finish()


def open_ids(path: Path, length: int, size: int) -> np.ndarray:
    """The ids in a file, mapped: what is not looked at is not read.

    Args:
      path: what `IdFile` wrote.
      length: how many.
      size: |A|, of how many characters.

    Raises:
      InputError: it is missing, damaged, or another text's.
    """
    try:
        # Unlike np.load it takes nothing but a single array.
        ids = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise checks.InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the header is read as Python, and errs as that may
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise checks.InputError(f"{path}: expected the ids of a text, got {line}") from error
    if ids.shape != (length,) or ids.dtype != id_dtype(size):
        wanted = f"{id_dtype(size)} array of shape [{length}]"
        raise checks.InputError(f"{path}: expected {wanted}, got {checks.came(ids)}")
    return np.asarray(ids)  # the same memory, without the methods of a file


def checksum(ids: np.ndarray) -> int:
    """A number of all bytes of the ids, CRC-32."""
    found = 0
    for chunk in chunks(ids):
        found = zlib.crc32(chunk.data, found)
    return found


def chunks(ids: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """All ids, piece by piece, in memory that does not grow with them.

    Args:
      ids: in memory, or mapped; then the pages of each piece are given back after it.
      overlap: how many ids at its end each piece shares with the next.
    """
    for start in range(0, len(ids) - overlap, CHUNK):
        yield ids[start : start + CHUNK + overlap]
        release(ids)


def release(ids: np.ndarray) -> None:
    """Give the pages of mapped ids back; what is looked at again is mapped again.

    The kernel would take them only when it wants them, and until then they count as the process's.
    """
    memory: Any = ids
    while isinstance(memory, np.ndarray):
        memory = memory.base
    if isinstance(memory, mmap.mmap) and hasattr(memory, "madvise"):  # not everywhere
        memory.madvise(mmap.MADV_DONTNEED)

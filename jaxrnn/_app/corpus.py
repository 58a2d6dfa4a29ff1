"""A text of any size as a memory-mapped file of ids, one for each character of UTF-8 or each byte.

A run (300 updates, H = 64, two cores) on 1 MB, 100 MB or 1 GB of text peaks at 595, 545 or 587 MB.
"""

import codecs
import io
import mmap
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from jaxrnn._api import checks
from jaxrnn._api.checks import InputError, bad_input
from jaxrnn._app.directory import first_line, is_run, whole_file, writing
from jaxrnn.text import Vocabulary, streams

UNITS = {"char": "character", "byte": "byte"}
BYTES = tuple(map(chr, range(256)))
STANDARD_INPUT = "-"
MOST_NAMES = 4  # a text of more sources is named after the first
CHUNK = 2**20  # bytes or ids that are processed at a time
HELD_OUT_STREAM = 4096  # least length of held-out streams, since each starts without context
PSEUDO_COUNT = 0.1  # added to each count (Lidstone), so that no probability is 0
MOST_COUNTED = 2048  # characters; of more, the table of pairs would exceed 32 MiB

Source = tuple[str, Callable[[], Any]]  # a name for messages, and a function that opens it


def _unreadable(name: object, error: OSError) -> NoReturn:
    raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def _find(names: Sequence[str]) -> tuple[str, list[Source]]:
    if not names:
        from pydoc_data.topics import topics

        name, content = "CPython's pydoc_data.topics", "".join(topics.values()).encode()
        return name, [(name, lambda: io.BytesIO(content))]
    times = names.count(STANDARD_INPUT)
    if times > 1:
        raise InputError(f"standard input: expected at most once, got {times} times")
    called = ["standard input" if name == STANDARD_INPUT else name for name in names]
    few = len(called) <= MOST_NAMES
    title = " ".join(called) if few else f"{called[0]} and {len(called) - 1} more"
    return title, [source for name in names for source in _sources(name)]


def _sources(name: str) -> list[Source]:
    if name == STANDARD_INPUT:
        return [("standard input", _standard_input)]
    try:
        is_folder = stat.S_ISDIR(os.stat(name).st_mode)
    except OSError as error:
        _unreadable(name, error)
    if not is_folder:
        return [(name, lambda: open(name, "rb"))]
    paths = sorted(_below(name), key=lambda path: path.parts)
    if not paths:
        bad_input(name, "text", "a directory without text files")
    return [(str(path), lambda path=path: path.open("rb")) for path in paths]


def _standard_input() -> Any:
    if sys.stdin is None:
        raise OSError("it is closed")
    return nullcontext(sys.stdin.buffer)  # must not be closed


def _below(folder: str) -> Iterator[Path]:
    """The non-empty files below a directory, except runs; links to directories are not followed."""

    def unlisted(error):
        _unreadable(error.filename, error)

    for where, folders, files in os.walk(folder, onerror=unlisted):
        folders[:] = [n for n in folders if not (n.startswith(".") or is_run(Path(where, n)))]
        for path in (Path(where, name) for name in files if not name.startswith(".")):
            try:
                about = path.stat()
            except OSError as error:
                if path.is_symlink():  # broken
                    continue
                _unreadable(path, error)
            if stat.S_ISREG(about.st_mode) and about.st_size:
                yield path


def _read(source: Source) -> Iterator[bytes]:
    name, opened = source
    empty = True
    try:
        with opened() as file:
            while chunk := file.read(CHUNK):
                empty = False
                yield chunk
    except OSError as error:
        _unreadable(name, error)
    if empty:
        bad_input(name, "text", "nothing" if name == "standard input" else "an empty file")


def _decoded(source: Source) -> Iterator[str]:
    """The text of a UTF-8 source, in pieces, without a byte-order mark."""
    decoder, read, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    for chunk in chain(_read(source), [b""]):  # b"" ends the decoding
        read += len(chunk)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # error.object is this chunk, preceded by the bytes left over from the last.
            offset = read - len(error.object) + error.start
            got = f"byte 0x{error.object[error.start]:02x} at offset {offset} ({error.reason})"
            bad_input(source[0], "UTF-8", f"{got}; --level byte takes any bytes")
        yield text if begun else text.removeprefix("\ufeff")
        begun = begun or bool(text)


@dataclass(frozen=True)
class Text:
    """The description of a text whose ids are in a file; at level "byte", ids are the bytes."""

    name: str
    level: str
    characters: tuple[str, ...]
    length: int
    checksum: int


def encode(names: Sequence[str], level: str, path: Path) -> Text:
    """Write the ids of a text, as in `Vocabulary`, to a `.npy` file, in bounded memory.

    Names are of files and directories, or "-" for standard input; without names, the text is
    CPython's documentation. The array is `[length]`, of the narrowest dtype.
    """
    checks.one_of("level", level, tuple(UNITS))
    name, sources = _find(names)
    alphabet, dtype, length = Alphabet(), _dtype(0), 0
    with whole_file(path) as file:
        with writing(path):
            start = file.write(_header(dtype, length))
        for source in sources:
            if level == "byte":
                pieces = (np.frombuffer(chunk, np.uint8) for chunk in _read(source))
            else:
                pieces = map(alphabet.ids, _decoded(source))
            for ids in pieces:
                with writing(path):
                    if ids.dtype != dtype:
                        _widen(file, start, length, dtype, ids.dtype)
                    file.write(ids.data)
                length, dtype = length + len(ids), ids.dtype
        if not length:
            bad_input(name, "text", "a byte-order mark alone")
        header = _header(dtype, length)
        if len(header) != start:
            raise RuntimeError(f"{path}: NumPy's header grew to {len(header)} bytes")
        with writing(path):
            file.seek(0)
            file.write(header)
    characters = BYTES if level == "byte" else tuple(map(chr, alphabet.codes))
    return Text(name, level, characters, length, checksum(open_ids(path, length, len(characters))))


def _dtype(count: int) -> np.dtype:
    return np.min_scalar_type(max(0, count - 1))


def _header(dtype: np.dtype, length: int) -> bytes:
    """The header of a `.npy` file, in which NumPy leaves room for the length to grow."""
    header = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _widen(file: BinaryIO, start: int, length: int, old: np.dtype, new: np.dtype) -> None:
    """Rewrite ids in a wider dtype, from the end, so that no unread id is overwritten."""
    for end in range(length, 0, -CHUNK):
        begin = max(0, end - CHUNK)
        file.seek(start + begin * old.itemsize)
        ids = np.frombuffer(file.read((end - begin) * old.itemsize), old)
        file.seek(start + begin * new.itemsize)
        file.write(ids.astype(new).data)
    file.seek(start + length * new.itemsize)


class Alphabet:
    """The characters seen so far, with a table from code points to ids (−1 for unseen ones)."""

    def __init__(self):
        self.codes: list[int] = []
        self._table = np.full(0x110000, -1, np.int32)

    def ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[codes]
        unseen = ids < 0
        if unseen.any():
            fresh, first = np.unique(codes[unseen], return_index=True)
            fresh = fresh[np.argsort(first)]
            self._table[fresh] = np.arange(len(self.codes), len(self.codes) + len(fresh))
            self.codes += fresh.tolist()
            ids = self._table[codes]
        return ids.astype(_dtype(len(self.codes)))


def open_ids(path: Path, length: int, size: int) -> np.ndarray:
    """Memory-map the ids in a file, for |A| = size characters."""
    try:
        # Unlike np.load, this accepts only a single array.
        ids = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        _unreadable(path, error)
    except Exception as error:  # the header is parsed as Python
        bad_input(path, "the ids of a text", first_line(error))
    if ids.shape != (length,) or ids.dtype != _dtype(size):
        bad_input(path, f"{_dtype(size)} array of shape [{length}]", checks.describe(ids))
    return np.asarray(ids)  # the same memory, without the methods of a file


def chunks(ids: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """All ids in pieces, which may overlap, in bounded memory."""
    for start in range(0, len(ids) - overlap, CHUNK):
        yield ids[start : start + CHUNK + overlap]
        release(ids)


def release(ids: np.ndarray) -> None:
    """Return the pages of memory-mapped ids to the system at once."""
    memory: Any = ids
    while isinstance(memory, np.ndarray):
        memory = memory.base
    if isinstance(memory, mmap.mmap) and hasattr(memory, "madvise"):  # not everywhere
        memory.madvise(mmap.MADV_DONTNEED)


def checksum(ids: np.ndarray) -> int:
    crc = 0
    for chunk in chunks(ids):
        crc = zlib.crc32(chunk.data, crc)
    return crc


@dataclass(frozen=True)
class Corpus:
    """The ids of a text: those for training, `[N]`, and the evaluated held-out ones, `[M]`."""

    text: Text
    vocabulary: Vocabulary
    train: np.ndarray
    held_out: np.ndarray

    def held_out_streams(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """A power of two of streams: few if the text is short, at most as many as in training."""
        most = min(batch_size, max(1, len(self.held_out) // HELD_OUT_STREAM))
        return streams(self.held_out, 1 << (most.bit_length() - 1))

    def references(self) -> dict[str, float]:
        """Bits per held-out character of unigram and bigram frequencies."""
        size = len(self.vocabulary)
        counts, times = _counts(self.train, size), _counts(self.held_out[1:], size)
        bits = {"unigram": _bits(counts, times)}
        if size <= MOST_COUNTED:
            counts, times = (_counts(ids, size, 2) for ids in (self.train, self.held_out))
            bits["bigram"] = _bits(counts, times)
        return bits


def _counts(ids: np.ndarray, size: int, n: int = 1) -> np.ndarray:
    """The counts of ids, or of pairs of neighbours: int64 `[size]` or `[size, size]`."""
    counts = np.zeros(size**n, np.int64)
    for chunk in chunks(ids, overlap=n - 1):
        places = chunk if n == 1 else chunk[:-1].astype(np.int64) * size + chunk[1:]
        counts += np.bincount(places, minlength=size**n)
    return counts.reshape((size,) * n)


def _bits(counts: np.ndarray, times: np.ndarray) -> float:
    """Bits per character of a text with counts `times`, by the frequencies in `counts`."""
    seen = np.nonzero(times)
    every = np.sum(counts, axis=-1) + counts.shape[-1] * PSEUDO_COUNT
    frequencies = (counts[seen] + PSEUDO_COUNT) / every[seen[:-1]]
    return float(times[seen] @ -np.log2(frequencies) / times.sum())


def open_corpus(
    path: Path, text: Text, *, held_out: float, batch_size: int, seq_length: int,
    evaluated: int = 500_000, verify: bool = False,
) -> Corpus:  # fmt: skip
    """Split the ids from `encode` into training and held-out ones, for B streams of T ids.

    `held_out` is the fraction at the end to hold out, of which the first `evaluated` ids are
    evaluated. `verify` compares the checksum of the whole file.
    """
    ids = open_ids(path, text.length, len(text.characters))
    if verify and checksum(ids) != text.checksum:
        bad_input(path, f"the ids of {text.name}", "different ids")
    unit, first = f"{UNITS[text.level]}s", ids[0]
    if not any(np.any(chunk != first) for chunk in chunks(ids)):
        only = f"0x{first:02x}" if text.level == "byte" else repr(text.characters[first])
        bad_input(text.name, f"two distinct {unit}", f"only {only}")
    held_count = max(2, round(text.length * held_out))
    needed, left = batch_size * seq_length + 1, max(0, text.length - held_count)
    if left < needed:
        why = f"{batch_size} streams of one window of {seq_length}"
        got = f"{left:,}; lower --batch-size, --seq-length or --held-out"
        bad_input(text.name, f"at least {needed:,} {unit} for training, {why}", got)
    vocabulary = Vocabulary(text.characters)
    return Corpus(text, vocabulary, ids[:-held_count], ids[-held_count:][:evaluated])

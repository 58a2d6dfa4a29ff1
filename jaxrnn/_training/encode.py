"""A text of any size as ids in a file: read once, a chunk at a time."""

import codecs
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxrnn._api import checks
from jaxrnn._training import sources as texts
from jaxrnn._training.config import CHOICES
from jaxrnn._training.id_file import checksum, id_dtype, new_file, open_ids

# Bytes that are read at a time.
CHUNK = 2**20
BYTES = tuple(map(chr, range(256)))


@dataclass(frozen=True)
class Text:
    """What there is to know of a text whose ids are in a file.

    Args:
      name: what messages call it.
      level: what an id stands for, "char" or "byte".
      characters: the alphabet, in order of first appearance; of bytes always chr(0) … chr(255),
        so that a byte is its own id.
      length: how many ids.
      checksum: of the file of ids.
    """

    name: str
    level: str
    characters: tuple[str, ...]
    length: int
    checksum: int


def encode(
    sources: Sequence[str],
    level: str,
    path: Path,
    report: Callable[[int, int | None], None] | None = None,
) -> Text:
    """Write the ids of a text to a file, in memory that does not grow with the text.

    Args:
      sources: files, directories, "-" for standard input; none for CPython's documentation.
      level: "char", of UTF-8, or "byte".
      path: the file, one `.npy` array `[length]`; written whole or not at all.
      report: called now and then with the bytes read, and with those there are or None.

    Returns:
      The `Text`. Ids are those of `Vocabulary` of the whole text; uint8 up to 256 characters,
      then uint16, then uint32.

    Raises:
      InputError: a source that cannot be read or is empty, no UTF-8, a file that cannot be
        written.
    """
    checks.one_of("level", level, CHOICES["level"])
    name, found = texts.find(sources)
    sizes = [source.size for source in found]
    total = None if None in sizes else sum(size for size in sizes if size)
    alphabet = Alphabet()
    done = told = 0
    with new_file(path) as file:
        for source in found:
            decoder = _Utf8(source.name)
            with closing(source.chunks(CHUNK)) as chunks:
                for chunk in chunks:
                    if level == "byte":
                        file.append(np.frombuffer(chunk, np.uint8))
                    else:
                        file.append(alphabet.ids(decoder.feed(chunk)))
                    done += len(chunk)
                    if report is not None and done - told >= CHUNK:
                        report(done, total)
                        told = done
            decoder.finish()
        if report is not None:
            report(done, total)
    characters = BYTES if level == "byte" else tuple(map(chr, alphabet.codes))
    ids = open_ids(path, file.length, len(characters))
    return Text(name, level, characters, file.length, checksum(ids))


class Alphabet:
    """The characters seen so far: a table from code points to ids, −1 where there is none."""

    def __init__(self):
        self.codes: list[int] = []
        self._table = np.full(0x110000, -1, np.int32)

    def ids(self, text: str) -> np.ndarray:
        """The ids of a text; characters not seen before get the next ones."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[codes]
        unseen = ids < 0
        if unseen.any():
            fresh, first = np.unique(codes[unseen], return_index=True)
            fresh = fresh[np.argsort(first)]
            self._table[fresh] = np.arange(len(self.codes), len(self.codes) + len(fresh))
            self.codes += fresh.tolist()
            ids = self._table[codes]
        return ids.astype(id_dtype(len(self.codes)))


class _Utf8:
    """Decodes one source; says where in it a byte is that is no UTF-8."""

    def __init__(self, name: str):
        self._name, self._read = name, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, chunk: bytes, final: bool = False) -> str:
        self._read += len(chunk)
        try:
            return self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            # What was decoded is this chunk, after the bytes that the last one left over.
            offset = self._read - len(error.object) + error.start
            raise checks.InputError(
                f"{self._name}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at "
                f"offset {offset} ({error.reason}); --level byte takes any bytes"
            ) from error

    def finish(self) -> None:
        self.feed(b"", final=True)

"""What an id stands for: a character, or a byte of UTF-8 or of anything else."""

import codecs
import re
from collections.abc import Iterable

import numpy as np

from jaxrnn._api import checks
from jaxrnn.text import Vocabulary

UNITS = {"char": "character", "byte": "byte"}


def to_ids(vocabulary: Vocabulary, level: str, prompt: str) -> np.ndarray:
    """The ids of a prompt, int32 `[length]`.

    Args:
      vocabulary: of the network.
      level: "char" or "byte".
      prompt: may hold bytes that are no UTF-8, as Python keeps them (surrogateescape).

    Raises:
      ValueError: a character outside the vocabulary, or of bytes half a surrogate pair.
    """
    if level == "char":
        return vocabulary.encode(prompt)
    try:
        content = prompt.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        at = f"{prompt[error.start]!r} at position {error.start}"
        checks.bad_value("text", "characters that UTF-8 has", at)
    return np.frombuffer(content, np.uint8).astype(np.int32)


def visible(text: str) -> str:
    r"""A text as a terminal may show it: the control characters that it would obey are \xNN."""
    return re.sub(r"[\0-\x08\v\f\x0e-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


class Decoder:
    r"""The text of ids that come piece by piece.

    Args:
      vocabulary: of the network.
      level: "char", or "byte", where the bytes of a character may come in several pieces; those
        that are no UTF-8 become \xNN.
    """

    def __init__(self, vocabulary: Vocabulary, level: str):
        self._vocabulary = vocabulary
        self._bytes = None
        if level == "byte":
            self._bytes = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        text = self._vocabulary.decode(ids)
        return text if self._bytes is None else self._bytes.decode(text.encode("latin-1"))

    def finish(self) -> str:
        """What is left over: the bytes of a character that did not come to its end."""
        return "" if self._bytes is None else self._bytes.decode(b"", True)

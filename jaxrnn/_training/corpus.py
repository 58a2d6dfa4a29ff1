"""A text as a training run sees it: ids, split into what is trained on and what is held out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxrnn import _checks
from jaxrnn._text import Vocabulary, streams
from jaxrnn._training.ngram import bigram_bits, unigram_bits

# Streams of the held-out text are at least this long: each starts without context.
HELD_OUT_STREAM = 4096


@dataclass(frozen=True)
class Corpus:
    """A text as ids, cut into streams for training and for held-out evaluation."""

    name: str
    vocabulary: Vocabulary
    train: np.ndarray
    held_out: np.ndarray

    def references(self) -> dict[str, float]:
        """Bits per held-out character of counting."""
        size = len(self.vocabulary)
        return {
            "unigram": unigram_bits(self.train, self.held_out, size),
            "bigram": bigram_bits(self.train, self.held_out, size),
        }

    def held_out_streams(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Few streams where the text is short, never more than in training."""
        count = min(batch_size, max(1, len(self.held_out) // HELD_OUT_STREAM))
        return streams(self.held_out, count)


def read_text(files: list[str]) -> tuple[str, str]:
    """The text of all files in their order, and what to call it.

    With no file: the documentation that ships inside CPython.

    Raises:
      InputError: a file that cannot be read, is empty, or is no UTF-8.
    """
    if not files:
        from pydoc_data.topics import topics

        return "".join(topics.values()), "CPython's pydoc_data.topics"
    parts = []
    for name in files:
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise _checks.InputError(f"{name}: cannot be read: {error.strerror}") from error
        if not content:
            raise _checks.InputError(f"{name}: expected text, got an empty file")
        try:
            parts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
            raise _checks.InputError(f"{name}: expected UTF-8, got {byte}") from error
    return "".join(parts), " ".join(files)


def make_corpus(
    text: str, name: str, *, held_out: float, batch_size: int, seq_length: int
) -> Corpus:
    """Split a text into training and held-out ids.

    Args:
      text: all of it.
      name: what messages call it.
      held_out: the fraction at its end that is not trained on.
      batch_size: B, how many streams training reads.
      seq_length: T, the length of their windows.

    Raises:
      InputError: a text of one distinct character, or too short for the streams.
    """
    vocabulary = Vocabulary(text)
    if len(vocabulary) < 2:
        only = vocabulary.characters[0]
        raise _checks.InputError(f"{name}: expected two distinct characters, got only {only!r}")
    kept = max(2, round(len(text) * held_out))
    needed = batch_size * seq_length + 1
    if len(text) - kept < needed:
        raise _checks.InputError(
            f"{name}: expected at least {needed:,} characters for training, "
            f"{batch_size} streams of one window of {seq_length}, "
            f"got {max(0, len(text) - kept):,}; lower --batch-size or --seq-length"
        )
    ids = vocabulary.encode(text)
    return Corpus(name, vocabulary, ids[:-kept], ids[-kept:])

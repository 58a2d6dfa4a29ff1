"""A text as a training run sees it: ids, split into what is trained on and what is held out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxrnn._api import checks
from jaxrnn._training.encode import Text
from jaxrnn._training.id_file import checksum, chunks, open_ids, release
from jaxrnn._training.levels import UNITS
from jaxrnn._training.ngram import bigram_bits, unigram_bits
from jaxrnn.text import Vocabulary, streams

# Streams of the held-out text are at least this long: each starts without context.
HELD_OUT_STREAM = 4096
EVALUATED = 500_000


@dataclass(frozen=True)
class Corpus:
    """A text as ids, cut into streams for training and for held-out evaluation.

    Args:
      name: what messages call it.
      level: what an id stands for, "char" or "byte".
      vocabulary: the characters of the ids.
      train: ids `[N]`, a view of the file.
      held_out: ids `[M]`, a view of the file.
      evaluated: of the held-out text, from its beginning, at most so many are predicted.
    """

    name: str
    level: str
    vocabulary: Vocabulary
    train: np.ndarray
    held_out: np.ndarray
    evaluated: int = EVALUATED

    def references(self) -> dict[str, float]:
        """Bits per held-out character of counting."""
        size, held_out = len(self.vocabulary), self.held_out[: self.evaluated]
        return {
            "unigram": unigram_bits(self.train, held_out, size),
            "bigram": bigram_bits(self.train, held_out, size),
        }

    def held_out_streams(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Few streams where the text is short, never more than in training.

        Their number is a power of two, so that they divide over devices.
        """
        held_out = self.held_out[: self.evaluated]
        most = min(batch_size, max(1, len(held_out) // HELD_OUT_STREAM))
        return streams(held_out, 1 << (most.bit_length() - 1))

    def release(self) -> None:
        """Give back the memory of what has been looked at."""
        release(self.train)


def open_corpus(
    path: Path,
    text: Text,
    *,
    held_out: float,
    batch_size: int,
    seq_length: int,
    evaluated: int = EVALUATED,
    verify: bool = False,
) -> Corpus:
    """Split the ids in a file into training and held-out ones; none is read into memory.

    Args:
      path: what `encode` wrote.
      text: what it returned.
      held_out: the fraction at the end that is not trained on.
      batch_size: B, how many streams training reads.
      seq_length: T, the length of their windows.
      evaluated: see `Corpus`.
      verify: read all of the file, and see whether it holds what was written.

    Raises:
      InputError: a missing or damaged file, a text of one distinct character, or too short for
        the streams.
    """
    ids = open_ids(path, text.length, len(text.characters))
    if verify and checksum(ids) != text.checksum:
        raise checks.InputError(f"{path}: expected the ids of {text.name}, got others")
    unit = f"{UNITS[text.level]}s"
    only = _only_one(ids, text)
    if only is not None:
        raise checks.InputError(f"{text.name}: expected two distinct {unit}, got only {only}")
    kept = max(2, round(text.length * held_out))
    needed = batch_size * seq_length + 1
    if text.length - kept < needed:
        raise checks.InputError(
            f"{text.name}: expected at least {needed:,} {unit} for training, "
            f"{batch_size} streams of one window of {seq_length}, "
            f"got {max(0, text.length - kept):,}; lower --batch-size, --seq-length or --held-out"
        )
    vocabulary = Vocabulary(text.characters)
    return Corpus(text.name, text.level, vocabulary, ids[:-kept], ids[-kept:], evaluated)


def _only_one(ids: np.ndarray, text: Text) -> str | None:
    """The only character of a text, or None where there are more."""
    if text.level == "char":
        return repr(text.characters[0]) if len(text.characters) == 1 else None
    first = ids[0]
    if any(np.any(chunk != first) for chunk in chunks(ids)):
        return None
    return f"0x{first:02x}"

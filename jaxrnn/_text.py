"""Section 1 of the source: characters to ids and one-hot rows, and a text to parallel streams."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import _checks


@dataclass(frozen=True, init=False)
class Vocabulary:
    """The alphabet A: distinct characters, each with its place as its id.

    Args:
      characters: a text, whose distinct characters count in the order in which they first
        appear, or a list of distinct characters.

    Raises:
      ValueError: nothing given, an entry that is not one character, or one given twice.

    Source: section 1.

    >>> vocabulary = Vocabulary("hello")
    >>> vocabulary.characters
    ('h', 'e', 'l', 'o')
    >>> vocabulary.encode("hell")
    array([0, 1, 2, 2], dtype=int32)
    >>> vocabulary.decode([1, 2, 2, 3])
    'ello'
    """

    characters: tuple[str, ...]

    def __init__(self, characters: str | Iterable[str]):
        found = tuple(dict.fromkeys(characters) if isinstance(characters, str) else characters)
        if not found:
            _checks.bad_value("characters", "at least one character", "none")
        for n, character in enumerate(found):
            if not isinstance(character, str) or len(character) != 1:
                _checks.bad_value("characters", "single characters", f"{character!r} at {n}")
        if len(set(found)) < len(found):
            twice = next(c for n, c in enumerate(found) if c in found[:n])
            _checks.bad_value("characters", "distinct characters", f"{twice!r} twice")
        object.__setattr__(self, "characters", found)

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """The distinct characters of a text, in the order in which they first appear."""
        return cls(text)

    def __len__(self) -> int:
        """|A|, the size of the alphabet."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[len(text)]`.

        Raises:
          ValueError: a character outside the vocabulary; the message shows it and its position.
        """
        codes = _code_points("".join(self.characters))
        order = np.argsort(codes)
        wanted = _code_points(text)
        place = np.searchsorted(codes[order], wanted).clip(max=len(codes) - 1)
        ids = order[place].astype(np.int32)
        unknown = np.flatnonzero(codes[ids] != wanted)
        if unknown.size:
            n = int(unknown[0])
            _checks.bad_value(
                "text", f"the {len(self)} characters of the vocabulary",
                f"{text[n]!r} at position {n}",
            )  # fmt: skip
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids.

        Raises:
          ValueError: an id outside 0 … |A| − 1; the message shows it and its position.
        """
        values = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if values.ndim != 1:
            _checks.bad_value("ids", "shape [length]", list(values.shape))
        wrong = np.flatnonzero((values < 0) | (values >= len(self)))
        if wrong.size:
            n = int(wrong[0])
            _checks.bad_value("ids", f"0 to {len(self) - 1}", f"{values[n]} at position {n}")
        return "".join(self.characters[int(n)] for n in values)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def one_hot(ids: jax.Array, size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The rows that ids stand for: 1 at the id, 0 elsewhere.

    Args:
      ids: integers, `[...]`, 0 ≤ id < size.
      size: |A|.
      dtype: of the rows.

    Returns:
      One-hot rows, `[..., size]`.

    Raises:
      TypeError: ids that are not integers.
      ValueError: an id outside 0 … size − 1; under jit, where its value cannot be seen, its
        row is 0.

    Source: section 1.

    >>> one_hot(Vocabulary("helo").encode("le"), 4)
    Array([[0., 0., 1., 0.],
           [0., 1., 0., 0.]], dtype=float32)
    """
    _checks.positive("size", size)
    ids = _checks.integers("ids", ids)
    _checks.in_range("ids", ids, size)
    return jax.nn.one_hot(ids, size, dtype=dtype)


def streams(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into parallel contiguous streams of inputs and the characters that follow them.

    Args:
      ids: the text, integers `[N]`.
      count: B, how many streams.

    Returns:
      (inputs, targets), `[L, B]` each, L = (N − 1) // B: stream n is the n-th stretch of the
      text, and targets[t] is the character after inputs[t]. Fewer than B characters at the end
      are left out.

    Raises:
      TypeError, ValueError: ids of another shape, or fewer than B + 1; a count below 1.
    """
    _checks.positive("count", count)
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) <= count:
        _checks.bad_value("ids", f"shape [N], N above {count}", list(ids.shape))
    length = (len(ids) - 1) // count
    inputs = ids[: length * count].reshape(count, length).T
    targets = ids[1 : length * count + 1].reshape(count, length).T
    return inputs, targets

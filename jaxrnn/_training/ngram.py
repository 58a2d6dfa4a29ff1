"""Reference lines: what counting characters, or pairs of them, predicts of held-out text."""

from collections.abc import Iterator

import numpy as np

from jaxrnn._training.id_file import chunks

# Added to each count (Lidstone), so that what was never seen has a probability.
PSEUDO_COUNT = 0.1
# Up to so many possible pairs each has a place in a table; else only those that occur are kept.
LARGEST_TABLE = 2**22


def unigram_bits(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits per held-out character of the training text's character frequencies.

    Args:
      train: ids `[N]`.
      held_out: ids `[M]`; all but the first are predicted, as a network would.
      size: |A|.
    """
    counts = _counts(train, size) + PSEUDO_COUNT
    times = _counts(held_out[1:], size)
    return float(times @ -np.log2(counts / counts.sum()) / times.sum())


def bigram_bits(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits per held-out character of its frequency after the character before it.

    Args:
      train: ids `[N]`.
      held_out: ids `[M]`; all but the first are predicted.
      size: |A|.
    """
    seen, counts = _pairs(train, size)
    wanted, times = _pairs(held_out, size)
    before = np.bincount(seen // size, counts, size) + size * PSEUDO_COUNT
    place = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
    count = np.where(seen[place] == wanted, counts[place], 0) + PSEUDO_COUNT
    return float(times @ -np.log2(count / before[wanted // size]) / times.sum())


def _counts(ids: np.ndarray, size: int) -> np.ndarray:
    """How often each id occurs, int64 `[size]`."""
    counts = np.zeros(size, np.int64)
    for chunk in chunks(ids):
        counts += np.bincount(chunk, minlength=size)
    return counts


def _pairs(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of neighbours, first · size + second, in order, and how often each occurs."""
    if size**2 > LARGEST_TABLE:
        return _sparse_pairs(ids, size)
    table = np.zeros(size**2, np.int64)
    for pairs in _neighbours(ids, size):
        table += np.bincount(pairs, minlength=size**2)
    seen = np.flatnonzero(table)
    return seen, table[seen]


def _sparse_pairs(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    none = np.zeros(0, np.int64)
    merged, waiting, held = (none, none), [], 0
    for pairs in _neighbours(ids, size):
        waiting.append(np.unique(pairs, return_counts=True))
        held += len(waiting[-1][0])
        # Merging costs as much as all that is kept; so it waits until it doubles that.
        if held >= len(merged[0]):
            merged, waiting, held = _merged([merged, *waiting]), [], 0
    return _merged([merged, *waiting])


def _neighbours(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for chunk in chunks(ids, overlap=1):
        wide = chunk.astype(np.int64)
        yield wide[:-1] * size + wide[1:]


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pairs, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(pairs, kind="stable")  # of sorted parts, which this kind merges
    pairs = pairs[order]
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[first], np.add.reduceat(counts[order], first)

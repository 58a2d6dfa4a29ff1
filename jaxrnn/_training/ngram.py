"""Reference lines: what counting characters, or pairs of them, predicts of held-out text."""

import numpy as np

# Added to each count (Lidstone), so that what was never seen has a probability.
PSEUDO_COUNT = 0.1


def unigram_bits(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits per held-out character of the training text's character frequencies.

    Args:
      train: ids `[N]`.
      held_out: ids `[M]`; all but the first are predicted, as a network would.
      size: |A|.
    """
    counts = np.bincount(train, minlength=size) + PSEUDO_COUNT
    return float(np.mean(-np.log2(counts / counts.sum())[held_out[1:]]))


def bigram_bits(train: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits per held-out character of its frequency after the character before it.

    Args:
      train: ids `[N]`.
      held_out: ids `[M]`; all but the first are predicted.
      size: |A|.
    """
    pairs = train[:-1].astype(np.int64) * size + train[1:]
    seen, counts = np.unique(pairs, return_counts=True)
    before = np.bincount(train[:-1], minlength=size) + size * PSEUDO_COUNT
    wanted = held_out[:-1].astype(np.int64) * size + held_out[1:]
    place = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
    count = np.where(seen[place] == wanted, counts[place], 0) + PSEUDO_COUNT
    return float(np.mean(-np.log2(count / before[held_out[:-1]])))

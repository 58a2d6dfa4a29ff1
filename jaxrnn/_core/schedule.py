"""How the loops are run, chosen by shape in one place; `python -m benchmarks tune` measures it.

Every choice is between two ways to compute the same; none changes what is computed. Sizes are
those after the fold: B counts all sequences that share the weights. What was measured are
CPUs; elsewhere a step should be few kernels, and caches are not what bounds it.
"""

from math import prod

import jax

from jaxrnn._jax.batch_axes import members_now


def _unmeasured(*sizes) -> bool:
    # A program exported for sizes to come has symbols for them.
    symbolic = not all(isinstance(size, int) for size in sizes)
    return symbolic or jax.default_backend() != "cpu"


def hoists_inputs(time: int, batch: tuple[int, ...], input_size: int, hidden_size: int) -> bool:
    """Whether U x of all steps is one product before the loop, not one in each step.

    Before the loop it is one large product, and U is read once; but all of `[T, B, H]` is written
    and read again. That pays where U outweighs what a step writes, or all of it stays in cache.
    """
    if _unmeasured(time, *batch, input_size, hidden_size):
        return True
    B = prod(batch)
    fits = members_now.get() * time * B * hidden_size <= 2**20
    return input_size >= 16 * B or (input_size >= 16 and fits)


def puts_weights_left(batch: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether a product of a step is formed as W hᵀ, not as h Wᵀ.

    XLA's CPU back end packs the right operand at every call: of few sequences and a large W,
    that should be the sequences.
    """
    if _unmeasured(*batch, rows, columns):
        return False
    fewest, most = (2, 64) if rows * columns >= 2**20 else (8, 32)
    return rows * columns >= 2**16 and fewest <= prod(batch) <= most


def segment_length(time: int, batch: tuple[int, ...], hidden_size: int) -> int:
    """How many steps the backward takes at once, where arrays of all steps outgrow the caches.

    A segment ends in one product for each parameter, which is added to the sum so far: it has to
    be large enough to pay for reading and writing a whole W.
    """
    B = prod(batch)
    if _unmeasured(time, B, hidden_size) or time * B * hidden_size <= 2**19:
        return time
    rows = max(2**18 // hidden_size, 6 * hidden_size)
    length = max(rows // B, 1)
    if 2 * length > time:
        return time
    near = [n for n in range(length, 2 * length) if time % n == 0]
    return near[0] if near else length

"""How the loops are run, by shape, in one table; `python -m benchmarks tune` measures it.

No choice changes the result. Times are milliseconds on two cores of a Xeon with AVX-512 (float32,
jax 0.10.2, 2026-11-28): of the answer, and of the alternatives in parentheses. The table is for
CPUs. On accelerators a step should be few kernels and caches are no limit: U x is computed before
the loop, W is the right factor, and time is not cut into segments.

Two more choices are the user's. A batch sharded over JAX_NUM_CPU_DEVICES=2 devices runs one loop
per core. Where steps are tiny, XLA compiles the loop to one kernel with
XLA_FLAGS=--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax

from jaxrnn._jax.batch_axes import member_count


class Line(NamedTuple):
    """One line of a choice; the first line whose condition on (T, B, D, H) holds is taken.

    B counts all sequences that share the weights, T the steps of all members with their own.
    """

    where: Callable[[int, int, int, int], bool]
    answer: Any
    shape: tuple[int, int, int, int]  # what was measured
    measured: str


TABLE = {
    # U x as one product before the loop, or as one in each step. The former reads U once, but
    # writes and reads [T, B, H]. Forward.
    "hoists_inputs": (
        Line(lambda T, B, D, H: D >= 16 * B, True, (100, 16, 1024, 1024),
             "50.0 (in the loop 89.1)"),
        Line(lambda T, B, D, H: D >= 16 and T * B * H <= 2**20, True, (256, 8, 128, 128),
             "2.54 (in the loop 4.02)"),
        Line(lambda T, B, D, H: True, False, (784, 128, 1, 128), "74.2 (before the loop 88.7)"),
    ),
    # W hᵀ or h Wᵀ. XLA packs the right operand in every call, which should be the smaller one: h if
    # there are few sequences and W is large. Forward.
    "puts_weights_left": (
        Line(lambda T, B, D, H: H >= 1024 and 2 <= B <= 64, True, (40, 16, 8, 1024),
             "10.1 (on the right 21.4)"),
        Line(lambda T, B, D, H: True, False, (100, 64, 8, 256), "12.8 (on the left 13.8)"),
    ),
    # How many rows [H], over steps and sequences, the backward takes at once; None for all. Each
    # segment ends with one product per parameter, added to the sum. Few rows pay where products
    # with x are skinny and cheap beside the memory traffic. Forward and gradient.
    "segment_rows": (
        Line(lambda T, B, D, H: D < 16 and H <= 128 and B >= 32 and T * B * H <= 2**20, 256,
             (60, 256, 3, 32), "4.86 (2,048 rows 5.79); (60, 64, 3, 128), beside a busy core, "
             "4.53 (all rows 5.54)"),
        Line(lambda T, B, D, H: T * B * H <= 2**19, None,
             (300, 16, 16, 64), "4.74 (in four parts 5.14)"),
        Line(lambda T, B, D, H: True, 2048, (256, 32, 128, 128),
             "22.1 (256 rows 24.6, all rows 20.4); (784, 128, 1, 128) 211 (256 rows 269)"),
    ),
}  # fmt: skip


def _answer(choice: str, elsewhere: Any, *shape: Any) -> Any:
    # In an exported program sizes may be symbolic.
    if jax.default_backend() != "cpu" or not all(isinstance(size, int) for size in shape):
        return elsewhere
    return next(line.answer for line in TABLE[choice] if line.where(*shape))


def hoists_inputs(time: int, batch: tuple[int, ...], input_size: int, hidden_size: int) -> bool:
    """Whether U x of all steps is one product before the loop, not one in each step."""
    steps = member_count.get() * time
    return _answer("hoists_inputs", True, steps, prod(batch), input_size, hidden_size)


def puts_weights_left(batch: tuple[int, ...], hidden_size: int) -> bool:
    """Whether a product of a step is formed as W hᵀ, not as h Wᵀ."""
    return _answer("puts_weights_left", False, 1, prod(batch), 1, hidden_size)


def segment_length(time: int, batch: tuple[int, ...], input_size: int, hidden_size: int) -> int:
    """How many steps the backward takes at once: all, or about a quarter at most."""
    rows = _answer("segment_rows", None, time, prod(batch), input_size, hidden_size)
    if rows is None or 2 * rows > time * prod(batch):
        return time
    length = max(min(rows // prod(batch), time // 4), 1)
    near = [n for n in range(length, 2 * length) if time % n == 0]
    return near[0] if near else length

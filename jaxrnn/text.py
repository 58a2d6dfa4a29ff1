"""Text: characters as ids and one-hot rows (section 1 of the source), streams, and sampling."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._api import checks
from jaxrnn._api.cell import check_forward, check_params
from jaxrnn._api.layers import unroll_layers
from jaxrnn._api.readout import apply_readout
from jaxrnn._core import layers
from jaxrnn._types import Ids, Params, first_cell

# Smaller ones have no inverse in float32.
LEAST_TEMPERATURE = 1.2e-38
# Ids drawn per device call.
BLOCK = 16


@dataclass(frozen=True, init=False)
class Vocabulary:
    """The alphabet A of section 1: distinct characters, whose ids are their positions.

    Args:
      characters: a text, whose distinct characters are taken in order of first appearance, or a
        list of distinct characters.

    Raises:
      TypeError: anything else, such as bytes or a file.
      ValueError: no characters, an entry that is not one character, or a duplicate.

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
        if _hint(characters) or not np.iterable(characters):
            got = checks.describe(characters) + _hint(characters)
            checks.bad_type("characters", "a str or a list of characters", got)
        alphabet = tuple(dict.fromkeys(characters) if isinstance(characters, str) else characters)
        if not alphabet:
            checks.bad_value("characters", "at least one character", "none")
        for n, character in enumerate(alphabet):
            if not isinstance(character, str) or len(character) != 1:
                checks.bad_value("characters", "single characters", f"{character!r} at {n}")
        if len(set(alphabet)) < len(alphabet):
            twice = next(c for n, c in enumerate(alphabet) if c in alphabet[:n])
            checks.bad_value("characters", "distinct characters", f"{twice!r} twice")
        object.__setattr__(self, "characters", alphabet)

    @classmethod
    def from_text(cls, text: str) -> "Vocabulary":
        """The distinct characters of a text, in order of first appearance."""
        return cls(text)

    def __len__(self) -> int:
        """The size of the alphabet."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[len(text)]`.

        Raises:
          TypeError: not a str.
          ValueError: a character outside the vocabulary, named with its position.
        """
        if not isinstance(text, str):
            checks.bad_type("text", "a str", checks.describe(text) + _hint(text))
        encoded = [t.encode("utf-32-le", "surrogatepass") for t in ("".join(self.characters), text)]
        codes, wanted = (np.frombuffer(points, np.uint32) for points in encoded)
        order = np.argsort(codes)
        place = np.searchsorted(codes[order], wanted).clip(max=len(codes) - 1)
        ids = order[place].astype(np.int32)
        for n in np.flatnonzero(codes[ids] != wanted)[:1]:
            expected = f"the {len(self)} characters of the vocabulary"
            checks.bad_value("text", expected, f"{text[n]!r} at position {n}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids.

        Raises:
          TypeError: ids that are not integers.
          ValueError: an id outside 0 … |A| − 1, named with its position.
        """
        values = _integers(ids)
        if values.ndim != 1:
            checks.bad_value("ids", "shape [length]", list(values.shape))
        for n in np.flatnonzero((values < 0) | (values >= len(self)))[:1]:
            checks.bad_value("ids", f"0 to {len(self) - 1}", f"{values[n]} at position {n}")
        return "".join(self.characters[int(n)] for n in values)


def _hint(value: object) -> str:
    """How to get a text from bytes or a file."""
    return next((f"; {how} it first" for how in ("decode", "read") if hasattr(value, how)), "")


def _integers(ids: Any) -> np.ndarray:
    """A NumPy array of integers, without a copy if possible."""
    is_array, masked = hasattr(ids, "__array__"), np.ma.isMaskedArray(ids)
    try:
        values = np.asarray(ids if is_array else list(ids))
    except ValueError:
        checks.bad_value("ids", "integers in one axis", "entries of different lengths")
    except (TypeError, RuntimeError):  # not a sequence, or a traced array
        checks.bad_type("ids", "integers", checks.describe(ids))
    empty = values.size == 0 and not is_array
    if masked or not (empty or jnp.issubdtype(values.dtype, np.integer)):
        checks.bad_type("ids", "integers", "a masked array" if masked else values.dtype.name)
    return values.astype(np.int32) if empty or values.dtype.kind == "V" else values  # int4 is "V"


def one_hot(ids: jax.Array, size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """One-hot rows as in section 1: 1 at the id, 0 elsewhere.

    To reproduce the source; as inputs of a cell, `Ids` are cheaper.

    Args:
      ids: integers, `[...]`, 0 ≤ id < size.
      size: |A|.
      dtype: of the rows.

    Returns:
      One-hot rows, `[..., size]`.

    Raises:
      TypeError: ids that are not integers.
      ValueError: an id outside 0 … size − 1; under jit, where it is not known, its row is 0.

    >>> one_hot(Vocabulary("helo").encode("le"), 4)
    Array([[0., 0., 1., 0.],
           [0., 1., 0., 0.]], dtype=float32)
    """
    checks.positive("size", size)
    ids = checks.integers("ids", ids)
    checks.in_range("ids", ids, size)
    return jax.nn.one_hot(ids, size, dtype=dtype)


def streams(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into parallel contiguous streams of inputs and next-character targets.

    Args:
      ids: the text, integers `[N]`.
      count: B, the number of streams.

    Returns:
      (inputs, targets), `[L, B]` each, L = (N − 1) // B: stream n is the n-th part of the text, and
      targets[t] follows inputs[t]. Fewer than B characters at the end are dropped.

    Raises:
      TypeError, ValueError: ids of another shape, or fewer than B + 1; a count below 1.
    """
    checks.positive("count", count)
    ids = _integers(ids)
    if ids.ndim != 1 or len(ids) <= count:
        checks.bad_value("ids", f"shape [N], N above {count}", list(ids.shape))
    used = (len(ids) - 1) // count * count
    return ids[:used].reshape(count, -1).T, ids[1 : used + 1].reshape(count, -1).T


def generate(
    params: Params, key: jax.Array, prompt: jax.Array, length: int, temperature: float = 1.0
) -> jax.Array:
    """Sample ids one by one, each conditioned on the prompt and on all ids before it.

    For long samples, as they are drawn, use `stream_ids`.

    Args:
      params: the `Params`, with |A| inputs and outputs.
      key: a JAX random key.
      prompt: ids to read first, `[N]`, N ≥ 1.
      length: how many ids to draw.
      temperature: divides the logits; at 0 the most likely id is always taken.

    Returns:
      Ids, int32 `[length]`.

    Raises:
      TypeError: ids that are not integers, params that are not `Params`.
      ValueError: an empty prompt, an invalid id, a negative length or temperature.
    """
    params, key, prompt, sharpness = _check_generation(params, key, prompt, length, temperature)
    return _generate(params, key, prompt, sharpness, length=length, greedy=temperature == 0)


def stream_ids(
    params: Params, key: jax.Array, prompt: jax.Array, length: int, temperature: float = 1.0,
    block: int = BLOCK,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The ids of `generate`, in arrays of `block` ids, as they are drawn.

    The next block is drawn while the caller uses the last one.

    Args:
      params, key, prompt, length, temperature: as in `generate`.
      block: how many ids to draw at a time.

    Returns:
      An iterator over int32 arrays.

    Raises:
      TypeError, ValueError: as `generate`, before the first block.
    """
    params, key, prompt, sharpness = _check_generation(params, key, prompt, length, temperature)
    checks.positive("block", block)

    def blocks():
        state, drawn = _read(params, prompt), None
        for start in range(0, length, block):
            # The last block is drawn whole, then cut: another length would compile again.
            places, previous = np.arange(start, start + block, dtype=np.uint32), drawn
            greedy = temperature == 0
            state, drawn = _draw(params, state, key, places, sharpness, greedy=greedy)
            if previous is not None:
                yield np.asarray(previous)
        if drawn is not None:
            yield np.asarray(drawn)[: (length - 1) % block + 1]

    return blocks()


def _check_generation(params, key, prompt, length, temperature):
    params = check_params(params)
    none = isinstance(prompt, list | tuple) and not prompt
    prompt = checks.integers("prompt", np.zeros(0, np.int32) if none else prompt, (None,))
    if prompt.shape[0] == 0:
        checks.bad_value("prompt", "at least one id", "none")
    checks.random_key("key", key)
    # A raw key has the current default implementation; a cached program may have an older one.
    key = jax.random.wrap_key_data(jnp.asarray(key)) if key.ndim else key
    checks.whole("length", length)
    temperature = checks.number("temperature", temperature)
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        expected = f"0, or a finite number of at least {LEAST_TEMPERATURE}"
        checks.bad_value("temperature", expected, temperature)
    check_forward("params.cell", params.cell)
    inputs, outputs = first_cell(params.cell).U.shape[1], len(params.readout.V)
    if outputs != inputs:
        checks.bad_value("params", "as many outputs as inputs", f"{outputs} and {inputs}")
    checks.in_range("prompt", prompt, inputs)
    sharpness = jnp.asarray(1.0 / temperature if temperature else 1.0, jnp.float32)
    return params, key, prompt, sharpness


@partial(jax.jit, static_argnames=("length", "greedy"))
def _generate(params, key, prompt, sharpness, *, length, greedy):
    places = jnp.arange(length, dtype=jnp.uint32)
    return _draw(params, _read(params, prompt), key, places, sharpness, greedy=greedy)[1]


@jax.jit
def _read(params, prompt):
    """(h, y) after a prompt: the state of each layer, and the output of the last one."""
    h, hs = unroll_layers(params.cell, Ids(prompt))
    return h, hs[-1]


@partial(jax.jit, static_argnames="greedy")
def _draw(params, state, key, places, sharpness, *, greedy):
    """Draw the ids at these places, each with its own key: ((h, y) after them, the ids)."""

    def body(state, place):
        h, y = state
        logits = apply_readout(params.readout, y).astype(jnp.float32)
        if greedy:
            drawn = jnp.argmax(logits)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits * sharpness)
        drawn = drawn.astype(jnp.int32)
        return layers.step(params.cell, Ids(drawn), h), drawn

    return jax.lax.scan(body, state, places)

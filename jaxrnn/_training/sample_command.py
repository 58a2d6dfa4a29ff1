"""`jaxrnn sample`: text of a trained network, character by character as it comes."""

import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._api import checks
from jaxrnn._training import saved
from jaxrnn._training.levels import Decoder, to_ids, visible
from jaxrnn.text import Vocabulary, stream_ids

TEMPERATURE = 0.8


def sample(args: Any) -> int:
    """Run the command: args.directory, prompt, length, temperature, seed, best."""
    state, text, _ = saved.load(Path(args.directory), args.best)
    vocabulary = Vocabulary(text.characters)
    # Without a prompt from somewhere a text can begin: after a line break, if it has any.
    prompt = args.prompt or ("\n" if "\n" in text.characters else text.characters[0])
    try:
        ids = to_ids(vocabulary, text.level, prompt)
    except ValueError as error:
        raise checks.InputError(f"--prompt: {str(error).removeprefix('text: ')}") from error
    stream(
        state.params, vocabulary, text.level, ids, args.length, args.temperature, args.seed,
        before=ids if args.prompt else (),
        raw=text.level == "byte" and not sys.stdout.isatty(),
    )  # fmt: skip
    return 0


def stream(
    params: Any, vocabulary: Vocabulary, level: str, ids: np.ndarray, length: int,
    temperature: float, seed: int, *, before: Iterable[int] = (), raw: bool = False,
) -> None:  # fmt: skip
    """Print what a network says after these ids, as it comes, and a new line.

    Args:
      params: the network.
      vocabulary: its characters.
      level: what an id stands for.
      ids: what it reads first, at least one.
      length: how many it draws.
      temperature: see `generate`.
      seed: of the random choices.
      before: ids that are printed first.
      raw: print ids as the bytes that they are, and nothing else.
    """
    drawn = stream_ids(
        params, jax.random.key(seed), jnp.asarray(ids, jnp.int32), length, temperature
    )
    if raw:
        for block in chain([before], drawn):
            sys.stdout.buffer.write(bytes(map(int, block)))
            sys.stdout.buffer.flush()
        return
    decoder, shown = Decoder(vocabulary, level), visible if sys.stdout.isatty() else str
    try:
        for block in chain([before], drawn):
            print(shown(decoder.feed(block)), end="", flush=True)
    finally:
        # After Ctrl-C too, so that the prompt of the shell stands on a line of its own.
        print(decoder.finish(), flush=True)

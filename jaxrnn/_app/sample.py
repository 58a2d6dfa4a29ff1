"""`jaxrnn sample`: text from a trained network, printed as it is drawn."""

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._api import checks
from jaxrnn._app import devices
from jaxrnn._app.run import PRNG, load
from jaxrnn.text import Vocabulary, stream_ids

TEMPERATURE = 0.8


def sample(args: Any) -> int:
    devices.start()
    state, text, _ = load(Path(args.directory), args.best)
    vocabulary = Vocabulary(text.characters)
    # Without a prompt, begin after a line break, if the text has any.
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
    """Print `before`, then what the network draws after reading `ids`, and a new line.

    With `raw`, print ids as bytes and nothing else.
    """
    key = jax.random.key(seed, impl=PRNG)
    drawn = stream_ids(params, key, jnp.asarray(ids, jnp.int32), length, temperature)
    if raw:
        for block in chain([before], drawn):
            sys.stdout.buffer.write(bytes(map(int, block)))
            sys.stdout.buffer.flush()
        return
    shown = visible if sys.stdout.isatty() else str
    try:
        for text in decoded(vocabulary, level, chain([before], drawn)):
            print(shown(text), end="", flush=True)
    finally:
        # After Ctrl-C too, so that the shell's prompt is on its own line.
        print(flush=True)


def decoded(vocabulary: Vocabulary, level: str, blocks: Iterable[Iterable[int]]) -> Iterator[str]:
    r"""The text of blocks of ids; bytes that are not UTF-8 become \xNN."""
    texts = map(vocabulary.decode, blocks)
    if level == "char":
        return texts
    contents = (text.encode("latin-1") for text in texts)
    return codecs.iterdecode(contents, "utf-8", "backslashreplace")


def to_ids(vocabulary: Vocabulary, level: str, prompt: str) -> np.ndarray:
    """The ids of a prompt, int32 `[length]`; surrogates stand for bytes that are not UTF-8."""
    if level == "char":
        return vocabulary.encode(prompt)
    try:
        content = prompt.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        at = f"{prompt[error.start]!r} at position {error.start}"
        checks.bad_value("text", "characters that UTF-8 can encode", at)
    return np.frombuffer(content, np.uint8).astype(np.int32)


def visible(text: str) -> str:
    r"""A text for a terminal, with control characters as \xNN."""
    return re.sub(r"[\0-\x08\v\f\x0e-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)

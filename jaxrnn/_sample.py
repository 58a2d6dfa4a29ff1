"""Generation: the network reads a prompt and goes on by itself."""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn import _checks
from jaxrnn._cell import Ids, Params, check_forward, check_params, first_cell
from jaxrnn._layers import step_layers, unroll_layers
from jaxrnn._step import apply_readout

# Below it there is no inverse in float32.
LEAST_TEMPERATURE = 1.2e-38
# Ids that are drawn between two looks at them.
BLOCK = 16


def generate(
    params: Params, key: jax.Array, prompt: jax.Array, length: int, temperature: float = 1.0
) -> jax.Array:
    """Draw characters one by one, each from the softmax after all those before it.

    Args:
      params: the `Params`; |A| inputs and outputs.
      key: a JAX random key.
      prompt: ids that are read first, `[N]`, N ≥ 1.
      length: how many ids to draw.
      temperature: logits are divided by it; at 0 the likeliest id is always taken.

    Returns:
      Ids, int32 `[length]`.

    Raises:
      TypeError: ids that are not integers, params of another kind.
      ValueError: an empty prompt, an invalid id, a negative length or temperature.
    """
    params, prompt, sharpness = _check(params, key, prompt, length, temperature)
    return _generate(params, key, prompt, sharpness, length=length, greedy=temperature == 0)


def stream_ids(
    params: Params, key: jax.Array, prompt: jax.Array, length: int, temperature: float = 1.0,
    block: int = BLOCK,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The ids that `generate` draws, as they come: arrays of `block`, the last one shorter.

    A block is being drawn already while the one before it is looked at.
    """
    params, prompt, sharpness = _check(params, key, prompt, length, temperature)
    return _blocks(params, key, prompt, sharpness, length, temperature == 0, block)


def _check(params, key, prompt, length, temperature):
    params = check_params(params)
    prompt = _checks.integers("prompt", prompt, (None,))
    if prompt.shape[0] == 0:
        _checks.bad_value("prompt", "at least one id", "none")
    _checks.random_key("key", key)
    _checks.whole("length", length)
    temperature = _checks.number("temperature", temperature)
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        expected = f"0, or a finite number of at least {LEAST_TEMPERATURE}"
        _checks.bad_value("temperature", expected, temperature)
    check_forward("params.cell", params.cell)
    sizes = first_cell(params.cell).U.shape[1], params.readout.V.shape[0]
    if sizes[0] != sizes[1]:
        _checks.bad_value("params", "as many outputs as inputs", f"{sizes[1]} and {sizes[0]}")
    _checks.in_range("prompt", prompt, sizes[0])
    return params, prompt, jnp.asarray(1.0 / temperature if temperature else 1.0, jnp.float32)


def _blocks(params, key, prompt, sharpness, length, greedy, block):
    state, drawn = _read(params, prompt), None
    for start in range(0, length, block):
        # The last block is drawn whole too, and cut: another length would be another program.
        places, former = np.arange(start, start + block, dtype=np.uint32), drawn
        state, drawn = _draw(params, state, key, places, sharpness, greedy=greedy)
        if former is not None:
            yield np.asarray(former)
    if drawn is not None:
        yield np.asarray(drawn)[: (length - 1) % block + 1]


@partial(jax.jit, static_argnames=("length", "greedy"))
def _generate(params, key, prompt, sharpness, *, length, greedy):
    places = jnp.arange(length, dtype=jnp.uint32)
    return _draw(params, _read(params, prompt), key, places, sharpness, greedy=greedy)[1]


@jax.jit
def _read(params, prompt):
    """(h, y) after a prompt: the state of each layer, and what the last one puts out."""
    h, hs = unroll_layers(params.cell, Ids(prompt))
    return h, hs[-1]


@partial(jax.jit, static_argnames="greedy")
def _draw(params, state, key, places, sharpness, *, greedy):
    """Draw the ids of some places, each with a key of its own; (h, y) after them, and the ids."""

    def body(state, place):
        h, y = state
        logits = apply_readout(params.readout, y).astype(jnp.float32)
        if greedy:
            drawn = jnp.argmax(logits)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits * sharpness)
        drawn = drawn.astype(jnp.int32)
        return step_layers(params.cell, Ids(drawn), h), drawn

    return lax.scan(body, state, places)

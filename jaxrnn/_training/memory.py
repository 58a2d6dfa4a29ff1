"""What a device holds of a run: roughly, and before anything is compiled."""

import math
from typing import Any

import jax

from jaxrnn._core import schedule
from jaxrnn._training.config import Config, initial_state
from jaxrnn._training.corpus import Corpus
from jaxrnn._training.devices import MODEL, Placement

# Beside the state, of the size of all parameters: summed and mean gradients, new parameters.
ARRAYS_OF_PARAMETERS = 3
# Of each layer `[T, B, H]`, states and inputs U x, and of a segment of the steps adjoints.
ARRAYS_OF_STATES, ARRAYS_OF_ADJOINTS = 2, 1
# And `[T, B, K]` of a segment: logits, their exponentials and errors, and one in another layout.
# Evaluation has the first two, of all steps that it reads at once.
ARRAYS_OF_LOGITS, ARRAYS_OF_EVALUATED_LOGITS = 4, 2
# So many numbers evaluation may hold even if an update holds fewer: 0.5 MB against many calls.
EVALUATED_AT_ONCE = 2**17


def memory(config: Config, corpus: Corpus, placement: Placement) -> int:
    """Bytes on each device, roughly: parameters, optimiser, gradients, and a window's arrays."""
    shapes = jax.eval_shape(lambda: initial_state(config, len(corpus.vocabulary)))
    shardings = placement.of_state(shapes)
    kept = _bytes(shapes, shardings)
    kept += ARRAYS_OF_PARAMETERS * _bytes(shapes.params, shardings.params)
    evaluated = evaluation_window(config, corpus, placement)
    evaluated *= _of_a_step(config, corpus, placement, _held_out(config, corpus)[1])
    return kept + 4 * max(_of_an_update(config, corpus, placement), evaluated)


def evaluation_window(config: Config, corpus: Corpus, placement: Placement) -> int:
    """Steps of held-out text to read at once, so that it needs no more memory than an update."""
    length, streams = _held_out(config, corpus)
    numbers = max(_of_an_update(config, corpus, placement), EVALUATED_AT_ONCE)
    fitting = numbers // _of_a_step(config, corpus, placement, streams)
    return max(1, min(length, fitting))


def _held_out(config, corpus) -> tuple[int, int]:
    return corpus.held_out_streams(config.batch_size)[0].shape


def _of_an_update(config, corpus, placement) -> int:
    """Numbers in the arrays of an update."""
    sequences, alphabet = placement.share(config.batch_size), len(corpus.vocabulary)
    window = segment = config.seq_length
    if config.layers == 1:
        longest = max(config.hidden_size, alphabet)
        segment = schedule.segment_length(window, (sequences,), alphabet, longest)
    units, gathered = _units(config, placement)
    of_a_segment = ARRAYS_OF_ADJOINTS * units + gathered + ARRAYS_OF_LOGITS * alphabet
    return sequences * (window * ARRAYS_OF_STATES * units + segment * of_a_segment)


def _of_a_step(config, corpus, placement, streams) -> int:
    """Numbers in the arrays of evaluation, for each step that it reads at once."""
    units, gathered = _units(config, placement)
    logits = ARRAYS_OF_EVALUATED_LOGITS * len(corpus.vocabulary)
    return placement.share(streams) * (ARRAYS_OF_STATES * units + gathered + logits)


def _units(config, placement) -> tuple[int, int]:
    """Of all layers those of a device, and those of one layer if they are gathered from several."""
    model = placement.mesh.shape[MODEL]
    return config.layers * config.hidden_size // model, config.hidden_size * (model > 1)


def _bytes(shapes: Any, shardings: Any) -> int:
    return sum(
        math.prod(how.shard_shape(x.shape)) * x.dtype.itemsize
        for x, how in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )

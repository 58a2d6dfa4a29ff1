"""What a run will do, said before anything is compiled."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from jaxrnn import _schedule
from jaxrnn._training.config import Config, initial_state
from jaxrnn._training.corpus import Corpus
from jaxrnn._training.devices import DATA, MODEL, Placement
from jaxrnn._training.levels import UNITS

# Beside the state, of the size of all parameters: summed and mean gradients, new parameters.
ARRAYS_OF_PARAMETERS = 3
# Of each layer `[T, B, H]`, states and inputs U x, and of a segment of the steps adjoints.
ARRAYS_OF_STATES, ARRAYS_OF_ADJOINTS = 2, 1
# And `[T, B, K]` of a segment: logits, their exponentials and errors.
ARRAYS_OF_LOGITS = 3


def lines(config: Config, corpus: Corpus, placement: Placement) -> Iterator[str]:
    """The plan, line by line."""
    unit = f"{UNITS[corpus.level]}s"
    alphabet = "" if corpus.level == "byte" else f", {len(corpus.vocabulary)} distinct"
    yield (
        f"{corpus.name}: {len(corpus.train):,} {unit}, {len(corpus.held_out):,} more held out"
        f"{alphabet}"
    )
    shapes = _shapes(config, corpus)
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    window = config.batch_size * config.seq_length
    times = config.steps * window / len(corpus.train)
    yield (
        f"{weights:,} parameters, {config.steps:,} updates of {config.batch_size} × "
        f"{config.seq_length} {unit}: the text {times:.3g} times"
    )
    yield f"{_devices(placement)}, about {memory(config, corpus, placement) / 1e6:,.0f} MB on each"


def memory(config: Config, corpus: Corpus, placement: Placement) -> int:
    """Bytes on each device, roughly: parameters, optimiser, gradients, and a window's arrays."""
    shapes, alphabet = _shapes(config, corpus), len(corpus.vocabulary)
    shardings = placement.of_state(shapes)
    kept = _bytes(shapes, shardings)
    kept += ARRAYS_OF_PARAMETERS * _bytes(shapes.params, shardings.params)
    sequences = config.batch_size // placement.mesh.shape[DATA]
    window = segment = config.seq_length
    if config.layers == 1:
        longest = max(config.hidden_size, alphabet)
        segment = _schedule.segment_length(window, (config.batch_size,), longest)
    units = config.layers * config.hidden_size // placement.mesh.shape[MODEL]
    numbers = window * ARRAYS_OF_STATES * units
    numbers += segment * (ARRAYS_OF_ADJOINTS * units + ARRAYS_OF_LOGITS * alphabet)
    return kept + 4 * sequences * numbers


def _shapes(config, corpus) -> Any:
    return jax.eval_shape(lambda: initial_state(config, len(corpus.vocabulary)))


def _bytes(shapes, shardings):
    return sum(
        math.prod(how.shard_shape(x.shape)) * x.dtype.itemsize
        for x, how in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def _devices(placement):
    kind = jax.devices()[0].platform
    count, processes = placement.devices, jax.process_count()
    said = f"{count} {kind} device{'s' * (count > 1)}"
    if processes > 1:
        said += f" in {processes} processes"
    data, model = placement.mesh.shape[DATA], placement.mesh.shape[MODEL]
    if data > 1:
        said += f", the batch over {data}"
    if model > 1:
        said += f", hidden units over {model}"
    return said

"""What a run will do, said before anything is compiled."""

import math
from collections.abc import Iterator

import jax

from jaxrnn._training.config import Config, initial_state
from jaxrnn._training.corpus import Corpus
from jaxrnn._training.devices import DATA, MODEL, Placement
from jaxrnn._training.levels import UNITS
from jaxrnn._training.memory import memory


def lines(config: Config, corpus: Corpus, placement: Placement) -> Iterator[str]:
    """The plan, line by line."""
    unit = f"{UNITS[corpus.level]}s"
    alphabet = "" if corpus.level == "byte" else f", {len(corpus.vocabulary)} distinct"
    yield (
        f"{corpus.name}: {len(corpus.train):,} {unit}, {len(corpus.held_out):,} more held out"
        f"{alphabet}"
    )
    shapes = jax.eval_shape(lambda: initial_state(config, len(corpus.vocabulary)))
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    window = config.batch_size * config.seq_length
    times = config.steps * window / len(corpus.train)
    yield (
        f"{weights:,} parameters, {config.steps:,} updates of {config.batch_size} × "
        f"{config.seq_length} {unit}: the text {times:.3g} times"
    )
    yield f"{_devices(placement)}, about {memory(config, corpus, placement) / 1e6:,.0f} MB on each"


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

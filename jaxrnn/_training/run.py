"""One training run: from a corpus to a run directory."""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxrnn import _checks, train
from jaxrnn._init import init_params
from jaxrnn._text import Vocabulary, streams
from jaxrnn._training import checkpoints
from jaxrnn._training.corpus import Corpus
from jaxrnn._training.devices import Placement

REPORT_EVERY = 25


@dataclass(frozen=True)
class Config:
    """What a run is made of; its fields are the options of `jaxrnn train`."""

    hidden_size: int = 256
    layers: int = 1
    seq_length: int = 64
    batch_size: int = 64
    steps: int = 2000
    learning_rate: float = 3e-3
    grad_clip: float = 1.0
    optimizer: str = "adam"
    activation: str = "tanh"
    recurrent: str = "orthogonal"
    held_out: float = 0.1
    eval_every: int = 250
    seed: int = 0


class DivergedError(Exception):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: train.TrainState
    steps: int
    bits: float
    seconds: float
    stopped: bool


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optax optimiser, its learning rate decaying to 0 as a cosine, gradients clipped."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = getattr(optax, config.optimizer)(rate)
    if config.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)
    return optimizer


def initial_state(config: Config, size: int) -> train.TrainState:
    """The state of a run before its first update, for |A| characters."""
    params = init_params(
        jax.random.key(config.seed), size, config.hidden_size, size,
        layers=config.layers, recurrent=config.recurrent, activation=config.activation,
    )  # fmt: skip
    return train.init_state(params, make_optimizer(config), config.batch_size)


def load(out: Path) -> tuple[train.TrainState, Vocabulary, Config]:
    """A run as it was saved.

    Raises:
      InputError: no run directory, or a damaged one.
    """
    vocabulary = checkpoints.load_vocabulary(out)
    values = checkpoints.load_json(out, checkpoints.CONFIG)
    try:
        config = Config(**values["options"])
        template = jax.eval_shape(lambda: initial_state(config, len(vocabulary)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = out / checkpoints.CONFIG
        raise _checks.InputError(f"{path}: expected the options of a run: {error}") from error
    return checkpoints.load_state(out, template), vocabulary, config


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: an update that was begun is finished first; twice ends it."""
    pressed = False

    def handler(*_):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    corpus: Corpus, config: Config, out: Path, report: Callable[[dict[str, Any]], None]
) -> Result:
    """Train, and leave a run directory behind, or nothing at all.

    Args:
      corpus: the text.
      config: the options.
      out: an empty or new directory.
      report: called with each row of metrics.

    Raises:
      InputError: `out` cannot be used.
      DivergedError: a loss that is not finite; nothing is left in `out`.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    checkpoints.claim(out)
    try:
        checkpoints.write_json(
            out / checkpoints.CONFIG, {"text": corpus.name, "options": asdict(config)}
        )
        checkpoints.write_json(out / checkpoints.VOCABULARY, corpus.vocabulary.characters)

        def keep_and_report(row):
            checkpoints.append_metrics(out, row)
            report(row)

        result = _loop(corpus, config, keep_and_report)
        checkpoints.save_state(out, result.state)
        return result
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            folder.rmdir()
        raise


def _loop(corpus, config, report):
    placement = Placement(config.batch_size)
    state = placement.everywhere(initial_state(config, len(corpus.vocabulary)))
    state = replace(state, h=placement.split(state.h))
    update = train.make_update(make_optimizer(config))
    held_out = corpus.held_out_streams(config.batch_size)
    windows = train.windows(*streams(corpus.train, config.batch_size), config.seq_length)
    losses, step, timed_from, bits = [], 0, 0, math.nan
    begun = since = time.perf_counter()
    with _interrupts() as interrupted:
        done = False
        while not done:
            inputs, targets, first = next(windows)
            if first:
                state = train.start_over(state)
            state, loss = update(state, placement.split(inputs, 1), placement.split(targets, 1))
            losses.append(loss)
            step += 1
            if step == 1:
                # The first update compiles; it does not count as reading.
                loss.block_until_ready()
                timed_from, since = step, time.perf_counter()
            done = step == config.steps or interrupted()
            due = done or step % config.eval_every == 0
            if step % REPORT_EVERY and not due:
                continue
            mean = _finite_mean(losses, step)
            seconds = time.perf_counter() - since
            read = (step - timed_from) * targets.size
            row = {
                "step": step,
                "loss": mean,
                "bits": mean / math.log(2),
                "characters_per_second": round(read / seconds),
                "seconds": round(time.perf_counter() - begun, 3),
            }
            if due:
                bits = train.evaluate(placement.together(state.params), *held_out) / math.log(2)
                _require_finite(bits, step)
                row["held_out_bits"] = bits
            report(row)
            losses, timed_from, since = [], step, time.perf_counter()
        state = placement.together(state)
        return Result(state, step, bits, time.perf_counter() - begun, step < config.steps)


def _finite_mean(losses, step):
    values = np.array([float(loss) for loss in losses])
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        _require_finite(values[bad[0]], step - len(values) + int(bad[0]) + 1)
    return float(values.mean())


def _require_finite(value, step):
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss became {value} at step {step}; nothing was kept; "
            "try a smaller --learning-rate or --grad-clip"
        )

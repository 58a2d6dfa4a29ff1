"""One training run: its options, and training from the start or a checkpoint to the end."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrnn import train
from jaxrnn._api import checks
from jaxrnn._api.cell import init_params
from jaxrnn._api.checks import bad_input
from jaxrnn._app import devices, directory
from jaxrnn._app.checkpoints import Checkpoints, FailedError, GoneError
from jaxrnn._app.corpus import UNITS, Corpus, Text, release
from jaxrnn._app.devices import Placement
from jaxrnn.text import Vocabulary, streams

REPORT_EVERY = 25
EVALUATED_AT_ONCE = 2**13  # characters of held-out text, which bounds memory
FREE = ("checkpoint_every", "skip_nonfinite")  # options that do not change a run's numbers
CHOICES = {
    "level": tuple(UNITS),
    "optimizer": ("adam", "adamw", "nadam", "rmsprop", "adagrad", "sgd"),
    "activation": ("tanh", "relu", "sigmoid", "identity"),
    "recurrent": ("orthogonal", "identity", "normal", "uniform"),
}
LEAST = {"seed": 0, "eval_length": 2}  # 1 for other whole numbers
PRNG = "threefry2x32"  # independent of JAX's default


@dataclass(frozen=True)
class Config:
    """The options of `jaxrnn train`."""

    level: str = "char"
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
    eval_length: int = 500_000
    checkpoint_every: int = 250
    skip_nonfinite: bool = False
    seed: int = 0


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_begun(out: Path) -> tuple[Config, list[str]]:
    """The options of a run, and the files and directories of its text."""

    def parse(values):
        config = Config(**values["options"])
        for field in fields(Config):
            value, kind = getattr(config, field.name), type(field.default)
            if type(value) not in (kind, int if kind is float else kind):
                checks.bad_type(field.name, kind.__name__, type(value).__name__)
            if kind is int:
                checks.whole(field.name, value, LEAST.get(field.name, 1))
            if kind is str:
                checks.one_of(field.name, value, CHOICES[field.name])
        return config, list(map(str, values["sources"]))

    return directory.read_json(out / directory.CONFIG, parse, "the options of a run")


def read_text(out: Path) -> tuple[Text, dict[str, float]]:
    """The `Text` of a run, and its reference losses."""

    def parse(values):
        text = Text(**{**values["text"], "characters": tuple(values["text"]["characters"])})
        checks.one_of("level", text.level, CHOICES["level"])
        Vocabulary(text.characters)  # raises if they are invalid
        return text, {str(name): float(bits) for name, bits in values["references"].items()}

    return directory.read_json(out / directory.TEXT, parse, "the text of a run")


def text_as_json(text: Text) -> dict[str, Any]:
    return {**asdict(text), "characters": "".join(text.characters)}


def go_on_with(begun: Config, options: Mapping[str, Any], out: Path) -> Config:
    """The options of a resumed run: an InputError if any would change its numbers."""
    for name, value in options.items():
        if name not in FREE and value != (before := getattr(begun, name)):
            bad_input(flag(name), f"{before}, as in {out}", value)
    return replace(begun, **options)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = getattr(optax, config.optimizer)(rate)
    if config.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)
    return optimizer


def initial_state(config: Config, size: int) -> train.TrainState:
    key = jax.random.key(config.seed, impl=PRNG)
    params = init_params(
        key, size, config.hidden_size, size, dtype=jnp.float32,
        layers=config.layers, recurrent=config.recurrent, activation=config.activation,
    )  # fmt: skip
    state = train.init_state(params, make_optimizer(config), config.batch_size)
    # A raw key, which is saved and placed like any array.
    return replace(state, key=jax.random.key_data(key))


def identity(config: Config, text: Text) -> dict[str, Any]:
    """What all checkpoints of a run have in common, as JSON values."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    content = text_as_json(text)
    del content["name"]  # the same text may have another name
    return {"options": options, "text": content}


def check_identity(checkpoints: Checkpoints, step: int, config: Config, text: Text) -> None:
    """Refuse a checkpoint that is damaged or of another run."""
    about = checkpoints.about(step)
    for part, values in identity(config, text).items():
        entry = about.get(part)
        saved = entry if isinstance(entry, dict) else {}
        for name, value in values.items():
            if saved.get(name) != value:
                detail = "" if name == "characters" else f", {saved.get(name)} instead of {value}"
                got = f"one of another {name}{detail}"
                bad_input(checkpoints.folder / str(step), "a checkpoint of this run", got)


def load_state(
    checkpoints: Checkpoints, step: int, config: Config, text: Text, placement: Placement
) -> train.TrainState:
    shapes: Any = jax.eval_shape(lambda: initial_state(config, len(text.characters)))
    shapes = jax.tree.map(
        lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how),
        shapes, placement.of_state(shapes),
    )  # fmt: skip
    state = checkpoints.state(step, shapes)
    if int(state.step) != step:
        path, got = checkpoints.folder / str(step), f"that of step {state.step}"
        bad_input(path, f"the state of step {step}", got)
    return state


def load(out: Path, best: bool = False) -> tuple[train.TrainState, Text, Config]:
    """Load the newest or the best checkpoint of a run, which may be training, on one device."""
    (config, _), (text, _) = read_begun(out), read_text(out)
    placement = Placement(1, config.hidden_size)
    checkpoints = Checkpoints(out)
    while True:
        steps, least = directory.checkpoint_steps(out), directory.best_checkpoint(out)
        step = (least[0] if least else None) if best else max(steps, default=None)
        if step is None:
            which = "none whose held-out loss was measured" if steps else "none yet"
            bad_input(out, "a run with a checkpoint", which)
        try:
            check_identity(checkpoints, step, config, text)
            return load_state(checkpoints, step, config, text, placement), text, config
        except GoneError:
            continue  # dropped for a newer or better one


class Run:
    """A new or resumed run: its `step`, its last held-out `bits` or NaN, and its `seconds`."""

    def __init__(self, out: Path, config: Config, corpus: Corpus, placement: Placement):
        self.out, self.config, self.corpus, self.placement = out, config, corpus, placement
        self._checkpoints = Checkpoints(out)
        self.step = max(directory.checkpoint_steps(out), default=0)
        if self.step:
            check_identity(self._checkpoints, self.step, config, corpus.text)
        rows = [row for row in directory.read_metrics(out) if row["step"] <= self.step]
        self._skipped = rows[-1].get("skipped", 0) if rows else 0
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        bits = [row["held_out_bits"] for row in rows if "held_out_bits" in row]
        self.bits = bits[-1] if bits and bits[-1] is not None else math.nan
        self._least = min((each for each in bits if each is not None), default=math.inf)

    def go(self, report: Callable[[dict[str, Any]], None]) -> int:
        """Train to the end, and return 0, or until a signal, and return that."""
        try:
            return self._go(report)
        except train.DivergedError as error:
            way = "start a new run with a smaller --learning-rate or --grad-clip"
            raise FailedError(f"{error}; {way}, or resume with --skip-nonfinite") from error
        except jax.errors.JaxRuntimeError as error:
            if devices.are_several():
                # A lost process breaks the next collective.
                raise devices.LostError(error) from error
            raise FailedError(directory.first_line(error)) from error
        except OSError as error:
            name = error.filename or self.out
            raise FailedError(f"{name}: cannot be written: {error.strerror}") from error

    def _go(self, report):
        config, put, text = self.config, self.placement.split, self.corpus.text
        if devices.is_first():
            self._checkpoints.prepare()
        if self.step:
            state = load_state(self._checkpoints, self.step, config, text, self.placement)
        else:
            state = self.placement.put_state(initial_state(config, len(text.characters)))
        if devices.is_first():
            directory.trim_metrics(self.out, self.step)
        update = train.make_checked_update(make_optimizer(config), mesh=self.placement.mesh)
        inputs, targets = streams(self.corpus.train, config.batch_size)
        windows = train.windows(inputs, targets, config.seq_length, self.step)
        placed = ((put(x, 1), put(y, 1), first) for x, y, first in windows)
        held_out = self.corpus.held_out_streams(config.batch_size)
        at_once = max(1, EVALUATED_AT_ONCE // held_out[0].shape[1])
        begun, signal = time.perf_counter() - self.seconds, 0
        with devices.stop_requests() as asked:

            def stop(step):
                nonlocal signal
                # All processes must stop at the same step.
                if not devices.are_several() or step % REPORT_EVERY == 0:
                    signal = devices.largest(asked())
                return signal > 0

            def save(last, measured):
                self._checkpoints.save(last.step, last.state, identity(config, text), measured)

            devices.wait_for_all("training")
            for last in train.fit(
                state, update, placed, config.steps,
                every=(REPORT_EVERY, config.eval_every, config.checkpoint_every),
                skip_nonfinite=config.skip_nonfinite, stop=stop,
            ):  # fmt: skip
                self.step, ended = last.step, last.step == config.steps
                release(self.corpus.train)
                row = self._row(last, begun)
                measured, best = None, False
                if ended or last.step % config.eval_every == 0:
                    nats = train.evaluate(last.state.params, *held_out, seq_length=at_once, put=put)
                    measured = row["held_out_bits"] = self._measured(nats, last)
                    self.bits = math.nan if measured is None else measured
                    best = self.bits < self._least
                    self._least = self.bits if best else self._least
                if devices.is_first():
                    directory.append_metrics(self.out, row)
                due = ended or signal or best or last.step % config.checkpoint_every == 0
                if due:
                    save(last, measured)
                try:
                    report(row)
                except OSError as error:  # the output was closed
                    if not (due or devices.are_several()):
                        save(last, None)
                    if not signal:
                        said = f"standard output: cannot be written: {error.strerror}"
                        raise FailedError(said) from error
        return 0 if self.step == config.steps else signal

    def _row(self, last, begun):
        self.seconds = round(time.perf_counter() - begun, 3)
        finite, pace = math.isfinite(last.loss), last.updates_per_second
        window = self.config.batch_size * self.config.seq_length
        row = {
            "step": last.step,
            "loss": last.loss if finite else None,
            "bits": last.loss / math.log(2) if finite else None,
            "characters_per_second": round(pace * window) if math.isfinite(pace) else None,
            "seconds": self.seconds,
        }
        self._skipped += last.skipped
        if self._skipped:
            row["skipped"] = self._skipped
        return row

    def _measured(self, nats, last):
        if math.isfinite(nats):
            return nats / math.log(2)
        if self.config.skip_nonfinite:
            return None
        raise train.DivergedError(
            f"the held-out loss became {nats} at step {last.step} (gradient norm "
            f"{last.gradient_norm:.4g}, parameter norm {last.parameter_norm:.4g})"
        )

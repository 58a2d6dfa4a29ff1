"""The options of a training run, and the optimiser and first state that they make."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import jax
import optax

from jaxrnn import train
from jaxrnn._api import checks
from jaxrnn._api.cell import init_params

# These change no number of a run, so that one that goes on may have others.
FREE = ("checkpoint_every", "skip_nonfinite")


# What an option may be that is one of a few names.
CHOICES = {
    "level": ("char", "byte"),
    "optimizer": ("adam", "adamw", "nadam", "rmsprop", "adagrad", "sgd"),
    "activation": ("tanh", "relu", "sigmoid", "identity"),
    "recurrent": ("orthogonal", "identity", "normal", "uniform"),
}
# Whole numbers are at least 1, but for these.
LEAST = {"seed": 0, "eval_length": 2}


@dataclass(frozen=True)
class Config:
    """What a run is made of; its fields are the options of `jaxrnn train`."""

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


def read_config(values: Any) -> Config:
    """The options from JSON.

    Raises:
      TypeError, ValueError: what is no option, of another type, or not among its values.
    """
    config = Config(**values)
    for field in fields(Config):
        value, kind = getattr(config, field.name), type(field.default)
        whole_number = kind is float and type(value) is int
        if type(value) is not kind and not whole_number:
            checks.bad_type(field.name, kind.__name__, type(value).__name__)
        if kind is int:
            checks.whole(field.name, value, LEAST.get(field.name, 1))
        if kind is str:
            checks.one_of(field.name, value, CHOICES[field.name])
    return config


def flag(name: str) -> str:
    """How a field is called on the command line."""
    return "--" + name.replace("_", "-")


def go_on_with(begun: Config, given: Mapping[str, Any], run: object) -> Config:
    """The options of a run that goes on, where some are given again.

    Args:
      begun: what the run was begun with.
      given: the fields that the user has named.
      run: what messages call it.

    Raises:
      InputError: another value of one that changes the numbers.
    """
    for name, value in given.items():
        if name not in FREE and value != (before := asdict(begun)[name]):
            expected = f"{before}, as {run} was begun with"
            raise checks.InputError(f"{flag(name)}: expected {expected}, got {value}")
    return replace(begun, **given)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optax optimiser, its learning rate decaying to 0 as a cosine, gradients clipped."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = getattr(optax, config.optimizer)(rate)
    if config.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)
    return optimizer


def initial_state(config: Config, size: int) -> train.TrainState:
    """The state of a run before its first update, for |A| characters."""
    key = jax.random.key(config.seed)
    params = init_params(
        key, size, config.hidden_size, size,
        layers=config.layers, recurrent=config.recurrent, activation=config.activation,
    )  # fmt: skip
    # Raw, which every way of saving and placing takes as the array that it is.
    key = jax.random.key_data(key)
    return train.init_state(params, make_optimizer(config), config.batch_size, key)

"""A run as it was saved: its options and text, and the state of one of its checkpoints."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrnn import train
from jaxrnn._api import checks
from jaxrnn._training import directory
from jaxrnn._training.checkpoints import Checkpoints
from jaxrnn._training.config import CHOICES, FREE, Config, initial_state, read_config
from jaxrnn._training.devices import Placement
from jaxrnn._training.encode import Text
from jaxrnn.text import Vocabulary


@dataclass(frozen=True)
class Begun:
    """What a run was begun with.

    Args:
      config: its options.
      sources: the files and directories of its text, absolute.
    """

    config: Config
    sources: list[str]

    def as_json(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"sources": self.sources, "options": asdict(self.config)}


def read_begun(out: Path) -> Begun:
    """What a run was begun with.

    Raises:
      InputError: no run directory, or a damaged one.
    """

    def parse(values):
        return Begun(read_config(values["options"]), list(map(str, values["sources"])))

    return directory.read_json(out / directory.CONFIG, parse, "the options of a run")


def read_text(out: Path) -> tuple[Text, dict[str, float]]:
    """What there is to know of the text of a run, and what counting predicts of it.

    Raises:
      InputError: it is not there or is damaged.
    """

    def parse(values):
        text = Text(**{**values["text"], "characters": tuple(values["text"]["characters"])})
        checks.one_of("level", text.level, CHOICES["level"])
        Vocabulary(text.characters)  # which says what is wrong with them
        return text, {str(name): float(bits) for name, bits in values["references"].items()}

    return directory.read_json(out / directory.TEXT, parse, "the text of a run")


def text_as_json(text: Text) -> dict[str, Any]:
    """What text.json holds, and every checkpoint."""
    return {**asdict(text), "characters": "".join(text.characters)}


def identity(config: Config, text: Text) -> dict[str, Any]:
    """What every checkpoint of a run agrees in, as JSON gives it back."""
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    known = text_as_json(text)
    del known["name"]  # the same file may be called otherwise
    return {"options": options, "text": known}


def check_identity(checkpoints: Checkpoints, step: int, config: Config, text: Text) -> None:
    """Refuse a checkpoint of another run.

    Raises:
      InputError: it is one, or is damaged.
    """
    ours, theirs = identity(config, text), checkpoints.about(step)
    path = checkpoints.folder / str(step)
    for part, values in ours.items():
        for name, value in values.items():
            found = theirs.get(part)
            saved = found.get(name) if isinstance(found, dict) else None
            if saved != value:
                detail = "" if name == "characters" else f", {saved} instead of {value}"
                raise checks.InputError(
                    f"{path}: expected a checkpoint of this run, got one of another {name}{detail}"
                )


def load_state(
    checkpoints: Checkpoints, step: int, config: Config, text: Text, placement: Placement
) -> train.TrainState:
    """The state of a checkpoint of this run, split as the placement says.

    Raises:
      InputError: it is damaged.
    """
    shapes: Any = jax.eval_shape(lambda: initial_state(config, len(text.characters)))
    shapes = jax.tree.map(
        lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how),
        shapes, placement.of_state(shapes),
    )  # fmt: skip
    state = checkpoints.state(step, shapes)
    if int(state.step) != step:
        path = checkpoints.folder / str(step)
        expected = f"expected the state of step {step}, got that of step {state.step}"
        raise checks.InputError(f"{path}: {expected}")
    return state


def load(out: Path, best: bool = False) -> tuple[train.TrainState, Text, Config]:
    """The newest or the best checkpoint of a run, on one device.

    Raises:
      InputError: no run directory, no checkpoint in it yet, or a damaged one.
    """
    config, (text, _) = read_begun(out).config, read_text(out)
    checkpoints = Checkpoints(out)
    step = checkpoints.best() if best else max(checkpoints.steps(), default=None)
    if step is None:
        which = "whose held-out loss was measured" if best and checkpoints.steps() else "yet"
        raise checks.InputError(f"{out}: expected a run with a checkpoint, got none {which}")
    check_identity(checkpoints, step, config, text)
    placement = Placement(1, config.hidden_size)
    return load_state(checkpoints, step, config, text, placement), text, config

"""What a run needs before it begins: its directory, its options, its text as ids, its devices."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrnn._api import checks
from jaxrnn._console import Console
from jaxrnn._training import directory, kept, processes, progress, saved
from jaxrnn._training.config import Config, go_on_with
from jaxrnn._training.corpus import Corpus, open_corpus
from jaxrnn._training.devices import Placement
from jaxrnn._training.encode import Text, encode
from jaxrnn._training.lock import locked
from jaxrnn._training.signals import undone
from jaxrnn._training.sources import STANDARD_INPUT


@dataclass(frozen=True)
class Asked:
    """What the user has asked for.

    Args:
      out: the run directory.
      resume: whether a run is there to go on with.
      files: the names of the text of a new one.
      given: the fields of `Config` that were named.
      model_devices: how many devices share the hidden units.
    """

    out: Path
    resume: bool
    files: Sequence[str]
    given: Mapping[str, Any]
    model_devices: int


@dataclass(frozen=True)
class Ready:
    """What a run needs."""

    config: Config
    text: Text
    references: dict[str, float]
    corpus: Corpus
    placement: Placement


def make_ready(asked: Asked, console: Console, held: ExitStack) -> Ready:
    """Prepare a run in its directory, by the first process, and read it there, by all.

    Args:
      asked: for what.
      console: for progress.
      held: gets the lock on the run, in the first process.

    Raises:
      RefusedError: bad input, in one of the processes.
      LostError: another process did not come.
    """
    problem, alike = None, {}
    ready: Any = None
    with ExitStack() as marked:
        try:
            if processes.is_first():
                with undone():
                    _prepare(asked, console, held)
                if processes.are_several():
                    directory.put_mark(asked.out)
                    marked.callback(directory.remove_mark, asked.out)
        except checks.InputError as error:
            problem = error
        processes.wait_for_all("text")
        try:
            if problem is None:
                ready = _read(asked)
                alike = _alike(asked, ready)
        except checks.InputError as error:
            problem = error
        processes.agree(problem, alike)
    return ready


def _prepare(asked, console, held):
    out, given = asked.out, asked.given
    if asked.resume:
        if asked.files:
            raise checks.InputError("--resume: expected no text beside it, the run has its own")
        begun = saved.read_begun(out)
        go_on_with(begun.config, given, out)
        held.enter_context(locked(out / directory.CONFIG))
        # Where there are checkpoints the text is what they were made of, and not to be replaced.
        if not (out / directory.TEXT).exists() and not kept.steps(out):
            _encode(begun, out, console)
    else:
        sources = [f if f == STANDARD_INPUT else str(Path(f).absolute()) for f in asked.files]
        begun = saved.Begun(Config(**given), sources)
        _placement(begun.config, asked)  # what cannot be split shall leave no directory behind
        with directory.claimed(out, begun.as_json(), held):
            _encode(begun, out, console, asked.files)


def _encode(begun, out, console, names=None):
    config = begun.config
    if names is None and STANDARD_INPUT in begun.sources:
        raise checks.InputError(
            f"{out}: its text came from standard input, which is gone; begin again in another place"
        )
    with progress.of_bytes(console, "encoding") as report:
        text = encode(
            begun.sources if names is None else names, config.level, out / directory.IDS, report
        )
    corpus = _open(out, config, text)
    about = {"text": saved.text_as_json(text), "references": corpus.references()}
    directory.write_json(out / directory.TEXT, about)


def _read(asked):
    out = asked.out
    config = go_on_with(saved.read_begun(out).config, asked.given, out)
    text, references = saved.read_text(out)
    # Whoever goes on has not written the text just now.
    corpus = _open(out, config, text, verify=asked.resume and processes.is_first())
    return Ready(config, text, references, corpus, _placement(config, asked))


def _open(out, config, text, verify=False):
    return open_corpus(
        out / directory.IDS, text,
        held_out=config.held_out, batch_size=config.batch_size, seq_length=config.seq_length,
        evaluated=config.eval_length, verify=verify,
    )  # fmt: skip


def _placement(config, asked):
    return Placement(config.batch_size, config.hidden_size, asked.model_devices)


def _alike(asked, ready):
    """What all processes must find alike, by what is said where they do not."""
    out = asked.out
    return {
        "--out: expected a directory that all processes see": directory.read_mark(out),
        "--process: expected the same options in all processes": (
            ready.config, asked.model_devices
        ),
        "--resume: expected the same newest checkpoint": max(kept.steps(out), default=0),
    }  # fmt: skip

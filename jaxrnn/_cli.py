"""The command line: `jaxrnn train`, `sample`, `show` and `example`."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from typing import ClassVar, NoReturn

from jaxrnn._api.checks import InputError
from jaxrnn.text import LEAST_TEMPERATURE

EXIT_DIFFERENT, EXIT_BAD_INPUT = 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number(kind: type, low: float, expected: str, below: float = math.inf) -> Callable:
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < below):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


_COUNT = _number(int, 1, "a whole number, at least 1")
_NATURAL = _number(int, 0, "a whole number, at least 0")
_SEED = _number(int, 0, "a whole number from 0 to 2³² − 1", below=2**32)
_POSITIVE = _number(float, math.ulp(0), "a number above 0")
_NOT_NEGATIVE = _number(float, 0, "a number, at least 0")

# group -> option -> (how it is read, None where it is one of a few; what it says)
_TRAIN = {
    "model": {
        "hidden_size": (_COUNT, "hidden units of a layer"),
        "layers": (_COUNT, "recurrent layers, each on the states of the one before"),
        "activation": (None, "nonlinearity"),
        "recurrent": (None, "how W is drawn"),
    },
    "training": {
        "steps": (_COUNT, "updates"),
        "seq_length": (_COUNT, "characters a window: how far gradients go back"),
        "batch_size": (_COUNT, "streams of text read side by side"),
        "optimizer": (None, "from optax"),
        "learning_rate": (_POSITIVE, "at the start; decays to 0 as a cosine"),
        "grad_clip": (_NOT_NEGATIVE, "largest global norm of the gradient; 0: any"),
        "skip_nonfinite": (bool, "leave out updates that are not finite, instead of ending"),
        "seed": (_SEED, "of the initial weights"),
    },
    "text": {
        "level": (None, "characters of UTF-8, or bytes of anything"),
        "held_out": (
            _number(float, math.ulp(0), "a fraction between 0 and 1", below=1),
            "fraction, at the end, that is not trained on",
        ),
        "eval_every": (_COUNT, "updates between evaluations on the held-out text"),
        "eval_length": (
            _number(int, 2, "a whole number, at least 2"),  # all but the first are predicted
            "characters of it evaluated at most",
        ),
    },
    "run": {"checkpoint_every": (_COUNT, "updates between checkpoints")},
}  # fmt: skip
_TRAIN_OPTIONS = [name for options in _TRAIN.values() for name in options]


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = _Parser(prog="jaxrnn", description="The Elman recurrent network in JAX.")
    parser.add_argument("--version", action="version", version=version("jaxrnn"))
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=("bash", "zsh", "tcsh"),
        metavar="SHELL", help="print what completes these commands in bash, zsh or tcsh",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser(
        "train", help="train a character network on text",
        usage="%(prog)s [options] [TEXT ...]",
    ))  # fmt: skip
    _add_sample(commands.add_parser("sample", help="generate text with a trained network"))
    show = commands.add_parser("show", help="what a run is, where it stands, its curves")
    show.add_argument("directory", metavar="RUN", help="what `jaxrnn train` left behind")
    show.set_defaults(run=_show)
    example = commands.add_parser("example", help="the source's example beside its numbers")
    example.add_argument("--plot", metavar="FILE.png", help="draw the ensemble's loss curves")
    example.set_defaults(run=_example)
    return parser


def _add_train(train):
    from jaxrnn._training.config import CHOICES, Config, flag

    defaults = {field.name: field.default for field in fields(Config)}
    groups = {title: train.add_argument_group(title) for title in _TRAIN}
    groups["text"].add_argument(
        "files", nargs="*", metavar="TEXT",
        help="files, directories, - for standard input; CPython's own documentation if none",
    )  # fmt: skip
    where = groups["run"].add_mutually_exclusive_group()
    where.add_argument(
        "--out", metavar="RUN", type=_named, help="run directory (default: a new one in runs/)"
    )
    where.add_argument("--resume", metavar="RUN", type=_named,
                       help="go on with a run that was interrupted")  # fmt: skip
    for title, options in _TRAIN.items():
        for name, (kind, text) in options.items():
            # Absent unless named: a run that goes on has its own.
            how = {"default": argparse.SUPPRESS}
            kind = kind or CHOICES[name]
            _option(groups[title], flag(name), kind, defaults[name], text, **how)
    _option(groups["run"], "--sample-length", _NATURAL, 400, "characters to generate at the end")
    _option(groups["run"], "--model-devices", _COUNT, 1, "devices that share the hidden units")
    many = train.add_argument_group("several processes, on one machine or many")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    many.add_argument("--processes", type=_processes, metavar="N",
                      help="how many; auto on a TPU pod, under Slurm or Open MPI")  # fmt: skip
    many.add_argument("--process", type=_NATURAL, metavar="I", help="which one this is, from 0")
    train.set_defaults(run=_train)


def _add_sample(sample):
    from jaxrnn._training.sample_command import TEMPERATURE

    sample.add_argument("directory", metavar="RUN", help="what `jaxrnn train` left behind")
    sample.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: a new line)")
    _option(sample, "--length", _NATURAL, 500, "characters to generate")
    about = "below 1 is safer, above 1 wilder, 0 always the likeliest"
    _option(sample, "--temperature", _temperature, TEMPERATURE, about)
    _option(sample, "--seed", _SEED, 0, "of the random choices")
    sample.add_argument("--best", action="store_true",
                        help="of the checkpoint of least held-out loss, not the last")  # fmt: skip
    sample.set_defaults(run=_sample)


class _PrintCompletion(argparse.Action):
    """Prints a script for a shell, by shtab, which is looked for only then."""

    # What a shell offers for an argument.
    OFFERED: ClassVar = {
        "directory": "DIRECTORY", "out": "DIRECTORY", "resume": "DIRECTORY",
        "files": "FILE", "plot": "FILE",
    }  # fmt: skip

    def __call__(self, parser, namespace, values, option_string=None):
        import shtab

        for each in (parser, *_commands(parser)):
            for action in each._actions:
                if action.dest in self.OFFERED:
                    vars(action)["complete"] = getattr(shtab, self.OFFERED[action.dest])
        print(shtab.complete(parser, str(values)))
        parser.exit(0)


def _commands(parser):
    return [
        command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    ]


def _temperature(text: str) -> float:
    value = _NOT_NEGATIVE(text)
    if 0 < value < LEAST_TEMPERATURE:
        expected = f"0, or a number of at least {LEAST_TEMPERATURE}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def _named(text: str) -> str:
    if not text:  # of a variable of the shell that is not set
        raise argparse.ArgumentTypeError("expected a directory, got nothing")
    return text


def _processes(text: str) -> int | str:
    return text if text == "auto" else _COUNT(text)


def _option(parser, flag, kind, shown, text, **how) -> None:
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text, **how)
        return
    how = {"default": shown, **how}
    how |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
    parser.add_argument(flag, help=f"{text} (default: {shown})", **how)


def _example(args) -> int:
    from jaxrnn._console import Console
    from jaxrnn._example_report import run

    if args.plot is not None:
        import_module("matplotlib")  # missed now, not after all has been computed
    agrees = run(Console(), plot=args.plot)
    return 0 if agrees else EXIT_DIFFERENT


def _train(args) -> int:
    from jaxrnn._training.train_command import train

    named = [name for name in _TRAIN_OPTIONS if hasattr(args, name)]
    return train(args, {name: getattr(args, name) for name in named})


def _sample(args) -> int:
    from jaxrnn._training.sample_command import sample

    return sample(args)


def _show(args) -> int:
    from jaxrnn._training.show_command import show

    return show(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 1 where numbers disagree, the loss is no number, a file cannot be written in training or a
      process is gone; 2 for bad input, with one line on standard error; 130 where Ctrl-C ended
      training early, 143 where SIGTERM did, 129 where the terminal closed.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"jaxrnn {args.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT

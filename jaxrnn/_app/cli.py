"""The command line: `jaxrnn train`, `sample`, `show` and `example`, with their options and help."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import ClassVar, NoReturn

import jax

from jaxrnn import __version__
from jaxrnn._api.checks import InputError
from jaxrnn.text import LEAST_TEMPERATURE

EXIT_BAD_INPUT = 2
_NOTES = """
Exit codes: 0 for success; 1 if a loss is not a number, a number of the example disagrees, or
training meets a full disk, a closed output or a lost process; 2 for bad input, in one line; 130
after Ctrl-C, 143 after SIGTERM, 129 if the terminal was closed."""
_TRAIN_NOTES = """
The text, of any size, is encoded once into a memory-mapped file of ids and cut into --batch-size
streams, which are read --seq-length at a time, in order, over and over. The state carries over
between windows and gradients stop there (truncated BPTT). Only the initial weights are random.

A run directory holds config.json, text.json (the alphabet), ids.npy (the text), metrics.jsonl (a
line every 25 updates), checkpoints/ and loss.png. A checkpoint has all that changes: parameters,
optimiser state, carried state, place in the text, random key. It is saved, whole or not at all,
every --checkpoint-every updates, at the least held-out loss so far, at the end, on Ctrl-C and
SIGTERM, and if the terminal closes. The last three and the best are kept (sample --best). One
process at a time may train a run; sample and show may run beside it.

--resume continues from the last checkpoint: bit for bit on the same number of devices, to rounding
on another. Options come from the run; only --checkpoint-every and --skip-nonfinite may be changed,
and --model-devices, which is not saved: give it again. What is damaged or of another run, and a
full disk, is one line of error, and the files stay as they are.

An update that is not finite changes nothing and ends the run, with the step, the norms and the last
checkpoint in the message; with --skip-nonfinite it is counted and left out.

The batch is split over all devices, on a CPU over its cores. Several hosts and TPU pods:
python -m pydoc jaxrnn._app.devices"""


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text, width, indent):
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(super(_Help, self)._fill_text(p, width, indent) for p in paragraphs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message == "argument --prompt: expected one argument":
            message += "; a text that begins with a dash: --prompt=-x"
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number(kind: type, low: float, expected: str, below=math.inf, zero=False) -> Callable:
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < below or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


_COUNT = _number(int, 1, "a whole number, at least 1")
_NATURAL = _number(int, 0, "a whole number, at least 0")
_SEED = _number(int, 0, "a whole number from 0 to 2³² − 1", below=2**32)
_POSITIVE = _number(float, math.ulp(0), "a number above 0")
_NOT_NEGATIVE = _number(float, 0, "a number, at least 0")
_FRACTION = _number(float, math.ulp(0), "a fraction between 0 and 1", below=1)
_TEMPERATURE = _number(
    float, LEAST_TEMPERATURE, f"0, or a number of at least {LEAST_TEMPERATURE}", zero=True
)
_SOME = _number(int, 2, "a whole number, at least 2")  # all but the first are predicted


def _directory(text: str) -> str:
    if not text:  # an unset variable of the shell
        raise argparse.ArgumentTypeError("expected a directory, got nothing")
    return text


# group -> option -> (parser, or None for a choice; help)
_TRAIN = {
    "model": {
        "hidden_size": (_COUNT, "hidden units of a layer"),
        "layers": (_COUNT, "recurrent layers, each reading the outputs of the one before"),
        "activation": (None, "nonlinearity"),
        "recurrent": (None, "distribution of the initial W"),
    },
    "training": {
        "steps": (_COUNT, "updates"),
        "seq_length": (_COUNT, "characters in a window: how far gradients go back"),
        "batch_size": (_COUNT, "parallel streams of text"),
        "optimizer": (None, "from optax"),
        "learning_rate": (_POSITIVE, "initial value; decays to 0 as a cosine"),
        "grad_clip": (_NOT_NEGATIVE, "largest global norm of the gradient; 0: no limit"),
        "skip_nonfinite": (bool, "skip updates that are not finite, instead of ending"),
        "seed": (_SEED, "of the initial weights"),
    },
    "text": {
        "level": (None, "characters of UTF-8, or any bytes"),
        "held_out": (_FRACTION, "fraction at the end that is held out from training"),
        "eval_every": (_COUNT, "updates between evaluations on the held-out text"),
        "eval_length": (_SOME, "evaluate at most this many held-out characters"),
    },
    "run": {"checkpoint_every": (_COUNT, "updates between checkpoints")},
}


def make_parser() -> argparse.ArgumentParser:
    how = {"prog": "jaxrnn", "formatter_class": _Help, "epilog": _NOTES}
    parser = _Parser(description="Recurrent networks of one equation in JAX.", **how)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=("bash", "zsh", "tcsh"),
        metavar="SHELL", help="print a completion script for bash, zsh or tcsh",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser(
        "train", help="train a character network on text", usage="%(prog)s [options] [TEXT ...]",
        formatter_class=_Help, epilog=_TRAIN_NOTES,
    ))  # fmt: skip
    _add_sample(commands.add_parser("sample", help="generate text with a trained network"))
    show = commands.add_parser("show", help="print a run's options, progress and curves")
    show.add_argument("directory", metavar="RUN", help="run directory of `jaxrnn train`")
    example = commands.add_parser("example", help="reproduce the numbers of the worked example")
    example.add_argument("--plot", metavar="FILE.png", help="plot the loss curves of the ensemble")
    return parser


def _add_train(train):
    from jaxrnn._app.run import CHOICES, Config, flag

    groups = {title: train.add_argument_group(title) for title in _TRAIN}
    text, run = groups["text"], groups["run"]
    text.add_argument(
        "files", nargs="*", metavar="TEXT",
        help="files, directories, - for standard input (default: CPython's documentation)",
    )  # fmt: skip
    where = run.add_mutually_exclusive_group()
    about = "run directory (default: a new one in runs/)"
    where.add_argument("--out", metavar="RUN", type=_directory, help=about)
    about = "continue an interrupted run"
    where.add_argument("--resume", metavar="RUN", type=_directory, help=about)
    for title, options in _TRAIN.items():
        for name, (kind, about) in options.items():
            default = {field.name: field.default for field in fields(Config)}[name]
            # Absent unless named, because a resumed run has its own.
            _option(groups[title], flag(name), kind or CHOICES[name], default, about, absent=True)
    _option(run, "--sample-length", _NATURAL, 400, "characters to generate at the end")
    _option(run, "--model-devices", _COUNT, 1, "devices to split the hidden units over")
    many = train.add_argument_group("several processes, on one machine or many")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    many.add_argument(
        "--processes", type=lambda text: text if text == "auto" else _COUNT(text), metavar="N",
        help="number of processes; auto on a TPU pod, under Slurm or Open MPI",
    )  # fmt: skip
    many.add_argument("--process", type=_NATURAL, metavar="I", help="this process, from 0")


def _add_sample(sample):
    from jaxrnn._app.sample import TEMPERATURE

    sample.add_argument("directory", metavar="RUN", help="run directory of `jaxrnn train`")
    sample.add_argument("--prompt", metavar="TEXT", help="text to continue (default: a new line)")
    _option(sample, "--length", _NATURAL, 500, "characters to generate")
    about = "divides the logits; 0: always the most likely character"
    _option(sample, "--temperature", _TEMPERATURE, TEMPERATURE, about)
    _option(sample, "--seed", _SEED, 0, "of the sampling")
    about = "use the checkpoint of least held-out loss, not the last"
    sample.add_argument("--best", action="store_true", help=about)


def _option(parser, flag, kind, default, text, absent=False) -> None:
    how: dict = {"default": argparse.SUPPRESS if absent else default}
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text, **how)
        return
    how |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
    parser.add_argument(flag, help=f"{text} (default: {default})", **how)


class _PrintCompletion(argparse.Action):
    # What a shell offers for an argument.
    OFFERED: ClassVar = {
        **dict.fromkeys(("directory", "out", "resume"), "DIRECTORY"),
        **dict.fromkeys(("files", "plot"), "FILE"),
    }

    def __call__(self, parser, namespace, values, option_string=None):
        import shtab

        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for action in (a for command in commands.choices.values() for a in command._actions):
            if action.dest in self.OFFERED:
                vars(action)["complete"] = getattr(shtab, self.OFFERED[action.dest])
        print(shtab.complete(parser, str(values)))
        parser.exit(0)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one command; files may come before, between and after options."""
    parser = make_parser()
    args, others = parser.parse_known_args(argv)
    training = args.command == "train"
    end = others.index("--") if training and "--" in others else len(others)
    unknown = [word for word in others[:end] if not training or word[:1] == "-" != word]
    if unknown:
        short = training and unknown[0][:2] != "--"
        hint = f"; a file of that name: ./{unknown[0]}" if short else ""
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")
    if others:
        args.files += others[:end] + others[end + 1 :]
    return args


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command, the function of its name in the module of its name; return the exit code."""
    args = parse(argv)
    try:
        # A run must not depend on JAX's defaults, and optax needs standard promotion.
        with jax.threefry_partitionable(True), jax.numpy_dtype_promotion("standard"):
            return getattr(import_module(f"jaxrnn._app.{args.command}"), args.command)(args)
    except InputError as error:
        print(f"jaxrnn {args.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT

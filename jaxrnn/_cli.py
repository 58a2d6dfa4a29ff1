"""The command line: `jaxrnn example`, `jaxrnn train`, `jaxrnn sample`."""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from jaxrnn._checks import InputError

EXIT_DIFFERENT, EXIT_DIVERGED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 1, 2, 130
TEMPERATURE = 0.8
# Characters of held-out text that the closing sample reads first, and does not repeat.
SAMPLE_CONTEXT = 100


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
_POSITIVE = _number(float, math.ulp(0), "a number above 0")
_NOT_NEGATIVE = _number(float, 0, "a number, at least 0")

# option -> (how it is read, or its choices; what it says)
_TRAIN = {
    "hidden_size": (_COUNT, "hidden units of a layer"),
    "layers": (_COUNT, "recurrent layers, each on the states of the one before"),
    "seq_length": (_COUNT, "characters a window: how far gradients go back"),
    "batch_size": (_COUNT, "streams of text read side by side"),
    "steps": (_COUNT, "updates"),
    "learning_rate": (_POSITIVE, "at the start; decays to 0 as a cosine"),
    "grad_clip": (_NOT_NEGATIVE, "largest global norm of the gradient; 0 for no clipping"),
    "optimizer": (("adam", "adamw", "nadam", "rmsprop", "adagrad", "sgd"), "from optax"),
    "activation": (("tanh", "relu", "sigmoid", "identity"), "nonlinearity of the cell"),
    "recurrent": (("orthogonal", "identity", "normal", "uniform"), "how W is drawn"),
    "held_out": (
        _number(float, math.ulp(0), "a fraction between 0 and 1", below=1),
        "fraction of the text, at its end, that is not trained on",
    ),
    "eval_every": (_COUNT, "updates between evaluations on the held-out text"),
    "seed": (_NATURAL, "of the initial weights"),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    from jaxrnn._training.run import Config

    parser = _Parser(prog="jaxrnn", description="The Elman recurrent network in JAX.")
    parser.add_argument("--version", action="version", version=version("jaxrnn"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    example = commands.add_parser("example", help="the source's example beside its numbers")
    example.add_argument("--plot", metavar="FILE.png", help="draw the ensemble's loss curves")
    example.set_defaults(run=_example)

    train = commands.add_parser("train", help="train a character network on text")
    train.add_argument(
        "files", nargs="*", metavar="FILE", help="UTF-8 text; CPython's own documentation if none"
    )
    defaults = {field.name: field.default for field in fields(Config)}
    for name, (kind, text) in _TRAIN.items():
        _option(train, f"--{name.replace('_', '-')}", kind, defaults[name], text)
    train.add_argument("--out", metavar="RUN", help="run directory (default: a new one in runs/)")
    _option(train, "--sample-length", _NATURAL, 400, "characters to generate at the end")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="generate text with a trained network")
    sample.add_argument("directory", metavar="RUN", help="what `jaxrnn train` left behind")
    sample.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: a new line)")
    _option(sample, "--length", _NATURAL, 500, "characters to generate")
    about = "below 1 is safer, above 1 wilder, 0 always the likeliest"
    _option(sample, "--temperature", _NOT_NEGATIVE, TEMPERATURE, about)
    _option(sample, "--seed", _NATURAL, 0, "of the random choices")
    sample.set_defaults(run=_sample)
    return parser


def _option(parser, flag, kind, default, text) -> None:
    how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
    parser.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **how)


def _example(args) -> int:
    from jaxrnn._example_report import run

    if args.plot is not None:
        import_module("matplotlib")  # missed now, not after all has been computed
    agrees = run(Console(), plot=args.plot)
    return 0 if agrees else EXIT_DIFFERENT


def _train(args) -> int:
    from jaxrnn._training import checkpoints, devices, progress
    from jaxrnn._training import corpus as texts
    from jaxrnn._training import run as runs

    devices.make_cores_devices()
    import_module("orbax.checkpoint")  # missed now, not when the trained network is saved
    config = runs.Config(**{name: getattr(args, name) for name in _TRAIN})
    text, name = texts.read_text(args.files)
    corpus = texts.make_corpus(
        text, name,
        held_out=config.held_out, batch_size=config.batch_size, seq_length=config.seq_length,
    )  # fmt: skip
    out = Path(args.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    size, hidden = len(corpus.vocabulary), config.hidden_size
    above = (config.layers - 1) * hidden * (2 * hidden + 1)
    weights = hidden * (2 * size + hidden + 1) + above + size
    console.print(
        f"{corpus.name}: {len(corpus.train):,} characters, {len(corpus.held_out):,} more held out, "
        f"{size} distinct"
    )
    console.print(f"{weights:,} parameters, {config.steps:,} updates")
    references = corpus.references()
    lines = ", ".join(f"{name} {bits:.2f}" for name, bits in references.items())
    console.print(f"held-out bits per character for reference: {lines}")
    try:
        with progress.reporter(console, config.steps) as report:
            result = runs.run(corpus, config, out, report)
    except runs.DivergedError as error:
        print(f"jaxrnn train: error: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    if result.stopped:
        console.print(f"stopped at step {result.steps} of {config.steps}")
    console.print(f"held-out bits per character: {result.bits:.3f} ({result.seconds:.0f} s)")
    if args.sample_length:
        console.print(
            f"a sample, at temperature {TEMPERATURE}, from where the held-out text begins:"
        )
        params, vocabulary = result.state.params, corpus.vocabulary
        prompt = vocabulary.decode(corpus.held_out[:SAMPLE_CONTEXT])
        print(_generated(params, vocabulary, prompt, args.sample_length, TEMPERATURE, args.seed))
    rows = checkpoints.read_metrics(out)
    try:
        from jaxrnn._plots import plot_run

        plot_run(rows, references, out / "loss.png")
        console.print(f"loss curves: {out / 'loss.png'}")
    except ModuleNotFoundError:
        console.print("no loss curves: matplotlib is missing; pip install 'jaxrnn[plot]'")
    go_on = shlex.join(["jaxrnn", "sample", str(out), "--prompt", "TEXT"])
    console.print(f"run directory: {out}; go on with: {go_on}")
    return EXIT_INTERRUPTED if result.stopped else 0


def _sample(args) -> int:
    from jaxrnn._training import run

    state, vocabulary, _ = run.load(Path(args.directory))
    text = _generated(
        state.params, vocabulary, args.prompt, args.length, args.temperature, args.seed
    )
    print((args.prompt or "") + text)
    return 0


def _generated(params, vocabulary, prompt, length, temperature, seed) -> str:
    import jax

    from jaxrnn._sample import generate

    if not prompt:
        # Somewhere a text can begin: after a line break, if it has any.
        prompt = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    try:
        ids = vocabulary.encode(prompt)
    except ValueError as error:
        raise InputError(f"--prompt: {str(error).removeprefix('text: ')}") from error
    return vocabulary.decode(generate(params, jax.random.key(seed), ids, length, temperature))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 1 where numbers disagree or the loss is no number; 2 for bad input, with one line on
      standard error; 130 where Ctrl-C ended training early.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"jaxrnn {args.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT

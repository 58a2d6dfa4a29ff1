"""`jaxrnn train`: prepare a run directory, say what will be done, do it, show what came of it."""

import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxrnn import _checks
from jaxrnn._training import devices, directory, plan, processes, progress, saved
from jaxrnn._training.config import Config, go_on_with
from jaxrnn._training.corpus import Corpus, open_corpus
from jaxrnn._training.encode import Text, encode
from jaxrnn._training.lock import locked
from jaxrnn._training.run import FailedError, Run
from jaxrnn._training.sample_command import TEMPERATURE, stream
from jaxrnn._training.signals import SIGNALS, exit_code
from jaxrnn._training.sources import STANDARD_INPUT

EXIT_FAILED = 1
# Characters of held-out text that the closing sample reads first, and does not repeat.
SAMPLE_CONTEXT = 100


def train(args: Any, given: Mapping[str, Any]) -> int:
    """Run the command.

    Args:
      args: what was parsed: files, out, resume, sample_length, model_devices, coordinator,
        processes, process.
      given: the fields of `Config` that were named.

    Returns:
      The exit code.

    Raises:
      InputError: bad input; nothing is changed then.
    """
    several = args.coordinator is not None or args.processes is not None
    _check_processes(args, several)
    devices.make_cores_devices()
    import_module("orbax.checkpoint")  # missed now, not when the first checkpoint is saved
    if several:
        count = None if args.processes == "auto" else args.processes
        processes.join(args.coordinator, count, args.process)
    out = Path(args.resume or args.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=not processes.is_first())
    try:
        return _train(args, given, out, console)
    except (FailedError, processes.LostError) as error:
        print(f"jaxrnn train: error: {error}; {_go_on(out)}", file=sys.stderr, flush=True)
        if isinstance(error, processes.LostError):
            processes.leave(EXIT_FAILED)
        return EXIT_FAILED


def _check_processes(args, several):
    by_hand = (args.coordinator, args.processes, args.process)
    if several and args.processes != "auto" and None in by_hand:
        raise _checks.InputError(
            "--coordinator: expected --processes N and --process I with it, or --processes auto"
        )
    if several and not (args.out or args.resume):
        raise _checks.InputError("--out: expected a directory that all processes see, got none")
    if not several and args.process is not None:
        raise _checks.InputError("--process: expected --coordinator HOST:PORT with it")
    if isinstance(args.processes, int) and (args.process or 0) >= args.processes:
        expected = f"a number from 0 to {args.processes - 1}"
        raise _checks.InputError(f"--process: expected {expected}, got {args.process}")


def _train(args, given, out, console):
    with ExitStack() as held:
        problem, begun, options = None, (), None
        try:
            if processes.is_first():
                _prepare(args, given, out, console)
        except _checks.InputError as error:
            problem = error
        processes.wait_for_all("text")
        try:
            if problem is None:
                if processes.is_first():
                    held.enter_context(locked(out / directory.CONFIG))
                begun = _load(args, given, out)
                options = begun[0], args.model_devices
        except _checks.InputError as error:
            problem = error
        processes.agree(problem, options)
        return _run(args, out, console, *begun)


def _load(args, given, out):
    config = go_on_with(saved.read_begun(out).config, given, out)
    text, references = saved.read_text(out)
    corpus = _open(out, config, text)
    placement = devices.Placement(config.batch_size, config.hidden_size, args.model_devices)
    return config, text, references, corpus, placement


def _run(args, out, console, config, text, references, corpus, placement):
    run = Run(out, config, text, corpus, placement)
    if run.step == config.steps:
        result = run.result()
        console.print(
            f"{out} is finished: {result.step} updates, held-out bits per character: "
            f"{result.bits:.3f}"
        )
        return 0
    for line in plan.lines(config, corpus, placement):
        console.print(line)
    counted = ", ".join(f"{name} {bits:.2f}" for name, bits in references.items())
    console.print(f"held-out bits per character for reference: {counted}")
    if processes.are_several():
        console.print(
            f"if a process is lost the others end within {processes.HEARTBEAT} s; {_go_on(out)}"
        )
    if args.resume:
        console.print(f"going on from step {run.step} of {config.steps}")
    with progress.reporter(console, config.steps, run.step) as report:
        result = run.go(report)
    if result.signal:
        name = next(each.name for each in SIGNALS if each == result.signal)
        console.print(f"stopped by {name} at step {result.step} of {config.steps}; {_go_on(out)}")
        return exit_code(result.signal)
    console.print(f"held-out bits per character: {result.bits:.3f} ({result.seconds:.0f} s)")
    if processes.is_first():
        _show(args, out, corpus, config, references, console)
    return 0


def _prepare(args, given, out, console):
    """Make what a run needs before it begins: its directory, its options, its text as ids."""
    if args.resume:
        if args.files:
            raise _checks.InputError("--resume: expected no text beside it, the run has its own")
        begun = saved.read_begun(out)
        go_on_with(begun.config, given, out)
        if not (out / directory.TEXT).exists():
            _encode(begun, out, console)
        return
    sources = [f if f == STANDARD_INPUT else str(Path(f).absolute()) for f in args.files]
    begun = saved.Begun(Config(**given), sources)
    with directory.claimed(out, begun.as_json()):
        _encode(begun, out, console, args.files)


def _encode(begun, out, console, names=None):
    config = begun.config
    if names is None and STANDARD_INPUT in begun.sources:
        raise _checks.InputError(f"{out}: its text came from standard input, which is gone")
    with progress.of_bytes(console, "encoding") as report:
        text = encode(
            begun.sources if names is None else names, config.level, out / directory.IDS, report
        )
    corpus = _open(out, config, text)
    about = {"text": saved.text_as_json(text), "references": corpus.references()}
    directory.write_json(out / directory.TEXT, about)


def _open(out: Path, config: Config, text: Text) -> Corpus:
    return open_corpus(
        out / directory.IDS, text,
        held_out=config.held_out, batch_size=config.batch_size, seq_length=config.seq_length,
        evaluated=config.eval_length,
    )  # fmt: skip


def _show(args, out, corpus, config, references, console):
    if args.sample_length and not processes.are_several():
        console.print(
            f"a sample, at temperature {TEMPERATURE}, from where the held-out text begins:"
        )
        state, *_ = saved.load(out)
        stream(
            state.params, corpus.vocabulary, corpus.level, corpus.held_out[:SAMPLE_CONTEXT],
            args.sample_length, TEMPERATURE, config.seed,
        )  # fmt: skip
    try:
        from jaxrnn._plots import plot_run

        plot_run(directory.read_metrics(out), references, out / "loss.png")
        console.print(f"loss curves: {out / 'loss.png'}")
    except ModuleNotFoundError:
        console.print("no loss curves: matplotlib is missing; pip install 'jaxrnn[plot]'")
    sample = shlex.join(["jaxrnn", "sample", str(out), "--prompt", "TEXT"])
    console.print(f"run directory: {out}; go on with: {sample}")


def _go_on(out):
    return f"to go on: {shlex.join(['jaxrnn', 'train', '--resume', str(out)])}"

"""`jaxrnn train`: prepare a run directory, say what will be done, do it, show what came of it."""

import os
import shlex
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from typing import Any

from jaxrnn._api import checks
from jaxrnn._console import Console
from jaxrnn._training import devices, directory, kept, plan, processes, progress, saved
from jaxrnn._training.config import flag
from jaxrnn._training.levels import UNITS
from jaxrnn._training.prepare import Asked, make_ready
from jaxrnn._training.run import FailedError, Run
from jaxrnn._training.sample_command import TEMPERATURE, stream
from jaxrnn._training.show_command import picture
from jaxrnn._training.signals import SIGNALS, exit_code

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
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
      InputError: bad input; nothing is changed then. (Of several processes the first one may have
        begun the run already when another refuses.)
    """
    several = args.coordinator is not None or args.processes is not None
    _check_processes(args, several)
    devices.make_cores_devices()
    import_module("orbax.checkpoint")  # missed now, not when the first checkpoint is saved
    if several:
        number = None if args.processes == "auto" else args.processes
        processes.join(args.coordinator, number, args.process)
    resume = args.resume is not None
    out = Path(args.resume if resume else args.out or _new_place())
    asked = Asked(out, resume, args.files, given, args.model_devices)
    console = Console(soft_wrap=True, quiet=not processes.is_first())
    try:
        with ExitStack() as held:
            return _run(asked, make_ready(asked, console, held), console, args.sample_length)
    except processes.RefusedError:
        raise
    except (FailedError, processes.LostError) as error:
        processes.complain(f"{error}; {_last(asked.out)}; {_go_on(asked)}")
        code = EXIT_FAILED
    except BaseException as error:
        if not processes.are_several():
            raise
        code = _end_of_one(error)
    if processes.are_several():
        processes.leave(code)
    return code


def _new_place():
    name = time.strftime("runs/%Y%m%d-%H%M%S")
    names = chain([name], (f"{name}-{n}" for n in count(2)))
    return next(name for name in names if not os.path.exists(name))


def _end_of_one(error):
    """What one of several processes says, and its exit code, where the others know nothing."""
    if isinstance(error, checks.InputError):
        processes.complain(error)
        return EXIT_BAD_INPUT
    if isinstance(error, OSError):
        where = error.filename or "standard output"
        processes.complain(f"{where}: cannot be written: {error.strerror}")
        return EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return exit_code(signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    traceback.print_exception(error)
    return EXIT_FAILED


def _check_processes(args, several):
    by_hand = (args.coordinator, args.processes, args.process)
    if several and args.processes != "auto" and None in by_hand:
        raise checks.InputError(
            "--coordinator: expected --processes N and --process I with it, or --processes auto"
        )
    if several and not (args.out or args.resume):
        raise checks.InputError("--out: expected a directory that all processes see, got none")
    if not several and args.process is not None:
        raise checks.InputError("--process: expected --coordinator HOST:PORT with it")
    if isinstance(args.processes, int) and (args.process or 0) >= args.processes:
        expected = f"a number from 0 to {args.processes - 1}"
        raise checks.InputError(f"--process: expected {expected}, got {args.process}")


def _run(asked, ready, console, sample_length):
    out, config, corpus = asked.out, ready.config, ready.corpus
    unit = UNITS[config.level]
    run = Run(out, config, ready.text, corpus, ready.placement)
    if run.step == config.steps:
        result = run.result()
        console.print(
            f"{out} is finished: {result.step} updates, held-out bits per {unit}: {result.bits:.3f}"
        )
        return 0
    for line in plan.lines(config, corpus, ready.placement):
        console.print(line)
    counted = ", ".join(f"{name} {bits:.2f}" for name, bits in ready.references.items())
    console.print(f"held-out bits per {unit} for reference: {counted}")
    if processes.are_several():
        console.print(
            f"if a process is lost the others end within {processes.HEARTBEAT} s; {_go_on(asked)}"
        )
    if asked.resume:
        console.print(f"going on from step {run.step} of {config.steps}")
    result = None
    try:
        with progress.reporter(console, config.steps, run.step, config.level) as report:
            result = run.go(report)
    except OSError:
        if result is None or not result.signal:
            raise
    if result.signal:
        name = next(each.name for each in SIGNALS if each == result.signal)
        stopped = f"stopped by {name} at step {result.step} of {config.steps}"
        with suppress(OSError):  # the terminal may be what has gone
            console.print(f"{stopped}; {_go_on(asked)}")
        return exit_code(result.signal)
    console.print(f"held-out bits per {unit}: {result.bits:.3f} ({result.seconds:.0f} s)")
    if processes.is_first():
        _show(out, ready, console, 0 if processes.are_several() else sample_length)
    return 0


def _show(out, ready, console, sample_length):
    corpus, unit = ready.corpus, UNITS[ready.config.level]
    if sample_length:
        console.print(
            f"a sample, at temperature {TEMPERATURE}, from where the held-out text begins:"
        )
        state, *_ = saved.load(out)
        stream(
            state.params, corpus.vocabulary, corpus.level, corpus.held_out[:SAMPLE_CONTEXT],
            sample_length, TEMPERATURE, ready.config.seed,
        )  # fmt: skip
    console.print(picture(out, directory.read_metrics(out), ready.references, unit))
    sample = shlex.join(["jaxrnn", "sample", str(out), "--prompt", "TEXT"])
    console.print(f"run directory: {out}; go on with: {sample}")


def _last(out):
    steps = kept.steps(out)
    if not steps:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {out / kept.FOLDER / str(steps[-1])}"


def _go_on(asked):
    """How to go on with the same numbers."""
    words = ["jaxrnn", "train", "--resume", str(asked.out)]
    if asked.model_devices > 1:
        words += ["--model-devices", str(asked.model_devices)]
    if asked.resume:  # else the run has them
        for name, value in asked.given.items():
            words += [flag(name)] if value is True else [flag(name), str(value)]
    return f"to go on: {shlex.join(words)}"

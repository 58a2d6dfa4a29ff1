"""`jaxrnn train`: prepare a run directory, print the plan, train, and show the results."""

import math
import shlex
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, fields
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import jax

from jaxrnn._api.checks import InputError
from jaxrnn._app import devices, directory, terminal
from jaxrnn._app import run as runs
from jaxrnn._app.checkpoints import FailedError
from jaxrnn._app.corpus import STANDARD_INPUT, UNITS, encode, open_corpus
from jaxrnn._app.devices import LostError, Placement, RefusedError, complain
from jaxrnn._app.run import Config, Run
from jaxrnn._app.sample import TEMPERATURE, stream
from jaxrnn._app.show import picture
from jaxrnn._app.terminal import Console

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
SAMPLE_CONTEXT = 100  # characters of held-out text that the closing sample reads first


def train(args: Any) -> int:
    """Run the command. Bad input leaves no files, unless only another process has it."""
    several = devices.check_processes(args)
    import_module("orbax.checkpoint")  # fails now, not at the first checkpoint
    devices.use_cores()
    if several:
        number = None if args.processes == "auto" else args.processes
        devices.join(args.coordinator, number, args.process)
    devices.start()
    args.given = {f.name: vars(args)[f.name] for f in fields(Config) if f.name in args}
    named: Any = args.resume or args.out
    args.out = named and Path(named)
    console = Console(soft_wrap=True, quiet=not devices.is_first())
    try:
        with ExitStack() as held:
            run, references = _make_ready(args, console, held)
            return _run(args, Run(*run), references, console)
    except RefusedError:
        raise
    except (FailedError, LostError) as error:
        steps = directory.checkpoint_steps(args.out)
        newest = steps and args.out / directory.CHECKPOINTS / str(steps[-1])
        last = f"the last checkpoint is {newest}" if steps else "there is no checkpoint yet"
        complain(f"{error}; {last}; {_go_on(args)}")
        code = EXIT_FAILED
    except BaseException as error:
        if not devices.are_several():
            raise
        code = _end_of_one(error)
    if devices.are_several():
        devices.leave(code)
    return code


def _end_of_one(error):
    """The exit code of one of several processes after an error that the others do not have."""
    if isinstance(error, InputError):
        complain(error)
        return EXIT_BAD_INPUT
    if isinstance(error, OSError):
        complain(f"{error.filename or 'standard output'}: cannot be written: {error.strerror}")
        return EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    traceback.print_exception(error)
    return EXIT_FAILED


def _make_ready(args: Any, console: Console, held: ExitStack) -> Any:
    """(the arguments of `Run`, reference losses): prepared by the first process, read by all."""
    problem, ready, alike = None, None, {}
    with ExitStack() as marked:
        try:
            if devices.is_first():
                with devices.handled(devices.raising):
                    _prepare(args, console, held)
                if devices.are_several():
                    marked.enter_context(directory.marked(args.out))
        except InputError as error:
            problem = error
        devices.wait_for_all("text")
        try:
            if problem is None:
                ready, alike = _read(args)
        except InputError as error:
            problem = error
        devices.agree(problem, alike)
    return ready


def _prepare(args, console, held):
    """Create or lock the run directory, and encode its text."""
    if args.resume:
        if args.files:
            raise InputError("--resume: expected no text beside it, the run has its own")
        config, sources = runs.read_begun(args.out)
        runs.go_on_with(config, args.given, args.out)
        held.enter_context(directory.locked(args.out))
        # With checkpoints, the text is the one they were trained on, and must not be replaced.
        has_text = (args.out / directory.TEXT).exists()
        if not has_text and not directory.checkpoint_steps(args.out):
            if STANDARD_INPUT in sources:
                gone = "standard input, which is gone; start a new run"
                raise InputError(f"{args.out}: its text came from {gone}")
            _encode(config, args.out, console, sources)
        return
    config = Config(**args.given)
    sources = [f if f == STANDARD_INPUT else str(Path(f).absolute()) for f in args.files]
    about = {"sources": sources, "options": asdict(config)}
    # Before the directory exists, check that the run can be split.
    Placement(config.batch_size, config.hidden_size, args.model_devices)
    name = time.strftime("runs/%Y%m%d-%H%M%S")
    for n in count(1):
        out = args.out or Path(name if n == 1 else f"{name}-{n}")
        try:
            with directory.claimed(out, about, held):
                args.out = out
                _encode(config, out, console, args.files)
            return
        except directory.TakenError:  # by a run that began in the same second
            if args.out is not None:
                raise


def _encode(config, out, console, names):
    with console.status("reading the text") if console.is_terminal else nullcontext():
        text = encode(names, config.level, out / directory.IDS)
    about = {"text": runs.text_as_json(text), "references": _open(out, config, text).references()}
    directory.write(out / directory.TEXT, about)


def _read(args):
    """The result of `_make_ready`, and what all processes must have alike, by error message."""
    out = args.out
    config = runs.go_on_with(runs.read_begun(out)[0], args.given, out)
    text, references = runs.read_text(out)
    # Only a resumed run can find another text than it wrote.
    corpus = _open(out, config, text, verify=args.resume and devices.is_first())
    placement = Placement(config.batch_size, config.hidden_size, args.model_devices)
    alike = {
        "--out: expected a directory that all processes see": directory.read_mark(out),
        "--process: expected the same options in all processes": (config, args.model_devices),
        "--resume: expected the same newest checkpoint": directory.checkpoint_steps(out)[-1:],
    }
    return ((out, config, corpus, placement), references), alike


def _open(out, config, text, verify=False):
    return open_corpus(
        out / directory.IDS, text,
        held_out=config.held_out, batch_size=config.batch_size, seq_length=config.seq_length,
        evaluated=config.eval_length, verify=verify,
    )  # fmt: skip


def _plan(args: Any, run: Run, references: dict[str, float]) -> Iterator[str]:
    config, corpus, text = run.config, run.corpus, run.corpus.text
    unit, length = UNITS[text.level], len(corpus.train)
    alphabet = "" if text.level == "byte" else f", {len(text.characters)} distinct"
    yield f"{text.name}: {length:,} {unit}s, {text.length - length:,} more held out{alphabet}"
    shapes = jax.eval_shape(lambda: runs.initial_state(config, len(text.characters)))
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    times = config.steps * config.batch_size * config.seq_length / length
    window = f"{config.batch_size} × {config.seq_length} {unit}s"
    updates = f"{config.steps:,} updates of {window}: the text {times:.3g} times"
    yield f"{weights:,} parameters, {updates}"
    yield str(run.placement)
    counted = ", ".join(f"{name} {bits:.2f}" for name, bits in references.items())
    yield f"held-out bits per {unit} for reference: {counted}"
    if devices.are_several():
        lost = f"if a process is lost the others end within {devices.HEARTBEAT} s"
        yield f"{lost}; {_go_on(args)}"
    if args.resume:
        yield f"continuing from step {run.step} of {config.steps}"


def _run(args, run, references, console):
    config, unit = run.config, UNITS[run.config.level]
    if run.step == config.steps:
        bits = f"held-out bits per {unit}: {run.bits:.3f}"
        console.print(f"{run.out} is finished: {run.step} updates, {bits}")
        return 0
    for line in _plan(args, run, references):
        console.print(line)
    ended = 0
    try:
        with terminal.reporter(console, config.steps, run.step, config.level) as report:
            ended = run.go(report)
    except OSError:  # of the progress bar, if its terminal has closed
        if not ended:
            raise
    if ended:
        stopped = f"stopped by {signal.Signals(ended).name} at step {run.step} of {config.steps}"
        with suppress(OSError):
            console.print(f"{stopped}; {_go_on(args)}")
        return 128 + ended
    console.print(f"held-out bits per {unit}: {run.bits:.3f} ({run.seconds:.0f} s)")
    if devices.is_first():
        _show(run, references, console, 0 if devices.are_several() else args.sample_length)
    return 0


def _show(run, references, console, sample_length):
    out, text = run.out, run.corpus.text
    if sample_length:
        where = "continuing the start of the held-out text"
        console.print(f"a sample at temperature {TEMPERATURE}, {where}:")
        stream(
            runs.load(out)[0].params, run.corpus.vocabulary, text.level,
            run.corpus.held_out[:SAMPLE_CONTEXT], sample_length, TEMPERATURE, run.config.seed,
        )  # fmt: skip
    console.print(picture(out, directory.read_metrics(out), references, UNITS[text.level]))
    sample = shlex.join(["jaxrnn", "sample", str(out), "--prompt", "TEXT"])
    console.print(f"run directory: {out}; to sample from it: {sample}")


def _go_on(args):
    words = ["jaxrnn", "train", "--resume", str(args.out)]
    if args.model_devices > 1:
        words += ["--model-devices", str(args.model_devices)]
    if args.resume:  # a new run has saved its options
        for name, value in args.given.items():
            words += [runs.flag(name)] if value is True else [runs.flag(name), str(value)]
    return f"to continue: {shlex.join(words)}"

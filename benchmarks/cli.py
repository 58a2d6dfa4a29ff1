"""The command line: `python -m benchmarks [run]`, `first`, `report`, `sweep`, `tune`."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import machine, results
from benchmarks.measures import MEASURES

EXIT_FAILED_ROWS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
RESULTS = Path(__file__).parent / "results"
COMMANDS = ("run", "first", "report", "sweep", "tune")


class InputError(Exception):
    """Bad input; the message says in one line what was expected."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text}")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number, at least 0, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands but `tune`, which has its own."""
    prog = "python -m benchmarks"
    about = f"How fast jaxrnn is. {' | '.join(COMMANDS)}; `run` if none is named."
    parser = _Parser(prog=prog, description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="measure, save and report (an hour or more; see --quick; on a GPU eight minutes)",
        description=about,
    )
    run.add_argument("--quick", action="store_true", help="the most telling part, in two minutes")
    run.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="(default: cpu)")
    for name, what in (("workload", "workload"), ("subject", "subject"), ("measure", "measure")):
        run.add_argument(f"--{name}", action="append", metavar="NAME", help=f"only that {what}; "
                         "may be repeated")  # fmt: skip
    run.add_argument("--rows", choices=("old", "new"), help="only workloads of one tanh layer, or "
                     "only those of other networks, dtypes and batches")  # fmt: skip
    run.add_argument("--rounds", type=_count, metavar="N", help="at most so many (default: 15)")
    run.add_argument("--compiles", type=_count, metavar="N", help="how often each program is "
                     "compiled (default: 3)")  # fmt: skip
    run.add_argument(
        "--budget", type=_number, metavar="SECONDS",
        help="for the rounds of one measure of a workload, five rounds at least (default: 25)",
    )  # fmt: skip
    run.set_defaults(go=_run)

    first = commands.add_parser(
        "first", help="the first minutes on a GPU of the Hopper generation: are the kernels exact "
        "and fast, the most telling first",
    )  # fmt: skip
    first.set_defaults(go=_first, device="gpu")
    for command, most in ((run, "none; on a GPU 8"), (first, "5.7")):
        command.add_argument("--minutes", type=_number, metavar="N", help="the run is over by then "
                             f"(default: {most})")  # fmt: skip
        command.add_argument("--dry", action="store_true", help="rehearse a run on a GPU: tiny, on "
                             "the CPU, kernels interpreted")  # fmt: skip

    sweep = commands.add_parser("sweep", help="how time and memory grow with T, B and H")
    sweep.set_defaults(go=_sweep)
    for command in (run, first, sweep):
        command.add_argument("--out", metavar="PATH", help="a file that ends in .json, or a "
                             "directory (default: in benchmarks/results/)")  # fmt: skip
        command.add_argument("--force", action="store_true", help="overwrite a file of that name")

    report = commands.add_parser("report", help="the tables and the picture of a run, or the best "
                                 "and the worst of several")  # fmt: skip
    report.add_argument("files", metavar="FILE", nargs="+", help="what a run has saved; of several "
                        "the ratio to the naive scan is shown")  # fmt: skip
    report.add_argument("--markdown", action="store_true", help="for a README")
    report.add_argument("--plot", metavar="FILE.png", help="draw ratios and scaling curves")
    report.set_defaults(go=_report)
    commands.add_parser("tune", help="measure what the library's choices rest on")
    return parser


def _run(args: argparse.Namespace) -> int:
    from benchmarks.catalogue import listed
    from benchmarks.plans import FULL, GPU, QUICK
    from benchmarks.workloads import is_new

    plan = QUICK if args.quick else FULL
    if args.device == "gpu":
        plan = replace(GPU, minutes=QUICK.minutes) if args.quick else GPU
    elif args.dry:
        raise InputError("--dry rehearses a run on a GPU: it needs --device gpu")
    steps = plan.steps if args.device == "gpu" else FULL.steps
    subjects = listed(args.device, args.quick and args.subject is None)
    known = {
        "workload": list(dict.fromkeys(step.workload.name for step in steps)),
        "measure": list(plan.measures if args.device == "gpu" else MEASURES),
        "subject": [s.name for s in subjects],
    }
    for option, names in known.items():
        for name in getattr(args, option) or ():
            if name not in names:
                known_ones = ", ".join(map(repr, names))
                raise InputError(f"--{option}: no {name!r}; there are {known_ones}")
    chosen = any((args.workload, args.subject, args.measure, args.rows))
    plan = replace(plan, sweeps=plan.sweeps and not chosen)
    if args.workload:
        plan = replace(plan, steps=tuple(s for s in steps if s.workload.name in args.workload))
    if args.rows:
        of_them = [s for s in plan.steps if is_new(s.workload) == (args.rows == "new")]
        plan = replace(plan, steps=tuple(of_them))
    if args.measure:
        plan = plan.only([measure for measure in MEASURES if measure in args.measure])
    if not plan.steps:
        raise InputError("expected options that some workload fits, got none that fits all")
    plan = plan.limited(partial(_limits, args))
    if args.subject:
        subjects = [s for s in subjects if s.name in args.subject]
    label = "-quick" if args.quick else "-part" if chosen else ""
    return _measure(args, plan, subjects, label)


def _limits(args: argparse.Namespace, limits: Any) -> Any:
    """What the options make of them."""
    if args.rounds is not None:
        limits = replace(limits, most=args.rounds, least=min(limits.least, args.rounds))
    if args.compiles is not None:
        limits = replace(limits, compiles=args.compiles)
    return limits if args.budget is None else replace(limits, budget=args.budget)


def _first(args: argparse.Namespace) -> int:
    from benchmarks.catalogue import listed
    from benchmarks.plans import FIRST

    bases = {base for step in FIRST.steps for base in step.bases or ()}
    subjects = [subject for subject in listed("gpu") if subject.base in bases]
    return _measure(args, FIRST, subjects, "-first")


def _sweep(args: argparse.Namespace) -> int:
    from benchmarks import sweeps
    from benchmarks.catalogue import listed
    from benchmarks.plans import FULL

    subjects = [s for s in listed("cpu") if s.name in sweeps.SUBJECTS]
    args.device = "cpu"
    return _measure(args, replace(FULL, steps=()), subjects, "-sweep")


def _measure(args: argparse.Namespace, plan: Any, subjects: list, label: str) -> int:
    from rich.console import Console

    from benchmarks import dry, report
    from benchmarks.progress import reporter
    from benchmarks.run import NoDeviceError, describe_workers, run
    from benchmarks.workers import Crew, TimeIsUpError, Worker

    started = time.monotonic()
    names = ("quick", "device", "rows", "workload", "subject", "measure", "rounds", "compiles",
             "budget", "minutes", "dry")  # fmt: skip
    options = {name: getattr(args, name, None) for name in names}
    minutes, rehearsed = options["minutes"], bool(options["dry"])
    plan = plan if minutes is None else replace(plan, minutes=minutes)
    plan = dry.rehearsal(plan) if rehearsed else plan
    until = None if plan.minutes is None else started + 60 * plan.minutes
    on_gpu = args.device == "gpu"
    versions = machine.gpu_versions() if on_gpu else machine.versions()
    document = results.new(machine.device(), versions, options)
    console, path, ended = Console(stderr=True), None, None
    crew = Crew(args.device, dry.make_worker if rehearsed else Worker, until=until)
    try:
        with _heeding_sigterm(), crew, reporter(console, plan.units(), on_gpu) as tell:
            if on_gpu:
                there = {name: found for name, found in versions.items() if found}
                tell.note(", ".join(f"{name} {found}" for name, found in there.items()))
            crew.start(dict.fromkeys(subject.kind for subject in subjects))
            describe_workers(crew, subjects, args.device, document)
            path = results.new_path(_wanted(args, document, label), args.force)
            results.check_writable(path)
            if on_gpu:
                tell.note(f"{document['device']['gpu']} found; results go to {path}")
            run(crew, plan, document, tell, lambda: results.write(document, path))
    except NoDeviceError as error:
        raise InputError(f"--device {args.device}: {error}") from error
    except TimeIsUpError as error:
        raise InputError("--minutes: the time was up before a worker had started") from error
    except OSError as error:
        raise InputError(f"cannot write the results: {error}") from error
    except KeyboardInterrupt as error:
        ended = EXIT_TERMINATED if isinstance(error, TerminatedError) else EXIT_INTERRUPTED
    measured = results.measured(document)
    if ended is None or (on_gpu and measured):
        report.show(document, _paper(), costs=False)
    took = time.monotonic() - started
    if ended is not None:
        kept = f"; what was measured is in {path}" if measured else ""
        print(f"stopped after {took:.0f} s{kept}", file=sys.stderr)
        return ended
    timed = sum("seconds" in row for row in document["rows"])
    print(f"{timed} rows in {took:.0f} s; all tables: python -m benchmarks report {path}")
    failed = any(row["status"] == "failed" for row in document["rows"] + document["sweeps"])
    return EXIT_FAILED_ROWS if failed else 0


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does: schedulers send it when a job's time is up."""

    def terminate(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was measured is being kept
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wanted(args: argparse.Namespace, document: dict[str, Any], label: str) -> Path:
    if args.out and args.out.endswith(".json"):
        return Path(args.out)
    name = f"{document['date']}{label}.json"
    if args.out:
        return Path(args.out) / name
    if document["options"]["dry"]:
        return Path(tempfile.mkdtemp()) / name
    return RESULTS / machine.slug(document["device"]) / name


def _paper() -> Any:
    """Where tables are printed: wide enough for them where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=220)


def _report(args: argparse.Namespace) -> int:
    from benchmarks import report, runs, tables

    try:
        documents = [results.read(Path(file)) for file in args.files]
    except results.ResultsError as error:
        raise InputError(str(error)) from error
    document = documents[0]
    if len(documents) > 1:
        if args.plot:
            raise InputError("--plot: expected one FILE")
        for table in runs.all_tables(documents):
            if args.markdown:
                print(f"{tables.markdown(table)}\n")
            else:
                tables.show(table, _paper())
        return 0
    if args.markdown:
        print(report.markdown(document))
    else:
        report.show(document, _paper())
    if args.plot:
        from benchmarks.picture import plot

        plot(document, Path(args.plot))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: its arguments; by default those of the process.

    Returns:
      0; 1 where a row failed; 2 for bad input, with one line on standard error; 130 after
      Ctrl-C, 143 after SIGTERM, both of which keep what was measured.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["tune"]:
        from benchmarks.tune import main as tune

        return tune(arguments[1:])
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["run", *arguments]
    args = make_parser().parse_args(arguments)
    try:
        return args.go(args)
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        print(f"benchmarks: error: {name} is missing: pip install '.[bench]'", file=sys.stderr)
    return EXIT_BAD_INPUT
